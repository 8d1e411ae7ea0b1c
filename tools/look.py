"""Shows what the model does with a sound: one page that explains itself, or a picture.

    python tools/look.py tiny/cards.wav -o look.html
    python tools/look.py tiny/cards.wav --png picture.png

The page is one file that opens from disk in any browser and asks nothing of the network. It holds
three greedy runs: with everything, without time markers and without DeepStack. Shapes: T mel
frames, A audio tokens, N prompt tokens, L decoder layers, H query heads, K positions in use,
C columns of the page: the prompt's tokens, or several as one where there are too many.
"""

import base64
import difflib
import inspect
import io
import json
import math
import sys
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adapter import audio_ids
from common import say, write_text
from encoder import HOP, SAMPLE_RATE, STRIDE, load_audio, log_mel, require
from evaluate import STAMP
from moss_min import MossAudio, Parser, Prompt, Step, add_model_options, end
from qwen3 import Attention, KVCache, Qwen3, apply_rope
from sample import Sampling, choose

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("look.html")
ASK = "Transcribe the audio with timestamps."
FRAMES = SAMPLE_RATE // HOP  # mel frames a second

# These bound a page's size. What goes beyond is left out or averaged, and the page says so.
MOST_TOKENS = 400  # of the answer
MOST_COLUMNS = 3000  # of audio tokens
MOST_FRAMES = 6000  # mel columns
MOST_SECONDS = 120  # of sound in the player
STRETCHES = 3000  # of the waveform
HEADS_BYTES = 700_000  # attention of all heads, of the whole run
LAYERS_BYTES = 8_000_000  # attention of all layers, of the whole run; an eighth, of another
RIVALS = 10

# The code that the page's panels name.
PLACES = {
    "sound": load_audio,
    "mel": log_mel,
    "prompt": audio_ids,
    "deepstack": Qwen3.forward,
    "attention": Attention.forward,
    "choice": choose,
    "runs": MossAudio.decode,
}


# ---- the time axis: clips one after another, each with the padding of its last chunk ----


