"""Makes the small checkpoint in tiny/: its voices, its training, and data to test it.

    python tools/make_tiny.py bank BANK
    python tools/make_tiny.py train BANK OUT

OUT becomes a checkpoint folder in the released layout, written every minute; OUT/training has the
log, and the state from which the same command goes on. The commands bank and words need speech
engines, whose packages tools/voices.py names.
"""

import argparse
import copy
import difflib
import functools
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import compose
from common import Example, load_state, random_model, save_state, say, whole, write_text
from compose import DESCRIBE, PLAIN, SOUNDS, STAMPS, WORDS
from encoder import HOP, SAMPLE_RATE, count_tokens, log_mel, mel_spectrum, require
from evaluate import Word, edit_distance, read_data, score, stamped_words
from moss_min import TINY, MossAudio, Parser, end, load_tokenizer, pick_device
from train import IGNORE, copy_all_but_weights, learned_ids, save_checkpoint
from voices import ENGINES, Bank, Clip, Heard, make_bank, retime

# Classes 1 and up of what hears; 0 is CTC's blank, and a frame in which nothing is heard.
NAMES = [*WORDS, *SOUNDS]

# ---- the folder: configuration and tokenizer ----
QWEN3 = Path(__file__).resolve().parents[1] / "tests" / "qwen3_tokenizer"
# What the tokenizer has to cut as Qwen3's does.
TEXTS = [
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
    *(f"\n{prompt}" for prompt in (PLAIN, STAMPS, DESCRIBE)),
    "There is silence.",
    "(silence)",
    'A voice says "',
    *SOUNDS,
    " at 1.0 seconds. A",
    *WORDS,
    *(f" {word}" for word in WORDS),
]


