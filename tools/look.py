"""Shows what the model does with a sound: one page that explains itself, or a picture.

    python tools/look.py tiny/cards.wav -o look.html
    python tools/look.py tiny/cards.wav --png picture.png

The page is one file that opens from disk in any browser and asks nothing of the network. It holds
three greedy runs: with everything, without time markers and without DeepStack. Shapes: T mel
frames, A audio tokens, N prompt tokens, n tokens of the answer, L decoder layers, H query heads,
K positions, C columns of the page, which are a prompt token each, or several of a long prompt.
"""

import base64
import difflib
import io
import json
import math
import sys
import zlib
from bisect import bisect_right
from collections import defaultdict
from itertools import accumulate
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import say, whole, write_text
from encoder import HOP, SAMPLE_RATE, STRIDE, load_audio, require
from evaluate import STAMP
from moss_min import MossAudio, Parser, Prompt, add_model_options, end
from qwen3 import Attention, KVCache, apply_rope

TEMPLATE = Path(__file__).with_name("look.html")
ASK = "Transcribe the audio with timestamps."
FRAMES = SAMPLE_RATE // HOP  # mel frames a second
TEXT, MARKER, SOUND, ANSWER = range(4)  # what attention goes to
# From paper to ink, in equal steps of lightness.
COLOURS = "#fbfaf6 #f5d3a6 #f5a46c #eb714b #d14159 #a02377 #631c7d #2d1961 #0b122a".split()

# These bound a page's size. What goes beyond is left out or averaged, and the page says so.
MOST_TOKENS = 400  # of the answer
MOST_COLUMNS = 3000  # of the prompt
MOST_FRAMES = 6000  # columns of the log-mel
MOST_SAMPLES = 120 * SAMPLE_RATE  # of the player's sound
HEADS_BYTES = 1_400_000  # attention of all heads
LAYERS_BYTES = 6_000_000  # attention of all layers


def layout(frames: list[int], n_window: int) -> list[dict]:
    """Lays clips of so many mel frames on the page's time axis, one after another. Returns for each
    its start and end, the end of its padding, and where its chunks and audio tokens start."""
    size = 2 * n_window  # of a chunk
    clips = []
    start = 0
    for length in frames:
        stop = start + length
        chunks = list(range(start, stop, size))
        padded = chunks[-1] + min(size, max(frames))  # as split_chunks does
        parts = [range(chunk, min(chunk + size, stop), STRIDE) for chunk in chunks]
        tokens = [first for part in parts for first in part]
        clip = {"start": start, "end": stop, "padded": padded, "chunks": chunks, "tokens": tokens}
        clips.append(clip)
        start = padded
    return clips


# ---- one run ----


