"""The porter: the whole model once more, log-mel to logits, in plain functions over the checkpoint's tensors.

Written from the specification, with none of the modules, as a port to C++ would be: one clip, one chunk after another,
no batches, no masks for padding, no cache. What ports have been seen to do wrong can be asked for by name, alone or
together, and tests/test_parity.py finds it again in the numbers. Shapes: T mel frames, A audio tokens, t frames and L
tokens of a chunk, N prompt tokens, H query heads of size hd.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

MISTAKES = (
    "mel-30s",
    "mel-float32",
    "mel-last-frame-kept",
    "mel-htk",
    "mel-natural-log",
    "mel-zero-padded",
    "mel-symmetric-window",
    "full-clip-attention",
    "positions-not-restarted",
    "tail-not-padded",
    "gelu-tanh-stem",
    "gelu-tanh-layers",
    "stem-mel-major",
    "query-scaled-before-bias",
    "layer-norm-eps",  # 1e-6, or another as "layer-norm-eps=1e-3"
    "tap-one-layer-early",
    "taps-reversed",
    "taps-after-norm",
    "gate-up-swapped",
    "no-time-markers",
    "no-deepstack",
    "deepstack-at-layer-input",
    "deepstack-before-mlp",
    "deepstack-one-layer-late",
    "deepstack-at-markers",
    "attention-scale",
    "no-qk-norm",
    "qk-norm-after-rope",
    "rope-interleaved",
    "rope-theta-10000",
    "rope-bfloat16-angles",
)
HARMLESS = (
    "mel-single-precision",  # float32 throughout, as C++ ports do, then rounded to bfloat16: a step off here and there
    "layers-before-injection",  # what is recorded of a decoder layer, as transformers' output_hidden_states does
)


def run(
    folder: Path,
    waveform: Tensor,
    before: list[int],
    after: list[int],
    mistakes=(),
    dtype=torch.float32,
    time_markers=True,
) -> dict[str, Tensor]:
    """Every stage of one pass over a prompt with one clip, in the order in which they are computed.

    folder: a checkpoint folder. waveform: float32 [S] at 16 kHz. before, after: the ids of the text around the clip.
    mistakes: of MISTAKES and HARMLESS. dtype: that of weights and arithmetic, and of the stages but for mel and logits.
    Names and shapes are those of golden/README.md; encoder.conv1..3 are [chunks, channels, mel, frames], after GELU.
    """
    wrong, eps = set(), None  # eps: of every norm of the encoder, where that is a mistake
    for name in mistakes:
        if name.startswith("layer-norm-eps"):
            name, _, value = name.partition("=")
            eps = float(value or 1e-6)
        if name not in MISTAKES + HARMLESS:
            raise ValueError(
                f"unknown mistake {name!r}; expected one of {', '.join(MISTAKES + HARMLESS)}"
            )
        wrong.add(name)
    w, config, processor = load(Path(folder), dtype)
    with torch.no_grad():
        mel = log_mel(waveform.numpy(), wrong)
        stages, output, taps = encode(w, config, mel.to(dtype), wrong, eps)
        stages = {
            "waveform.0": waveform,
            "mel.0": mel,
            **stages,
            "adapter": project(w, "audio_adapter", output, wrong),
        }
        deepstack = [
            project(w, f"deepstack_audio_merger_list.{k}", tap, wrong) for k, tap in enumerate(taps)
        ]
        stages |= {f"deepstack.{k}": rows for k, rows in enumerate(deepstack)}
        audio_id = processor.get("audio_token_id", 151_654)
        sound = audio_ids(len(output), audio_id, time_markers and "no-time-markers" not in wrong)
        start, end = (
            processor.get("audio_start_id", 151_669),
            processor.get("audio_end_id", 151_670),
        )
        ids = torch.tensor([*before, start, *sound, end, *after])
        stages["input_ids"] = ids.to(torch.int32)
        at = (ids == audio_id).nonzero()[:, 0]  # [A]
        x = w["language_model.embed_tokens.weight"][ids]
        x[at] = stages["adapter"]
        if "deepstack-at-markers" in wrong:
            at = at[0] + torch.arange(
                len(at)
            )  # without a gap, so that markers get rows and the last audio tokens none
        laid = [
            torch.zeros_like(x).index_copy(0, at, rows) for rows in deepstack
        ]  # [N, hidden] each
        return stages | {"inputs_embeds": x} | decode(w, config["language_config"], x, laid, wrong)


@functools.cache
def load(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict, dict]:
    """All tensors by their names in the checkpoint, config.json and processor_config.json."""
    shards = [load_file(path) for path in sorted(folder.glob("model*.safetensors"))]
    w = {name: tensor.to(dtype) for shard in shards for name, tensor in shard.items()}
    config, processor = (
        folder / "config.json",
        folder / "processor_config.json",
    )  # one released folder lacks the latter
    return (
        w,
        json.loads(config.read_text()),
        json.loads(processor.read_text()) if processor.exists() else {},
    )


# ---- log-mel ----


def mel_filters(wrong: set) -> np.ndarray:
    """128 triangles over the 201 frequencies of the spectrum: [128, 201]."""
    if "mel-htk" in wrong:
        edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1)
    else:  # Slaney: 200/3 Hz a mel up to 1000 Hz, which is 15 mel, and 27 mel for a factor of 6.4 from there
        mels = np.linspace(0, 15 + 27 * math.log(8) / math.log(6.4), 130)
        edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    triangles = [np.interp(np.arange(201) * 40.0, edges[m : m + 3], [0, 1, 0]) for m in range(128)]
    return np.array(triangles) * 2 / (edges[2:] - edges[:-2])[:, None]


def log_mel(wave: np.ndarray, wrong: set) -> Tensor:
    """float32 [S] to bfloat16 [128, T], T = S // 160."""
    if "mel-30s" in wrong:
        wave = np.pad(wave, (0, max(0, 480_000 - len(wave))))
    real = np.float32 if "mel-single-precision" in wrong else np.float64
    frames = 1 + len(wave) // 160
    padded = np.pad(wave, 200, mode="constant" if "mel-zero-padded" in wrong else "reflect").astype(
        real
    )
    samples = padded[160 * np.arange(frames)[:, None] + np.arange(400)]  # [T + 1, 400]
    period = 399 if "mel-symmetric-window" in wrong else 400
    samples = samples * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / period)).astype(real)
    turns = (
        np.outer(np.arange(400), np.arange(201)) % 400 * (2 * np.pi / 400)
    )  # the Fourier transform, written out
    parts = [
        (samples @ of(turns).astype(real)).astype(np.float32) for of in (np.cos, np.sin)
    ]  # [T + 1, 201] each
    power = sum(part.astype(real) ** 2 for part in parts) @ mel_filters(wrong).T.astype(
        real
    )  # [T + 1, 128]
    log = np.log if "mel-natural-log" in wrong else np.log10
    x = log(np.maximum(power, 1e-10)).astype(np.float32).T  # [128, T + 1]
    x = x if "mel-last-frame-kept" in wrong else x[:, :-1]
    x = torch.from_numpy((np.maximum(x, x.max() - 8) + 4) / 4)
    return x if "mel-float32" in wrong else x.to(torch.bfloat16)


