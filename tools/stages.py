"""The model as a table of stages: what each is computed from, and how.

parity.py writes a run's stages and compares a port's with them; mistakes.py puts wrong parts into a
run. The stages are the model's numbers to the last bit (tests/test_parity.py). Shapes: T mel
frames, A audio tokens (12.5 a second), C chunks, t frames and L tokens of a chunk, N prompt tokens,
n new tokens, K cache places, D the width of the encoder or the decoder, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import qwen3
from adapter import splice
from encoder import HOP, N_FFT, N_MELS, STRIDE, mel_filters, sinusoids, split_chunks
from moss_min import MossAudio
from qwen3 import KVCache


class Kind(NamedTuple):
    """What is said of a stage."""

    axes: str
    row: str  # what one row along its first axis is (of mel, along its last)
    place: str  # where it is computed


STEM = "AudioEncoder.stem in encoder.py"
TAP = "the taps in AudioEncoder.forward in encoder.py, GatedMLP in adapter.py"
DECODER_LAYER = "DecoderLayer and Qwen3.forward in qwen3.py"
STEP = "MossAudio.step and Step in moss_min.py, KVCache in qwen3.py"
KINDS = {  # by the stage's name without its number
    "waveform": Kind("samples", "sample", "load_audio in encoder.py"),
    "mel": Kind("mel bands, frames", "frame", "log_mel in encoder.py"),
    "encoder.conv": Kind("chunks, channels, mel bands, frames", "chunk", STEM),
    "encoder.stem": Kind("audio tokens, encoder width", "token", STEM),
    "encoder.layers": Kind("audio tokens, encoder width", "token", "EncoderLayer in encoder.py"),
    "encoder": Kind("audio tokens, output width", "token", "AudioEncoder.forward in encoder.py"),
    "adapter": Kind("audio tokens, decoder width", "token", "GatedMLP in adapter.py"),
    "deepstack": Kind("audio tokens, decoder width", "token", TAP),
    "input_ids": Kind("prompt tokens", "position", "MossAudio.prompt_ids in moss_min.py"),
    "inputs_embeds": Kind("prompt tokens, decoder width", "position", "splice in adapter.py"),
    "decoder.layers": Kind("prompt tokens, decoder width", "position", DECODER_LAYER),
    "final_norm": Kind("prompt tokens, decoder width", "position", "Qwen3.norm in qwen3.py"),
    "logits": Kind("prompt tokens, vocabulary", "position", "MossAudio.lm_head in moss_min.py"),
    "step_logits": Kind("new tokens, vocabulary", "step", STEP),
    "generated": Kind("new tokens", "step", "choose and generate in sample.py"),
}
INSIDE = ("input_norm", "q", "k", "v", "attention", "attention_out", "mlp")  # of a layer
for part in INSIDE:
    norm_or_mlp = part in ("input_norm", "mlp")
    place = "EncoderLayer in encoder.py" if norm_or_mlp else "EncoderAttention in encoder.py"
    KINDS[f"encoder.layers.{part}"] = Kind("audio tokens, encoder width", "token", place)
    place = "DecoderLayer in qwen3.py" if norm_or_mlp else "Attention in qwen3.py"
    axes = "heads x head size" if part in ("q", "k", "v", "attention") else "decoder width"
    KINDS[f"decoder.layers.{part}"] = Kind(f"prompt tokens, {axes}", "position", place)
IDS = ("input_ids", "generated")
HIDDEN = ("frames", "chunks")  # stages that no file has: what the encoder's are computed from


def kind(name: str) -> str:
    """Returns a stage's name without its number: encoder.layers.3 is one of encoder.layers, and
    encoder.layers.3.q of encoder.layers.q."""
    return re.sub(r"\.?\d+(?=\.|$)", "", name)


def layer_of(name: str) -> str:
    """Returns the layer that a stage is inside, or the stage itself."""
    return re.sub(r"(layers\.\d+)\.\w+$", r"\1", name)


# ---- the stages' functions ----
# Each takes the run and the stages that it is computed from.


WINDOW = np.hanning(N_FFT + 1)[:-1]  # [400]
FILTERS = mel_filters()  # [128, 201]


def log_spectrum(
    wave: torch.Tensor,
    length: int | None = None,
    pad: str = "reflect",
    last_frame: bool = False,
    window: np.ndarray = WINDOW,
    filters: np.ndarray = FILTERS,
    power: int = 2,
    logarithm: Callable = np.log10,
) -> np.ndarray:
    """Returns the log-mel of float32 [samples] before its floor, float32 [128, T]; parts can be
    replaced.

    length: samples to which the sound is cut or padded with zeros. pad: numpy's mode at the edges.
    last_frame: keep the frame around the sound's end. power: of the magnitude.
    """
    samples = wave.numpy()
    if length is not None:
        samples = np.pad(samples, (0, max(0, length - len(samples))))[:length]
    padded = np.pad(samples, N_FFT // 2, mode=pad)
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]  # [T + 1, 400]
    if not last_frame:
        frames = frames[:-1]
    mel = np.empty((N_MELS, len(frames)), np.float32)
    for i in range(0, len(frames), 1000):
        spectrum = np.fft.rfft(frames[i : i + 1000] * window)  # [1000, 201]
        magnitude = np.abs(spectrum.astype(np.complex64), dtype=np.float64)
        mel[:, i : i + 1000] = logarithm(np.maximum(filters @ (magnitude**power).T, 1e-10))
    return mel


def log_mel(
    wave: torch.Tensor, *others: torch.Tensor, rounded: Callable = torch.Tensor.bfloat16, **parts
) -> torch.Tensor:
    """Returns encoder.log_mel of float32 [samples] in float32, [128, T]; parts can be replaced.

    others: sounds whose maximum counts for the floor, too. rounded: what rounds it. parts:
    arguments of log_spectrum.
    """
    mel = log_spectrum(wave, **parts)
    top = max(x.max() for x in (mel, *[log_spectrum(other, **parts) for other in others]))
    return rounded(torch.from_numpy((np.maximum(mel, top - 8) + 4) / 4)).float()


def chunk_frames(run, *mels: torch.Tensor) -> torch.Tensor:
    """Returns how many frames each chunk has before it is padded: int64 [C]."""
    size = 2 * run.model.audio_encoder.config.n_window
    frames = []
    for mel in mels:
        frames += [chunk.shape[1] for chunk in mel.split(size, dim=1)]
    return torch.tensor(frames)


def padded_chunks(run, *mels: torch.Tensor) -> torch.Tensor:
    """[C, 1, 128, t]"""
    chunks, _ = split_chunks(mels, run.model.audio_encoder.config.n_window)
    return chunks[:, None]


def chunk_tokens(frames: torch.Tensor) -> torch.Tensor:
    return (frames + STRIDE - 1) // STRIDE  # [C]


def real_tokens(frames: torch.Tensor) -> torch.Tensor:
    """bool [C, L], false for tokens that are padding."""
    tokens = chunk_tokens(frames)
    return torch.arange(int(tokens.max())) < tokens[:, None]


def in_batches(run, function: Callable, *tensors: torch.Tensor) -> torch.Tensor:
    """Applies a function to as many chunks at a time as the model does: to the same last bit."""
    parts = [x.split(run.model.audio_encoder.chunks_at_a_time) for x in tensors]
    return torch.cat([function(*batch) for batch in zip(*parts)])


def convolve(run, i: int, x: torch.Tensor) -> torch.Tensor:
    """Convolution i, from 1, and GELU: [C, channels, bands, t] to half the bands and frames. A
    tail's padding is convolved like sound."""
    audio = run.model.audio_encoder
    conv = getattr(audio, f"conv{i}")

    def activated(x: torch.Tensor) -> torch.Tensor:
        return audio.activation(conv(x.to(conv.weight)))

    return in_batches(run, activated, x)


