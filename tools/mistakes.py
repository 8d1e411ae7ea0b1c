"""How MOSS-Audio goes wrong: a run of the model stage by stage, and each mistake that ports of it are known to make.

parity.py makes them, to see which one explains a port's numbers. The second half, which teaches what matters in this
model, can be read without the first. Shapes: T mel frames, A audio tokens (12.5 a second), C chunks, t frames and L
tokens of a chunk, N prompt tokens, D the width of encoder or decoder, hd the size of a decoder's head."""

import inspect, math, sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adapter, encoder, qwen3
from encoder import HOP, STRIDE, count_tokens
from moss_min import MossAudio

# ---- a run, stage by stage ----
HIDDEN = "frames", "chunks"  # two stages more than a dump has: what the encoder's are computed from
Stage = namedtuple("Stage", "inputs compute")  # names of earlier stages; a function of their values


def chunk_frames(run, *mels: torch.Tensor) -> torch.Tensor:
    """How many frames each chunk of the log-mels has before it is padded: int64 [C]."""
    size = 2 * run.model.audio_encoder.config.n_window
    return torch.tensor([chunk.shape[1] for mel in mels for chunk in mel.split(size, dim=1)])


def padded_chunks(run, *mels: torch.Tensor) -> torch.Tensor:
    """[C, 1, 128, t]"""
    return encoder.split_chunks(mels, run.model.audio_encoder.config.n_window)[0][:, None]


def chunk_tokens(frames: torch.Tensor) -> torch.Tensor:
    return (frames + STRIDE - 1) // STRIDE  # [C]


def real_tokens(frames: torch.Tensor) -> torch.Tensor:
    """bool [C, L], false for tokens that are padding."""
    tokens = chunk_tokens(frames)
    return torch.arange(int(tokens.max())) < tokens[:, None]