def find_merges(piece: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Returns the merges that BPE makes of a piece of text, the one of the lowest rank first."""
    parts = list(piece)
    merges = []
    while True:
        pairs = list(zip(parts, parts[1:]))
        best = min(pairs, key=lambda pair: ranks.get(pair, math.inf), default=None)
        if best not in ranks:
            return merges
        merges.append(best)
        i = pairs.index(best)
        parts[i : i + 2] = ["".join(best)]


def cut_tokenizer(source: Path) -> tuple[dict[str, int], list[str]]:
    """Returns vocabulary and merges: of Qwen3's tokenizer the bytes, with their own ids, and the
    merges that TEXTS need, in its order."""
    vocab = json.loads((source / "vocab.json").read_text("utf-8"))
    lines = (source / "merges.txt").read_text("utf-8").splitlines()
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(lines) if " " in line}
    split = load_tokenizer(source).pre_tokenizer
    used = set()
    for text in TEXTS:
        for piece, _ in split.pre_tokenize_str(text):
            used.update(find_merges(piece, ranks))
    merges = sorted(used, key=ranks.get)
    tokens = sorted(vocab, key=vocab.get)[:256] + ["".join(pair) for pair in merges]
    return {token: i for i, token in enumerate(tokens)}, [" ".join(pair) for pair in merges]


def write_folder(folder: Path, time_markers: bool, deepstack: bool) -> None:
    """Writes a checkpoint but for its weights: the files and sizes are those in tiny/, the tokens
    those that TEXTS need."""
    copy_all_but_weights(TINY, folder)
    vocab, merges = cut_tokenizer(QWEN3)
    files = {path.stem: json.loads(path.read_text("utf-8")) for path in TINY.glob("*.json")}
    ids = {token: len(vocab) + i for i, token in enumerate(files["added_tokens"])}
    bounds = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    taps = [0, 1, 2] if deepstack else []

    config = files["config"]
    config.update(bounds, vocab_size=len(vocab) + len(ids), deepstack_num_inject_layers=len(taps))
    config["audio_config"].update(deepstack_encoder_layer_indexes=taps)
    config["language_config"].update(bounds, vocab_size=len(vocab) + len(ids))
    files["generation_config"].update(bounds)
    processor = files["processor_config"]
    processor.update(enable_time_marker=time_markers, audio_token_id=ids["<|vision_pad|>"])
    processor.update(audio_start_id=ids["<|audio_bos|>"], audio_end_id=ids["<|audio_eos|>"])
    added = files["tokenizer_config"]["added_tokens_decoder"].values()
    added = {str(ids[token["content"]]): token for token in added}
    files["tokenizer_config"]["added_tokens_decoder"] = added
    files["added_tokens"] = ids
    files["vocab"] = vocab
    for name, data in files.items():
        indent = None if name == "vocab" else 2
        text = json.dumps(data, indent=indent, ensure_ascii=False)
        write_text(text + "\n", folder / f"{name}.json")
    write_text("\n".join(["#version: 0.2", *merges]) + "\n", folder / "merges.txt")


# ---- stages ----
class Stage(NamedTuple):
    """A part of the training: steps first to end - 1, at a rate that stays at its peak for half of
    them. Until then no step depends on end: from a saved state, a stage can be made longer."""

    number: int  # 0: the encoder alone; 1: the whole model
    first: int
    end: int
    peak: float
    least: float  # the rate's share at the end

    def rate(self, step: int) -> float:
        """Returns the learning rate: a short warm-up, the peak, then half a cosine."""
        done = (step - self.first) / (self.end - self.first)
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, 2 * done - 1))
        warm = min(1, (1 + step - self.first) / 60)
        return self.peak * warm * (self.least + (1 - self.least) * cosine)


def make_stages(args: argparse.Namespace) -> list[Stage]:
    if args.start:
        whole = args.markers and args.deepstack
        require(whole, "--start: the checkpoint decides on time markers and DeepStack")
        return [Stage(1, 0, args.steps, 1e-3, 0)]
    require(0 < args.alone < args.steps, "expected --alone to be above 0 and below --steps")
    alone = Stage(0, 0, args.alone, 2.5e-3, 0.1)
    return [alone, Stage(1, args.alone, args.steps, 2e-3, 0)]


# ---- batches ----
class Lesson(NamedTuple):
    """What training has of a clip."""

    mel: Tensor  # bfloat16 [128, T]
    heard: list[Heard]
    questions: list[tuple[str, str]]  # prompts and answers


def draw_lesson(bank: Bank, rng: np.random.Generator, frames: int) -> Lesson:
    """Draws a clip of so many mel frames, and questions about it."""
    seconds = frames * HOP / SAMPLE_RATE
    speed = rng.choice([1, rng.uniform(0.87, 1.18)])
    clip = compose.compose(bank, rng, seconds * speed, None)
    wave = compose.degrade(clip.wave, rng, telephone=rng.random() < 0.4)
    mel = compose.warp_mel(mel_spectrum(wave), frames, rng)
    heard = retime(clip.heard, speed=speed)
    return Lesson(torch.from_numpy(mel).to(torch.bfloat16), heard, compose.ask(heard, rng))


# Clips' lengths, at least and at most, in 0.4 s, and how often: for the encoder alone, to which the
# chunks of 4 s of a longer clip are new rows, and for the whole model.
LENGTHS = (((2, 10), (11, 20)), ((2, 10), (11, 30), (31, 80), (81, 190)))
LENGTH_SHARES = ((0.7, 0.3), (0.3, 0.3, 0.2, 0.2))


def draw_lengths(rng: np.random.Generator, stage: int, steps: int, seconds: float) -> list[int]:
    """Draws clips' lengths in mel frames, about so much sound together; all are short in the first
    steps of a stage.

    Clips of up to 4 s are all equally long, so that none is padded where inference would not pad
    it; of longer ones, every chunk is padded to 4 s. Lengths come in steps of 40 frames: oneDNN
    makes code for every new shape. Up to 7 frames are missing, since an audio token hears 8, and a
    model to which a last token of fewer is new takes it for a click.
    """
    kind = (3, 6)
    if steps >= 200:
        kinds = LENGTHS[stage]
        kind = kinds[rng.choice(len(kinds), p=LENGTH_SHARES[stage])]
    longest = int(rng.integers(*kind, endpoint=True))
    missing = int(rng.integers(8))
    count = max(1, round(seconds / 0.4 / longest))
    if longest <= 10:
        return [40 * longest - missing] * count
    own = [max(11, longest - int(rng.integers(4))) for _ in range(count)]
    return [40 * length - int(rng.integers(8)) for length in own]


@dataclass
class Batch:
    """B clips, in few tensors: each is a file to the processes that hand it on."""

    mels: Tensor  # end to end, bfloat16 [128, frames of all]
    lengths: list[int]  # each clip's mel frames
    tokens: list[int]  # each clip's audio tokens
    counts: list[int]  # how many words and sounds are heard in each
    heard: Tensor  # their classes, in order, int64 [sum of counts]
    frames: Tensor  # each audio token's class, int64 [sum of tokens]
    # Of the first question about each clip, and of the second:
    ids: list[Tensor]  # prompts and answers, int64 [B, N] each
    labels: list[Tensor]  # int64 [B, N] each, IGNORE but for the answers

    def to(self, device: torch.device) -> "Batch":
        names = ("mels", "heard", "frames")
        moved = {name: getattr(self, name).to(device) for name in names}
        ids = [tensor.to(device) for tensor in self.ids]
        labels = [tensor.to(device) for tensor in self.labels]
        return replace(self, ids=ids, labels=labels, **moved)


def frame_classes(heard: list[Heard], tokens: int) -> Tensor:
    """Returns, for each 80-ms frame, the class of what is heard and in which third of it: int64
    [tokens], 0 where nothing is heard."""
    classes = torch.zeros(tokens, dtype=torch.long)
    middles = (torch.arange(tokens) + 0.5) * 0.08
    for name, start, stop in heard:
        thirds = ((middles - start) / max(stop - start, 0.01) * 3).floor().long()
        inside = (thirds >= 0) & (thirds < 3)
        classes[inside] = 1 + 3 * NAMES.index(name) + thirds[inside]
    return classes


def pad_rows(rows: list[list[int]], value: int) -> Tensor:
    """Returns rows of ids as int64 [B, N]; N is a multiple of 32, for the same reason as lengths
    are of 40 frames."""
    longest = 32 * math.ceil(max(len(row) for row in rows) / 32)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def make_batch(model: MossAudio, lessons: list[Lesson]) -> Batch:
    lengths = [lesson.mel.shape[1] for lesson in lessons]
    tokens = [count_tokens(length, model.config.encoder.n_window) for length in lengths]
    classes = [1 + NAMES.index(part.name) for lesson in lessons for part in lesson.heard]
    frames = [frame_classes(lesson.heard, count) for lesson, count in zip(lessons, tokens)]
    all_ids = []
    all_labels = []
    for questions in zip(*(lesson.questions for lesson in lessons)):
        ids = []
        labels = []
        for (prompt, answer), length in zip(questions, lengths):
            before = model.prompt_ids(prompt, [length])
            learned = learned_ids(model, answer)
            ids.append(before + learned)
            labels.append([IGNORE] * len(before) + learned)
        all_ids.append(pad_rows(ids, 0))
        all_labels.append(pad_rows(labels, IGNORE))
    return Batch(
        mels=torch.cat([lesson.mel for lesson in lessons], dim=1),
        lengths=lengths,
        tokens=tokens,
        counts=[len(lesson.heard) for lesson in lessons],
        heard=torch.tensor(classes, dtype=torch.long),
        frames=torch.cat(frames),
        ids=all_ids,
        labels=all_labels,
    )


class Batches(Dataset):
    """The batch of each step, by its number. Each step has its own seed: its batch is the same
    whichever process composes it."""

    def __init__(self, args: argparse.Namespace, stages: list[Stage], model: MossAudio):
        self.args = args
        self.stages = stages
        self.model = model  # for its tokens

    @functools.cached_property
    def bank(self) -> Bank:
        # Opened by each process for itself: whole sounds would be sent to those that are spawned.
        return Bank(self.args.bank, held=False)

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.args.seed, step])
        stage = next(stage for stage in self.stages if step < stage.end)
        lengths = draw_lengths(rng, stage.number, step - stage.first, self.args.seconds)
        lessons = [draw_lesson(self.bank, rng, frames) for frames in lengths]
        return make_batch(self.model, lessons)


# ---- losses ----
# Without its own instructions, a CPU's bfloat16 is slower than float32.
FAST = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def hearing_loss(heads: nn.ModuleDict, output: Tensor, batch: Batch) -> Tensor:
    """CTC over words and sounds plus each frame's class, from the encoder's output [A, E]."""
    frame_logits = heads["frames"](output).float()
    frame_loss = F.cross_entropy(frame_logits, batch.frames, label_smoothing=0.05)
    log_probs = heads["ctc"](output).float().log_softmax(-1)
    log_probs = nn.utils.rnn.pad_sequence(log_probs.split(batch.tokens))  # [L, B, classes]
    lengths = (torch.tensor(batch.tokens), torch.tensor(batch.counts))
    return frame_loss + F.ctc_loss(log_probs, batch.heard, *lengths, zero_infinity=True)


def answer_loss(model: MossAudio, batch: Batch, sound: list[Tensor]) -> Tensor:
    """Cross-entropy of the answers, after hear's rows. Words count four times: beside the dozen
    tokens of its timestamps, a word would hardly be learned."""
    loss = 0
    total = 0
    for ids, labels in zip(batch.ids, batch.labels):
        B, N = ids.shape
        positions = torch.arange(N, device=ids.device)[None]
        hidden = model.decode(ids, positions, model.new_cache(B, N), N, sound)  # [B, N, D]
        right = labels[:, 1:]
        learned = right != IGNORE
        logits = model.lm_head(hidden[:, :-1][learned]).float()
        losses = F.cross_entropy(logits, right[learned], reduction="none")
        # Below 256 are the bytes: digits, brackets, points.
        weights = torch.where(right[learned] < 256, 1.0, 4.0)
        loss = loss + (losses * weights).sum()
        total = total + weights.sum()
    return loss / total


# ---- optimisers ----
class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz (https://kellerjordan.github.io/posts/muon/), in
    steps as large as AdamW's (arXiv 2502.16982). torch's own takes one matrix after the other;
    this takes those of a shape at once."""

    def __init__(self, params, weight_decay: float):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in sorted({p.shape for p in group["params"]}):
                matrices = [p for p in group["params"] if p.shape == shape and p.grad is not None]
                self.change(matrices, group["lr"], group["weight_decay"])

    def change(self, matrices: list[Tensor], rate: float, decay: float) -> None:
        """Takes a step with matrices of one shape."""
        grads = [p.grad for p in matrices]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in matrices]
        torch._foreach_lerp_(momenta, grads, 0.05)
        # Nesterov's look ahead.
        x = torch.stack(torch._foreach_lerp(grads, momenta, 0.95))  # [matrices, rows, columns]
        _, rows, columns = x.shape
        x = x.to(torch.bfloat16 if x.is_cuda else FAST)
        x = x.mT if rows > columns else x
        x = x / x.norm(dim=(1, 2), keepdim=True)
        for _ in range(5):
            square = x @ x.mT
            square = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
            x = torch.baddbmm(x, square, x, beta=3.4445)
        x = x.mT if rows > columns else x
        x = x.float() * (0.2 * max(rows, columns) ** 0.5)
        torch._foreach_mul_(matrices, 1 - rate * decay)
        torch._foreach_add_(matrices, list(x), alpha=-rate)


