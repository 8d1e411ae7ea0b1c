"""The porter: the whole model once more, log-mel to logits, in plain functions over the tensors.

Written from the specification, with none of the modules, as a port to C++ would be: one clip, one
chunk after another, no batches, no masks for padding, one step after another. What ports have been
seen to do wrong can be asked for by name, alone or together; tests/test_parity.py finds it again in
the numbers. Shapes: T mel frames, A audio tokens, t frames and L tokens of a chunk, N prompt
tokens, K tokens in the cache, H query heads of size hd.
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
    "mel-magnitude",
    "mel-no-slaney-norm",
    "mel-bfloat16-truncated",
    "mel-floor-shared",
    "clips-padded-alone",
    "full-clip-attention",
    "positions-not-restarted",
    "tail-not-padded",
    "gelu-tanh-stem",
    "gelu-tanh-layers",
    "stem-mel-major",
    "query-scaled-before-bias",
    "conv-padded-behind",
    "conv-kernels-transposed",
    "sinusoids-half-width",
    "sinusoids-interleaved",
    "padding-attended",
    "no-v-bias",
    "no-out-bias",
    "layer-norm-eps",  # 1e-6, or another as "layer-norm-eps=1e-3"
    "tap-one-layer-early",
    "taps-reversed",
    "taps-after-norm",
    "taps-without-out-proj",
    "gate-up-swapped",
    "clip-rows-restarted",
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
    "qk-norms-swapped",
    "query-heads-modulo",
    "causal-mask-without-itself",
    "rms-norm-eps",
    "weights-as-float16",
)
DECODING = (
    "decode-rope-too-far",
    "decode-position-too-far",
    "decode-last-place-overwritten",  # RoPE right, or as far as the cache with "...=rope"
    "decode-without-itself",
    "decode-first-place-lost",
)
# Of the answer alone: what is taken from logits that are right.
ANSWER = ("first-id-of-another-row", "stop-id-missed")
HARMLESS = (
    # In float32 throughout, as C++ ports do, then rounded to bfloat16: a step off here and there.
    "mel-single-precision",
    # What is recorded of a decoder layer, as transformers' output_hidden_states does.
    "layers-before-injection",
)


def run(
    folder: Path,
    waveform: Tensor,
    before: list[int],
    after: list[int],
    mistakes=(),
    dtype=torch.float32,
    time_markers=True,
    more=(),
    inside=(),
    new_tokens=0,
) -> dict[str, Tensor]:
    """Returns every stage of one pass over a prompt with a clip, in order, and, with new_tokens,
    step_logits and generated of so many greedy steps at most.

    waveform: float32 [S] at 16 kHz. before, after: the ids of the text around the clip. mistakes:
    of the tuples above. dtype: of weights, arithmetic and stages, but for mel and logits. more:
    further clips, each as its waveform and the ids of the text after it. inside: the layers, as
    "encoder.layers.0", whose inside is recorded, too. Names and shapes are golden/README.md's;
    encoder.conv1..3 are [chunks, channels, mel, frames].
    """
    wrong = {}  # mistakes and what follows their "="
    known = MISTAKES + DECODING + ANSWER + HARMLESS
    for mistake in mistakes:
        name, _, value = mistake.partition("=")
        if name not in known:
            raise ValueError(f"unknown mistake {name!r}; expected one of {', '.join(known)}")
        wrong[name] = value
    w, config, processor = load(Path(folder), dtype)
    if "weights-as-float16" in wrong:
        w = {name: x.to(torch.bfloat16).view(torch.float16).to(dtype) for name, x in w.items()}
    waves = [waveform, *[wave for wave, _ in more]]
    texts = [after, *[text for _, text in more]]
    stages = {f"waveform.{i}": wave for i, wave in enumerate(waves)}
    for i, mel in enumerate(log_mels([wave.numpy() for wave in waves], wrong)):
        stages[f"mel.{i}"] = mel
    with torch.no_grad():
        mels = [stages[f"mel.{i}"].to(dtype) for i in range(len(waves))]
        clips = [split(config["audio_config"], mel, wrong) for mel in mels]
        taps = encode(w, config, clips, wrong, stages)
        stages["adapter"] = project(w, "audio_adapter", stages["encoder"], wrong)
        deepstack = []
        for k, tap in enumerate(taps):
            deepstack.append(project(w, f"deepstack_audio_merger_list.{k}", tap, wrong))
            stages[f"deepstack.{k}"] = deepstack[k]
        audio_id = processor.get("audio_token_id", 151_654)
        start = processor.get("audio_start_id", 151_669)
        end = processor.get("audio_end_id", 151_670)
        markers = time_markers and "no-time-markers" not in wrong
        ids = list(before)
        order = []  # the row of each audio token
        for chunks, text in zip(clips, texts):
            tokens = sum(count_tokens(chunks))
            first = 0 if "clip-rows-restarted" in wrong else len(order)
            order += range(first, first + tokens)
            ids += [start, *audio_ids(tokens, audio_id, markers), end, *text]
        ids = torch.tensor(ids)
        stages["input_ids"] = ids.to(torch.int32)
        at = (ids == audio_id).nonzero()[:, 0]  # [A]
        x = w["language_model.embed_tokens.weight"][ids]
        x[at] = stages["adapter"][order]
        stages["inputs_embeds"] = x
        if "deepstack-at-markers" in wrong:
            # Without a gap: markers get rows, and the last audio tokens none.
            at = at[0] + torch.arange(len(at))
        laid = [
            torch.zeros_like(x).index_copy(0, at, rows[order]) for rows in deepstack
        ]  # [N, hidden]
        cache = []
        decode(w, config["language_config"], x, laid, wrong, stages, cache)
        if new_tokens:
            generation = json.loads((Path(folder) / "generation_config.json").read_text())
            stops = generation["eos_token_id"]
            stops = [stops] if isinstance(stops, int) else stops
            answer(w, config["language_config"], stops, new_tokens, wrong, stages, cache)
    return {
        name: x
        for name, x in stages.items()
        if name.count(".") < 3 or name.rsplit(".", 1)[0] in inside
    }


@functools.cache
def load(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict, dict]:
    """Returns all tensors by their names, config.json and processor_config.json."""
    w = {}
    for path in sorted(folder.glob("model*.safetensors")):
        for name, tensor in load_file(path).items():
            w[name] = tensor.to(dtype)
    config = json.loads((folder / "config.json").read_text())
    path = folder / "processor_config.json"  # which one released folder lacks
    processor = json.loads(path.read_text()) if path.exists() else {}
    return w, config, processor


# ---- log-mel ----


def mel_filters(wrong: dict) -> np.ndarray:
    """128 triangles over the 201 frequencies of the spectrum: [128, 201]."""
    if "mel-htk" in wrong:
        edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1)
    else:
        # Slaney: 200/3 Hz a mel up to 1000 Hz, which is 15 mel, then 27 mel for a factor of 6.4.
        mels = np.linspace(0, 15 + 27 * math.log(8) / math.log(6.4), 130)
        edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    bins = np.arange(201) * 40.0  # Hz
    triangles = np.array([np.interp(bins, edges[m : m + 3], [0, 1, 0]) for m in range(128)])
    if "mel-no-slaney-norm" in wrong:
        return triangles
    return triangles * 2 / (edges[2:] - edges[:-2])[:, None]


def log_power(wave: np.ndarray, wrong: dict) -> np.ndarray:
    """float32 [S] to the logarithm of the mel bands' power, float32 [128, T], T = S // 160."""
    if "mel-30s" in wrong:
        wave = np.pad(wave, (0, max(0, 480_000 - len(wave))))
    real = np.float32 if "mel-single-precision" in wrong else np.float64
    frames = 1 + len(wave) // 160
    edges = "constant" if "mel-zero-padded" in wrong else "reflect"
    padded = np.pad(wave, 200, mode=edges).astype(real)
    samples = padded[160 * np.arange(frames)[:, None] + np.arange(400)]  # [T + 1, 400]
    period = 399 if "mel-symmetric-window" in wrong else 400
    samples = samples * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / period)).astype(real)
    # The Fourier transform, written out.
    turns = np.outer(np.arange(400), np.arange(201)) % 400 * (2 * np.pi / 400)
    cosines = (samples @ np.cos(turns).astype(real)).astype(np.float32)  # [T + 1, 201]
    sines = (samples @ np.sin(turns).astype(real)).astype(np.float32)
    power = cosines.astype(real) ** 2 + sines.astype(real) ** 2
    if "mel-magnitude" in wrong:
        power = np.sqrt(power)
    power = np.maximum(power @ mel_filters(wrong).T.astype(real), 1e-10)  # [T + 1, 128]
    x = np.log(power) if "mel-natural-log" in wrong else np.log10(power)
    x = x.astype(np.float32).T  # [128, T + 1]
    return x if "mel-last-frame-kept" in wrong else x[:, :-1]


