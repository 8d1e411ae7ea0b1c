"""Holds the mistakes that ports of MOSS-Audio are known to make, and what is right in each case.

    python tools/parity.py diagnose reference.safetensors PORT --model FOLDER

This tries them on a port's numbers: diagnose.py makes each mistake in a run (stages.py). The file
can be read as a chapter on what matters in this model. Shapes: C chunks, t frames and L tokens of a
chunk, N prompt tokens, D the width of the encoder or the decoder, hd the size of a head.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import qwen3
from encoder import N_FFT, N_MELS, count_tokens
from moss_min import Parser, end
from stages import (
    Run,
    Stage,
    attend,
    chunk_frames,
    convolve,
    encoder_output,
    is_audio,
    layer_of,
    log_mel,
    real_tokens,
    stem_chunks,
)


@dataclass(frozen=True, eq=False)
class Mistake:
    """make changes a run; stages: those computed otherwise, {n} being the number of mergers.
    rounding: how much larger it makes the differences between right programs."""

    id: str
    sentence: str
    stages: tuple[str, ...]
    make: Callable[[Run], None]
    rounding: float = 1

    def touches(self, run: Run, name: str) -> bool:
        if name == "step_logits":
            # Steps go through the decoder's layers, and attend to what the prompt left there.
            return any(glob.startswith(("step_logits", "decoder.layers")) for glob in self.stages)
        mergers = min(len(run.model.deepstack_audio_merger_list), 9)
        return any(fnmatchcase(layer_of(name), glob.format(n=mergers)) for glob in self.stages)


MISTAKES: list[Mistake] = []


def mistake(id: str, *stages: str, rounding: float = 1, **values) -> Callable:
    """Enters a function into MISTAKES. Its docstring is the mistake's sentence: what a port does,
    what is right, and where that is in the code. values: arguments of the function, and of its
    docstring."""

    def enter(make: Callable) -> Callable:
        sentence = " ".join(inspect.getdoc(make).format(**values).split())
        MISTAKES.append(Mistake(id, sentence, stages, partial(make, **values), rounding))
        return make

    return enter


@contextmanager
def made(run: Run, mistakes: Sequence[Mistake]) -> Iterator[None]:
    """Makes mistakes in a run, in the order of the table, and takes them away again."""
    with run.swapped:
        for wrong in sorted(mistakes, key=MISTAKES.index):
            wrong.make(run)
        yield


def replace_stage(run: Run, name: str, inputs: Sequence[str], compute: Callable) -> None:
    run.swap(run, "replaced", run.replaced | {name: Stage(tuple(inputs), compute)})


def weight(x: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


# ---- log-mel ----


def swap_mel(run: Run, **parts) -> None:
    run.swap(run, "mel_parts", run.mel_parts | parts)


def triangles(edges: np.ndarray) -> np.ndarray:
    """Returns mel filters of height 1 between edges in Hz [130], [128, 201]."""
    bins = np.linspace(0, 8000, N_FFT // 2 + 1)  # Hz [201]
    return np.stack([np.interp(bins, edges[i : i + 3], [0, 1, 0]) for i in range(N_MELS)])


@mistake("mel-30s", "mel.*")
def mel_30s(run):
    """The sound is padded with zeros (or cut) to 30 s, as Whisper's feature extractor does unless
    it is told not to: 375 audio tokens, and the time markers that go with them. Right: nothing is
    padded, T = samples // 160 (encoder.py, mel_spectrum)."""
    swap_mel(run, length=480_000)


@mistake("mel-float32", "mel.*")
def mel_float32(run):
    """The log-mel stays in float32. Right: it is rounded to bfloat16 whatever the model's own type,
    since the model has never seen another (encoder.py, log_mel)."""
    swap_mel(run, rounded=torch.Tensor.float)


