"""Shows what the model does with a sound: one page that explains itself, or a picture.

    python tools/look.py tiny/cards.wav -o look.html
    python tools/look.py tiny/cards.wav --png picture.png

The page is one file that opens from disk in any browser and asks nothing of the network. It holds
three greedy runs: with everything, without time markers and without DeepStack. Shapes: T mel
frames, A audio tokens, N prompt tokens, n tokens of the answer, L decoder layers, H query heads,
K positions, C columns of the page, which are a prompt token each, or several of a long prompt.
"""

import base64
import html
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
from batch import generate_batch
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
        tokens = [t for chunk in chunks for t in range(chunk, min(chunk + size, stop), STRIDE)]
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


def name_of(tokenizer, token: int) -> str:
    """Returns an id's text, or its name if it is a special token or a part of a character."""
    text = tokenizer.decode([token]).replace("\ufffd", "")
    return text or tokenizer.id_to_token(token) or f"id {token}"


def pairs(tokenizer, best) -> list[tuple[str, float]]:
    """Returns names and probabilities of what topk or max has found."""
    names = [name_of(tokenizer, token) for token in best.indices.tolist()]
    return [(name, round(share, 5)) for name, share in zip(names, best.values.tolist())]


@torch.no_grad()
def see(model: MossAudio, prompt: Prompt, answer: list[int], by_head=False, report=None) -> dict:
    """Returns what the page tells of one run. The prompt and its answer pass through the model once
    more, and hooks on its modules take notes. by_head: keep heads apart, if they aren't many."""
    layers = model.language_model.layers
    mergers = model.deepstack_audio_merger_list
    config = model.config.adapter
    N = len(prompt.ids)
    size = max(1, len(answer)) * len(layers)
    by_head = by_head and size * N * model.config.decoder.num_attention_heads <= HEADS_BYTES
    pool = math.ceil(size * N / LAYERS_BYTES)
    ids = torch.cat([prompt.ids, torch.tensor(answer[:-1], dtype=torch.int64)])
    starts = ids == config.audio_start_id
    # 0, which is TEXT, outside of a clip, and 1, which is MARKER, behind its start.
    kinds = starts.cumsum(0) - (ids == config.audio_end_id).cumsum(0) - starts.long()
    kinds[ids == config.audio_token_id] = SOUND
    kinds[N:] = ANSWER
    norms = defaultdict(list)  # of a merger's rows; of what has left a layer, at audio tokens
    states = defaultdict(list)  # what has left a layer, [r, D] of each slice
    seen = defaultdict(list)  # a layer's attention, [H or 1, r, C + 4] of each slice

    def see_rows(merger, args, rows: Tensor) -> None:
        norms[merger].append(rows.float().norm(dim=-1).cpu())

    def see_layer(layer, args, x: Tensor) -> None:
        before, cache = args
        positions = cache.positions[0].cpu()
        # DeepStack's rows are not yet in x.
        norms[layer].append(x[0, kinds[positions] == SOUND].float().norm(dim=-1).cpu())
        rows = positions >= N - 1  # each chooses a token of the answer
        if rows.any():
            found = weights(layer.self_attn, layer.input_layernorm(before), cache, rows).cpu()
            found = found if by_head else found.mean(0, keepdim=True)
            columns = F.pad(found[:, :, :N], (0, -N % pool)).unflatten(2, (-1, pool)).sum(3)
            shares = found @ F.one_hot(kinds[: cache.in_use], 4).float()
            seen[layer].append(torch.cat([columns, shares], 2))
            states[layer].append(x[0, rows])

    hooks = [merger.register_forward_hook(see_rows) for merger in mergers]
    hooks += [layer.register_forward_hook(see_layer) for layer in layers]
    try:
        model.prefill(Prompt(ids, prompt.mels), model.new_cache(1, len(ids)), report)
    finally:
        for hook in hooks:
            hook.remove()
    attention = torch.stack([torch.cat(seen[layer], 1) for layer in layers])
    attention = attention.permute(2, 0, 1, 3)[: len(answer)]  # [n, L, H or 1, C + 4]
    tokens = []
    for token, state in zip(answer, torch.stack([torch.cat(states[x]) for x in layers], 1)):
        # What each layer would have said: its output through the final norm and lm_head.
        said = model.lm_head(model.language_model.norm(state)).float().softmax(-1)  # [L, V]
        rivals = pairs(model.tokenizer, said[-1].topk(10))
        would_say = pairs(model.tokenizer, said.max(-1))
        name = name_of(model.tokenizer, token)
        tokens.append({"id": token, "name": name, "rivals": rivals, "layers": would_say})
    added = [torch.cat(norms[a]) / torch.cat(norms[b]) for a, b in zip(mergers, layers) if norms[a]]
    return {
        "ids": prompt.ids.tolist(),
        "names": [name_of(model.tokenizer, token) for token in prompt.ids.tolist()],
        "kinds": kinds[:N].tolist(),
        "tokens": tokens,
        "pool": pool,
        # The square root in 8 bits keeps small weights apart.
        "attention": (attention.sqrt() * 255).round().to(torch.uint8),
        "shape": list(attention.shape),
        "added": [ratios.tolist() for ratios in added],
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


# ---- the page and the picture ----


def gather(model, clips, text, answer=None, time_markers=True, report=None) -> dict:
    """Returns what a page shows; see page."""
    waves = [load_audio(clip) for clip in clips]
    require(waves, "no sound; expected at least one clip to look at")
    prompt = model.prompt(text, waves, time_markers)
    frames = [mel.shape[1] for mel in prompt.mels]
    laid = layout(frames, model.config.encoder.n_window)
    bare = Prompt(torch.tensor(model.prompt_ids(text, frames, False)), prompt.mels)
    mute = Prompt(prompt.ids, list(prompt.mels))

    def leave_out(encoder, args, heard):
        """Gives a prompt that is to be without DeepStack nothing from inside of the encoder."""
        return heard[:1] if args[0] is mute.mels else heard

    with model.audio_encoder.register_forward_hook(leave_out):
        if answer is None:
            answer = list(model.generate(prompt, MOST_TOKENS, 0, report=report))
        others = dict(generate_batch(model, [bare, mute], MOST_TOKENS, 0, report=report))
        runs = {
            "whole": see(model, prompt, answer[:MOST_TOKENS], True, report),
            "no-markers": see(model, bare, others[0], False, report),
            "no-deepstack": see(model, mute, others[1], False, report),
        }
    for run in runs.values():
        run["pieces"] = pieces_of(model.tokenizer, [token["id"] for token in run["tokens"]])
        run["words"] = words_of(run["pieces"], laid)
    lengths = [clip["padded"] - clip["start"] for clip in laid]
    mels = [F.pad(mel, (0, n - mel.shape[1])) for mel, n in zip(prompt.mels, lengths)]
    mel = torch.cat(mels, 1).float()
    pool = math.ceil(mel.shape[1] / MOST_FRAMES)
    mel = F.avg_pool1d(mel, pool, ceil_mode=True)
    mel = (mel - mel.min()) / (mel.max() - mel.min()).clamp(min=1e-9)
    waves = [F.pad(wave, (0, n * HOP - len(wave))) for wave, n in zip(waves, lengths)]
    wave = torch.cat(waves)
    loud = F.max_pool1d(wave.abs()[None], pool * HOP, ceil_mode=True)[0]
    averaged = "in the other runs" if runs["whole"]["shape"][2] > 1 else "in all runs"
    note = [
        f"Shown are at most {MOST_TOKENS} tokens of an answer, as 8-bit values.",
        f"The player has two minutes at most. Heads are averaged {averaged}. A column averages",
        f"{pool} frames of the log-mel and {runs['whole']['pool']} tokens of the prompt.",
    ]
    return {
        "prompt": text,
        "clips": laid,
        "names": [Path(clip).name for clip in clips if isinstance(clip, (str, Path))],
        "layers": model.config.decoder.num_hidden_layers,
        "heads": model.config.decoder.num_attention_heads,
        "taps": model.config.encoder.deepstack_encoder_layer_indexes,
        "colours": COLOURS,
        "runs": runs,
        "loud": (loud / loud.max().clamp(min=1e-9) * 255).to(torch.uint8),
        "mel": (255 * mel).round().to(torch.uint8),
        "columns": mel.shape[1],
        "wave": wave,
        "note": " ".join(note),
    }


def packed(tensor: Tensor) -> str:
    """Returns a tensor's bytes, compressed and in base64."""
    return base64.b64encode(zlib.compress(tensor.numpy().tobytes())).decode()


def page(model, clips, prompt, answer=None, time_markers=True, source=None, report=None) -> str:
    """Returns the whole HTML page of an answer to a prompt about clips, as MossAudio.prompt takes
    them. answer: ids, which may have been drawn; None: it is made greedily. source: the address
    under which the modules can be read. Raises ValueError, as prompt does."""
    data = gather(model, clips, prompt, answer, time_markers, report)
    file = io.BytesIO()
    soundfile.write(file, data.pop("wave")[:MOST_SAMPLES].numpy(), SAMPLE_RATE, format="WAV")
    data["sound"] = packed(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
    # No text can end the block: "<" is in it only as an escape, like all that is not ASCII.
    block = json.dumps(data, default=packed).replace("<", "\\u003c")
    text = TEMPLATE.read_text("utf-8")
    if source:
        text = text.replace('data-file="', f'href="{html.escape(source.rstrip("/"))}/')
    return text.replace("null", block, 1)


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
    markers = defaultdict(str)  # by their second
    for position, (name, kind) in enumerate(zip(run["names"], run["kinds"])):
        if kind == SOUND:
            columns.append(position // run["pool"])
        elif kind == MARKER:
            markers[edges[len(columns)]] += name
    strip.vlines(edges, 0, 1, "0.6", lw=0.6)
    for second, digits in markers.items():
        strip.text(second, 0.3, digits, color="w", ha="center", bbox={"facecolor": "teal"})
    strip.set(ylim=(0, 1), yticks=[], ylabel="prompt")
    weights = (run["attention"].float() / 255).square().mean((1, 2))[:, columns]  # [n, A]
    drawn = answer.pcolormesh(edges, range(len(weights) + 1), weights.numpy(), cmap=colours)
    places = [word["tokens"][0] + 0.5 for word in run["words"]]
    answer.set_yticks(places, [word["text"] for word in run["words"]])
    answer.set(ylim=(len(weights), 0), ylabel="answer, token by token", xlabel="seconds")
    figure.colorbar(drawn, ax=answer, label="attention", pad=0.01)
    with whole(Path(path)) as part:
        figure.savefig(part, dpi=80, format="png")


def run(argv: list[str] | None) -> None:
    """Writes a page or a picture."""
    parser = Parser("look.py", __doc__.partition("\n\nThe page")[0])
    add = parser.add_argument
    add("audio", nargs="+", metavar="CLIP", help="the clips of one prompt")
    add("--prompt", default=ASK, metavar="TEXT", help=f"what to ask ({ASK})")
    add("-o", dest="out", default="look.html", metavar="FILE", help="the page (look.html)")
    add("--png", metavar="FILE", help="write a picture instead; needs matplotlib")
    add("--source", metavar="URL", help="where the page's links to the code lead")
    add_model_options(parser)
    args = parser.parse_args(argv)
    model = MossAudio.from_pretrained(args.model, args.device, args.dtype, say)
    if args.png:
        picture(args.png, model, args.audio, args.prompt, say)
        return
    text = page(model, args.audio, args.prompt, source=args.source, report=say)
    write_text(text, Path(args.out))
    say(f"{args.out}: {len(text) / 1e6:.2f} MB")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return end("look", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