def weights(attention: Attention, x: Tensor, cache: KVCache, rows: Tensor) -> Tensor:
    """Returns the attention weights [H, r, K] of r rows of x [1, n, D], whose keys the cache holds.
    SDPA gives none, so they are computed again from q and k."""
    q = attention.q_proj(x[0, rows]).unflatten(1, (-1, attention.head_dim))  # [r, H, hd]
    q = apply_rope(attention.q_norm(q), cache.cos[0, rows], cache.sin[0, rows]).transpose(0, 1)
    keys = cache.keys[attention.layer][0, :, : cache.in_use]  # [G, K, hd]
    keys = keys.repeat_interleave(len(q) // len(keys), dim=0)  # [H, K, hd]
    scores = q @ keys.mT / math.sqrt(attention.head_dim)
    later = torch.arange(cache.in_use, device=x.device) > cache.positions[0, rows, None]  # [r, K]
    return scores.float().masked_fill(later, -torch.inf).softmax(-1)


def pairs(best) -> list[tuple[int, float]]:
    """Returns ids and probabilities of what topk or max has found."""
    return [(i, round(p, 5)) for i, p in zip(best.indices.tolist(), best.values.tolist())]


@torch.no_grad()
def see(model: MossAudio, prompt: Prompt, answer=None, mute=False, whole=True, report=None) -> dict:
    """Returns what the page tells of one run. answer: ids; None: it is made greedily. mute: leave
    DeepStack out. whole: keep single heads, if they are not too many. After the answer, one more
    pass goes over the prompt and it, in which hooks on the model's own modules take notes."""
    layers = model.language_model.layers
    mergers = model.deepstack_audio_merger_list
    config = model.config.adapter
    N = len(prompt.ids)
    norms = defaultdict(list)  # of a merger's rows; of what has left a layer, at audio tokens
    states = defaultdict(list)  # what has left a layer, [r, D] of each slice
    seen = defaultdict(list)  # a layer's attention, [H or 1, r, C + 4] of each slice

    def see_rows(merger, args, rows: Tensor) -> Tensor:
        rows = torch.zeros_like(rows) if mute else rows
        norms[merger].append(rows.float().norm(dim=-1).cpu())
        return rows

    def see_layer(layer, args, x: Tensor) -> None:
        # DeepStack's rows come after the layer, and add nothing to text, like these rows.
        positions = args[1].positions[0].cpu()
        states[layer].append(x[0, positions >= N - 1])
        norms[layer].append(x[0, kinds[positions] == SOUND].float().norm(dim=-1).cpu())

    def see_attention(attention: Attention, args, x: Tensor) -> None:
        rows = args[1].positions[0] >= N - 1
        if not rows.any():
            return  # a slice of the prompt alone
        found = weights(attention, *args, rows).cpu()  # [H, r, K]
        found = found if with_heads else found.mean(0, keepdim=True)
        columns = F.pad(found[:, :, :N], (0, -N % pool)).unflatten(2, (-1, pool)).sum(3)
        shares = found @ F.one_hot(kinds[: found.shape[2]], 4).float()
        seen[attention].append(torch.cat([columns, shares], 2))

    hooks = [merger.register_forward_hook(see_rows) for merger in mergers]
    try:
        if answer is None:
            answer = list(model.generate(prompt, MOST_TOKENS, 0, report=report))
        norms.clear()
        size = max(1, len(answer)) * len(layers)
        with_heads = whole and size * N * model.config.decoder.num_attention_heads <= HEADS_BYTES
        pool = math.ceil(N / min(MOST_COLUMNS, LAYERS_BYTES // size))
        ids = torch.cat([prompt.ids, torch.tensor(answer[:-1], dtype=torch.int64)])
        starts = ids == config.audio_start_id
        kinds = starts.cumsum(0) - (ids == config.audio_end_id).cumsum(0) - starts.long()
        kinds[ids == config.audio_token_id] = SOUND  # what else is inside of a clip is a marker
        kinds[N:] = ANSWER
        for layer in layers:
            hooks.append(layer.register_forward_hook(see_layer))
            hooks.append(layer.self_attn.register_forward_hook(see_attention))
        model.prefill(Prompt(ids, prompt.mels), model.new_cache(1, len(ids)), report)
    finally:
        for hook in hooks:
            hook.remove()
    attention = torch.stack([torch.cat(seen[layer.self_attn], 1) for layer in layers])
    attention = attention.permute(2, 0, 1, 3)[: len(answer)]  # [n, L, H or 1, C + 4]
    tokens = []
    for token, state in zip(answer, torch.stack([torch.cat(states[x]) for x in layers], 1)):
        # What each layer would have said: its output through the final norm and lm_head.
        said = model.lm_head(model.language_model.norm(state)).float().softmax(-1)  # [L, V]
        tokens.append(
            {"id": token, "rivals": pairs(said[-1].topk(10)), "layers": pairs(said.max(-1))}
        )
    return {
        "ids": prompt.ids.tolist(),
        "kinds": kinds[:N].tolist(),
        "tokens": tokens,
        "pool": pool,
        # The square root in 8 bits keeps small weights apart.
        "attention": (attention.sqrt() * 255).round().to(torch.uint8),
        "shape": list(attention.shape),
        "added": [
            (torch.cat(norms[a]) / torch.cat(norms[b])).tolist() for a, b in zip(mergers, layers)
        ],
    }


# ---- the answer's text ----


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    """Returns what each id adds to the text; a character of several ids comes with its last."""
    texts = [tokenizer.decode(ids[:i]).rstrip("\ufffd") for i in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(texts, texts[1:])]


def words_of(pieces: list[str], clips: list[dict]) -> list[dict]:
    """Returns the words between timestamps: text, frames on the page's axis, and tokens."""
    ends = list(accumulate(len(piece) for piece in pieces))
    stamps = list(STAMP.finditer("".join(pieces)))
    words = []
    clip = 0
    for before, stamp, following in zip([None, *stamps], stamps, stamps[1:]):
        if before and float(stamp[1]) < float(before[1]) and clip + 1 < len(clips):
            clip += 1  # times begin again with the next clip
        text = stamp.string[stamp.end() : following.start()].strip()
        if text:
            times = [clips[clip]["start"] + FRAMES * float(x[1]) for x in (stamp, following)]
            tokens = [bisect_right(ends, x) for x in (stamp.end(), following.start() - 1)]
            words.append({"text": text, "times": times, "tokens": tokens})
    return words


def name_of(tokenizer, token: int) -> str:
    """Returns an id's text, or its name if it is a special token or a part of a character."""
    text = tokenizer.decode([token]).replace("\ufffd", "")
    return text or tokenizer.id_to_token(token) or f"id {token}"


# ---- the page and the picture ----


def gather(model, clips, text, answer=None, time_markers=True, names=(), report=None) -> dict:
    """Returns what a page shows; see page."""
    waves = [load_audio(clip) for clip in clips]
    require(waves, "no sound; expected at least one clip to look at")
    prompt = model.prompt(text, waves, time_markers)
    frames = [mel.shape[1] for mel in prompt.mels]
    laid = layout(frames, model.config.encoder.n_window)
    shown = None if answer is None else answer[:MOST_TOKENS]
    runs = {"whole": see(model, prompt, shown, report=report)}
    bare = Prompt(torch.tensor(model.prompt_ids(text, frames, False)), prompt.mels)
    if len(bare.ids) < len(prompt.ids):
        runs["no-markers"] = see(model, bare, whole=False, report=report)
    if len(model.deepstack_audio_merger_list):
        runs["no-deepstack"] = see(model, prompt, mute=True, whole=False, report=report)
    used = set()
    reference = [token["id"] for token in runs["whole"]["tokens"]]
    for run in runs.values():
        ids = [token["id"] for token in run["tokens"]]
        run["pieces"] = pieces_of(model.tokenizer, ids)
        run["words"] = words_of(run["pieces"], laid)
        blocks = difflib.SequenceMatcher(None, reference, ids, False).get_matching_blocks()
        run["same"] = [i for block in blocks for i in range(block.b, block.b + block.size)]
        used.update(ids, run["ids"])
        for token in run["tokens"]:
            used.update(x[0] for x in token["rivals"] + token["layers"])
    lengths = [clip["padded"] - clip["start"] for clip in laid]
    mels = [F.pad(mel, (0, n - mel.shape[1])) for mel, n in zip(prompt.mels, lengths)]
    mel = torch.cat(mels, 1).float()
    pool = math.ceil(mel.shape[1] / MOST_FRAMES)
    mel = F.avg_pool1d(mel, pool, ceil_mode=True)
    mel = (mel - mel.min()) / (mel.max() - mel.min()).clamp(min=1e-9)
    waves = [F.pad(wave, (0, n * HOP - len(wave))) for wave, n in zip(waves, lengths)]
    wave = torch.cat(waves)
    loud = F.max_pool1d(wave.abs()[None], math.ceil(len(wave) / 3000), ceil_mode=True)[0]
    count = len(reference)
    ended = reference[-1] in model.config.stop_ids if answer is None else count == len(answer)
    notes = {
        "All values are stored in 8 bits. Where an idea is left out, heads are averaged.": True,
        "They are averaged in the whole run, too.": runs["whole"]["shape"][2] == 1,
        f"Attention goes to {runs['whole']['pool']} tokens together.": runs["whole"]["pool"] > 1,
        f"A column of the log-mel is the mean of {pool} frames.": pool > 1,
        "The player has the first two minutes.": len(wave) > MOST_SAMPLES,
        f"Of the answer only {count} tokens are shown.": not ended,
        "The whole run's answer was given; the others are greedy.": answer is not None,
    }
    return {
        "prompt": text,
        "clips": laid,
        "clip_names": list(names) or [f"clip {i + 1}" for i in range(len(laid))],
        "names": {token: name_of(model.tokenizer, token) for token in used},
        "layers": model.config.decoder.num_hidden_layers,
        "heads": model.config.decoder.num_attention_heads,
        "taps": model.config.encoder.deepstack_encoder_layer_indexes,
        "colours": COLOURS,
        "runs": runs,
        "loud": (loud / loud.max().clamp(min=1e-9) * 255).to(torch.uint8),
        "mel": (255 * mel).round().to(torch.uint8),
        "wave": wave,
        "notes": [sentence for sentence, holds in notes.items() if holds],
    }


def packed(tensor: Tensor) -> str:
    """Returns a tensor's bytes, compressed and in base64."""
    return base64.b64encode(zlib.compress(tensor.numpy().tobytes())).decode()


def page(
    model, clips, prompt, answer=None, time_markers=True, names=(), source=None, report=None
) -> str:
    """Returns the whole HTML page of an answer to a prompt about clips, as MossAudio.prompt takes
    them. answer: ids, which may have been drawn; None: it is made greedily. names: the clips'.
    source: the address under which the modules can be read. Raises ValueError, as prompt does."""
    data = gather(model, clips, prompt, answer, time_markers, names, report)
    file = io.BytesIO()
    soundfile.write(file, data.pop("wave")[:MOST_SAMPLES].numpy(), SAMPLE_RATE, format="WAV")
    data["sound"] = packed(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
    data["source"] = source and source.rstrip("/")
    # No text can end the block: "<" is in it only as an escape, like all that is not ASCII.
    block = json.dumps(data, default=packed).replace("<", "\\u003c")
    return TEMPLATE.read_text("utf-8").replace("null", block, 1)


def picture(path: str, model, clips, prompt, report=None) -> None:
    """Draws the sound, the log-mel, the prompt and its greedy answer's attention as a PNG file."""
    try:
        from matplotlib import colors, pyplot
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install matplotlib") from None
    data = gather(model, clips, prompt, report=report)
    pyplot.rcParams["text.parse_math"] = False  # a dollar sign is one
    colours = colors.LinearSegmentedColormap.from_list("look", COLOURS)
    run = data["runs"]["whole"]
    edges = [frame / FRAMES for clip in data["clips"] for frame in clip["tokens"]]
    edges.append(data["clips"][-1]["end"] / FRAMES)
    figure, (sound, mel, strip, answer) = pyplot.subplots(
        4, sharex=True, figsize=(11, 7), height_ratios=(3, 4, 1, 6), layout="constrained"
    )
    wave = data["wave"] / data["wave"].abs().max().clamp(min=1e-9)
    sound.plot(np.arange(len(wave)) / SAMPLE_RATE, wave.numpy(), "0.4", lw=0.4)
    for i, word in enumerate(run["words"]):
        start, stop = [frame / FRAMES for frame in word["times"]]
        sound.axvspan(start, stop, color="tab:orange", alpha=0.2 + 0.15 * (i % 2), lw=0)
        sound.text(start, 1.2 + 0.5 * (i % 3), word["text"])
    sound.set(ylim=(-1.1, 2.8), yticks=[], ylabel="sound", title=prompt, xlim=(0, edges[-1]))
    extent = (0, data["clips"][-1]["padded"] / FRAMES, 0, 128)
    mel.imshow(data["mel"].numpy(), colours, aspect="auto", origin="lower", extent=extent)
    mel.set(yticks=[], ylabel="log-mel")
    columns = []  # of the audio tokens
    markers = defaultdict(str)
    for position, (token, kind) in enumerate(zip(run["ids"], run["kinds"])):
        if kind == SOUND:
            columns.append(position // run["pool"])
        elif kind == MARKER:
            markers[edges[len(columns)]] += data["names"][token]
    strip.vlines(edges, 0, 1, "0.6", lw=0.6)
    for second, digits in markers.items():
        strip.text(second, 0.3, digits, color="w", ha="center", bbox={"facecolor": "teal"})
    strip.set(ylim=(0, 1), yticks=[], ylabel="prompt")
    weights = (run["attention"].float() / 255).square().mean((1, 2))[:, columns]  # [n, A]
    drawn = answer.pcolormesh(edges, range(len(weights) + 1), weights.numpy(), cmap=colours)
    answer.set_yticks([word["tokens"][0] + 0.5 for word in run["words"]])
    answer.set_yticklabels([word["text"] for word in run["words"]])
    answer.set(ylim=(len(weights), 0), ylabel="answer, token by token", xlabel="seconds")
    figure.colorbar(drawn, ax=answer, label="attention", pad=0.01)
    figure.align_ylabels()
    with whole(Path(path)) as part:
        figure.savefig(part, dpi=80, format="png")


def run(argv: list[str] | None) -> None:
    """Writes a page, a picture or both."""
    parser = Parser("look.py", __doc__.partition("\n\nThe page")[0])
    add = parser.add_argument
    add("audio", nargs="+", metavar="CLIP", help="the clips of one prompt")
    add("--prompt", default=ASK, metavar="TEXT", help=f"what to ask ({ASK})")
    add("-o", dest="out", metavar="FILE", help="the page (look.html, unless --png is given)")
    add("--png", metavar="FILE", help="write a picture; needs matplotlib")
    add("--source", metavar="URL", help="where the page's links to the code lead")
    add_model_options(parser)
    args = parser.parse_args(argv)
    is_address = (args.source or "https://").startswith(("https://", "http://"))
    require(is_address, f"--source is {args.source!r:.60}; expected an address, https://...")
    if args.out is None and args.png is None:
        args.out = "look.html"
    waves = [load_audio(name) for name in args.audio]
    names = [Path(name).name for name in args.audio]
    model = MossAudio.from_pretrained(args.model, args.device, args.dtype, say)
    if args.png:
        picture(args.png, model, waves, args.prompt, say)
    if args.out:
        html = page(model, waves, args.prompt, names=names, source=args.source, report=say)
        write_text(html, Path(args.out))
        say(f"{args.out}: {len(html) / 1e6:.2f} MB")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return end("look", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