def make_optimizers(modules: dict[str, nn.Module]) -> list[torch.optim.Optimizer]:
    """Makes Muon for matrices, and AdamW for the rest, embeddings and output among it. Beside
    other modules, the encoder learns at half of the rate."""
    matrices = []
    rest = []
    for name, module in modules.items():
        share = 0.5 if name == "audio_encoder" and "lm_head" in modules else 1.0
        own = []
        others = []
        for key, parameter in module.named_parameters():
            if parameter.ndim == 2 and name != "lm_head" and "embed" not in key:
                own.append(parameter)
            else:
                others.append(parameter)
        matrices.append({"params": own, "share": share})
        rest.append({"params": others, "share": share})
    adam = torch.optim.AdamW(rest, weight_decay=0.02, betas=(0.9, 0.98))
    return [Muon(matrices, weight_decay=0.02), adam]


# ---- tests ----
@torch.no_grad()
def test_hearing(model: MossAudio, heads: nn.ModuleDict, clips: list[Clip]) -> float:
    """Returns the share of words that are wrong by the encoder's likeliest classes."""
    wrong = 0
    total = 0
    for clip in clips:
        words = [word.name for word in compose.only_words(clip.heard)]
        output, *_ = model.hear([log_mel(torch.from_numpy(clip.wave))])
        classes = heads["ctc"](output).argmax(-1).unique_consecutive().tolist()
        given = [NAMES[i - 1] for i in classes if 0 < i <= len(WORDS)]
        wrong += edit_distance(words, given)
        total += len(words)
    return wrong / max(total, 1)


