"""The model as a table of stages: what each is computed from, and how.

parity.py writes a run's stages and compares a port's with them; mistakes.py puts wrong parts into a
run. The stages are the model's numbers to the last bit (tests/test_parity.py). Shapes: T mel
frames, A audio tokens (12.5 a second), C chunks, t frames and L tokens of a chunk, N prompt tokens,
D the width of the encoder or the decoder.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
    "generated": Kind("new tokens", "position", "generate in sample.py"),
}
IDS = ("input_ids", "generated")
HIDDEN = ("frames", "chunks")  # stages that no file has: what the encoder's are computed from


def kind(name: str) -> str:
    """Returns a stage's name without its number: encoder.layers.3 is one of encoder.layers."""
    return re.sub(r"\.?\d+$", "", name)


# ---- the stages' functions ----
# Each takes the run and the stages that it is computed from.


WINDOW = np.hanning(N_FFT + 1)[:-1]  # [400]
FILTERS = mel_filters()  # [128, 201]


def log_mel(
    wave: torch.Tensor,
    length: int | None = None,
    pad: str = "reflect",
    last_frame: bool = False,
    window: np.ndarray = WINDOW,
    filters: np.ndarray = FILTERS,
    logarithm: Callable = np.log10,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Returns encoder.log_mel of float32 [samples] in float32, [128, T]; parts can be replaced.

    length: samples to which the sound is cut or padded with zeros. pad: numpy's mode at the edges.
    last_frame: keep the frame around the sound's end.
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
        power = filters @ (magnitude**2).T  # [128, 1000]
        mel[:, i : i + 1000] = logarithm(np.maximum(power, 1e-10))
    mel = (np.maximum(mel, mel.max() - 8) + 4) / 4
    return torch.from_numpy(mel).to(dtype).float()


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


def convolve(run, i: int, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Convolution i, from 1, and GELU: [C, channels, bands, t] to half the bands and frames.

    It does not look at how many frames are sound: a tail's padding is convolved like sound.
    """
    audio = run.model.audio_encoder
    conv = getattr(audio, f"conv{i}")

    def activated(x: torch.Tensor) -> torch.Tensor:
        return audio.activation(conv(x.to(conv.weight)))

    return in_batches(run, activated, x)


def chunk_positions(x: torch.Tensor) -> torch.Tensor:
    """Returns what is added to the stem's [C, L, D]: the same for every chunk, [L, D]."""
    return sinusoids(x.shape[1], x.shape[2])


def stem(run, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """The last convolution's [C, channels, 16, L] to [A, D]."""
    x = x.permute(0, 3, 1, 2).flatten(2)  # [C, L, channels x 16]
    x = in_batches(run, run.model.audio_encoder.stem_proj, x)  # [C, L, D]
    return (x + run.positions(x).to(x))[real_tokens(frames)]


def encoder_layer(run, i: int, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """[A, D] to the same."""
    is_real = real_tokens(frames)  # [C, L]
    # In chunks again, with zeros for padding, which the mask keeps from the rest.
    chunks = x.new_zeros(*is_real.shape, x.shape[1])  # [C, L, D]
    chunks[is_real] = x

    def layer(x: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        mask = None if is_real.all() else is_real[:, None, None].to(x.device)
        return run.model.audio_encoder.layers[i](x, mask)

    return in_batches(run, layer, chunks, is_real)[is_real]


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


def embed(run, ids: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    """[N, D]. rows: the adapter's [A, D], if there is sound."""
    x = run.model.language_model.embed_tokens(ids)
    return splice(x, rows[0], is_audio(run, ids)) if rows else x


def layer_with_rows(layer: nn.Module, x: torch.Tensor, cache: KVCache, rows) -> torch.Tensor:
    """What leaves a decoder layer, [1, n, D]. rows: DeepStack's [1, n, D], or 0."""
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
    rows = torch.zeros_like(x)
    if deepstack:
        rows = splice(rows, deepstack[0], run.places(run, ids))
    layer = run.model.language_model.layers[i]
    return run.layer(layer, x[None], cache_for(len(x)), rows[None])[0]


def logits(lm_head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return lm_head(x).float()


# ---- a run ----


@dataclass
class Run:
    """What a run is made of. A mistake swaps one of these parts, or something of the model."""

    model: MossAudio
    text: str
    time_markers: bool | None
    clips: int
    mel_parts: dict[str, Any] = field(default_factory=dict)  # arguments of log_mel
    convolve: Callable = convolve
    positions: Callable = chunk_positions
    tap: Callable = tap
    places: Callable = is_audio  # where DeepStack's rows are added
    layer: Callable = layer_with_rows
    # The decoder layer whose output merger k's rows are added to -> k.
    merger_of_layer: dict[int, int] = field(init=False)
    swapped: list[tuple[Any, str, Any]] = field(default_factory=list)

    def __post_init__(self):
        mergers = len(self.model.deepstack_audio_merger_list) if self.clips else 0
        layers = len(self.model.language_model.layers)
        self.merger_of_layer = {k: k for k in range(min(mergers, layers))}

    def swap(self, owner: Any, name: str, value: Any) -> None:
        """Puts a value in the place of an object's attribute until restore."""
        self.swapped.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def restore(self) -> None:
        while self.swapped:
            owner, name, value = self.swapped.pop()
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
    cache_for = functools.cache(partial(prompt_cache, run))
    for i in range(len(decoder.layers)):
        inputs = [x, "input_ids"]
        if i in run.merger_of_layer:
            inputs.append(f"deepstack.{run.merger_of_layer[i]}")
        x = add(f"decoder.layers.{i}", inputs, decoder_layer, run, i, cache_for)
    add("final_norm", [x], decoder.norm)
    add("logits", ["final_norm"], logits, model.lm_head)
    return stages


def add_encoder(run: Run, add: Callable, mels: list[str]) -> None:
    """Adds the stages from log-mels to the adapter's and the mergers' rows."""
    audio = run.model.audio_encoder
    add("frames", mels, chunk_frames, run)
    x = add("chunks", mels, padded_chunks, run)
    for i in (1, 2, 3):
        x = add(f"encoder.conv{i}", [x, "frames"], run.convolve, run, i)
    outputs = [add("encoder.stem", [x, "frames"], stem, run)]
    for i in range(len(audio.layers)):
        name = f"encoder.layers.{i}"
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
