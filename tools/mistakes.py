"""The mistakes that ports of MOSS-Audio are known to make, and what is right in each case.

It can be read as a chapter on what matters in this model. diagnose.py makes the mistakes in a run
(stages.py), to see which of them explains a port's numbers. Shapes: C chunks, t frames and L tokens
of a chunk, N prompt tokens, D the width of the encoder or the decoder, hd the size of a head.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import qwen3
from encoder import N_FFT, N_MELS, count_tokens, sinusoids
from moss_min import Parser, end
from stages import Run, convolve, encoder_output, is_audio


@dataclass(frozen=True, eq=False)
class Mistake:
    """make changes a run; stages: those computed otherwise, {n} being the number of mergers."""

    id: str
    sentence: str
    stages: tuple[str, ...]
    make: Callable[[Run], None]

    def touches(self, run: Run, name: str) -> bool:
        mergers = min(len(run.model.deepstack_audio_merger_list), 9)
        return any(fnmatchcase(name, glob.format(n=mergers)) for glob in self.stages)


MISTAKES: list[Mistake] = []


def mistake(id: str, *stages: str, **values) -> Callable:
    """Enters a function into MISTAKES. Its docstring is the mistake's sentence: what a port does,
    what is right, and where that is in the code. values: arguments of the function, and of its
    docstring."""

    def enter(make: Callable) -> Callable:
        sentence = " ".join(inspect.getdoc(make).format(**values).split())
        MISTAKES.append(Mistake(id, sentence, stages, partial(make, **values)))
        return make

    return enter


@contextmanager
def made(run: Run, mistakes: Sequence[Mistake]) -> Iterator[None]:
    """Makes mistakes in a run, in the order of the table, and takes them away again."""
    try:
        for wrong in sorted(mistakes, key=MISTAKES.index):
            wrong.make(run)
        yield
    finally:
        run.restore()


def weight(x: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


# ---- log-mel ----


def swap_mel(run: Run, **parts) -> None:
    run.swap(run, "mel_parts", run.mel_parts | parts)


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
    swap_mel(run, dtype=torch.float32)


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
    bins = np.linspace(0, 8000, N_FFT // 2 + 1)  # Hz [201]
    triangles = [np.interp(bins, edges[i : i + 3], [0, 1, 0]) for i in range(N_MELS)]
    areas = (edges[2:] - edges[:-2]) / 2
    swap_mel(run, filters=np.stack(triangles) / areas[:, None])


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


# ---- encoder ----


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

    def going_on(x):
        C, L, D = x.shape
        return sinusoids((C - 1) * each + L, D).unfold(0, L, each).mT  # [C, L, D]

    run.swap(run, "positions", going_on)


@mistake("tail-not-padded", "encoder.conv*")
def tail_not_padded(run):
    """Each chunk is convolved at its own length. Right: all are padded with zeros to the longest,
    and the convolutions' biases make something of that padding which reaches the tail's last tokens
    (encoder.py, split_chunks)."""

    def to_its_end(run, i, x, frames):
        x = convolve(run, i, x, frames)
        # Zeros behind a chunk's end are what the next convolution takes to be outside.
        beyond = torch.arange(x.shape[-1]) >= (frames[:, None] / 2**i).ceil()  # [C, t]
        return x.masked_fill(beyond[:, None, None].to(x.device), 0)

    run.swap(run, "convolve", to_its_end)


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

    def at_input(layer, x, cache, rows):
        return layer(x + rows, cache)

    run.swap(run, "layer", at_input)


@mistake("deepstack-before-mlp", "decoder.layers.[0-{n}]")
def deepstack_before_mlp(run):
    """Merger k's DeepStack rows are added inside decoder layer k, between its attention and its
    MLP. Right: to what leaves the layer (qwen3.py, Qwen3.forward)."""

    def before_mlp(layer, x, cache, rows):
        x = x + layer.self_attn(layer.input_layernorm(x), cache) + rows
        return x + layer.mlp(layer.post_attention_layernorm(x))

    run.swap(run, "layer", before_mlp)


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
    config = run.model.config.decoder

    def turn_and_normalise(norm, x):  # [1, n, heads, hd], the whole prompt
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return norm(turn(x, *qwen3.rope_table(positions, config, x.dtype)))

    for attention in attentions(run):
        for norm in (attention.q_norm, attention.k_norm):
            run.swap(norm, "forward", partial(turn_and_normalise, norm.forward))
    run.swap(qwen3, "apply_rope", lambda x, cos, sin: x)


@mistake("attention-scale", "decoder.layers.*")
def attention_scale(run):
    """The decoder's scores are scaled by (hidden_size / num_attention_heads)^-0.5. Right:
    head_dim^-0.5; head_dim is a number of its own (qwen3.py, Attention)."""
    config = run.model.config.decoder
    ratio = (config.head_dim * config.num_attention_heads / config.hidden_size) ** 0.5

    def scaled(norm, x):
        return norm(x) * ratio

    # Queries that are so much larger make scores that are so much larger.
    for attention in attentions(run):
        run.swap(attention.q_norm, "forward", partial(scaled, attention.q_norm.forward))


@mistake("rope-interleaved", "decoder.layers.*")
def rope_interleaved(run):
    """RoPE turns pairs of neighbours, (2i, 2i + 1). Right: dimension i with i + head_dim / 2, at
    the same rate (qwen3.py, apply_rope)."""

    def turn_neighbours(x, cos, sin):
        half = x.shape[-1] // 2
        cos = cos[..., :half].repeat_interleave(2, dim=-1)
        sin = sin[..., :half].repeat_interleave(2, dim=-1)
        rotated = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return x * cos + rotated * sin

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


HELP = """Holds the known mistakes of ports; parity.py's diagnose tries them on a port's numbers.

    python tools/parity.py diagnose reference.safetensors PORT --model FOLDER
"""


def main(argv: list[str] | None = None) -> int:
    """The command line, which has nothing but help; returns the exit status."""
    parser = Parser("mistakes.py", HELP)

    def run() -> None:
        parser.parse_args(argv)
        parser.print_help()

    return end("mistakes.py", run)


if __name__ == "__main__":
    sys.exit(main())