# ---- encoder ----


def linear(w: dict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Queries [n, H, hd], keys and values [n, G, hd], each for H / G heads, to [n, H * hd]."""
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -math.inf
        )
    weights = scores.float().softmax(-1).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def stem(w: dict, audio: dict, mel: Tensor, wrong: set) -> tuple[dict[str, Tensor], list[int]]:
    """Log-mel [128, T] to encoder.conv1..3 and encoder.stem [A, width], and the tokens of each chunk, A together."""
    size = mel.shape[1] if "full-clip-attention" in wrong else 2 * audio.get("n_window", 200)
    chunks = mel.split(size, dim=1)
    lengths = [math.ceil(chunk.shape[1] / 8) for chunk in chunks]
    if "tail-not-padded" not in wrong:  # a tail beside a full chunk is as long as that, with zeros
        chunks = [F.pad(chunk, (0, chunks[0].shape[1] - chunk.shape[1])) for chunk in chunks]
    half = audio["d_model"] // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))  # [width / 2]
    convs, rows = ([], [], []), []
    for j, (chunk, length) in enumerate(zip(chunks, lengths)):
        x = chunk[None, None]  # [1, 1, 128, t]
        for n, conv in enumerate(convs, 1):
            x = F.conv2d(
                x,
                w[f"audio_encoder.conv{n}.weight"],
                w[f"audio_encoder.conv{n}.bias"],
                stride=2,
                padding=1,
            )
            x = F.gelu(x, approximate="tanh" if "gelu-tanh-stem" in wrong else "none")
            conv.append(x[0])
        x = (
            x[0].permute(2, 1, 0) if "stem-mel-major" in wrong else x[0].permute(2, 0, 1)
        )  # [L, channels, 16]
        first = j * lengths[0] if "positions-not-restarted" in wrong else 0
        angles = (first + torch.arange(len(x)))[:, None] * rates
        x = linear(w, "audio_encoder.stem_proj", x.flatten(1)) + torch.cat(
            [angles.sin(), angles.cos()], 1
        ).to(x.dtype)
        rows.append(x[:length])  # what is padding goes here: no real token attends to it
    stages = {}
    for n, conv in enumerate(
        convs, 1
    ):  # chunks of unequal lengths, a mistake, are stored with zeros behind the tail
        stages[f"encoder.conv{n}"] = torch.stack(
            [F.pad(x, (0, conv[0].shape[2] - x.shape[2])) for x in conv]
        )
    return stages | {"encoder.stem": torch.cat(rows)}, lengths


def encode(w: dict, config: dict, mel: Tensor, wrong: set, eps: float | None):
    """Log-mel [128, T] to the encoder's stages, and its output and the taps in use, each [A, output_dim]."""
    audio = config["audio_config"]
    heads, width = audio["encoder_attention_heads"], audio["d_model"]
    scale = (width // heads) ** -0.5
    tanh = "tanh" if "gelu-tanh-layers" in wrong else "none"

    def norm(name: str, x: Tensor, right: float = 1e-5) -> Tensor:
        weight, bias = (w[f"audio_encoder.{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, (width,), weight, bias, eps or right)

    stages, lengths = stem(w, audio, mel, wrong)
    x = stages["encoder.stem"]
    outputs = [x]
    for i in range(audio["encoder_layers"]):
        name = f"audio_encoder.layers.{i}"
        h = norm(f"layers.{i}.self_attn_layer_norm", x)
        q, k, v = (
            linear(w, f"{name}.self_attn.{part}_proj", h) for part in "qkv"
        )  # [A, width] each
        q = q * scale
        if "query-scaled-before-bias" in wrong:
            weight, bias = (w[f"{name}.self_attn.q_proj.{part}"] for part in ("weight", "bias"))
            q = h @ weight.T * scale + bias
        chunks = zip(
            *(y.unflatten(1, (heads, -1)).split(lengths) for y in (q, k, v))
        )  # of each q, k, v [L, H, hd]
        h = torch.cat([attention(*chunk, scale=1.0, causal=False) for chunk in chunks])
        x = x + linear(w, f"{name}.self_attn.out_proj", h)
        h = linear(w, f"{name}.fc1", norm(f"layers.{i}.final_layer_norm", x))
        x = x + linear(w, f"{name}.fc2", F.gelu(h, approximate=tanh))
        x = x.clamp(-64_504, 64_504) if x.dtype == torch.float16 else x
        outputs.append(x)
        stages[f"encoder.layers.{i}"] = x

    def final_norm(x: Tensor) -> Tensor:
        return norm("layer_norm", x, audio["layer_norm_eps"])

    def leave(x: Tensor) -> Tensor:
        return x if audio["output_dim"] == width else linear(w, "audio_encoder.out_proj", x)

    stages["encoder"] = leave(final_norm(x))
    indexes = audio["deepstack_encoder_layer_indexes"]
    indexes = indexes[: config.get("deepstack_num_inject_layers", len(indexes))]
    taps = [outputs[i if "tap-one-layer-early" in wrong else i + 1] for i in indexes]
    taps = [leave(final_norm(tap) if "taps-after-norm" in wrong else tap) for tap in taps]
    return stages, stages["encoder"], taps[::-1] if "taps-reversed" in wrong else taps


# ---- adapters and prompt ----


def gated(w: dict, name: str, x: Tensor, gate="gate_proj", up="up_proj") -> Tensor:
    return linear(
        w,
        f"{name}.down_proj",
        F.silu(linear(w, f"{name}.{gate}", x)) * linear(w, f"{name}.{up}", x),
    )


def project(w: dict, name: str, x: Tensor, wrong: set) -> Tensor:
    """The adapter or a merger: [A, output_dim] to [A, hidden]."""
    return (
        gated(w, name, x, "up_proj", "gate_proj")
        if "gate-up-swapped" in wrong
        else gated(w, name, x)
    )


def audio_ids(tokens: int, audio_id: int, time_markers: bool) -> list[int]:
    """A clip's ids: after every 25 audio tokens, 2 s, the seconds so far in digits, "0" to "9" being 15 to 24."""
    ids = [audio_id] * tokens
    if time_markers:
        for second in range(
            tokens // 25 * 2, 0, -2
        ):  # from the last on, so that earlier places stay
            place = second // 2 * 25
            ids[place:place] = [15 + int(digit) for digit in str(second)]
    return ids


# ---- decoder ----


def rms_norm(w: dict, name: str, x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return w[f"{name}.weight"] * (
        wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    ).to(x.dtype)


def rope_angles(n: int, text: dict, wrong: set) -> Tensor:
    """float32 [n, hd / 2]."""
    base = 10_000.0 if "rope-theta-10000" in wrong else text["rope_theta"]
    rates = 1 / base ** (torch.arange(0, text["head_dim"], 2) / text["head_dim"])
    positions = torch.arange(n)[:, None].float()
    if "rope-bfloat16-angles" in wrong:
        return (positions * rates.bfloat16().float()).bfloat16().float()
    return positions * rates


def rotate(x: Tensor, angles: Tensor, wrong: set) -> Tensor:
    """Heads [n, H, hd], each pair of dimensions turned by its angle."""
    cos, sin = (
        table.to(x.dtype)[:, None] for table in (angles.cos(), angles.sin())
    )  # [n, 1, hd / 2]
    interleaved = "rope-interleaved" in wrong
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.stack(turned, dim=-1).flatten(2) if interleaved else torch.cat(turned, dim=-1)


def turned_head(w: dict, name: str, x: Tensor, angles: Tensor, eps: float, wrong: set) -> Tensor:
    """Queries or keys [n, H, hd], normalised over hd and turned."""
    if "no-qk-norm" in wrong:
        return rotate(x, angles, wrong)
    if "qk-norm-after-rope" in wrong:
        return rms_norm(w, name, rotate(x, angles, wrong), eps)
    return rotate(rms_norm(w, name, x, eps), angles, wrong)


def decode(
    w: dict, text: dict, x: Tensor, deepstack: list[Tensor], wrong: set
) -> dict[str, Tensor]:
    """Embeddings [N, hidden] and DeepStack rows, [N, hidden] for each of the first layers, to the decoder's stages."""
    head_dim, eps = text["head_dim"], text["rms_norm_eps"]
    scale = (
        text["hidden_size"] / text["num_attention_heads"]
        if "attention-scale" in wrong
        else head_dim
    ) ** -0.5
    angles = rope_angles(len(x), text, wrong)
    at_input, before_mlp = "deepstack-at-layer-input" in wrong, "deepstack-before-mlp" in wrong
    late = "deepstack-one-layer-late" in wrong
    deepstack = [] if "no-deepstack" in wrong else deepstack
    stages = {}
    for i in range(text["num_hidden_layers"]):
        name = f"language_model.layers.{i}"
        rows = deepstack[i - late] if 0 <= i - late < len(deepstack) else torch.zeros_like(x)
        if at_input:
            x = x + rows
        h = rms_norm(w, f"{name}.input_layernorm", x, eps)
        projections = (linear(w, f"{name}.self_attn.{part}_proj", h) for part in "qkv")
        q, k, v = (y.unflatten(1, (-1, head_dim)) for y in projections)  # [N, H or G, hd]
        q, k = (
            turned_head(w, f"{name}.self_attn.{part}_norm", y, angles, eps, wrong)
            for part, y in (("q", q), ("k", k))
        )
        x = x + linear(w, f"{name}.self_attn.o_proj", attention(q, k, v, scale, causal=True))
        if before_mlp:
            x = x + rows
        x = x + gated(w, f"{name}.mlp", rms_norm(w, f"{name}.post_attention_layernorm", x, eps))
        before_injection = x
        if not (at_input or before_mlp):
            x = x + rows
        stages[f"decoder.layers.{i}"] = (
            before_injection if "layers-before-injection" in wrong else x
        )
    stages["final_norm"] = rms_norm(w, "language_model.norm", x, eps)
    return stages | {"logits": linear(w, "lm_head", stages["final_norm"]).float()}