@torch.no_grad()
def test_answers(model: MossAudio, clips: list[Clip]) -> dict[str, dict]:
    """Returns evaluate's measures of transcripts, plain and with timestamps, by their prompts."""
    examples = {}
    answers = {}
    for clip in clips:
        right = {PLAIN: compose.transcript(clip.heard), STAMPS: compose.stamped(clip.heard)}
        for prompt, answer in right.items():
            number = len(examples)
            examples[number] = Example(prompt, [], answer, False)
            answers[number] = model.ask(clip.wave, prompt, max_new_tokens=200, temperature=0)
    return score(examples, answers)["prompts"]


def score_events(folder: Path, data: Path) -> None:
    """Prints how many descriptions of a data file's sounds name the right events."""
    model = MossAudio.from_pretrained(folder, "cpu")
    right = 0
    total = 0
    for example in read_data(data, need_sound=True).values():
        if example.prompt == DESCRIBE:
            given = model.ask(example.clips, DESCRIBE, temperature=0, max_new_tokens=200)
            right += compose.events(given) == compose.events(example.answer)
            total += 1
    print(f"{data}: {right} of {total}", flush=True)


def word_errors(spoken: list[Word], heard: list[Word]) -> list[float]:
    """Returns how far off the starts of spoken words are in an answer, in seconds: infinity for a
    word that is not there, or has no time. Words are matched by difflib, which takes the longest
    stretches in common: evaluate.align gives sums over all words, not which of them match."""
    texts = [word.text for word in spoken]
    matcher = difflib.SequenceMatcher(None, texts, [word.text for word in heard], autojunk=False)
    errors = [math.inf] * len(spoken)
    for first, other, size in matcher.get_matching_blocks():
        for i in range(size):
            start = heard[other + i].start
            if start is not None:
                errors[first + i] = abs(start - spoken[first + i].start) / 1000
    return errors


