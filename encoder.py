"""Sound to audio features: file -> 16 kHz waveform -> log-mel -> 4-second chunks -> encoder output and taps.

Shapes: T mel frames (100 a second), A audio tokens (12.5 a second), C chunks, t frames of a chunk, L tokens of a
chunk, D the encoder's width (d_model), H heads, hd head size. The file reads in the order in which sound goes through.
"""

from __future__ import annotations

import io
import math
import os
import subprocess
import tempfile
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

SAMPLE_RATE = 16_000
N_FFT = 400  # a frame: 25 ms
HOP = 160  # between frames: 10 ms
N_MELS = 128
STRIDE = 8  # mel frames to a token: three convolutions of stride 2

# ---- sound to a waveform ----

# The containers that ffmpeg may open. Playlists (hls, concat, dash) are not among them: they would name other files.
CONTAINERS = "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,tta,w64,wav,wv"


def load_audio(source) -> torch.Tensor:
    """Sound to float32 [samples], 16 kHz, mono.

    source: a path, an open binary file, or a one-dimensional float array (torch or numpy) that is at 16 kHz already.
    Raises ValueError for what is not sound, is shorter than one 10-ms hop, or holds NaN or infinity.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            with open(source, "rb") as file:
                return load_audio(file)
        except OSError as error:
            raise ValueError(f"{source}: {error.strerror or error}") from error
    name = getattr(source, "name", "the sound")
    if hasattr(source, "read"):
        file = source if source.seekable() else io.BytesIO(source.read())  # a pipe is read whole
        samples, rate = decode(file, name)
        wave = resample(torch.from_numpy(samples), rate)
    else:
        wave = torch.as_tensor(source)
        if wave.ndim != 1 or not wave.is_floating_point():
            kind = f"{wave.dtype} {list(wave.shape)}".removeprefix("torch.")
            raise ValueError(f"a clip given as an array has to be float [samples] at 16 kHz, not {kind}")
        wave = wave.detach().to("cpu", torch.float32)
    if len(wave) < HOP:
        raise ValueError(f"{name}: {len(wave)} samples at 16 kHz, shorter than one 10-ms hop of {HOP}")
    if not wave.isfinite().all():
        raise ValueError(f"{name}: the sound has samples that are not finite (NaN or infinity)")
    return wave


def read_mono(file) -> tuple[np.ndarray, int]:
    """What soundfile can read, from a seekable binary file, to float32 [samples] (channels averaged) and the rate in Hz."""
    with soundfile.SoundFile(file) as sound:
        blocks = sound.blocks(1 << 18, dtype="float32", always_2d=True)  # [frames, channels] each
        mono = [block.mean(axis=1) for block in blocks]
        return np.concatenate(mono or [np.zeros(0, np.float32)]), sound.samplerate


def decode(file, name: str) -> tuple[np.ndarray, int]:
    """As read_mono, with ffmpeg for what soundfile can't read (m4a, mp4, webm, ...)."""
    try:
        return read_mono(file)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a file called .raw has no rate
        reason = str(error).split(": ", 1)[-1]
    # ffmpeg gets the sound on its standard input and may open nothing else; what it decodes is for soundfile again.
    command = ["ffmpeg", "-v", "error", "-protocol_whitelist", "cache,pipe", "-format_whitelist", CONTAINERS]
    command += ["-i", "cache:pipe:0", "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    file.seek(0)
    with tempfile.TemporaryFile() as decoded:
        try:
            run = subprocess.run(command, input=file.read(), stdout=decoded, stderr=subprocess.PIPE)
        except FileNotFoundError:
            raise ValueError(f"{name}: soundfile can't read it ({reason}), and there is no ffmpeg on the PATH") from None
        said = run.stderr.decode(errors="replace").strip().splitlines() or ["no sound in it"]
        if run.returncode != 0 or decoded.seek(0, os.SEEK_END) == 0:
            raise ValueError(f"{name}: not a sound that soundfile or ffmpeg can read ({said[-1]})")
        decoded.seek(0)
        return read_mono(decoded)


def resample(wave: torch.Tensor, rate: int) -> torch.Tensor:
    """Windowed-sinc interpolation of [samples] at `rate` Hz to 16 kHz, as torchaudio.functional.resample does it.

    Output sample n m + p is filter p (of n) on the window around input sample o m + o p / n, with o and n the old and the
    new rate over their greatest common divisor. torchaudio's filters have 2w + o taps, of which all but the 2w + 2 around the
    centre are 0: only those are made here, one filter at a time, or an odd rate would need gigabytes.
    """
    if rate == SAMPLE_RATE:
        return wave
    divisor = math.gcd(rate, SAMPLE_RATE)
    old, new = rate // divisor, SAMPLE_RATE // divisor
    cutoff = 0.99 * min(old, new)
    width = math.ceil(6 * old / cutoff)
    length = math.ceil(np.float32(new * len(wave) / old))  # in float32, since torchaudio rounds there
    length = min(length, new * (len(wave) // old + 1))
    beyond = (length - 1) * old // new + width + 2 - len(wave)  # how far the last window reaches past the end
    padded = F.pad(wave, (width, max(0, beyond)))
    out = torch.empty(length)
    for p in range(min(new, length)):
        first = p * old // new - width
        taps = torch.arange(first, first + 2 * width + 2, dtype=torch.float32)
        t = (cutoff * (taps / old - p / new)).clamp(-6, 6)
        filters = cutoff / old * torch.sinc(t) * torch.cos(torch.pi * t / 12) ** 2
        windows = padded[first + width :].unfold(0, 2 * width + 2, old)[: len(out[p::new])]  # a view: [samples, taps]
        out[p::new] = torch.cat([block @ filters for block in windows.split(1 << 16)])
    return out


# ---- waveform to log-mel ----


def mel_filters() -> np.ndarray:
    """128 triangular filters over 0-8000 Hz, float64 [128, 201]: Slaney's mel scale, each of unit area.

    The scale is linear below 1000 Hz (15 mel) and logarithmic above, 27 mel to a factor of 6.4. HTK's scale is another.
    """
    mels = np.linspace(0, 15 + np.log(8000 / 1000) * (27 / np.log(6.4)), N_MELS + 2)
    edges = np.where(mels < 15, 200 * mels / 3, 1000 * np.exp(np.log(6.4) / 27 * (mels - 15)))  # Hz [130]
    bins = np.linspace(0, SAMPLE_RATE // 2, N_FFT // 2 + 1)  # Hz [201]
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]  # [128, 201]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]


def hann_window() -> np.ndarray:
    """The periodic Hann window, float64 [400]: 401 symmetric points without the last."""
    return np.hanning(N_FFT + 1)[:-1]


def pad_edges(wave: np.ndarray) -> np.ndarray:
    """200 samples of reflection at each end, so that frame i is centred on sample 160 i."""
    return np.pad(wave, N_FFT // 2, mode="reflect")


def mel_spectrum(wave: np.ndarray) -> np.ndarray:
    """float32 [samples] to the normalised log-mel, float32 [128, T], T = samples // 160.

    Spectrum and filters are in float64 with the spectrum rounded to complex64 once, as in the numpy path of transformers'
    WhisperFeatureExtractor: its ordinary torch path differs in dozens of values. Nothing is padded or cut to 30 s.
    """
    frames = np.lib.stride_tricks.sliding_window_view(pad_edges(wave), N_FFT)[::HOP]
    frames = frames[: len(wave) // HOP]  # [T, 400]: the frame around the very end is dropped
    filters, window = mel_filters(), hann_window()
    mel = np.empty((N_MELS, len(frames)), np.float32)
    for start in range(0, len(frames), 1000):  # ten seconds at a time: a frame in float64 takes ten times its sound
        block = frames[start : start + 1000].astype(np.float64) * window
        power = np.abs(np.fft.rfft(block).astype(np.complex64), dtype=np.float64) ** 2  # [1000, 201]
        mel[:, start : start + 1000] = np.log10(np.maximum(1e-10, filters @ power.T))
    mel = np.maximum(mel, mel.max() - 8)  # 80 dB below the clip's own maximum
    return (mel + 4) / 4


def log_mel(wave: torch.Tensor) -> torch.Tensor:
    """float32 [samples] to the encoder's input, bfloat16 [128, T]: rounded so whatever the model's type, as upstream does."""
    return torch.from_numpy(mel_spectrum(wave.numpy())).to(torch.bfloat16)


# ---- log-mel to features ----


@dataclass(frozen=True)
class EncoderConfig:
    """The fields of config.json's audio_config that are used, by their names there."""

    num_mel_bins: int
    downsample_hidden_size: int  # channels of the convolutions
    d_model: int
    output_dim: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    layer_norm_eps: float
    deepstack_encoder_layer_indexes: tuple[int, ...]  # the layers that are tapped, in the order of their projectors
    n_window: int = 200  # half a chunk, in mel frames
    conv_chunksize: int = 64  # chunks that are encoded at a time


def count_tokens(frames: int, n_window: int) -> int:
    """Audio tokens of a clip of `frames` mel frames: its chunks are encoded, and rounded up, one by one."""
    chunks, rest = divmod(frames, 2 * n_window)
    return chunks * math.ceil(2 * n_window / STRIDE) + math.ceil(rest / STRIDE)


def split_chunks(mels: list[torch.Tensor], n_window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mels [M, T] of all clips to chunks [C, M, t] and the tokens of each, int64 [C].

    Every chunk is padded with zeros to the longest chunk of all clips. The convolutions' biases go through the padding, so it
    changes the last tokens of a padded tail: that is upstream's arithmetic, and encoding each chunk at its own length is not.
    """
    chunks = [chunk for mel in mels for chunk in mel.split(2 * n_window, dim=1)]
    frames = [chunk.shape[1] for chunk in chunks]
    padded = torch.stack([F.pad(chunk, (0, max(frames) - chunk.shape[1])) for chunk in chunks])
    return padded, torch.tensor([count_tokens(t, n_window) for t in frames])


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Positions 0 to length - 1 as float32 [length, width]: sines in the first half, cosines in the second."""
    rates = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2, dtype=torch.float32))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class EncoderAttention(nn.Module):
    """Bidirectional attention within a chunk."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """The query, scaled after projection and bias (in a low precision, the order of rounding shows)."""
        return self.q_proj(x) * (x.shape[-1] // self.heads) ** -0.5

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        C, L, D = x.shape
        q, k, v = (y.view(C, L, self.heads, -1).transpose(1, 2) for y in (self.query(x), self.k_proj(x), self.v_proj(x)))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)  # [C, H, L, hd]
        return self.out_proj(x.transpose(1, 2).reshape(C, L, D))


class EncoderLayer(nn.Module):
    """A pre-norm Transformer layer (Whisper's)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=1e-5)  # fixed: layer_norm_eps is the final norm's
        self.self_attn = EncoderAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=1e-5)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.activation = nn.GELU()  # exact (erf), not tanh
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        x = x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))
        if x.dtype == torch.float16:  # its largest value is 65504: upstream keeps away from infinity
            x = x.clamp(-64504, 64504)
        return x  # [C, L, D]


class AudioEncoder(nn.Module):
    """Log-mels to features at 12.5 tokens a second, with the outputs of a few inner layers (taps) for DeepStack."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        channels, mels = config.downsample_hidden_size, math.ceil(config.num_mel_bins / STRIDE)
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.activation = nn.GELU()  # exact (erf), not tanh
        self.stem_proj = nn.Linear(channels * mels, config.d_model)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        same = config.output_dim == config.d_model
        self.out_proj = nn.Identity() if same else nn.Linear(config.d_model, config.output_dim, bias=False)

    def stem(self, chunks: torch.Tensor) -> torch.Tensor:
        """[C, M, t] to [C, L, D]: three convolutions over (mel, time), a projection, and positions from 0 in every chunk."""
        x = chunks[:, None]  # [C, 1, 128, t]
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.activation(conv(x))  # [C, channels, 64 then 32 then 16, ceil(t/2) then ceil(t/4) then L]
        x = self.stem_proj(x.permute(0, 3, 1, 2).flatten(2))  # channels before mel: [C, L, channels * 16] -> [C, L, D]
        return x + sinusoids(x.shape[1], x.shape[2]).to(x)  # rounded to the model's type only here

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """What the adapter gets of the last layer's output: [..., D] to [..., output_dim]."""
        return self.out_proj(self.layer_norm(x))

    def tap(self, x: torch.Tensor) -> torch.Tensor:
        """What a DeepStack projector gets of its layer's output, which has no norm: [..., D] to [..., output_dim]."""
        return self.out_proj(x)

    def forward(self, mels: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Log-mels [M, T] of a prompt's clips to the output [A, output_dim] and the taps, each [A, output_dim].

        Chunks are a batch of their own kind: nothing crosses from one to the next. A counts all clips, one after another.
        """
        indexes = self.config.deepstack_encoder_layer_indexes
        chunks, tokens = split_chunks(mels, self.config.n_window)
        found = []  # a batch: [output, tap 0, tap 1, ...]
        for batch, count in zip(chunks.split(self.config.conv_chunksize), tokens.split(self.config.conv_chunksize)):
            x = self.stem(batch.to(self.conv1.weight))
            keep = torch.arange(x.shape[1]) < count[:, None]  # [C, L], False where a chunk is padding
            mask = None if keep.all() else keep[:, None, None].to(x.device)  # over keys: [C, 1, 1, L]
            keep, tapped = keep.to(x.device), {}
            for i, layer in enumerate(self.layers):
                x = layer(x, mask)
                if i in indexes:
                    tapped[i] = self.tap(x[keep])
            found.append([self.output(x[keep]), *(tapped[i] for i in indexes)])
        output, *taps = (torch.cat(batches) for batches in zip(*found))
        return output, taps