def layout(waves: list[Tensor], n_window: int) -> list[dict]:
    """Returns where each clip lies on the page's time axis, in seconds: its start and end, the end
    of its padding, its chunks' starts [chunks], and the bounds of its audio tokens [A + 1]."""
    size = 2 * n_window  # of a chunk, in mel frames
    lengths = [len(wave) // HOP for wave in waves]
    longest = min(size, max(lengths, default=0))  # split_chunks pads to it
    clips = []
    offset = 0
    for length in lengths:
        chunks = range(0, length, size)
        edges = []
        for first in chunks:
            edges += range(first, min(first + size, length), STRIDE)
        frames = {
            "start": [0],
            "end": [length],
            "padded": [chunks[-1] + longest],
            "chunks": chunks,
            "edges": [*edges, length],
        }
        seconds = {key: [(offset + x) / FRAMES for x in frames[key]] for key in frames}
        for key in ("start", "end", "padded"):
            seconds[key] = seconds[key][0]
        clips.append(seconds)
        offset += chunks[-1] + longest
    return clips


def on_axis(parts: list[Tensor], clips: list[dict], rate: int) -> Tensor:
    """Lays the clips' samples or mels [..., length], of so many a second, on the time axis."""
    laid = []
    for part, clip in zip(parts, clips):
        length = round((clip["padded"] - clip["start"]) * rate)
        # A clip's last samples may not fill a mel frame.
        laid.append(F.pad(part, (0, length - part.shape[-1])))
    return torch.cat(laid, -1)


def outline(wave: Tensor) -> Tensor:
    """Returns the least and the largest value in each of up to 3,000 stretches of [samples], int8
    [stretches, 2] in 127ths of the largest magnitude."""
    size = math.ceil(len(wave) / STRETCHES)
    stretches = F.pad(wave, (0, -len(wave) % size)).view(-1, size)
    ends = torch.stack([stretches.amin(1), stretches.amax(1)], 1)
    return (ends / wave.abs().max().clamp(min=1e-9) * 127).round().to(torch.int8)


# ---- one run ----


@dataclass
class Column:
    """A prompt token, or several, as the page shows them."""

    kind: str  # "text", "marker" or "sound"
    first: int  # position
    start: float | None  # seconds; None for text
    end: float | None
    ids: list[int] = field(default_factory=list)


def columns_of(ids: list[int], config, clips: list[dict], pool: int) -> tuple[list[Column], Tensor]:
    """Returns a prompt's columns and the column of each position, int64 [N]. pool: audio tokens in
    a column; from 2 on, the digits of a time marker are one column, too."""
    columns = {}  # by what they stand for
    keys = []
    clip = -1
    inside = False
    for position, token in enumerate(ids):
        kind = "text"
        start = stop = None
        key = position
        if token == config.audio_start_id:
            clip += 1
            heard = 0
            inside = True
        elif token == config.audio_end_id:
            inside = False
        elif token == config.audio_token_id:
            kind = "sound"
            key = (clip, kind, heard // pool)
            start, stop = clips[clip]["edges"][heard : heard + 2]
            heard += 1
        elif inside:
            kind = "marker"
            start = stop = clips[clip]["edges"][heard]
            key = (clip, kind, heard) if pool > 1 else position
        column = columns.setdefault(key, Column(kind, position, start, stop))
        column.ids.append(token)
        column.end = stop
        keys.append(key)
    order = {key: number for number, key in enumerate(columns)}
    return list(columns.values()), torch.tensor([order[key] for key in keys])


def last_weights(attention: Attention, x: Tensor, cache: KVCache) -> Tensor:
    """Returns the attention weights [H, K] of the last of x [1, n, D], whose keys the cache holds:
    SDPA gives none, so they are computed again from q and k."""
    q = attention.q_proj(x[:, -1:]).view(1, 1, -1, attention.head_dim)
    q = apply_rope(attention.q_norm(q), cache.cos[:, -1:], cache.sin[:, -1:])  # [1, 1, H, hd]
    keys = cache.keys[attention.layer][0, :, : cache.in_use]  # [G, K, hd]
    q = q[0, 0].unflatten(0, (len(keys), -1))  # [G, H / G, hd]
    scores = q @ keys.mT / math.sqrt(attention.head_dim)  # [G, H / G, K]: it sees all in use
    return scores.float().softmax(-1).flatten(0, 1)


class Watch:
    """What the last position of each call does, and what DeepStack adds to the prompt, gathered by
    hooks on the model's own modules."""

    def __init__(self, model: MossAudio, prompt: Prompt, mute: bool):
        self.model = model
        self.is_audio = prompt.ids == model.config.adapter.audio_token_id  # [N]
        self.mute = mute
        mergers = model.deepstack_audio_merger_list
        self.added = [[] for _ in mergers]  # of each merger, norms of its rows
        self.stream = [[] for _ in mergers]  # norms of what they are added to
        self.weights = {}  # of each layer, [H, K]
        self.states = {}  # what has left each layer, [D]

    def start(self) -> list:
        """Registers the hooks; returns their handles."""
        handles = []
        for k, merger in enumerate(self.model.deepstack_audio_merger_list):
            handles.append(merger.register_forward_hook(partial(self.see_merger, k)))
        for i, layer in enumerate(self.model.language_model.layers):
            handles.append(layer.self_attn.register_forward_hook(self.see_attention))
            handles.append(layer.register_forward_hook(partial(self.see_layer, i)))
        return handles

    def see_merger(self, k: int, merger: nn.Module, args, rows: Tensor) -> Tensor:
        """Returns what takes the place of merger k's rows [a, D]: themselves, or zeros."""
        if self.mute:
            rows = torch.zeros_like(rows)
        self.added[k].append(rows.float().norm(dim=-1).cpu())
        return rows

    def see_attention(self, attention: Attention, args, output: Tensor) -> None:
        self.weights[attention.layer] = last_weights(attention, *args).cpu()

    def see_layer(self, i: int, layer: nn.Module, args, output: Tensor) -> None:
        # The last position is text, to which DeepStack adds nothing.
        self.states[i] = output[0, -1]
        positions = args[1].positions[0].cpu()
        if i < len(self.stream) and positions[-1] < len(self.is_audio):
            rows = output[0][self.is_audio[positions]]
            self.stream[i].append(rows.float().norm(dim=-1).cpu())

    def said_by_layers(self) -> Tensor:
        """Returns each layer's output as probabilities of the next token, float32 [L, V]."""
        states = torch.stack([self.states[i] for i in sorted(self.states)])
        logits = self.model.lm_head(self.model.language_model.norm(states))
        return logits.float().softmax(-1).cpu()

    def added_to_columns(self, columns: list[Column], column_of: Tensor) -> list[list[float]]:
        """Returns what each merger's rows add to an audio token: their norm over the norm of what
        they are added to, the mean over a column, [mergers, C]."""
        counts = torch.tensor([len(column.ids) for column in columns])
        added = []
        for rows, stream in zip(self.added, self.stream):
            ratios = torch.cat(rows) / torch.cat(stream)  # [A]
            sums = torch.zeros(len(columns)).index_add(0, column_of[self.is_audio], ratios)
            added.append(rounded(sums / counts))
        return added


SHARES = ("text", "marker", "sound", "answer")  # where attention goes


def attention_columns(weights: Tensor, columns: list[Column], column_of: Tensor) -> Tensor:
    """Returns attention [L, H, K] on each column, then on each of SHARES: [L, H, C + 4]."""
    N = len(column_of)
    prompt = weights[:, :, :N]
    on_columns = weights.new_zeros(*weights.shape[:2], len(columns))
    on_columns.index_add_(2, column_of, prompt)
    shares = weights.new_zeros(*weights.shape[:2], len(SHARES))
    kinds = torch.tensor([SHARES.index(column.kind) for column in columns])
    shares.index_add_(2, kinds, on_columns)
    shares[:, :, -1] = weights[:, :, N:].sum(2)
    return torch.cat([on_columns, shares], 2)


def rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def chosen(token: int, said: Tensor) -> dict:
    """Returns what the page says of a token's choice. said: see Watch.said_by_layers."""
    rivals = said[-1].topk(min(RIVALS, said.shape[1]))
    best = said.max(-1)
    return {
        "id": token,
        "rank": 1 + int((said[-1] > said[-1, token]).sum()),
        "rivals": list(zip(rivals.indices.tolist(), rounded(rivals.values))),
        # Of each layer, the likeliest token, its probability, and the chosen token's.
        "layers": list(zip(best.indices.tolist(), rounded(best.values), rounded(said[:, token]))),
    }


@torch.no_grad()
def see(
    model: MossAudio, prompt: Prompt, clips, answer, most: int, mute=False, whole=True, report=None
) -> dict:
    """Returns what the page tells of one run. answer: ids; None: made greedily, up to `most`. mute:
    leave DeepStack out. whole: keep single heads and layers, where they are not too many."""
    layers = len(model.language_model.layers)
    room = model.fit(prompt, Sampling(most, 0)).max_new_tokens
    most = room if answer is None else len(answer)
    watch = Watch(model, prompt, mute)
    room = min(MOST_COLUMNS, LAYERS_BYTES // (layers * max(most, 1)))
    pool = max(1, math.ceil(int(watch.is_audio.sum()) / room))
    columns, column_of = columns_of(prompt.ids.tolist(), model.config.adapter, clips, pool)
    tokens = []
    by_head = []  # [L, H, C + 4] of each token, while they are not too many
    by_layer = []  # the mean over their heads, [L, 1, C + 4]
    cache = model.new_cache(1, len(prompt.ids) + most)
    step = Step(model, cache, [len(prompt.ids)], cuda_graph=False)
    handles = watch.start()
    try:
        logits = model.prefill(prompt, cache, report)
        while len(tokens) < most:
            token = int(logits.argmax()) if answer is None else answer[len(tokens)]
            tokens.append(chosen(token, watch.said_by_layers()))
            weights = torch.stack([watch.weights[i] for i in range(layers)])  # [L, H, K]
            attention = attention_columns(weights, columns, column_of)
            by_layer.append(attention.mean(1, keepdim=True))
            if whole and len(tokens) * attention.numel() <= HEADS_BYTES:
                by_head.append(attention)
            if len(tokens) == most or (answer is None and token in model.config.stop_ids):
                break
            logits = step(token)
    finally:
        for handle in handles:
            handle.remove()
    attention = torch.zeros(0, layers, 1, len(columns) + len(SHARES))
    if tokens:
        attention = torch.stack(by_head if len(by_head) == len(tokens) else by_layer)
    if not whole and attention.numel() > LAYERS_BYTES / 8:
        attention = attention.mean(1, keepdim=True)
    return {
        "tokens": tokens,
        "columns": columns,
        "pool": pool,
        # The square root in 8 bits keeps small weights apart.
        "attention": (attention.sqrt() * 255).round().to(torch.uint8),
        "shape": list(attention.shape),
        "added": watch.added_to_columns(columns, column_of),
        "cut": bool(tokens) and tokens[-1]["id"] not in model.config.stop_ids,
    }


# ---- the answer's text ----


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Returns what each id adds to the text; a character of several ids comes with its last."""
    pieces = []
    waiting = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        whole = not text.endswith("\ufffd")
        pieces.append(text if whole else "")
        if whole:
            waiting = []
    return pieces


def words_of(pieces: list[str], clips: list[dict]) -> list[dict]:
    """Returns the words between timestamps: text, seconds on the page's axis, tokens."""
    ends = list(accumulate(len(piece) for piece in pieces))
    stamps = list(STAMP.finditer("".join(pieces)))
    words = []
    clip = 0
    before = 0
    for stamp, following in zip(stamps, stamps[1:]):
        start = float(stamp[1])
        if start < before:
            clip = min(clip + 1, len(clips) - 1)  # times begin again with the next clip
        before = start
        text = stamp.string[stamp.end() : following.start()]
        if text.strip() and clips:
            first = bisect_right(ends, stamp.end())
            last = bisect_right(ends, following.start() - 1)
            times = [clips[clip]["start"] + float(x[1]) for x in (stamp, following)]
            words.append({"text": text.strip(), "times": times, "tokens": [first, last]})
    return words


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """Returns an id's text, or its name if it is a special token or a part of a character."""
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else tokenizer.id_to_token(token) or f"id {token}"


# ---- the page ----


def gather(
    model: MossAudio, clips, text: str, answer=None, time_markers=None, names=(), report=None
) -> dict:
    """Returns all that a page shows."""
    waves = [load_audio(clip) for clip in clips]
    require(waves, "no sound; expected at least one clip to look at")
    prompt = model.prompt(text, waves, time_markers)
    laid = layout(waves, model.config.encoder.n_window)
    given = None if answer is None else answer[:MOST_TOKENS]
    runs = {"whole": see(model, prompt, laid, given, MOST_TOKENS, report=report)}
    brief = partial(see, model, clips=laid, answer=None, most=MOST_TOKENS, whole=False)
    if any(column.kind == "marker" for column in runs["whole"]["columns"]):
        ids = model.prompt_ids(text, [mel.shape[1] for mel in prompt.mels], False)
        runs["no-markers"] = brief(Prompt(torch.tensor(ids), prompt.mels), report=report)
    if len(model.deepstack_audio_merger_list):
        runs["no-deepstack"] = brief(prompt, mute=True, report=report)
    used = set()
    reference = [token["id"] for token in runs["whole"]["tokens"]]
    for run in runs.values():
        ids = [token["id"] for token in run["tokens"]]
        run["pieces"] = pieces_of(model.tokenizer, ids)
        run["words"] = words_of(run["pieces"], laid)
        matcher = difflib.SequenceMatcher(None, reference, ids, autojunk=False)
        blocks = matcher.get_matching_blocks()
        same = {i for block in blocks for i in range(block.b, block.b + block.size)}
        run["changed"] = [i for i in range(len(ids)) if i not in same]
        for token in run["tokens"]:
            used.update([token["id"], *[x[0] for x in token["rivals"] + token["layers"]]])
        for column in run["columns"]:
            used.update(column.ids)
    for i, clip in enumerate(laid):
        clip["name"] = names[i] if i < len(names) else f"clip {i + 1}"
    wave = on_axis([wave[: len(wave) // HOP * HOP] for wave in waves], laid, SAMPLE_RATE)
    mel = on_axis(prompt.mels, laid, FRAMES)
    mel_pool = math.ceil(mel.shape[1] / MOST_FRAMES)
    if mel_pool > 1:
        mel = F.avg_pool1d(mel.float(), mel_pool, ceil_mode=True).to(torch.bfloat16)
    return {
        "prompt": text,
        "clips": laid,
        "names": {token: name_of(model.tokenizer, token) for token in sorted(used)},
        "runs": runs,
        "wave": wave,
        "outline": outline(wave),
        "mel": mel,
        "mel_pool": mel_pool,
        "taps": model.config.encoder.deepstack_encoder_layer_indexes,
        "layers": len(model.language_model.layers),
        "heads": model.config.decoder.num_attention_heads,
        "given": answer is not None,
        "answer_tokens": len(reference if answer is None else answer),
    }


def left_out(data: dict) -> list[str]:
    """Returns, in sentences, what the page averages or lacks."""
    whole = data["runs"]["whole"]
    others = [run["shape"][1] for name, run in data["runs"].items() if name != "whole"]
    cut = whole["cut"]
    shown = len(whole["tokens"])
    notes = {
        "Attention is stored in 8 bits.": True,
        "The heads of each layer are averaged.": whole["shape"][2] < data["heads"],
        "In the runs that leave an idea out, the heads are averaged.": others,
        "In at least one of these, so are the layers.": min(others, default=0) < data["layers"],
        f"A column of audio tokens is {whole['pool']} of them.": whole["pool"] > 1,
        f"A column of the log-mel is the mean of {data['mel_pool']} frames.": data["mel_pool"] > 1,
        f"The sound is not in the page: it is longer than {MOST_SECONDS} s.": data["sound"] is None,
        f"Of the answer's {data['answer_tokens']} tokens the first {shown} are shown.": (
            shown < data["answer_tokens"]
        ),
        f"The answer is cut after {shown} tokens.": cut and not data["given"],
        "The answer was given, and may have been drawn; the runs that leave an idea out are"
        " greedy.": data["given"],
    }
    return [sentence for sentence, holds in notes.items() if holds]


def plain(value):
    """Takes what JSON lacks to what it has: tensors to bytes in base64, columns to objects."""
    if isinstance(value, Column):
        return vars(value)
    if value.dtype == torch.bfloat16:
        value = value.view(torch.int16)  # numpy lacks it
    return base64.b64encode(value.numpy().tobytes()).decode()


def page(
    model: MossAudio,
    clips,
    prompt: str,
    answer: list[int] | None = None,
    time_markers: bool | None = None,
    names=(),
    source: str | None = None,
    report=None,
) -> str:
    """Returns the whole HTML page of an answer to a prompt about clips, as MossAudio.prompt takes
    them. answer: ids, which may have been drawn; None: it is made greedily. names: the clips'.
    source: the address under which the modules can be read. Raises ValueError, as prompt does."""
    data = gather(model, clips, prompt, answer, time_markers, names, report)
    wave = data.pop("wave")
    data["sound"] = None
    if len(wave) <= MOST_SECONDS * SAMPLE_RATE:
        file = io.BytesIO()
        soundfile.write(file, wave.numpy(), SAMPLE_RATE, format="WAV", subtype="PCM_16")
        data["sound"] = base64.b64encode(file.getvalue()).decode()
    data["notes"] = left_out(data)
    data["places"] = {}
    for panel, function in PLACES.items():
        path = Path(inspect.getsourcefile(function)).name
        line = inspect.getsourcelines(function)[1]
        link = f"{source.rstrip('/')}/{path}#L{line}" if source else None
        data["places"][panel] = [f"{function.__qualname__} in {path}", link]
    # No text can end the block: "<" is in it only as an escape, and so is all that is not ASCII.
    block = json.dumps(data, default=plain).replace("<", "\\u003c")
    return TEMPLATE.read_text("utf-8").replace("null", block, 1)


# ---- command line ----


def run(argv: list[str] | None) -> None:
    parser = Parser("look.py", __doc__.split("\n\nThe page")[0])
    add = parser.add_argument
    add("audio", nargs="+", metavar="CLIP", help="the clips of one prompt")
    add("--prompt", default=ASK, metavar="TEXT", help=f"what to ask ({ASK})")
    add("-o", dest="out", metavar="FILE", help="the page (look.html, unless --png is given)")
    add("--png", metavar="FILE", help="write a picture; needs matplotlib")
    add("--source", metavar="URL", help="where the page's links to the code lead")
    add_model_options(parser)
    args = parser.parse_args(argv)
    good = args.source is None or args.source.startswith(("https://", "http://"))
    require(good, f"--source is {args.source!r:.60}; expected an address, https://...")
    if args.out is None and args.png is None:
        args.out = "look.html"
    for path in (args.out, args.png):
        folder = Path(path or "look.html").parent
        require(folder.is_dir(), f"{folder} is no folder; expected one for {path}")
    waves = [load_audio(name) for name in args.audio]
    names = [Path(name).name for name in args.audio]
    model = MossAudio.from_pretrained(args.model, args.device, args.dtype, say)
    if args.out:
        html = page(model, waves, args.prompt, names=names, source=args.source, report=say)
        write_text(html, Path(args.out))
        say(f"{args.out}: {len(html) / 1e6:.2f} MB")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return end("look", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