def log_mels(waves: list[np.ndarray], wrong: dict) -> list[Tensor]:
    """float32 [S] each to bfloat16 [128, T], with a floor of each clip's own."""
    clips = [log_power(wave, wrong) for wave in waves]
    tops = [x.max() for x in clips]
    if "mel-floor-shared" in wrong:
        tops = [max(tops)] * len(tops)
    mels = []
    for x, top in zip(clips, tops):
        x = torch.from_numpy((np.maximum(x, top - 8) + 4) / 4)
        if "mel-bfloat16-truncated" in wrong:
            x = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
        mels.append(x if "mel-float32" in wrong else x.to(torch.bfloat16))
    return mels


# ---- encoder ----


def linear(w: dict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, wrong: dict) -> Tensor:
    """Queries [n, H, hd], keys and values [n, G, hd], each for H / G heads, to [n, H x hd]."""
    sharing = q.shape[1] // k.shape[1]
    if "query-heads-modulo" in wrong:
        k, v = k.repeat(1, sharing, 1), v.repeat(1, sharing, 1)
    else:
        k, v = k.repeat_interleave(sharing, dim=1), v.repeat_interleave(sharing, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        first = 0 if "causal-mask-without-itself" in wrong else 1
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(first)
        scores = scores.masked_fill(later, -math.inf)
    # Of a query that sees nothing, a mistake, nothing comes: 0, not NaN.
    weights = scores.float().softmax(-1).nan_to_num(0).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def split(audio: dict, mel: Tensor, wrong: dict) -> list[Tensor]:
    """A clip's log-mel [128, T] to its chunks [128, t]."""
    size = mel.shape[1] if "full-clip-attention" in wrong else 2 * audio.get("n_window", 200)
    return list(mel.split(size, dim=1))


def count_tokens(chunks: list[Tensor]) -> list[int]:
    return [math.ceil(chunk.shape[1] / 8) for chunk in chunks]


def padded(clips: list[list[Tensor]], wrong: dict) -> list[Tensor]:
    """All clips' chunks with zeros behind, up to the longest of them all."""
    chunks = sum(clips, [])
    sizes = [max(chunk.shape[1] for chunk in chunks)] * len(chunks)
    if "clips-padded-alone" in wrong:
        sizes = [max(each.shape[1] for each in clip) for clip in clips for _ in clip]
    if "tail-not-padded" in wrong:
        sizes = [chunk.shape[1] for chunk in chunks]
    return [F.pad(chunk, (0, size - chunk.shape[1])) for chunk, size in zip(chunks, sizes)]


def stem(w: dict, audio: dict, clips: list[list[Tensor]], wrong: dict, stages: dict) -> tuple:
    """Chunks [128, t] to encoder.conv1..3 and encoder.stem; returns what enters the layers, how
    many rows of it are each chunk's, and how many of those are sound: all, but for a mistake."""
    lengths = count_tokens(sum(clips, []))
    half = audio["d_model"] // 2
    steps = half if "sinusoids-half-width" in wrong else half - 1
    rates = torch.exp(torch.arange(half) * (-math.log(10_000) / steps))  # [width / 2]
    gelu = "tanh" if "gelu-tanh-stem" in wrong else "none"
    convolved = {1: [], 2: [], 3: []}
    rows = []
    for j, chunk in enumerate(padded(clips, wrong)):
        x = chunk[None, None]  # [1, 1, 128, t]
        for n in (1, 2, 3):
            weight = w[f"audio_encoder.conv{n}.weight"]
            if "conv-kernels-transposed" in wrong:
                weight = weight.transpose(2, 3)
            edges = (0, 2, 0, 2) if "conv-padded-behind" in wrong else (1, 1, 1, 1)
            x = F.conv2d(F.pad(x, edges), weight, w[f"audio_encoder.conv{n}.bias"], stride=2)
            x = F.gelu(x, approximate=gelu)
            convolved[n].append(x[0])
        order = (2, 1, 0) if "stem-mel-major" in wrong else (2, 0, 1)
        x = x[0].permute(order).flatten(1)  # [L, channels x 16]
        first = j * lengths[0] if "positions-not-restarted" in wrong else 0
        angles = (first + torch.arange(len(x)))[:, None] * rates
        positions = torch.cat([angles.sin(), angles.cos()], dim=1)
        if "sinusoids-interleaved" in wrong:
            positions = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
        x = linear(w, "audio_encoder.stem_proj", x) + positions.to(x.dtype)
        rows.append(x)
    for n, parts in convolved.items():
        # Chunks of unequal lengths, a mistake, are recorded with zeros behind.
        longest = max(x.shape[2] for x in parts)
        parts = [F.pad(x, (0, longest - x.shape[2])) for x in parts]
        stages[f"encoder.conv{n}"] = torch.stack(parts)
    # What is padding goes here: no real token attends to it.
    stages["encoder.stem"] = torch.cat([x[:length] for x, length in zip(rows, lengths)])
    if "padding-attended" in wrong:
        return torch.cat(rows), [len(x) for x in rows], lengths
    return stages["encoder.stem"], lengths, lengths


def encode(w: dict, config: dict, clips: list, wrong: dict, stages: dict) -> list[Tensor]:
    """Clips' chunks [128, t] to the encoder's stages; returns the taps in use, [A, output_dim]."""
    audio = config["audio_config"]
    heads = audio["encoder_attention_heads"]
    width = audio["d_model"]
    scale = (width // heads) ** -0.5
    gelu = "tanh" if "gelu-tanh-layers" in wrong else "none"

    def norm(name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        weight = w[f"audio_encoder.{name}.weight"]
        if "layer-norm-eps" in wrong:
            eps = float(wrong["layer-norm-eps"] or 1e-6)
        return F.layer_norm(x, (width,), weight, w[f"audio_encoder.{name}.bias"], eps)

    def leave(x: Tensor, normalised: bool) -> Tensor:
        if normalised:
            x = norm("layer_norm", x, audio["layer_norm_eps"])
        elif "taps-without-out-proj" in wrong:
            return F.pad(x, (0, audio["output_dim"] - width))
        return x if audio["output_dim"] == width else linear(w, "audio_encoder.out_proj", x)

    for part in ("v", "out"):
        if f"no-{part}-bias" in wrong:
            w = {
                name: x
                for name, x in w.items()
                if not ("audio_encoder" in name and name.endswith(f"{part}_proj.bias"))
            }
    x, lengths, real = stem(w, audio, clips, wrong, stages)
    is_real = torch.cat([torch.arange(n) < some for n, some in zip(lengths, real)])
    outputs = [x[is_real]]
    for i in range(audio["encoder_layers"]):
        name = f"audio_encoder.layers.{i}"
        h = norm(f"layers.{i}.self_attn_layer_norm", x)
        inside = {"input_norm": h}
        q = linear(w, f"{name}.self_attn.q_proj", h) * scale  # [A, width]
        if "query-scaled-before-bias" in wrong:
            q = h @ w[f"{name}.self_attn.q_proj.weight"].T * scale
            q = q + w[f"{name}.self_attn.q_proj.bias"]
        k = linear(w, f"{name}.self_attn.k_proj", h)
        v = linear(w, f"{name}.self_attn.v_proj", h)
        inside |= {"q": q / scale, "k": k, "v": v}
        # Of each chunk [L, H, hd].
        q, k, v = (rows.unflatten(1, (heads, -1)).split(lengths) for rows in (q, k, v))
        parts = [attention(q[j], k[j], v[j], 1.0, False, wrong) for j in range(len(lengths))]
        inside["attention"] = torch.cat(parts)
        inside["attention_out"] = linear(w, f"{name}.self_attn.out_proj", inside["attention"])
        x = x + inside["attention_out"]
        h = linear(w, f"{name}.fc1", norm(f"layers.{i}.final_layer_norm", x))
        inside["mlp"] = linear(w, f"{name}.fc2", F.gelu(h, approximate=gelu))
        x = x + inside["mlp"]
        if x.dtype == torch.float16:
            x = x.clamp(-64_504, 64_504)
        for part, rows in inside.items():
            stages[f"encoder.layers.{i}.{part}"] = rows[is_real]
        outputs.append(x[is_real])
        stages[f"encoder.layers.{i}"] = outputs[-1]
    stages["encoder"] = leave(outputs[-1], normalised=True)
    indexes = audio["deepstack_encoder_layer_indexes"]
    indexes = indexes[: config.get("deepstack_num_inject_layers", len(indexes))]
    early = "tap-one-layer-early" in wrong
    taps = [leave(outputs[i + 1 - early], "taps-after-norm" in wrong) for i in indexes]
    return taps[::-1] if "taps-reversed" in wrong else taps


# ---- adapters and prompt ----


def gated(w: dict, name: str, x: Tensor, gate="gate_proj", up="up_proj") -> Tensor:
    gate = F.silu(linear(w, f"{name}.{gate}", x))
    return linear(w, f"{name}.down_proj", gate * linear(w, f"{name}.{up}", x))


def project(w: dict, name: str, x: Tensor, wrong: dict) -> Tensor:
    """The adapter or a merger: [A, output_dim] to [A, hidden]."""
    if "gate-up-swapped" in wrong:
        return gated(w, name, x, gate="up_proj", up="gate_proj")
    return gated(w, name, x)


def audio_ids(tokens: int, audio_id: int, time_markers: bool) -> list[int]:
    """A clip's ids: the seconds so far follow every 25 audio tokens, "0" to "9" being 15 to 24."""
    ids = [audio_id] * tokens
    if time_markers:
        # From the last on, so that earlier places stay.
        for second in range(tokens // 25 * 2, 0, -2):
            place = second // 2 * 25
            ids[place:place] = [15 + int(digit) for digit in str(second)]
    return ids


# ---- decoder ----


def rms_norm(w: dict, name: str, x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return w[f"{name}.weight"] * wide.to(x.dtype)


def rope_angles(n: int, text: dict, wrong: dict) -> Tensor:
    """float32 [n, hd / 2]."""
    base = 10_000.0 if "rope-theta-10000" in wrong else text["rope_theta"]
    rates = 1 / base ** (torch.arange(0, text["head_dim"], 2) / text["head_dim"])
    positions = torch.arange(n)[:, None].float()
    if "rope-bfloat16-angles" in wrong:
        return (positions * rates.bfloat16().float()).bfloat16().float()
    return positions * rates


def rotate(x: Tensor, angles: Tensor, wrong: dict) -> Tensor:
    """Heads [n, H, hd], each pair of dimensions turned by its angle."""
    cos = angles.cos().to(x.dtype)[:, None]  # [n, 1, hd / 2]
    sin = angles.sin().to(x.dtype)[:, None]
    if "rope-interleaved" in wrong:
        a = x[..., 0::2]
        b = x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def turned_head(w: dict, name: str, x: Tensor, angles: Tensor, eps: float, wrong: dict) -> Tensor:
    """Queries or keys [n, H, hd], normalised over hd and turned."""
    if "no-qk-norm" in wrong:
        return rotate(x, angles, wrong)
    if "qk-norm-after-rope" in wrong:
        return rms_norm(w, name, rotate(x, angles, wrong), eps)
    return rotate(rms_norm(w, name, x, eps), angles, wrong)


def decode(
    w: dict,
    text: dict,
    x: Tensor,
    deepstack: list,
    wrong: dict,
    stages: dict,
    cache: list,
    position: int = 0,
) -> None:
    """Embeddings [N, hidden] and DeepStack rows [N, hidden] of the first layers to the stages.

    cache: keys and values [K, G, hd] of each layer; empty before the prompt, after which a call
    takes one token. position: of the first row, in RoPE.
    """
    head_dim = text["head_dim"]
    eps = 1e-5 if "rms-norm-eps" in wrong else text["rms_norm_eps"]
    scale = head_dim**-0.5
    if "attention-scale" in wrong:
        scale = (text["hidden_size"] / text["num_attention_heads"]) ** -0.5
    angles = rope_angles(position + len(x), text, wrong)[position:]
    if "no-deepstack" in wrong:
        deepstack = []
    if "deepstack-one-layer-late" in wrong:
        deepstack = [torch.zeros_like(x), *deepstack]
    for i in range(text["num_hidden_layers"]):
        name = f"language_model.layers.{i}"
        rows = deepstack[i] if i < len(deepstack) else torch.zeros_like(x)
        if "deepstack-at-layer-input" in wrong:
            x = x + rows
        h = rms_norm(w, f"{name}.input_layernorm", x, eps)
        q = linear(w, f"{name}.self_attn.q_proj", h).unflatten(1, (-1, head_dim))  # [N, H, hd]
        k = linear(w, f"{name}.self_attn.k_proj", h).unflatten(1, (-1, head_dim))  # [N, G, hd]
        v = linear(w, f"{name}.self_attn.v_proj", h).unflatten(1, (-1, head_dim))
        norms = ["q_norm", "k_norm"]
        if "qk-norms-swapped" in wrong:
            norms.reverse()
        q = turned_head(w, f"{name}.self_attn.{norms[0]}", q, angles, eps, wrong)
        k = turned_head(w, f"{name}.self_attn.{norms[1]}", k, angles, eps, wrong)
        inside = {"input_norm": h, "q": q.flatten(1), "k": k.flatten(1), "v": v.flatten(1)}
        k, v = remember(cache, i, k, v, wrong)
        inside["attention"] = attention(q, k, v, scale, len(x) > 1, wrong)
        inside["attention_out"] = linear(w, f"{name}.self_attn.o_proj", inside["attention"])
        x = x + inside["attention_out"]
        if "deepstack-before-mlp" in wrong:
            x = x + rows
        h = rms_norm(w, f"{name}.post_attention_layernorm", x, eps)
        inside["mlp"] = gated(w, f"{name}.mlp", h)
        x = x + inside["mlp"]
        for part, recorded in inside.items():
            stages[f"decoder.layers.{i}.{part}"] = recorded
        stages[f"decoder.layers.{i}"] = x
        if not wrong.keys() & {"deepstack-at-layer-input", "deepstack-before-mlp"}:
            x = x + rows
        if "layers-before-injection" not in wrong:
            stages[f"decoder.layers.{i}"] = x
    stages["final_norm"] = rms_norm(w, "language_model.norm", x, eps)
    stages["logits"] = linear(w, "lm_head", stages["final_norm"]).float()


def remember(cache: list, i: int, k: Tensor, v: Tensor, wrong: dict) -> tuple[Tensor, Tensor]:
    """Adds new keys and values to layer i's; returns those that are attended to."""
    if i == len(cache):
        cache.append((k, v))
        return k, v
    keys, values = cache[i]
    cache[i] = torch.cat([keys, k]), torch.cat([values, v])
    return (keys, values) if "decode-without-itself" in wrong else cache[i]


def after_the_prompt(keys: Tensor, wrong: dict) -> Tensor:
    """The prompt's keys, or values, [N, G, hd] as the steps find them."""
    if "decode-first-place-lost" in wrong:
        keys = keys[1:]
    if "decode-last-place-overwritten" in wrong:
        keys = keys[:-1]
    if "decode-position-too-far" in wrong:
        keys = torch.cat([keys, torch.zeros_like(keys[:1])])
    return keys


def answer(
    w: dict, text: dict, stops: list, most: int, wrong: dict, stages: dict, cache: list
) -> None:
    """The prompt's logits and cache to step_logits [n, vocabulary] and generated [n], greedily."""
    position = len(stages["logits"])
    if "decode-rope-too-far" in wrong or "decode-position-too-far" in wrong:
        position += 1
    if wrong.get("decode-last-place-overwritten") == "rope":
        position -= 1
    for i, (keys, values) in enumerate(cache):
        cache[i] = after_the_prompt(keys, wrong), after_the_prompt(values, wrong)
    rows = [stages["logits"][-1]]
    first = stages["logits"][-2] if "first-id-of-another-row" in wrong else rows[0]
    ids = [int(first.argmax())]
    while len(ids) < most and ("stop-id-missed" in wrong or ids[-1] not in stops):
        x = w["language_model.embed_tokens.weight"][ids[-1:]]
        step = {}
        decode(w, text, x, [], wrong, step, cache, position + len(ids) - 1)
        rows.append(step["logits"][0])
        ids.append(int(rows[-1].argmax()))
    stages["step_logits"] = torch.stack(rows)
    stages["generated"] = torch.tensor(ids, dtype=torch.int32)