def errors_by_span(folder: Path, data: Path) -> dict[int, list[float]]:
    """Returns the errors of the words that begin in each five seconds of a data file's clips, by
    the number of these, from 0, in the answers with timestamps of the model in a folder."""
    model = MossAudio.from_pretrained(folder, "cpu")
    spans = {}
    for example in read_data(data, need_sound=True).values():
        if example.prompt == STAMPS:
            say(f"{folder}: {example.clips[0]}")
            spoken = [word for word in stamped_words(example.answer) if word.stamped]
            heard = stamped_words(model.ask(example.clips, STAMPS, temperature=0))
            for word, error in zip(spoken, word_errors(spoken, heard)):
                spans.setdefault(word.start // 5000, []).append(error)
    require(spans, f"{data}: no words with times; expected lines that ask {STAMPS!r}")
    return spans


def draw_positions(picture: Path, data: Path, folders: list[Path]) -> None:
    """Draws, for each model and every five seconds of a data file's clips, how far off the starts
    of words are on average, and how many words begin within 0.1 s of their time."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("figure needs matplotlib: pip install matplotlib") from None
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 5), layout="constrained")
    for folder in folders:
        middles = []  # of the five seconds
        means = []
        shares = []
        for span, errors in sorted(errors_by_span(folder, data).items()):
            found = [error for error in errors if error < math.inf]
            middles.append(5 * span + 2.5)
            means.append(np.mean(found) if found else math.nan)  # NaN: no point is drawn
            shares.append(100 * np.mean(np.array(errors) < 0.1))
        above.plot(middles, means, "o-", label=folder.name)
        below.plot(middles, shares, "o-")
    above.set(ylabel="mean error of the words\nthat are there, s", yscale="log")
    above.legend()
    below.set(xlabel="position in the clip, s", ylabel="words within 0.1 s, %", ylim=(0, 102))
    with whole(picture) as part:
        figure.savefig(part, dpi=110, format="png")


# ---- training ----
SAVE_SECONDS = 60
TEST_SECONDS = 1200
LOG_STEPS = 50
AVERAGING = 0.003  # a step's share of the averaged weights


class Training:
    """A model, the heads that are thrown away at the end, their optimisers, and a run's files."""

    def __init__(self, args: argparse.Namespace):
        self.out = args.out
        self.folder = args.out / "training" / "folder"
        self.state = args.out / "training" / "state.safetensors"
        self.run = {name: getattr(args, name) for name in ("markers", "deepstack", "seed")}
        if args.start:
            self.model = MossAudio.from_pretrained(args.start, "cpu", "float32")
            self.model.requires_grad_(True)
            copy_all_but_weights(args.start, self.folder)
        else:
            write_folder(self.folder, args.markers, args.deepstack)
            self.model = random_model(self.folder, args.seed)
        width = self.model.config.encoder.output_dim
        ctc = nn.Linear(width, 1 + len(NAMES))
        frames = nn.Linear(width, 1 + 3 * len(NAMES))
        self.heads = nn.ModuleDict({"ctc": ctc, "frames": frames})
        self.both = nn.ModuleDict({"model": self.model, "heads": self.heads})
        # Of the last steps' weights: what is tested and saved as the checkpoint.
        self.average = copy.deepcopy(self.both)
        self.sets = compose.held_out(args.bank, [4.8] * 4)
        self.step = 0
        self.stage = None
        self.began = time.time()  # or, of a run that goes on, as if it had not stopped
        self.moments = {}  # of the optimisers, as they are saved
        self.losses = []
        if self.state.exists():
            tensors, saved = load_state(self.state, self.run)
            self.both.load_state_dict({name: tensors.pop(name) for name in self.both.state_dict()})
            average = {name: tensors.pop(f"average.{name}") for name in self.both.state_dict()}
            self.average.load_state_dict(average)
            self.moments = tensors
            self.step = saved["step"]
            self.stage = saved["stage"]
            self.began -= 60 * saved["minutes"]
        self.saved = time.time()
        self.tested = time.time()

    def begin(self, stage: Stage) -> None:
        """Makes a stage's optimisers, with their moments, if this is the stage that was saved."""
        self.modules = {"audio_encoder": self.model.audio_encoder, "heads": self.heads}
        if stage.number > 0:
            self.modules |= self.model.named_children()
        self.optimizers = make_optimizers(self.modules)
        if stage.number == self.stage:
            states = [{} for _ in self.optimizers]
            for key, tensor in self.moments.items():
                number, place, name = key.split(".")
                states[int(number)].setdefault(int(place), {})[name] = tensor
            for optimizer, state in zip(self.optimizers, states):
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        self.stage = stage.number

    def learn(self, stage: Stage, batch: Batch) -> None:
        """Makes one step."""
        batch = batch.to(self.heads["ctc"].weight.device)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.rate(self.step) * group["share"]
        with torch.autocast("cpu", FAST, torch.float32 != FAST and not batch.mels.is_cuda):
            sound = self.model.hear(list(batch.mels.split(batch.lengths, dim=1)))
            hearing = hearing_loss(self.heads, sound[0], batch)
            answers = torch.zeros_like(hearing)
            loss = hearing
            if stage.number > 0:
                answers = answer_loss(self.model, batch, sound)
                loss = answers + 0.25 * hearing
        loss.backward()
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            weights = list(self.both.parameters())
            torch._foreach_lerp_(list(self.average.parameters()), weights, AVERAGING)
        self.step += 1
        self.losses.append(torch.stack([hearing, answers]).detach())

    def minutes(self) -> float:
        return round((time.time() - self.began) / 60, 2)

    def keep(self, ended: bool) -> None:
        """Logs, saves and tests, if it is time to or the stage has ended."""
        if self.step % LOG_STEPS == 0:
            hearing, answers = torch.stack(self.losses).mean(0).tolist()
            self.losses = []
            losses = {"hearing": round(hearing, 4), "answers": round(answers, 4)}
            self.report({"minutes": self.minutes(), "stage": self.stage} | losses)
        if ended or time.time() - self.saved > SAVE_SECONDS:
            self.save()
            self.saved = time.time()
        if ended or time.time() - self.tested > TEST_SECONDS:
            model = self.average["model"]
            for name, clips in self.sets.items():
                scores = {"ctc": test_hearing(model, self.average["heads"], clips)}
                if self.stage > 0:
                    scores |= test_answers(model, clips)
                self.report({"test": name} | scores)
            self.tested = time.time()

    def save(self) -> None:
        """Writes the state, from which the same command goes on, and the checkpoint."""
        tensors = self.both.state_dict()
        tensors |= {f"average.{name}": x for name, x in self.average.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for place, values in optimizer.state_dict()["state"].items():
                for name, tensor in values.items():
                    tensors[f"{i}.{place}.{name}"] = tensor
        done = {"step": self.step, "stage": self.stage, "minutes": self.minutes()}
        save_state(self.state, tensors, self.run | done)
        save_checkpoint(self.average["model"], self.out, self.folder)

    def report(self, line: dict) -> None:
        """Prints a line of JSON, and adds it to the log."""
        text = json.dumps({"step": self.step} | line)
        print(text, flush=True)
        with open(self.out / "training" / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(text + "\n")


def train(args: argparse.Namespace) -> None:
    """Trains the encoder alone, then the whole model."""
    stages = make_stages(args)
    torch.set_num_threads(1)
    device = pick_device(args.device)
    training = Training(args)
    model = training.model
    size = sum(p.numel() for p in model.parameters())
    say(f"{size:,} parameters, {model.config.decoder.vocab_size} tokens, {device}")
    workers = args.workers or 1
    if device.type == "cuda":
        workers = args.workers or max(1, os.cpu_count() - 1)
        torch.set_float32_matmul_precision("high")  # TF32
        # All chunks at a time: launches are what takes time there.
        model.audio_encoder.chunks_at_a_time = 10_000
    data = Batches(args, stages, model)
    steps = range(training.step, args.steps)
    loader = DataLoader(data, None, sampler=steps, num_workers=workers, prefetch_factor=4)
    # The processes are forked here, before CUDA has anything of the model.
    batches = iter(loader)
    training.both.to(device)
    training.average.to(device)
    for stage in stages:
        if training.step < stage.end:
            training.begin(stage)
        while training.step < stage.end:
            training.learn(stage, next(batches))
            training.keep(ended=training.step == stage.end)
    say(f"{args.out} is trained: {training.step} steps, {training.minutes():.0f} minutes")


# ---- command line ----
def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("make_tiny.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("bank", help="make the voices").add_argument
    add("bank", type=Path, metavar="BANK")
    add("engines", nargs="*", metavar="ENGINE", help=f"some of {', '.join(ENGINES)} (all)")

    about = "write sounds of held-out voices or of people, with data files"
    add = commands.add_parser("test", help=about).add_argument
    add("source", type=Path, metavar="SOURCE", help="a bank, or a folder of WORD.wav")
    add("folder", type=Path, metavar="FOLDER")
    add("--count", type=int, default=25, metavar="N", help="sounds of each voice (%(default)s)")
    add("--seconds", type=float, nargs=2, default=[2, 10], metavar="X", help="lengths (2 to 10)")

    add = commands.add_parser("events", help="score descriptions by their events").add_argument
    add("model", type=Path, metavar="MODEL")
    add("data", type=Path, metavar="DATA", help="what test wrote")

    about = "draw the error in time against the position in a clip; needs matplotlib"
    add = commands.add_parser("figure", help=about).add_argument
    add("picture", type=Path, metavar="PICTURE", help="a PNG file")
    add("data", type=Path, metavar="DATA", help="what test wrote")
    add("models", type=Path, nargs="+", metavar="MODEL", help="called by its folder's name")

    add = commands.add_parser("words", help="write data that teach other words").add_argument
    add("folder", type=Path, metavar="FOLDER")
    add("words", nargs="+", metavar="WORD")

    add = commands.add_parser("train", help="train and save").add_argument
    add("bank", type=Path, metavar="BANK")
    add("out", type=Path, metavar="OUT")
    about = "a checkpoint of this shape to go on from, without steps of the encoder alone"
    add("--start", type=Path, metavar="FOLDER", help=about)
    add("--alone", type=int, default=3000, metavar="N", help="steps of the encoder alone (3000)")
    add("--steps", type=int, default=11_300, metavar="N", help="steps in all (%(default)s)")
    add("--seconds", type=float, default=100, metavar="X", help="sound in a step (%(default)s)")
    add("--seed", type=int, default=0, metavar="S")
    add("--device", default="auto", metavar="D", help="cuda, mps, cpu or auto (the first there is)")
    about = "processes that compose clips (1; on CUDA all cores but 1)"
    add("--workers", type=int, metavar="N", help=about)
    add("--no-time-markers", dest="markers", action="store_false")
    add("--no-deepstack", dest="deepstack", action="store_false")
    return parser.parse_args(argv)


def run(argv: list[str] | None) -> None:
    args = parse(argv)
    if args.command == "bank":
        make_bank(args.bank, args.engines or list(ENGINES), compose.draw_phrase)
    elif args.command == "test":
        compose.write_test(args.source, args.folder, args.count, args.seconds)
    elif args.command == "events":
        score_events(args.model, args.data)
    elif args.command == "figure":
        draw_positions(args.picture, args.data, args.models)
    elif args.command == "words":
        compose.write_words(args.words, args.folder)
    else:
        train(args)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return end("make_tiny", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
