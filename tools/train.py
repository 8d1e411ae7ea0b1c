"""Trains MOSS-Audio on upstream's data format: all weights, or a LoRA adapter in peft's files.

    python tools/train.py --model FOLDER --data train.jsonl --out FOLDER --lora-rank 16 --lr 1e-4
    python tools/train.py --model FOLDER --merge ADAPTER --out FOLDER

A line of data is {"conversation": [{"role": "user", "message_type": "audio", "content": PATH},
{"role": "user", "message_type": "text", "content": PROMPT}, {"role": "assistant", "message_type":
"text", "content": ANSWER}]}; paths are relative to the file. A sample is the prompt as inference
makes it, with time markers, then the answer and <|im_end|>, which alone are learned.

OUT becomes a checkpoint folder or, with --lora-rank, an adapter's. OUT/training has the log, and
the state from which the same command goes on. `torchrun --nproc-per-node N tools/train.py ...`
trains in N processes.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import Example, random_model, read_example, write_tensors, write_text
from encoder import HOP, SAMPLE_RATE, load_audio, require
from lora import add_lora, add_lora_option, lora_change, save_adapter
from moss_min import MossAudio, Parser, end, pick_device

IGNORE = -100  # the label of a token that is not learned

# torchrun sets these; alone, a process is the first of one.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


# ---- data ----


class Sample(NamedTuple):
    """What is learned from an example: the prompt and the answer as one sequence of N tokens."""

    ids: torch.Tensor  # int64 [N]
    labels: torch.Tensor  # int64 [N], IGNORE but for the answer
    mels: list[torch.Tensor]  # for each clip, bfloat16 [128, T]
    line: int = 0  # of the data, from 1


def count_frames(path: Path) -> int:
    """Returns how many mel frames a sound file has. Raises ValueError for what is not sound."""
    samples = 0
    with contextlib.suppress(soundfile.SoundFileError):
        info = soundfile.info(str(path))  # the header alone: fast
        samples = math.ceil(info.frames * SAMPLE_RATE / info.samplerate)
    if samples <= HOP:
        samples = len(load_audio(path))  # reads all else, and refuses what is too short
    return samples // HOP


def learned_ids(model: MossAudio, answer: str) -> list[int]:
    """Returns an answer's tokens and <|im_end|>."""
    surrogates = re.search("[\ud800-\udfff]", answer)
    require(not surrogates, "the answer has bytes that are not UTF-8; expected text")
    ids = model.tokenizer.encode(answer, add_special_tokens=False).ids
    sounds = model.config.adapter.audio_token_id in ids
    require(not sounds, "the answer has a token that stands for sound")
    return [*ids, model.tokenizer.token_to_id("<|im_end|>")]


def make_sample(model: MossAudio, text: str, clips, answer: str, time_markers=None) -> Sample:
    prompt = model.prompt(text, clips, time_markers)
    learned = torch.tensor(learned_ids(model, answer))
    labels = torch.cat([torch.full_like(prompt.ids, IGNORE), learned])
    return Sample(torch.cat([prompt.ids, learned]), labels, prompt.mels)


def read_data(path: Path, model: MossAudio) -> dict[int, Example]:
    """Reads a data file's lines, by number. Raises ValueError that names what can't be learned
    from: before the first step, not in the middle of the night."""
    most = model.config.decoder.max_position_embeddings

    def read(value) -> Example:
        example = read_example(value, path.parent)
        frames = [count_frames(clip) for clip in example.clips]
        prompt = model.prompt_ids(example.prompt, frames)
        used = len(prompt) + len(learned_ids(model, example.answer))
        message = f"{used} tokens with its answer; expected at most {most}, the model's positions"
        require(used <= most, message)
        return example

    examples = common.each_line(path, common.read_json_lines(path), read)
    require(len(examples) > 0, f"{path}: expected at least one line")
    return examples


def draw(examples: list, seed: int, first: int, count: int) -> list:
    """Returns examples first to first + count - 1 of an endless sequence: epoch after epoch, each
    in an order of its own."""
    drawn = []
    for i in range(first, first + count):
        epoch, place = divmod(i, len(examples))
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(examples), generator=generator)
        drawn.append(examples[order[place]])
    return drawn


# ---- forward and loss ----