@mistake("mel-last-frame-kept", "mel.*")
def mel_last_frame_kept(run):
    """The log-mel has one frame too many, the one around the sound's very end. Right: it is
    dropped, so that T is samples // 160 (encoder.py, mel_spectrum)."""
    swap_mel(run, last_frame=True)


@mistake("mel-htk", "mel.*")
def mel_htk(run):
    """The mel filters lie on HTK's scale, 2595 log10(1 + f / 700). Right: on Slaney's, linear up to
    1000 Hz and logarithmic from there (encoder.py, mel_filters)."""
    mels = np.linspace(0, math.log10(1 + 8000 / 700), N_MELS + 2)
    edges = 700 * (10**mels - 1)  # Hz [130]
    areas = (edges[2:] - edges[:-2]) / 2
    swap_mel(run, filters=triangles(edges) / areas[:, None])


@mistake("mel-natural-log", "mel.*")
def mel_natural_log(run):
    """The log-mel is a natural logarithm. Right: log10; the floor of 8 below the maximum and
    (x + 4) / 4 are made for that (encoder.py, mel_spectrum)."""
    swap_mel(run, logarithm=np.log)


@mistake("mel-zero-padded", "mel.*")
def mel_zero_padded(run):
    """The sound's edges are padded with zeros, 200 samples each. Right: with its reflection
    (encoder.py, mel_spectrum)."""
    swap_mel(run, pad="constant")


@mistake("mel-symmetric-window", "mel.*")
def mel_symmetric_window(run):
    """The Hann window is symmetric, of period 399. Right: periodic, of period 400 (encoder.py,
    mel_spectrum)."""
    swap_mel(run, window=np.hanning(N_FFT))


@mistake("mel-magnitude", "mel.*")
def mel_magnitude(run):
    """The mel filters are applied to the spectrum's magnitude. Right: to its square, the power
    (encoder.py, mel_spectrum)."""
    swap_mel(run, power=1)


@mistake("mel-no-slaney-norm", "mel.*")
def mel_no_slaney_norm(run):
    """The mel filters are triangles of height 1. Right: of area 1, Slaney's norm (encoder.py,
    mel_filters)."""
    step = math.log(6.4) / 27
    mels = np.linspace(0, 15 + math.log(8) / step, N_MELS + 2)
    edges = np.where(mels < 15, 200 * mels / 3, 1000 * np.exp(step * (mels - 15)))  # Hz [130]
    swap_mel(run, filters=triangles(edges))


@mistake("mel-bfloat16-truncated", "mel.*")
def mel_bfloat16_truncated(run):
    """The log-mel becomes bfloat16 by losing a float32's lower 16 bits. Right: it is rounded to the
    nearest (encoder.py, log_mel)."""

    def truncated(mel):
        return (mel.view(torch.int32) & -65536).view(torch.float32)

    swap_mel(run, rounded=truncated)


@mistake("mel-floor-shared", "mel.*")
def mel_floor_shared(run):
    """The floor of a clip's log-mel is 8 below the maximum of all clips. Right: below its own
    (encoder.py, mel_spectrum)."""
    waves = [f"waveform.{i}" for i in range(run.clips)]
    for i, wave in enumerate(waves):
        others = [other for other in waves if other != wave]
        replace_stage(run, f"mel.{i}", [wave, *others], partial(log_mel, **run.mel_parts))


# ---- encoder ----


def replace_convolutions(run: Run, inputs: Sequence[str], convolve: Callable) -> None:
    """Puts convolve in the place of stages.convolve; it takes the stages in inputs, too."""
    for i, before in ((1, "chunks"), (2, "encoder.conv1"), (3, "encoder.conv2")):
        replace_stage(run, f"encoder.conv{i}", [before, *inputs], partial(convolve, run, i))