def convolve(run, i: int, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Convolution i, from 1, and GELU: [C, channels, bands, t] to half the bands and frames. It takes no heed of how
    many frames of a chunk are sound: a tail's padding is convolved like sound."""
    audio = run.model.audio_encoder
    conv, parts = getattr(audio, f"conv{i}"), x.split(audio.batch)
    return torch.cat([audio.activation(conv(part.to(conv.weight))) for part in parts])


def positions(x: torch.Tensor) -> torch.Tensor:
    """What is added to the stem's [C, L, D]: the same for every chunk, [L, D]."""
    return encoder.sinusoids(*x.shape[1:])


def stem(run, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """The last convolution's [C, channels, 16, L] to [A, D], as AudioEncoder.stem goes on."""
    audio = run.model.audio_encoder
    parts = x.permute(0, 3, 1, 2).flatten(2).split(audio.batch)
    x = torch.cat([audio.stem_proj(part) for part in parts])  # [C, L, D]
    return (x + run.positions(x).to(x))[real_tokens(frames)]


def encoder_layer(run, i: int, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """[A, D] to [A, D]: laid out in chunks again, with zeros for padding, which the mask keeps from the rest."""
    audio, real = run.model.audio_encoder, real_tokens(frames)
    chunks, size = x.new_zeros(*real.shape, x.shape[1]), audio.batch
    chunks[real] = x
    masks = [None if part.all() else part[:, None, None].to(x.device) for part in real.split(size)]
    return torch.cat([audio.layers[i](*part) for part in zip(chunks.split(size), masks)])[real]


def leave_encoder(run, function: Callable, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """A function of [A, D], on the tokens of as many chunks at a time as the model gives it: to the same last bit."""
    parts = chunk_tokens(frames).split(run.model.audio_encoder.batch)
    return torch.cat([function(part) for part in x.split([int(part.sum()) for part in parts])])


def prompt_ids(run, *mels: torch.Tensor) -> torch.Tensor:
    ids = run.model.prompt_ids(run.text, [mel.shape[1] * HOP for mel in mels], run.time_markers)
    return torch.tensor(ids, device=run.model.lm_head.weight.device)


def is_audio(run, ids: torch.Tensor) -> torch.Tensor:
    return ids == run.model.config.adapter.audio_token_id


def embed(run, ids: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    x = run.model.language_model.embed_tokens(ids)
    return adapter.splice(x, rows[0], is_audio(run, ids)) if rows else x


def lay(run, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A merger's rows [A, D], laid out like the prompt: [N, D]."""
    return adapter.deepstack_rows(rows, is_audio(run, ids))


def step(layer: nn.Module, x: torch.Tensor, cos, sin, rows: torch.Tensor | None) -> torch.Tensor:
    """What leaves a decoder layer, the injection included: [1, N, D]. rows: DeepStack's, [1, N, D], if it has any."""
    x = layer(x, cos, sin, None, None)
    return x if rows is None else qwen3.inject(x, rows)


def decoder_layer(
    run, i: int, x: torch.Tensor, ids: torch.Tensor, *rows: torch.Tensor
) -> torch.Tensor:
    decoder = run.model.language_model
    cos, sin = qwen3.rope_table(
        torch.arange(len(x), device=x.device)[None], decoder.config, x.dtype
    )
    return run.step(
        decoder.layers[i], x[None], cos, sin, run.lay(run, rows[0], ids)[None] if rows else None
    )[0]


@dataclass
class Run:
    """What a run is made with. A mistake puts something else in the place of one of these values, of a submodule or a
    value of the model, or of a module's function."""

    model: MossAudio
    text: str
    time_markers: bool | None
    clips: int
    convolve: Callable = convolve
    positions: Callable = positions
    lay: Callable = lay
    step: Callable = step
    injected: dict[int, int] | None = (
        None  # decoder layer -> number of the merger whose rows are added to its output
    )

    def __post_init__(self):
        mergers, layers = (
            len(self.model.deepstack_audio_merger_list),
            len(self.model.language_model.layers),
        )
        self.injected = {k: k for k in range(min(mergers, layers)) if self.clips}


def table(run: Run) -> dict[str, Stage]:
    """Every stage in order, what it is computed from and how: the whole model."""
    model, audio, decoder = run.model, run.model.audio_encoder, run.model.language_model
    waves, mels = ([f"{name}.{i}" for i in range(run.clips)] for name in ("waveform", "mel"))
    stages = {wave: Stage((), None) for wave in waves}
    stages |= {
        mel: Stage((wave,), lambda x: encoder.log_mel(x).float()) for wave, mel in zip(waves, mels)
    }
    if mels:
        stages["frames"] = Stage(mels, partial(chunk_frames, run))
        stages["chunks"] = Stage(mels, partial(padded_chunks, run))
        for i, x in enumerate(("chunks", "encoder.conv1", "encoder.conv2"), 1):
            stages[f"encoder.conv{i}"] = Stage((x, "frames"), partial(run.convolve, run, i))
        stages["encoder.stem"] = Stage(("encoder.conv3", "frames"), partial(stem, run))
        outputs = ["encoder.stem", *(f"encoder.layers.{i}" for i in range(len(audio.layers)))]
        for i, x in enumerate(outputs[:-1]):
            stages[outputs[i + 1]] = Stage((x, "frames"), partial(encoder_layer, run, i))
        output = partial(leave_encoder, run, lambda x: audio.out_proj(audio.layer_norm(x)))
        stages["encoder"] = Stage((outputs[-1], "frames"), output)
        stages["adapter"] = Stage(("encoder",), model.audio_adapter)
        for k, i in enumerate(audio.config.deepstack_encoder_layer_indexes):
            merger = model.deepstack_audio_merger_list[k]
            rows = lambda x, frames, merger=merger: merger(leave_encoder(run, audio.tap, x, frames))
            stages[f"deepstack.{k}"] = Stage((outputs[i + 1], "frames"), rows)
    stages["input_ids"] = Stage(mels, partial(prompt_ids, run))
    stages["inputs_embeds"] = Stage(("input_ids", "adapter")[: 1 + bool(mels)], partial(embed, run))
    x = "inputs_embeds"
    for i in range(len(decoder.layers)):
        rows = [f"deepstack.{run.injected[i]}"] if i in run.injected else []
        stages[f"decoder.layers.{i}"] = Stage(
            (x, "input_ids", *rows), partial(decoder_layer, run, i)
        )
        x = f"decoder.layers.{i}"
    stages["final_norm"] = Stage((x,), decoder.norm)
    stages["logits"] = Stage(("final_norm",), lambda x: model.lm_head(x).float())
    return stages


@torch.no_grad()
def compute(run: Run, given: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The stages in order, given ones as they are. Each is kept only for as long as later ones need it."""
    stages, values = table(run), {}
    last = {
        x: name for name, stage in stages.items() for x in stage.inputs
    }  # who needs a stage last
    for name, stage in stages.items():
        x = given[name] if name in given else stage.compute(*(values[x] for x in stage.inputs))
        yield name, x
        values[name] = x
        values = {x: value for x, value in values.items() if last.get(x, name) != name}


# ---- the mistakes ----
# Each function makes one: it returns a context, within which something wrong stands in the right thing's place. Its
# docstring, which diagnose prints, says what the port does, what is right, and where that is in the code. The decorator
# gives its id and the stages that are computed otherwise ({n} is the number of DeepStack's mergers).
Mistake = namedtuple("Mistake", "id sentence stages make")
MISTAKES = []


def mistake(id: str, *stages: str, **values):
    """Enters a function into MISTAKES; values are arguments of it, and of its docstring."""

    def enter(make):
        sentence = " ".join(inspect.getdoc(make).format(**values).split())
        MISTAKES.append(Mistake(id, sentence, stages, partial(make, **values)))
        return make

    return enter


def touches(wrong: Mistake, run: Run, name: str) -> bool:
    n = min(len(run.model.deepstack_audio_merger_list), 9)
    return any(fnmatchcase(name, stage.format(n=n)) for stage in wrong.stages)


@contextmanager
def swap(owner, **values):
    """Puts values in the place of an object's attributes, and takes them away again."""
    right = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in right.items():
            setattr(owner, name, value)


@contextmanager
def swap_all(changes):
    """swap for pairs of an object and {attribute: value}."""
    with ExitStack() as stack:
        for owner, values in changes:
            stack.enter_context(swap(owner, **values))
        yield


class Function(nn.Module):
    """A function in a submodule's place."""

    def __init__(self, function: Callable):
        super().__init__()
        self.forward = function


def weight(x: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


@mistake("mel-30s", "mel.*")
def mel_30s(run):
    """The sound is padded with zeros (or cut) to 30 s, as Whisper's feature extractor does unless it is told not to:
    375 audio tokens, and the time markers that go with them. Right: nothing is padded, T = samples // 160
    (encoder.py, mel_spectrum)."""
    right = encoder.mel_spectrum
    return swap(
        encoder,
        mel_spectrum=lambda wave: right(np.pad(wave, (0, max(0, 480_000 - len(wave))))[:480_000]),
    )


@mistake("mel-float32", "mel.*")
def mel_float32(run):
    """The log-mel stays in float32. Right: it is rounded to bfloat16 whatever the model's own type, since the model
    has never seen another (encoder.py, log_mel)."""
    return swap(encoder, log_mel=lambda wave: torch.from_numpy(encoder.mel_spectrum(wave.numpy())))


@mistake("mel-last-frame-kept", "mel.*")
def mel_last_frame_kept(run):
    """The log-mel has one frame too many, the one around the sound's very end. Right: it is dropped, so that T is
    samples // 160 (encoder.py, mel_spectrum)."""
    right, hop = encoder.mel_spectrum, np.zeros(HOP, np.float32)

    def one_more(
        wave,
    ):  # a hop more, put behind the padding: now it is that one's frame which is dropped
        pad_edges = encoder.pad_edges
        with swap(encoder, pad_edges=lambda longer: np.append(pad_edges(longer[:-HOP]), hop)):
            return right(np.append(wave, hop))

    return swap(encoder, mel_spectrum=one_more)


@mistake("mel-htk", "mel.*")
def mel_htk(run):
    """The mel filters lie on HTK's scale, 2595 log10(1 + f / 700). Right: Slaney's, linear up to 1000 Hz and
    logarithmic from there (encoder.py, mel_filters)."""
    edges = 700 * (
        10 ** np.linspace(0, math.log10(1 + 8000 / 700), encoder.N_MELS + 2) - 1
    )  # Hz [130]
    hertz = np.linspace(0, 8000, encoder.N_FFT // 2 + 1)
    filters = np.stack(
        [np.interp(hertz, edges[i : i + 3], [0, 1, 0]) for i in range(encoder.N_MELS)]
    )
    return swap(encoder, mel_filters=lambda: filters * (2 / (edges[2:] - edges[:-2]))[:, None])


@mistake("mel-natural-log", "mel.*")
def mel_natural_log(run):
    """The log-mel is a natural logarithm. Right: log10; the floor of 8 below the maximum and (x + 4) / 4 are made for
    that (encoder.py, mel_spectrum)."""
    return swap(np, log10=np.log)


@mistake("mel-zero-padded", "mel.*")
def mel_zero_padded(run):
    """The sound's edges are padded with zeros, 200 samples each. Right: with its reflection (encoder.py, pad_edges)."""
    return swap(encoder, pad_edges=lambda wave: np.pad(wave, encoder.N_FFT // 2))


@mistake("mel-symmetric-window", "mel.*")
def mel_symmetric_window(run):
    """The Hann window is symmetric, of period 399. Right: periodic, of period 400 (encoder.py, hann_window)."""
    return swap(encoder, hann_window=lambda: np.hanning(encoder.N_FFT))


@mistake("full-clip-attention", "frames", "chunks")
def full_clip_attention(run):
    """Convolutions, positions and attention go over the whole clip, as in a Whisper encoder. Right: over chunks of 4 s
    (n_window 200 is half of one), and nothing crosses from one to the next (encoder.py, split_chunks)."""
    audio = run.model.audio_encoder
    return swap(audio, config=replace(audio.config, n_window=2**40))


@mistake("positions-not-restarted", "encoder.stem")
def positions_not_restarted(run):
    """The encoder's positions go on from chunk to chunk: chunk j's begin at 50 j (with n_window 200). Right: they begin
    at 0 in every chunk (encoder.py, sinusoids in AudioEncoder.stem)."""
    window = run.model.audio_encoder.config.n_window
    each = count_tokens(2 * window, window)

    def ramp(x):
        C, L, D = x.shape
        return encoder.sinusoids((C - 1) * each + L, D).unfold(0, L, each).mT  # [C, L, D]

    return swap(run, positions=ramp)


@mistake("tail-not-padded", "encoder.conv*")
def tail_not_padded(run):
    """Each chunk is convolved at its own length. Right: all are padded with zeros to the longest, and the convolutions'
    biases make something of that padding which reaches the tail's last tokens (encoder.py, split_chunks)."""

    def to_its_end(
        run, i, x, frames
    ):  # 0 from there on, which is what a convolution takes to be outside
        x = convolve(run, i, x, frames)
        beyond = torch.arange(x.shape[-1]) >= (frames[:, None] / 2**i).ceil()  # [C, t]
        return x.masked_fill(beyond[:, None, None].to(x.device), 0)

    return swap(run, convolve=to_its_end)


@mistake("gelu-tanh-stem", "encoder.conv*")
def gelu_tanh_stem(run):
    """The convolutions' GELU is the tanh approximation. Right: the exact one, by erf (encoder.py, AudioEncoder)."""
    return swap(run.model.audio_encoder, activation=nn.GELU("tanh"))


@mistake("gelu-tanh-layers", "encoder.layers.*")
def gelu_tanh_layers(run):
    """The GELU in the encoder's layers is the tanh approximation. Right: the exact one, by erf (encoder.py,
    EncoderLayer)."""
    return swap_all(
        (layer, {"activation": nn.GELU("tanh")}) for layer in run.model.audio_encoder.layers
    )


@mistake("stem-mel-major", "encoder.stem")
def stem_mel_major(run):
    """Mel comes before channels where the convolutions' output is flattened for stem_proj. Right: channels before mel
    (encoder.py, AudioEncoder.stem)."""
    proj, channels = (
        run.model.audio_encoder.stem_proj,
        run.model.audio_encoder.config.downsample_hidden_size,
    )
    columns = proj.weight.unflatten(1, (-1, channels)).transpose(
        1, 2
    )  # as if they were mel by channels
    return swap(proj, weight=weight(columns.flatten(1)))


@mistake("query-scaled-before-bias", "encoder.layers.*")
def query_scaled_before_bias(run):
    """The encoder's query is (W x) scale + b. Right: (W x + b) scale (encoder.py, EncoderAttention)."""
    attentions = [layer.self_attn for layer in run.model.audio_encoder.layers]
    scale = (run.model.audio_encoder.config.d_model / attentions[0].heads) ** -0.5
    projs = [attention.q_proj for attention in attentions]
    return swap_all(
        (proj, {"bias": weight(proj.bias / scale)}) for proj in projs
    )  # scale times which is b


@mistake("layer-norm-eps", "encoder.layers.*", "encoder", eps=1e-6)
@mistake("layer-norm-eps", "encoder.layers.*", "encoder", eps=1e-3)
def layer_norm_eps(run, eps):
    """The epsilon of the encoder's LayerNorms is {eps}. Right: 1e-5, in the layers whatever the configuration says
    (encoder.py, EncoderLayer and AudioEncoder.layer_norm)."""
    norms = (
        module for module in run.model.audio_encoder.modules() if isinstance(module, nn.LayerNorm)
    )
    return swap_all((norm, {"eps": eps}) for norm in norms)


@mistake("tap-one-layer-early", "deepstack.*")
def tap_one_layer_early(run):
    """A tap is what enters its layer, the output of layer index - 1, as where hidden_states[index] counts the
    embeddings. Right: the output of layer index itself, counted from 0 (encoder.py, AudioEncoder.forward)."""
    audio = run.model.audio_encoder
    indexes = tuple(i - 1 for i in audio.config.deepstack_encoder_layer_indexes)
    return swap(audio, config=replace(audio.config, deepstack_encoder_layer_indexes=indexes))


@mistake("taps-reversed", "deepstack.*")
def taps_reversed(run):
    """Tap k goes to merger n - 1 - k. Right: tap k, in the order that the configuration lists them, to merger k
    (encoder.py, AudioEncoder.forward)."""
    audio = run.model.audio_encoder
    indexes = audio.config.deepstack_encoder_layer_indexes[::-1]
    return swap(audio, config=replace(audio.config, deepstack_encoder_layer_indexes=indexes))


@mistake("taps-after-norm", "deepstack.*")
def taps_after_norm(run):
    """The encoder's final norm is applied to the taps. Right: to its output alone (encoder.py, AudioEncoder.tap)."""
    return swap(encoder.AudioEncoder, tap=lambda audio, x: audio.out_proj(audio.layer_norm(x)))


@mistake("gate-up-swapped", "adapter", "deepstack.*")
def gate_up_swapped(run):
    """SiLU is on the wrong side in the adapter and the mergers: down(gate(x) silu(up(x))). Right: down(silu(gate(x))
    up(x)) (adapter.py, GatedMLP)."""
    mlps = run.model.audio_adapter, *run.model.deepstack_audio_merger_list
    return swap_all((mlp, {"gate_proj": mlp.up_proj, "up_proj": mlp.gate_proj}) for mlp in mlps)


@mistake("no-time-markers", "input_ids")
def no_time_markers(run):
    """The prompt has no time markers. Right: after every 25 audio tokens come the seconds so far, in digits, unless
    processor_config.json says enable_time_marker false (adapter.py, audio_ids)."""
    return swap(run, time_markers=False)


@mistake("no-deepstack", "decoder.layers.[0-{n}]")
def no_deepstack(run):
    """No DeepStack rows are added in the decoder. Right: merger k's rows are added to what leaves layer k (qwen3.py,
    inject)."""
    return swap(run, injected={})


@mistake("deepstack-at-layer-input", "decoder.layers.[0-{n}]")
def deepstack_at_layer_input(run):
    """Merger k's DeepStack rows are added to what enters decoder layer k. Right: to what leaves it (qwen3.py,
    inject)."""

    def at_input(layer, x, cos, sin, rows):
        return step(layer, x if rows is None else x + rows, cos, sin, None)

    return swap(run, step=at_input)


@mistake("deepstack-before-mlp", "decoder.layers.[0-{n}]")
def deepstack_before_mlp(run):
    """Merger k's DeepStack rows are added inside decoder layer k, between its attention and its MLP. Right: to what
    leaves the layer (qwen3.py, inject)."""

    def inside(layer, x, cos, sin, rows):
        x = x + layer.self_attn(layer.input_layernorm(x), cos, sin, None, None)
        x = x if rows is None else x + rows
        return x + layer.mlp(layer.post_attention_layernorm(x))

    return swap(run, step=inside)


@mistake("deepstack-one-layer-late", "decoder.layers.[0-{n}]")
def deepstack_one_layer_late(run):
    """Merger k's DeepStack rows are added to what leaves decoder layer k + 1. Right: layer k, counted from 0 (qwen3.py,
    Qwen3.forward)."""
    return swap(run, injected={i + 1: k for i, k in run.injected.items()})


@mistake("deepstack-at-markers", "decoder.layers.[0-{n}]")
def deepstack_at_markers(run):
    """A clip's DeepStack rows are laid without a gap from its first audio token on, over the time markers. Right: at
    its audio tokens alone (adapter.py, deepstack_rows)."""

    def without_gaps(run, rows, ids):
        sound, clip = is_audio(run, ids), (ids == run.model.config.adapter.audio_start_id).cumsum(0)
        laid = torch.zeros_like(sound)
        for own in (sound & (clip == i) for i in clip[sound].unique()):
            first = int(own.nonzero()[0])
            laid[first : first + int(own.sum())] = True
        return adapter.deepstack_rows(rows, laid)

    return swap(run, lay=without_gaps)


@mistake("no-qk-norm", "decoder.layers.*")
def no_qk_norm(run):
    """The decoder's queries and keys are not normalised. Right: each head of them is, over head_dim, by q_norm and
    k_norm (qwen3.py, Attention)."""
    attentions = (layer.self_attn for layer in run.model.language_model.layers)
    return swap_all(
        (attention, {"q_norm": nn.Identity(), "k_norm": nn.Identity()}) for attention in attentions
    )


@mistake("qk-norm-after-rope", "decoder.layers.*")
def qk_norm_after_rope(run):
    """q_norm and k_norm come after RoPE, so that their weights fall on turned pairs. Right: before it (qwen3.py,
    Attention)."""
    decoder, turn = run.model.language_model, qwen3.apply_rope

    def late(norm):
        def turned(x):  # [1, N, H, hd]
            cos, sin = qwen3.rope_table(
                torch.arange(x.shape[1], device=x.device)[None], decoder.config, x.dtype
            )
            return norm(turn(x, cos.transpose(1, 2), sin.transpose(1, 2)))

        return Function(turned)

    attentions = [layer.self_attn for layer in decoder.layers]
    norms = [
        (each, {"q_norm": late(each.q_norm), "k_norm": late(each.k_norm)}) for each in attentions
    ]
    return swap_all([(qwen3, {"apply_rope": lambda x, cos, sin: x}), *norms])


@mistake("attention-scale", "decoder.layers.*")
def attention_scale(run):
    """The decoder's scores are scaled by (hidden_size / num_attention_heads)^-0.5. Right: head_dim^-0.5; head_dim is a
    number of its own (qwen3.py, Attention)."""
    config = run.model.language_model.config
    ratio = (config.head_dim * config.num_attention_heads / config.hidden_size) ** 0.5
    attentions = [layer.self_attn for layer in run.model.language_model.layers]

    def scaled(norm):  # queries, so much larger, make scores so much larger
        return Function(lambda x: norm(x) * ratio)

    return swap_all((each, {"q_norm": scaled(each.q_norm)}) for each in attentions)


@mistake("rope-interleaved", "decoder.layers.*")
def rope_interleaved(run):
    """RoPE turns pairs of neighbours, (2i, 2i + 1). Right: dimension i with i + head_dim / 2, at the same rate
    (qwen3.py, apply_rope)."""

    def turn(x, cos, sin):
        cos, sin = (y[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for y in (cos, sin))
        return x * cos + torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2) * sin

    return swap(qwen3, apply_rope=turn)


@mistake("rope-theta-10000", "decoder.layers.*")
def rope_theta_10000(run):
    """RoPE's base is 10,000, the default of most code. Right: rope_theta, 1,000,000 (qwen3.py, rope_table)."""
    decoder = run.model.language_model
    return swap(decoder, config=replace(decoder.config, rope_theta=10_000.0))


@mistake("rope-bfloat16-angles", "decoder.layers.*")
def rope_bfloat16_angles(run):
    """RoPE's rates and angles are rounded to bfloat16, as a buffer is when the model is cast. Right: both are float32,
    and only cos and sin are rounded to the model's type (qwen3.py, rope_table)."""

    def rounded(positions, config, dtype):
        rates = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
        rates = rates.bfloat16().float().to(positions.device)
        angles = (positions[:, None, :, None] * rates).bfloat16().float().repeat(1, 1, 1, 2)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    return swap(qwen3, rope_table=rounded)