def hear_samples(model: MossAudio, samples: list[Sample]) -> list[torch.Tensor]:
    """Returns the encoder's rows for the samples' audio tokens: output and taps, [A, E] each."""
    # One sample at a time, as in inference: chunks are padded to the longest of their prompt
    # (encoder.split_chunks), not of the batch.
    heard = [model.hear(sample.mels) for sample in samples if sample.mels]
    return [torch.cat(part) for part in zip(*heard)]


def hidden_states(model: MossAudio, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns hidden states [B, N, D] and labels [B, N] of samples that are padded on the right,
    where causal attention does not look."""
    device = model.lm_head.weight.device
    ids = [sample.ids for sample in samples]
    labels = [sample.labels for sample in samples]
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)  # [B, N]
    labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    B, N = ids.shape
    positions = torch.arange(N, device=device).expand(B, N)
    cache = model.new_cache(B, N)
    hidden = model.decode(ids, positions, cache, N, hear_samples(model, samples))
    return hidden, labels.to(device)


class SummedLoss(nn.Module):
    """The cross-entropy of samples, summed over what is learned: a module, since
    DistributedDataParallel wraps one."""

    def __init__(self, model: MossAudio):
        super().__init__()
        self.model = model

    def forward(self, samples: list[Sample]) -> torch.Tensor:
        hidden, labels = hidden_states(self.model, samples)
        # Position n predicts token n + 1; logits are made for what is learned alone.
        labels = labels[:, 1:]
        learned = labels != IGNORE
        logits = self.model.lm_head(hidden[:, :-1][learned]).float()  # [learned tokens, V]
        return F.cross_entropy(logits, labels[learned], reduction="sum")


# ---- checkpoints ----


INDEX = "model.safetensors.index.json"


def copy_all_but_weights(source: Path, folder: Path) -> None:
    """Copies a checkpoint's configuration, its tokenizer, and what is there for servers."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".jinja", ".py") and file.name != INDEX:
            shutil.copyfile(file, folder / file.name)


def save_checkpoint(model: MossAudio, out: Path, source: Path, shard_bytes=5_000_000_000) -> None:
    """Writes the model in the released layout: bfloat16, in shards with an index if one is not
    enough; all else is the source's. No file in out is touched before all new ones are whole."""
    shards = [{}]
    total = 0
    room = shard_bytes
    for name, tensor in sorted(model.state_dict().items()):
        size = 2 * tensor.numel()
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
        total += size
    out.mkdir(parents=True, exist_ok=True)
    # New shards get new names: an old index leads to the old ones until the new index is there.
    stem = "model"
    while any(out.glob(f"{stem}-0*")):
        stem += "-new"
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    with common.part_folder(out / ".part") as part:
        weight_map = {}
        for name, shard in zip(names, shards):
            rounded = {k: t.to("cpu", torch.bfloat16).contiguous() for k, t in shard.items()}
            write_tensors(rounded, part / name)
            weight_map |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_text(json.dumps(content, indent=2), part / INDEX)
        copy_all_but_weights(source, part)
        # An index that stays would lead to the weights before these.
        old = [out / INDEX, out / "model.safetensors", *out.glob("model-*-of-?????.safetensors")]
        old = [file for file in old if not (part / file.name).exists()]
        common.move_files(part, out, "config.json", old)


# ---- training ----


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up from 0, then half a cosine that would come to 0 at the step after the last."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Trainer:
    """The parameters that require a gradient and their optimizer."""

    def __init__(self, model: MossAudio, args: argparse.Namespace):
        self.args = args
        self.device = model.lm_head.weight.device
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        others = [p for p in self.trained.values() if p.ndim < 2]  # norms and biases: no decay
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.decay)
        for parameter in self.trained.values():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }
        self.loss = SummedLoss(model)
        self.summed = self.loss
        if WORLD > 1:
            self.summed = nn.parallel.DistributedDataParallel(self.loss)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns what training goes on from: weights in float32, and AdamW's moments."""
        tensors = {}
        for name, parameter in self.trained.items():
            tensors[f"weight.{name}"] = parameter.data
            for key in "exp_avg", "exp_avg_sq":
                tensors[f"{key}.{name}"] = self.optimizer.state[parameter][key]
        return tensors

    def step(self, step: int, samples: list[Sample]) -> tuple[float, float, int]:
        """Makes one step with this process's samples. Returns the mean loss of a learned token and
        the number of tokens, both over all processes, and between them the gradient's norm. Raises
        ValueError, before anything changes, if one of them is not finite."""
        learned = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
        tokens = sum(len(sample.ids) for sample in samples)
        counts = torch.tensor([learned, tokens], device=self.device)
        if WORLD > 1:
            # Every learned token weighs the same, whichever process has it.
            dist.all_reduce(counts)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.args.steps, self.args.lr, self.args.warmup)
        total = torch.zeros((), device=self.device)
        for first in range(0, len(samples), self.args.batch):
            part = samples[first : first + self.args.batch]
            more = WORLD > 1 and first + len(part) < len(samples)
            sync = self.summed.no_sync() if more else contextlib.nullcontext()
            with sync, torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
                loss = self.summed(part)
                # DistributedDataParallel divides by the processes.
                (loss * WORLD / counts[0]).backward()
            total += loss.detach()
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.args.clip))
        if WORLD > 1:
            dist.all_reduce(total)
        mean = float(total / counts[0])
        if not (math.isfinite(mean) and math.isfinite(norm)):
            with torch.no_grad():
                wrong = [each.line for each in samples if not self.loss([each]).isfinite()]
            said = f"step {step + 1}: the loss is {mean}, its gradient {norm}; nothing is saved"
            where = f"data line {wrong}" if wrong else "no data line by itself: at --lr"
            raise ValueError(f"{said}. Look at {where}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean, norm, int(counts[1])


def state_path(args: argparse.Namespace) -> Path:
    return Path(args.out) / "training" / "state.safetensors"


def run_options(args: argparse.Namespace) -> dict:
    """Returns the options that have to be the same for a training to go on."""
    options = vars(args) | {"processes": WORLD}
    del options["out"], options["save_every"]
    return options


def is_finished(args: argparse.Namespace) -> bool:
    """Tells whether the last step is made and its weights are in OUT. Raises ValueError for the
    state of another run."""
    state = state_path(args)
    if not state.exists() or common.read_run(state, run_options(args))["step"] < args.steps:
        return False
    # Weights that are older than the state are what was in OUT before. The configuration is moved
    # behind them.
    out = Path(args.out)
    last = out / ("adapter_config.json" if args.lora_rank else "config.json")
    files = [*out.glob("*.safetensors"), last]
    made = state.stat().st_mtime_ns
    return len(files) > 1 and all(f.exists() and f.stat().st_mtime_ns >= made for f in files)


def train(model: MossAudio, examples: dict[int, Example], args: argparse.Namespace) -> None:
    """Trains the parameters that require a gradient. A step is a line on stderr and one in
    OUT/training/log.jsonl."""
    trainer = Trainer(model, args)
    options = run_options(args)
    state = state_path(args)
    folder = state.parent
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    if state.exists():
        saved, run = common.load_state(state, options, trainer.tensors())
        start = run["step"]
        for name, tensor in trainer.tensors().items():
            tensor.copy_(saved[name])
        for moments in trainer.optimizer.state.values():
            moments["step"].fill_(start)
    path = folder / "log.jsonl"
    log = []
    for number, value in common.read_json_lines(path) if path.exists() else []:
        good = type(value) is dict and type(value.get("step")) is int
        require(good, f"{path}: line {number} has no step; expected what a training has written")
        if value["step"] <= start:
            log.append(json.dumps(value))
    size = args.batch * args.accumulate

    def read_samples(step: int) -> list[Sample]:
        samples = []
        for line in draw(list(examples), args.seed, (step * WORLD + RANK) * size, size):
            prompt, clips, answer, _ = examples[line]
            samples.append(make_sample(model, prompt, clips, answer)._replace(line=line))
        return samples

    began = time.perf_counter()
    seen = 0
    with ThreadPoolExecutor(1) as pool:  # sound is read one step ahead
        ahead = pool.submit(read_samples, start)
        for step in range(start, args.steps):
            samples = ahead.result()
            ahead = pool.submit(read_samples, min(step + 1, args.steps - 1))
            loss, norm, tokens = trainer.step(step, samples)
            if RANK > 0:
                continue
            done = step + 1
            seen += tokens
            spent = time.perf_counter() - began
            minutes = spent / (done - start) * (args.steps - done) / 60
            rate = trainer.optimizer.param_groups[0]["lr"]
            common.say(
                f"step {done}/{args.steps}: loss {loss:.4f}, lr {rate:.2e}, gradient {norm:.2f}, "
                f"{seen / spent:.0f} tokens a second, {minutes:.1f} minutes left"
            )
            log.append(json.dumps({"step": done, "loss": loss, "lr": rate}))
            write_text("\n".join(log) + "\n", path)
            if done % args.save_every == 0 or done == args.steps:
                common.save_state(state, trainer.tensors(), options | {"step": done})


# ---- command line ----


def load_model(args: argparse.Namespace, device: str) -> MossAudio:
    """Returns the model to be trained."""
    if args.init:
        return random_model(Path(args.init), args.seed).to(pick_device(device))
    dtype = "float32"
    if args.lora_rank and pick_device(device).type == "cuda":
        dtype = "auto"  # under autocast, frozen weights may stay in the checkpoint's type
    change = lora_change(args.lora, args.model)
    return MossAudio.from_pretrained(args.model, device, dtype, change=change).requires_grad_(True)


def run(args: argparse.Namespace) -> None:
    require(0 <= args.lora_rank <= 4096, "--lora-rank: expected a number from 0 to 4096")
    require(abs(args.seed) < 2**62, "--seed: expected a number of less than 62 bits")
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * max(args.lora_rank, 1)
    for name in "steps", "batch", "accumulate", "lr", "warmup", "clip", "save_every", "lora_alpha":
        option = "--" + name.replace("_", "-")
        good = 0 < getattr(args, name) < 1e9
        require(good, f"{option}: expected a number above 0 and below 1e9")
    require(args.lora_rank or not args.lora_encoder, "--lora-encoder: expected --lora-rank, too")
    require(args.model or args.init, "--model: expected a folder's name")
    message = "--merge and --lora: expected --model, whose weights the adapter is added to"
    require(args.model or not (args.merge or args.lora), message)
    out = Path(args.out)
    source = Path(args.model or args.init)
    if args.merge:
        change = lora_change(args.merge, source)
        model = MossAudio.from_pretrained(source, "cpu", "bfloat16", change=change)
        save_checkpoint(model, out, source)
        return
    require(args.data, "expected --data or --merge")
    if is_finished(args):
        if RANK == 0:
            done = f"this training of {args.steps} steps is finished"
            common.say(f"{out}: {done}; nothing is left to do")
        return
    device = args.device
    if WORLD > 1:
        common.end_with_parent()
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    model = load_model(args, device)
    examples = read_data(Path(args.data), model)
    torch.manual_seed(args.seed)  # LoRA's A is random: the same in every process
    if args.lora_rank:
        targets = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_encoder)
    train(model, examples, args)
    if RANK == 0 and args.lora_rank:
        save_adapter(model, out, args.lora_rank, args.lora_alpha, targets)
    elif RANK == 0:
        save_checkpoint(model, out, source)
    if WORLD > 1:
        dist.destroy_process_group()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("train.py", __doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="FOLDER", help="checkpoint to train")
    source.add_argument("--init", metavar="FOLDER", help="the same, with weights drawn anew")
    add("--data", metavar="FILE", help="JSONL in upstream's format, above")
    add("--out", required=True, metavar="FOLDER", help="what is trained, with its log and state")
    add("--lora-rank", type=int, default=0, metavar="N", help="train an adapter of this rank")
    add("--lora-alpha", type=float, metavar="X", help="it is scaled by alpha / rank (2 x rank)")
    add("--lora-encoder", action="store_true", help="adapt the encoder's q, k and v, too")
    adapter = parser.add_mutually_exclusive_group()
    adapter.add_argument("--merge", metavar="ADAPTER", help="save MODEL with this adapter added")
    add_lora_option(adapter)
    add("--steps", type=int, default=1000, metavar="N", help="steps in all (%(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="samples of a forward pass (%(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="passes of a step (%(default)s)")
    add("--lr", type=float, default=1e-5, metavar="X", help="highest learning rate (%(default)s)")
    add("--warmup", type=int, default=50, metavar="N", help="steps up to it (%(default)s)")
    add("--decay", type=float, default=0.01, metavar="X", help="weight decay (%(default)s)")
    add("--clip", type=float, default=1.0, metavar="X", help="largest gradient norm (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of order and weights (%(default)s)")
    add("--save-every", type=int, default=100, metavar="N", help="save every N steps (%(default)s)")
    add("--device", default="auto", metavar="D", help="cuda, mps, cpu or auto (the first there is)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return end("train", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