def convolve_to(run: Run, i: int, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Convolution i of chunks that end after so many frames: 0 behind their ends."""
    x = convolve(run, i, x)
    # Zeros behind a chunk's end are what the next convolution takes to be outside.
    beyond = torch.arange(x.shape[-1]) >= (frames[:, None] / 2**i).ceil()  # [C, t]
    return x.masked_fill(beyond[:, None, None].to(x.device), 0)


@mistake("clips-padded-alone", "encoder.conv*")
def clips_padded_alone(run):
    """Each clip's chunks are padded to the longest of that clip. Right: to the longest of all
    clips' chunks; the convolutions' biases make something of that padding which reaches a tail's
    last tokens (encoder.py, split_chunks)."""

    def to_the_clips_longest(run, i, x, *mels):
        longest = []
        for mel in mels:
            of_clip = chunk_frames(run, mel)
            longest += [of_clip.max()] * len(of_clip)
        return convolve_to(run, i, x, torch.stack(longest))

    mels = [f"mel.{i}" for i in range(run.clips)]
    replace_convolutions(run, mels, to_the_clips_longest)


@mistake("full-clip-attention", "frames", "chunks")
def full_clip_attention(run):
    """Convolutions, positions and attention go over the whole clip, as in a Whisper encoder. Right:
    over chunks of 4 s (n_window 200 is half of one), and nothing crosses from one to the next
    (encoder.py, split_chunks)."""
    audio = run.model.audio_encoder
    run.swap(audio, "config", replace(audio.config, n_window=2**40))


@mistake("positions-not-restarted", "encoder.stem")
def positions_not_restarted(run):
    """The encoder's positions go on from chunk to chunk: chunk j's begin at 50 j (with n_window
    200). Right: they begin at 0 in every chunk (encoder.py, AudioEncoder.stem)."""
    window = run.model.audio_encoder.config.n_window
    each = count_tokens(2 * window, window)

    def going_on(run, x):
        C, L, D = x.shape
        return run.sinusoids((C - 1) * each + L, D).unfold(0, L, each).mT  # [C, L, D]

    run.swap(run, "positions", going_on)


@mistake("tail-not-padded", "encoder.conv*")
def tail_not_padded(run):
    """Each chunk is convolved at its own length. Right: all are padded with zeros to the longest,
    and the convolutions' biases make something of that padding which reaches the tail's last tokens
    (encoder.py, split_chunks)."""
    replace_convolutions(run, ["frames"], convolve_to)


@mistake("gelu-tanh-stem", "encoder.conv*")
def gelu_tanh_stem(run):
    """The convolutions' GELU is the tanh approximation. Right: the exact one, by erf (encoder.py,
    AudioEncoder)."""
    run.swap(run.model.audio_encoder, "activation", nn.GELU("tanh"))


@mistake("gelu-tanh-layers", "encoder.layers.*")
def gelu_tanh_layers(run):
    """The GELU in the encoder's layers is the tanh approximation. Right: the exact one, by erf
    (encoder.py, EncoderLayer)."""
    for layer in run.model.audio_encoder.layers:
        run.swap(layer, "activation", nn.GELU("tanh"))


@mistake("stem-mel-major", "encoder.stem")
def stem_mel_major(run):
    """Mel comes before channels where the convolutions' output is flattened for stem_proj. Right:
    channels before mel (encoder.py, AudioEncoder.stem)."""
    audio = run.model.audio_encoder
    # The weight's columns, as if they were mel by channels, are put in the order of our input.
    columns = audio.stem_proj.weight.unflatten(1, (-1, audio.config.downsample_hidden_size))
    run.swap(audio.stem_proj, "weight", weight(columns.transpose(1, 2).flatten(1)))


def convolutions(run: Run) -> list[nn.Conv2d]:
    audio = run.model.audio_encoder
    return [audio.conv1, audio.conv2, audio.conv3]


@mistake("conv-padded-behind", "encoder.conv*")
def conv_padded_behind(run):
    """The convolutions' input is padded behind its end alone, as TensorFlow's SAME pads an even
    length at stride 2. Right: with one 0 on either side, of bands and of frames (encoder.py,
    AudioEncoder)."""

    def padded_behind(forward, x):
        return forward(F.pad(x, (0, 2, 0, 2)))

    for conv in convolutions(run):
        run.swap(conv, "padding", (0, 0))
        run.swap(conv, "forward", partial(padded_behind, conv.forward))


@mistake("conv-kernels-transposed", "encoder.conv*")
def conv_kernels_transposed(run):
    """The convolutions' kernels are frames by mel bands. Right: mel bands by frames (encoder.py,
    AudioEncoder.stem)."""
    for conv in convolutions(run):
        run.swap(conv, "weight", weight(conv.weight.mT))


@mistake("sinusoids-half-width", "encoder.stem")
def sinusoids_half_width(run):
    """The rates of the encoder's positions fall by 10,000^(1 / (D / 2)) each. Right: by
    10,000^(1 / (D / 2 - 1)), so that the last is 1 / 10,000 (encoder.py, sinusoids)."""

    def of_half_width(length, width):
        rates = torch.exp(-math.log(10_000) / (width // 2) * torch.arange(width // 2))
        angles = torch.arange(length)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    run.swap(run, "sinusoids", of_half_width)


@mistake("sinusoids-interleaved", "encoder.stem")
def sinusoids_interleaved(run):
    """Sines and cosines alternate in the encoder's positions. Right: sines are the first half of a
    row, cosines the second (encoder.py, sinusoids)."""

    def interleaved(table, length, width):
        return torch.stack(table(length, width).chunk(2, dim=1), dim=2).flatten(1)

    run.swap(run, "sinusoids", partial(interleaved, run.sinusoids))


@mistake("padding-attended", "encoder.layers.*")
def padding_attended(run):
    """The padding behind a tail is attended to, as in a batch without a mask. Right: tokens attend
    to the real ones of their chunk alone (encoder.py, AudioEncoder.forward)."""
    layers = run.model.audio_encoder.layers

    # The stages have no padding, so it is carried along here, layer by layer.
    @functools.cache
    def entering(frames, conv3, *outputs):
        """What enters a layer, [C, L, D], of encoder.stem and the outputs of those before it."""
        *before, last = outputs
        x = stem_chunks(run, conv3)
        if before:
            x = layers[len(before) - 1](entering(frames, conv3, *before), None)
        return x.masked_scatter(real_tokens(frames)[:, :, None].to(x.device), last)

    def output(layer, frames, *inputs):
        return layer(entering(frames, *inputs), None)[real_tokens(frames)]

    def attention(layer, frames, *inputs):
        part = layer.self_attn
        x = layer.self_attn_layer_norm(entering(frames, *inputs))
        x = attend(part, part.q_proj(x), part.k_proj(x), part.v_proj(x), None)
        return x[real_tokens(frames)]

    inputs = ["frames", "encoder.conv3", "encoder.stem"]
    for i, layer in enumerate(layers):
        name = f"encoder.layers.{i}"
        if name in run.inside:
            replace_stage(run, f"{name}.attention", inputs, partial(attention, layer))
        else:
            replace_stage(run, name, inputs, partial(output, layer))
        inputs.append(name)


@mistake("no-v-bias", "encoder.layers.*", proj="v_proj")
@mistake("no-out-bias", "encoder.layers.*", proj="out_proj")
def bias_left_out(run, proj):
    """The bias of {proj} is left out in the encoder's attention. Right: all of its projections but
    k_proj have one (encoder.py, EncoderAttention)."""
    for layer in run.model.audio_encoder.layers:
        run.swap(getattr(layer.self_attn, proj), "bias", None)


@mistake("query-scaled-before-bias", "encoder.layers.*")
def query_scaled_before_bias(run):
    """The encoder's query is (W x) scale + b. Right: (W x + b) scale (encoder.py,
    EncoderAttention)."""
    for layer in run.model.audio_encoder.layers:
        proj = layer.self_attn.q_proj
        scale = (proj.out_features / layer.self_attn.heads) ** -0.5
        # The right code multiplies this with the scale, which gives b.
        run.swap(proj, "bias", weight(proj.bias / scale))


@mistake("layer-norm-eps", "encoder.layers.*", "encoder", eps=1e-6)
@mistake("layer-norm-eps", "encoder.layers.*", "encoder", eps=1e-3)
def layer_norm_eps(run, eps):
    """The epsilon of the encoder's LayerNorms is {eps}. Right: 1e-5, in the layers whatever the
    configuration says (encoder.py, EncoderLayer and AudioEncoder)."""
    for module in run.model.audio_encoder.modules():
        if isinstance(module, nn.LayerNorm):
            run.swap(module, "eps", eps)


# ---- taps, adapter, prompt ----


def swap_taps(run: Run, indexes: list[int]) -> None:
    audio = run.model.audio_encoder
    config = replace(audio.config, deepstack_encoder_layer_indexes=tuple(indexes))
    run.swap(audio, "config", config)


@mistake("tap-one-layer-early", "deepstack.*")
def tap_one_layer_early(run):
    """A tap is what enters its layer, the output of layer index - 1, as where hidden_states[index]
    counts the embeddings. Right: the output of layer index itself, counted from 0 (encoder.py,
    AudioEncoder.forward)."""
    indexes = run.model.audio_encoder.config.deepstack_encoder_layer_indexes
    swap_taps(run, [i - 1 for i in indexes])


@mistake("taps-reversed", "deepstack.*")
def taps_reversed(run):
    """Tap k goes to merger n - 1 - k. Right: tap k, in the order that the configuration lists them,
    to merger k (encoder.py, AudioEncoder.forward)."""
    indexes = run.model.audio_encoder.config.deepstack_encoder_layer_indexes
    swap_taps(run, indexes[::-1])


@mistake("taps-after-norm", "deepstack.*")
def taps_after_norm(run):
    """The encoder's final norm is applied to the taps. Right: to its output alone (encoder.py,
    AudioEncoder.forward)."""
    run.swap(run, "tap", encoder_output)


@mistake("taps-without-out-proj", "deepstack.*")
def taps_without_out_proj(run):
    """The taps do not pass out_proj, where there is one, and zeros fill a merger's wider input.
    Right: they do, as the output does (encoder.py, AudioEncoder.forward)."""
    config = run.model.audio_encoder.config

    def as_it_is(run, x):
        return F.pad(x, (0, config.output_dim - config.d_model))

    run.swap(run, "tap", as_it_is)


@mistake("gate-up-swapped", "adapter", "deepstack.*")
def gate_up_swapped(run):
    """SiLU is on the wrong side in the adapter and the mergers: down(gate(x) silu(up(x))). Right:
    down(silu(gate(x)) up(x)) (adapter.py, GatedMLP)."""
    for mlp in (run.model.audio_adapter, *run.model.deepstack_audio_merger_list):
        gate = mlp.gate_proj
        run.swap(mlp, "gate_proj", mlp.up_proj)
        run.swap(mlp, "up_proj", gate)


@mistake("no-time-markers", "input_ids")
def no_time_markers(run):
    """The prompt has no time markers. Right: after every 25 audio tokens come the seconds so far,
    in digits, unless processor_config.json has enable_time_marker false (adapter.py, audio_ids)."""
    run.swap(run, "time_markers", False)


@mistake("clip-rows-restarted", "inputs_embeds", "decoder.layers.[0-{n}]")
def clip_rows_restarted(run):
    """Each clip's audio tokens get the encoder's rows from the first on: the second clip the rows
    of the first. Right: the rows go on from clip to clip (encoder.py, AudioEncoder.forward)."""

    def from_the_first_on(run, ids, rows):
        clip = (ids == run.model.config.adapter.audio_start_id).cumsum(0)
        clip = clip[is_audio(run, ids)]  # [A]
        first = torch.searchsorted(clip, clip)  # the clip's first row
        return rows[torch.arange(len(clip), device=clip.device) - first]

    run.swap(run, "order", from_the_first_on)


# ---- DeepStack ----


@mistake("no-deepstack", "decoder.layers.[0-{n}]")
def no_deepstack(run):
    """No DeepStack rows are added in the decoder. Right: merger k's rows are added to what leaves
    layer k (qwen3.py, Qwen3.forward)."""
    run.swap(run, "merger_of_layer", {})


@mistake("deepstack-at-layer-input", "decoder.layers.[0-{n}]")
def deepstack_at_layer_input(run):
    """Merger k's DeepStack rows are added to what enters decoder layer k. Right: to what leaves it
    (qwen3.py, Qwen3.forward)."""
    run.swap(run, "rows_at", "input")


@mistake("deepstack-before-mlp", "decoder.layers.[0-{n}]")
def deepstack_before_mlp(run):
    """Merger k's DeepStack rows are added inside decoder layer k, between its attention and its
    MLP. Right: to what leaves the layer (qwen3.py, Qwen3.forward)."""
    run.swap(run, "rows_at", "mlp")


@mistake("deepstack-one-layer-late", "decoder.layers.[0-{n}]")
def deepstack_one_layer_late(run):
    """Merger k's DeepStack rows are added to what leaves decoder layer k + 1. Right: layer k,
    counted from 0 (qwen3.py, Qwen3.forward)."""
    run.swap(run, "merger_of_layer", {i + 1: k for i, k in run.merger_of_layer.items()})


@mistake("deepstack-at-markers", "decoder.layers.[0-{n}]")
def deepstack_at_markers(run):
    """A clip's DeepStack rows are laid without a gap from its first audio token on, over the time
    markers. Right: at its audio tokens alone (moss_min.py, MossAudio.decode)."""

    def without_gaps(run, ids):
        sound = is_audio(run, ids)
        clip = (ids == run.model.config.adapter.audio_start_id).cumsum(0)
        places = torch.zeros_like(sound)
        for i in clip[sound].unique():
            audio_tokens = (sound & (clip == i)).nonzero()
            first = int(audio_tokens[0])
            places[first : first + len(audio_tokens)] = True
        return places

    run.swap(run, "places", without_gaps)


# ---- decoder ----


def attentions(run: Run) -> list[nn.Module]:
    return [layer.self_attn for layer in run.model.language_model.layers]


def swap_attention(run: Run, attend: Callable) -> None:
    """Puts attend in the place of the decoder's scaled_dot_product_attention. It takes that first,
    then queries [1, G, n x H / G, hd], keys and values [1, G, K, hd] and a mask [1, 1, n x H / G,
    K], or None for a lone token."""
    right = qwen3.F.scaled_dot_product_attention
    functions = vars(qwen3.F) | {"scaled_dot_product_attention": partial(attend, right)}
    # That of the encoder stays.
    run.swap(qwen3, "F", SimpleNamespace(**functions))


@mistake("no-qk-norm", "decoder.layers.*")
def no_qk_norm(run):
    """The decoder's queries and keys are not normalised. Right: each head of them is, over
    head_dim, by q_norm and k_norm (qwen3.py, Attention)."""
    for attention in attentions(run):
        run.swap(attention, "q_norm", nn.Identity())
        run.swap(attention, "k_norm", nn.Identity())


@mistake("qk-norm-after-rope", "decoder.layers.*")
def qk_norm_after_rope(run):
    """q_norm and k_norm come after RoPE, so that their weights fall on turned pairs. Right: before
    it (qwen3.py, Attention)."""
    turn = qwen3.apply_rope
    waiting = []  # a norm until its heads are turned

    def wait(norm, x):
        waiting.append(norm)
        return x

    for attention in attentions(run):
        for norm in (attention.q_norm, attention.k_norm):
            run.swap(norm, "forward", partial(wait, norm.forward))
    run.swap(qwen3, "apply_rope", lambda x, cos, sin: waiting.pop()(turn(x, cos, sin)))


@mistake("attention-scale", "decoder.layers.*")
def attention_scale(run):
    """The decoder's scores are scaled by (hidden_size / num_attention_heads)^-0.5. Right:
    head_dim^-0.5; head_dim is a number of its own (qwen3.py, Attention)."""
    config = run.model.config.decoder
    scale = (config.hidden_size / config.num_attention_heads) ** -0.5

    def scaled(attend, q, keys, values, attn_mask):
        return attend(q, keys, values, attn_mask=attn_mask, scale=scale)

    swap_attention(run, scaled)


@mistake("rope-interleaved", "decoder.layers.*")
def rope_interleaved(run):
    """RoPE turns pairs of neighbours, (2i, 2i + 1). Right: dimension i with i + head_dim / 2, at
    the same rate (qwen3.py, apply_rope)."""

    turn = qwen3.apply_rope

    def turn_neighbours(x, cos, sin):
        # Even and odd dimensions become the halves that `turn` pairs, and go back to their places.
        halves = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
        return torch.stack(turn(halves, cos, sin).chunk(2, dim=-1), dim=-1).flatten(-2)

    run.swap(qwen3, "apply_rope", turn_neighbours)


@mistake("rope-theta-10000", "decoder.layers.*")
def rope_theta_10000(run):
    """RoPE's base is 10,000, the default of most code. Right: rope_theta, 1,000,000 (qwen3.py,
    rope_rates)."""
    config = run.model.config
    decoder = replace(config.decoder, rope_theta=10_000.0)
    run.swap(run.model, "config", config._replace(decoder=decoder))


@mistake("rope-bfloat16-angles", "decoder.layers.*")
def rope_bfloat16_angles(run):
    """RoPE's rates and angles are rounded to bfloat16, as a buffer is when the model is cast.
    Right: both are float32, and only cos and sin are rounded to the model's type (qwen3.py,
    rope_table)."""

    def rounded(positions, config, dtype):
        rates = qwen3.rope_rates(config, positions.device).bfloat16().float()
        angles = (positions[:, :, None] * rates).bfloat16().float()  # [B, n, hd / 2]
        angles = angles.repeat(1, 1, 2)[:, :, None]  # [B, n, 1, hd]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    run.swap(qwen3, "rope_table", rounded)


@mistake("qk-norms-swapped", "decoder.layers.*")
def qk_norms_swapped(run):
    """Queries are normalised with k_norm's weights, keys with q_norm's. Right: each with their own
    (qwen3.py, Attention)."""
    for attention in attentions(run):
        q_norm = attention.q_norm
        run.swap(attention, "q_norm", attention.k_norm)
        run.swap(attention, "k_norm", q_norm)


@mistake("query-heads-modulo", "decoder.layers.*")
def query_heads_modulo(run):
    """Query head h shares key head h mod G, of G. Right: h // (H / G), neighbours one key head
    (qwen3.py, Attention)."""
    config = run.model.config.decoder
    G = config.num_key_value_heads
    sharing = config.num_attention_heads // G

    def modulo(attend, q, keys, values, attn_mask):
        x = torch.empty_like(q)
        for r in range(sharing):
            heads = slice(r, None, sharing)  # r of each group
            of = (torch.arange(G) * sharing + r) % G
            mask = attn_mask if attn_mask is None else attn_mask[:, :, heads]
            x[:, :, heads] = attend(q[:, :, heads], keys[:, of], values[:, of], attn_mask=mask)
        return x

    swap_attention(run, modulo)


@mistake("causal-mask-without-itself", "decoder.layers.*")
def causal_mask_without_itself(run):
    """A prompt's token does not attend to itself, and the first one to nothing. Right: it attends
    to itself and to all before it (qwen3.py, KVCache.place)."""
    config = run.model.config.decoder
    sharing = config.num_attention_heads // config.num_key_value_heads

    def without_itself(attend, q, keys, values, attn_mask):
        if q.shape[2] == sharing * keys.shape[2]:  # a whole prompt
            attn_mask = F.pad(attn_mask[..., 1:], (0, 1), value=-math.inf)
        return attend(q, keys, values, attn_mask=attn_mask)

    swap_attention(run, without_itself)


@mistake("rms-norm-eps", "decoder.layers.*", "final_norm")
def rms_norm_eps(run):
    """The epsilon of the decoder's RMSNorms is 1e-5. Right: rms_norm_eps, 1e-6 (qwen3.py,
    RMSNorm)."""
    for module in run.model.language_model.modules():
        if isinstance(module, qwen3.RMSNorm):
            run.swap(module, "eps", 1e-5)


WITH_WEIGHTS = ("encoder*", "adapter", "deepstack.*", "inputs_embeds", "decoder.layers.*")
WITH_WEIGHTS += ("final_norm", "logits")


@mistake("weights-as-float16", *WITH_WEIGHTS, rounding=10)
def weights_as_float16(run):
    """The weights' bfloat16 is read as float16, which has as many bits. Right: bfloat16 is the
    upper half of a float32 (moss_min.py, map_shards)."""

    def misread(module, forward, *arguments):
        stored = dict(module.named_parameters(recurse=False))
        for name, x in stored.items():
            setattr(module, name, weight(x.bfloat16().view(torch.float16).to(x)))
        result = forward(*arguments)
        for name, x in stored.items():
            setattr(module, name, x)
        return result

    # Module by module, when it is used: a second copy of all the weights may be too large.
    for module in run.model.modules():
        if list(module.parameters(recurse=False)):
            run.swap(module, "forward", partial(misread, module, module.forward))


# ---- decoding ----


def swap_stepping(run: Run, **values) -> None:
    run.swap(run, "stepping", replace(run.stepping, **values))


@mistake("decode-rope-too-far", "step_logits")
def decode_rope_too_far(run):
    """After a prompt of N tokens, RoPE goes on with position N + 1. Right: the first new token has
    position N, since positions are counted from 0 (moss_min.py, Step)."""
    swap_stepping(run, position=1)


@mistake("decode-position-too-far", "step_logits")
def decode_position_too_far(run):
    """After a prompt of N tokens, RoPE and the cache go on with position N + 1, and the place that
    is skipped, with zeros in it, is attended to. Right: position and place N (moss_min.py,
    Step)."""
    swap_stepping(run, position=1, place=1)


@mistake("decode-last-place-overwritten", "step_logits", position=0, and_rope="")
@mistake("decode-last-place-overwritten", "step_logits", position=-1, and_rope=" RoPE does, too.")
def decode_last_place_overwritten(run, position, and_rope):
    """After a prompt of N tokens, the cache goes on with place N - 1, over the prompt's last
    token.{and_rope} Right: place and position N (qwen3.py, KVCache)."""
    swap_stepping(run, place=-1, position=position)


@mistake("decode-without-itself", "step_logits")
def decode_without_itself(run):
    """A new token attends to those before it alone: its keys and values are stored too late, or
    counted too late. Right: to itself, too (qwen3.py, KVCache)."""
    swap_stepping(run, sees_itself=False)


@mistake("decode-first-place-lost", "step_logits")
def decode_first_place_lost(run):
    """New tokens do not attend to the prompt's first token. Right: to all places of the cache, from
    0 on (qwen3.py, KVCache)."""
    swap_stepping(run, first=1)


def main(argv: list[str] | None = None) -> int:
    """The command line, which has nothing but help; returns the exit status."""
    parser = Parser("mistakes.py", __doc__)

    def run() -> None:
        parser.parse_args(argv)
        parser.print_help()

    return end("mistakes", run)


if __name__ == "__main__":
    sys.exit(main())