def chunk_positions(run, x: torch.Tensor) -> torch.Tensor:
    """Returns what is added to the stem's [C, L, D]: the same for every chunk, [L, D]."""
    return run.sinusoids(x.shape[1], x.shape[2])


def stem_chunks(run, x: torch.Tensor) -> torch.Tensor:
    """The last convolution's [C, channels, 16, L] to [C, L, D], padding included."""
    x = x.permute(0, 3, 1, 2).flatten(2)  # [C, L, channels x 16]
    x = in_batches(run, run.model.audio_encoder.stem_proj, x)  # [C, L, D]
    return x + run.positions(run, x).to(x)


def stem(run, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """The last convolution's [C, channels, 16, L] to [A, D]."""
    return stem_chunks(run, x)[real_tokens(frames)]


def in_chunks(run, function: Callable, frames: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    """Applies a function of chunks [C, L, D] and of a mask for their keys to rows [A, D]."""
    is_real = real_tokens(frames)  # [C, L]
    # In chunks again, with zeros for padding, which the mask keeps from the rest.
    chunks = [x.new_zeros(*is_real.shape, x.shape[1]) for x in rows]  # [C, L, D]
    for chunk, x in zip(chunks, rows):
        chunk[is_real] = x

    def masked(is_real: torch.Tensor, *chunks: torch.Tensor) -> torch.Tensor:
        mask = None if is_real.all() else is_real[:, None, None].to(chunks[0].device)
        return function(*chunks, mask)

    return in_batches(run, masked, is_real, *chunks)[is_real]


def encoder_layer(run, i: int, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """[A, D] to the same."""
    return in_chunks(run, run.model.audio_encoder.layers[i], frames, x)


def encoder_output(run, x: torch.Tensor) -> torch.Tensor:
    """[A, D] to [A, E]"""
    audio = run.model.audio_encoder
    return audio.out_proj(audio.layer_norm(x))


def tap(run, x: torch.Tensor) -> torch.Tensor:
    """[A, D] to [A, E]"""
    return run.model.audio_encoder.out_proj(x)


def merge(run, k: int, x: torch.Tensor) -> torch.Tensor:
    """A tapped layer's output [A, D] to merger k's rows [A, D]."""
    return run.model.deepstack_audio_merger_list[k](run.tap(run, x))


def prompt_ids(run, *mels: torch.Tensor) -> torch.Tensor:
    frames = [mel.shape[1] for mel in mels]
    ids = run.model.prompt_ids(run.text, frames, run.time_markers)
    return torch.tensor(ids, device=run.model.lm_head.weight.device)


def is_audio(run, ids: torch.Tensor) -> torch.Tensor:
    """bool [N]"""
    return ids == run.model.config.adapter.audio_token_id


def attend(attention: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask):
    """The encoder's attention of q before its scaling, k and v [C, L, D], before out_proj."""
    q = q * (q.shape[2] // attention.heads) ** -0.5
    heads = [x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (q, k, v)]
    x = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=1.0)  # [C, H, L, hd]
    return x.transpose(1, 2).flatten(2)


def add_inside_encoder(run, add: Callable, i: int, entering: str) -> str:
    """Adds encoder layer i as the stages INSIDE and its output, whose name is returned."""
    layer = run.model.audio_encoder.layers[i]
    attention = layer.self_attn
    name = f"encoder.layers.{i}"

    def mlp(x, attended, mask):
        x = layer.final_layer_norm(x + attended)
        return layer.fc2(layer.activation(layer.fc1(x)))

    def sums(x, attended, more, mask):
        x = x + attended + more
        return x.clamp(-64504, 64504) if x.dtype == torch.float16 else x

    def add_part(part: str, inputs: Sequence[str], function: Callable) -> str:
        return add(name + part, ["frames", *inputs], in_chunks, run, function)

    h = add_part(".input_norm", [entering], lambda x, mask: layer.self_attn_layer_norm(x))
    q = add_part(".q", [h], lambda h, mask: attention.q_proj(h))
    k = add_part(".k", [h], lambda h, mask: attention.k_proj(h))
    v = add_part(".v", [h], lambda h, mask: attention.v_proj(h))
    heads = add_part(".attention", [q, k, v], partial(attend, attention))
    attended = add_part(".attention_out", [heads], lambda x, mask: attention.out_proj(x))
    more = add_part(".mlp", [entering, attended], mlp)
    return add_part("", [entering, attended, more], sums)


def in_order(run, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns the rows [A, D] in the order of the audio tokens that they are for: as they are."""
    return rows


def embed(run, ids: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    """[N, D]. rows: the adapter's [A, D], if there is sound."""
    x = run.model.language_model.embed_tokens(ids)
    return splice(x, run.order(run, ids, rows[0]), is_audio(run, ids)) if rows else x


def layer_with_rows(
    run, layer: nn.Module, x: torch.Tensor, cache: KVCache, rows: torch.Tensor
) -> torch.Tensor:
    """Returns what leaves a decoder layer, [1, N, D], with DeepStack's rows [N, D] added."""
    if run.rows_at == "input":
        return layer(x + rows, cache)
    if run.rows_at == "mlp":
        x = x + layer.self_attn(layer.input_layernorm(x), cache) + rows
        return x + layer.mlp(layer.post_attention_layernorm(x))
    return layer(x, cache) + rows


def prompt_cache(run, tokens: int) -> KVCache:
    """Returns a cache for a whole prompt that is taken through one layer after another."""
    config = run.model.config.decoder
    one_layer = dataclasses.replace(config, num_hidden_layers=1)
    cache = KVCache(one_layer, 1, tokens, run.model.lm_head.weight)
    # Every layer writes all places before it reads them, so one memory does for all.
    cache.keys = cache.keys * config.num_hidden_layers
    cache.values = cache.values * config.num_hidden_layers
    cache.place(torch.arange(tokens, device=cache.keys[0].device)[None], tokens)
    return cache


def decoder_layer(
    run, i: int, cache_for: Callable, x: torch.Tensor, ids: torch.Tensor, *deepstack: torch.Tensor
) -> torch.Tensor:
    """[N, D] to the same. deepstack: the rows [A, D] of the layer's merger, if it has one."""
    layer = run.model.language_model.layers[i]
    rows = deepstack_rows(run, x, ids, *deepstack)
    return layer_with_rows(run, layer, x[None], cache_for(len(x)), rows)[0]


def deepstack_rows(run, x: torch.Tensor, ids: torch.Tensor, *deepstack: torch.Tensor):
    """Returns what DeepStack adds to a prompt's [N, D], as [N, D]: zeros without a merger."""
    rows = torch.zeros_like(x)
    if deepstack:
        rows = splice(rows, run.order(run, ids, deepstack[0]), run.places(run, ids))
    return rows


def add_inside_decoder(run, add: Callable, i: int, cache_for: Callable, inputs: list[str]) -> str:
    """Adds decoder layer i as the stages INSIDE and its output, whose name is returned. inputs:
    what decoder_layer is computed from."""
    layer = run.model.language_model.layers[i]
    attention = layer.self_attn
    name = f"decoder.layers.{i}"
    entering, *mergers = inputs

    def rows_at(place, x, *mergers):
        """DeepStack's rows [N, D] if they are added in that place, or else 0."""
        return deepstack_rows(run, x, *mergers) if run.rows_at == place else 0

    def projected(proj, norm, h):
        """Queries or keys of all heads, normalised and turned: [N, heads x hd]."""
        x = proj(h)[None].unflatten(2, (-1, attention.head_dim))  # [1, N, heads, hd]
        cache = cache_for(len(h))
        return qwen3.apply_rope(norm(x), cache.cos, cache.sin)[0].flatten(1)

    def attend(q, k, v):
        q, k, v = (x[None].unflatten(2, (-1, attention.head_dim)) for x in (q, k, v))
        cache = cache_for(q.shape[1])
        keys, values = cache.write(attention.layer, k, v)  # [1, G, N, hd]
        q = q.unflatten(2, (keys.shape[1], -1)).transpose(1, 2).flatten(2, 3)
        # As qwen3.py finds it, where mistakes put another.
        x = qwen3.F.scaled_dot_product_attention(q, keys, values, attn_mask=cache.mask)
        return x.unflatten(2, (k.shape[1], -1)).transpose(1, 2)[0].flatten(1)

    def middle(x, attended, *mergers):
        return x + rows_at("input", x, *mergers) + attended + rows_at("mlp", x, *mergers)

    def mlp(x, attended, *mergers):
        return layer.mlp(layer.post_attention_layernorm(middle(x, attended, *mergers)))

    def sums(x, attended, more, *mergers):
        return middle(x, attended, *mergers) + more + rows_at("output", x, *mergers)

    def input_norm(x, *mergers):
        return layer.input_layernorm(x + rows_at("input", x, *mergers))

    h = add(f"{name}.input_norm", inputs, input_norm)
    q = add(f"{name}.q", [h], projected, attention.q_proj, attention.q_norm)
    k = add(f"{name}.k", [h], projected, attention.k_proj, attention.k_norm)
    v = add(f"{name}.v", [h], attention.v_proj)
    heads = add(f"{name}.attention", [q, k, v], attend)
    attended = add(f"{name}.attention_out", [heads], attention.o_proj)
    more = add(f"{name}.mlp", [entering, attended, *mergers], mlp)
    return add(name, [entering, attended, more, *mergers], sums)


# ---- decoding ----


@dataclass(frozen=True)
class Stepping:
    """Where a step puts its token and what the token attends to. These values are right."""

    place: int = 0  # how many places in the cache too far
    position: int = 0  # how many positions in RoPE too far
    sees_itself: bool = True
    first: int = 0  # the first place that it attends to


def step_logits(
    run, generated: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, *inputs: torch.Tensor
) -> torch.Tensor:
    """Returns the logits [n, V] from which each of the generated ids [n] was taken: the last of the
    prompt's ids' [N] logits, and then one row for each step.

    inputs: what enters each decoder layer, [N, D], and after these each merger's rows [A, D]. The
    prompt's keys and values are made of what enters the layers. All ids are known, so that the
    steps go through the decoder together, as the tokens of one call.
    """
    decoder = run.model.language_model
    N = len(ids)
    first = N + run.stepping.place
    count = len(generated) - 1  # the last id is never an input
    if count == 0:
        return logits[-1:].float()
    cache = KVCache(run.model.config.decoder, 1, first + count, run.model.lm_head.weight)
    steps = torch.arange(count, device=ids.device)
    cache.place(torch.arange(N, device=ids.device)[None], N)
    deepstack = inputs[len(decoder.layers) :]
    for i, layer in enumerate(decoder.layers):
        mergers = [deepstack[run.merger_of_layer[i]]] if i in run.merger_of_layer else []
        rows = deepstack_rows(run, inputs[i], ids, *mergers)
        layer_with_rows(run, layer, inputs[i][None], cache, rows)

    # The cosines and sines of the steps' positions, and then the places and their mask.
    cache.place((N + run.stepping.position + steps)[None], first + count)
    cache.positions = (first + steps)[None]
    places = torch.arange(first + count, device=ids.device)
    latest = first + steps if run.stepping.sees_itself else first + steps - 1
    visible = (places <= latest[:, None]) & (places >= run.stepping.first)  # [n - 1, K]
    sharing = cache.config.num_attention_heads // cache.config.num_key_value_heads
    mask = cache.keys[0].new_zeros(visible.shape).masked_fill(~visible, -math.inf)
    cache.mask = mask.repeat_interleave(sharing, dim=0)[None, None]
    x = decoder.embed_tokens(generated[:-1])[None]  # [1, n - 1, D]
    for layer in decoder.layers:
        x = layer(x, cache)
    return torch.cat([logits[-1:], run.model.lm_head(decoder.norm(x))[0]]).float()


# ---- a run ----


@dataclass
class Run:
    """What a run is made of. A mistake swaps one of these parts, or something of the model."""

    model: MossAudio
    text: str
    time_markers: bool | None
    clips: int
    mel_parts: dict[str, Any] = field(default_factory=dict)  # arguments of log_mel
    sinusoids: Callable = sinusoids
    positions: Callable = chunk_positions
    tap: Callable = tap
    order: Callable = in_order
    places: Callable = is_audio  # where DeepStack's rows are added
    rows_at: str = "output"  # where in a layer they are added: "input", "mlp" or "output"
    inside: frozenset[str] = frozenset()  # the layers whose inside is stages, too
    stepping: Stepping = Stepping()
    steps: bool = False  # whether the table has the steps after the prompt
    max_new_tokens: int | None = None  # None: not known
    # The decoder layer whose output merger k's rows are added to -> k.
    merger_of_layer: dict[int, int] = field(init=False)
    # Stages that are computed from others, and otherwise.
    replaced: "dict[str, Stage]" = field(default_factory=dict)
    swapped: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self):
        mergers = len(self.model.deepstack_audio_merger_list) if self.clips else 0
        layers = len(self.model.language_model.layers)
        self.merger_of_layer = {k: k for k in range(min(mergers, layers))}

    def swap(self, owner: Any, name: str, value: Any) -> None:
        """Puts a value in the place of an object's attribute until `swapped` is closed."""
        self.swapped.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


class Stage(NamedTuple):
    inputs: tuple[str, ...]  # names of earlier stages
    compute: Callable  # a function of their values


def table(run: Run) -> dict[str, Stage]:
    """Returns every stage of the model in order."""
    model = run.model
    decoder = model.language_model
    stages = {f"waveform.{i}": Stage((), None) for i in range(run.clips)}  # always given

    def add(name: str, inputs: Sequence[str], compute: Callable, *arguments: Any) -> str:
        stages[name] = Stage(tuple(inputs), partial(compute, *arguments))
        return name

    mel = partial(log_mel, **run.mel_parts)
    mels = [add(f"mel.{i}", [f"waveform.{i}"], mel) for i in range(run.clips)]
    if mels:
        add_encoder(run, add, mels)
    add("input_ids", mels, prompt_ids, run)
    x = add("inputs_embeds", ["input_ids", "adapter"] if mels else ["input_ids"], embed, run)
    entering = []
    cache_for = functools.cache(partial(prompt_cache, run))
    for i in range(len(decoder.layers)):
        entering.append(x)
        inputs = [x, "input_ids"]
        if i in run.merger_of_layer:
            inputs.append(f"deepstack.{run.merger_of_layer[i]}")
        if f"decoder.layers.{i}" in run.inside:
            x = add_inside_decoder(run, add, i, cache_for, inputs)
        else:
            x = add(f"decoder.layers.{i}", inputs, decoder_layer, run, i, cache_for)
    add("final_norm", [x], decoder.norm)
    add("logits", ["final_norm"], lambda x: model.lm_head(x).float())
    if run.steps:
        stages["generated"] = Stage((), None)  # always given
        rows = [name for name in stages if kind(name) == "deepstack"]
        inputs = ["generated", "logits", "input_ids", *entering, *rows]
        add("step_logits", inputs, step_logits, run)
    return stages | run.replaced


def add_encoder(run: Run, add: Callable, mels: list[str]) -> None:
    """Adds the stages from log-mels to the adapter's and the mergers' rows."""
    audio = run.model.audio_encoder
    add("frames", mels, chunk_frames, run)
    x = add("chunks", mels, padded_chunks, run)
    for i in (1, 2, 3):
        x = add(f"encoder.conv{i}", [x], convolve, run, i)
    outputs = [add("encoder.stem", [x, "frames"], stem, run)]
    for i in range(len(audio.layers)):
        name = f"encoder.layers.{i}"
        if name in run.inside:
            outputs.append(add_inside_encoder(run, add, i, outputs[i]))
        else:
            outputs.append(add(name, [outputs[i], "frames"], encoder_layer, run, i))
    add("encoder", [outputs[-1]], encoder_output, run)
    add("adapter", ["encoder"], run.model.audio_adapter)
    for k, i in enumerate(audio.config.deepstack_encoder_layer_indexes):
        add(f"deepstack.{k}", [outputs[i + 1]], merge, run, k)


@torch.no_grad()
def compute(run: Run, given: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the stages in order, given ones as they are. Each is kept only while it is needed."""
    stages = table(run)
    last_use = {}
    for name, stage in stages.items():
        for x in (name, *stage.inputs):
            last_use[x] = name
    values = {}
    for name, stage in stages.items():
        if name in given:
            values[name] = given[name]
        else:
            values[name] = stage.compute(*[values[x] for x in stage.inputs])
        yield name, values[name]
        for x in [x for x in values if last_use[x] == name]:
            del values[x]
