"""Sound to audio features: file -> 16 kHz waveform -> log-mel -> 4-second chunks -> encoder output and taps.
Shapes: T mel frames (100 a second), A audio tokens (12.5 a second), C chunks, t frames and L tokens of a chunk, D the
encoder's width (d_model), H heads, hd head size. The file reads in the order in which sound goes through it."""

import io, math, os, shutil, subprocess, tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

SAMPLE_RATE = 16_000
N_FFT, HOP = 400, 160  # samples in a frame (25 ms), and from frame to frame (10 ms)
N_MELS, STRIDE = 128, 8  # bands of the log-mel; frames in a token (three convolutions of stride 2)

CONTAINERS = "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,tta,w64,wav,wv"
FFMPEG = (
    "ffmpeg",
    "-v",
    "error",
    "-nostdin",
    "-protocol_whitelist",
    "file",
    "-format_whitelist",
    CONTAINERS,
    "-i",
    "file:sound",
    "-map",
    "0:a:0",
    "-c:a",
    "pcm_f32be",
    "-f",
    "au",
    "pipe:1",
)  # no playlists


def require(good: bool, sentence: str) -> None:
    if not good:
        raise ValueError(sentence)


def load_audio(source) -> torch.Tensor:
    """A path, an open binary file or a float array [samples] at 16 kHz, to float32 [samples], 16 kHz, mono.
    Raises ValueError for what is not sound, not finite, or shorter than one 10-ms hop."""
    is_path = isinstance(source, (str, os.PathLike))
    name = str(source) if is_path else getattr(source, "name", None) or "sound"
    try:
        if is_path or hasattr(source, "read"):
            wave = resample(*decode(Path(source).read_bytes() if is_path else source.read(), name))
        else:
            wave = (
                torch.as_tensor(source if torch.is_tensor(source) else np.array(source))
                .detach()
                .cpu()
            )
    except (
        OSError,
        MemoryError,
        TypeError,
        RuntimeError,
    ) as error:  # the latter two for what is no array of numbers
        raise ValueError(
            f"{name}: {getattr(error, 'strerror', error)}; expected a sound file or an array"
        ) from error
    floats = wave.ndim == 1 and wave.is_floating_point()
    require(floats, f"{name}: {wave.dtype} {list(wave.shape)}; expected floats [samples] at 16 kHz")
    require(
        len(wave) >= HOP,
        f"{name}: {len(wave)} samples at 16 kHz; expected at least {HOP}, one hop of 10 ms",
    )
    require(
        wave.float().isfinite().all(),
        f"{name}: samples that are NaN or infinite; expected finite ones",
    )
    return wave.float()


def decode(data: bytes, name: str) -> tuple[torch.Tensor, int]:
    """A sound file's bytes, by soundfile or else by ffmpeg (m4a, mp4, webm, ...), to float32 [samples], and Hz."""
    try:
        samples, rate = soundfile.read(
            io.BytesIO(data), dtype="float32", always_2d=True
        )  # [samples, channels]
    except soundfile.SoundFileError as error:
        said = getattr(error, "error_string", error)  # the whole has the bytes' address in it
        require(
            shutil.which("ffmpeg"),
            f"{name}: {said} For other formats an ffmpeg on the PATH is needed",
        )
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "sound").write_bytes(
                data
            )  # alone there, under a name that tells ffmpeg nothing
            run = subprocess.run(FFMPEG, cwd=folder, capture_output=True)
        said = (run.stderr.decode(errors="replace").strip().splitlines() or ["no sound"])[-1]
        require(
            run.returncode == 0 and run.stdout,
            f"{name}: soundfile and ffmpeg can't read it as a sound: {said}",
        )
        samples, rate = soundfile.read(io.BytesIO(run.stdout), dtype="float32", always_2d=True)
    return torch.from_numpy(
        samples.mean(axis=1)
    ), rate  # and bytes and channels are freed before it is resampled


def resample(wave: torch.Tensor, rate: int) -> torch.Tensor:
    """[samples] at `rate` Hz to 16 kHz by windowed-sinc interpolation (torchaudio.functional.resample). With o, n the
    rates over their greatest common divisor, output n m + p is filter p, of n, around input o m + o p / n. A filter at
    a time, and 2w + 2 taps of it: torchaudio's other o - 2 are 0, and take gigabytes at an odd rate (44,101 Hz)."""
    if rate == SAMPLE_RATE:
        return wave
    o, n = rate // math.gcd(rate, SAMPLE_RATE), SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE)
    cutoff = 0.99 * min(o, n)
    w = math.ceil(6 * o / cutoff)
    out = torch.empty(
        min(math.ceil(np.float32(n * len(wave) / o)), n * (len(wave) // o + 1))
    )  # float32: torchaudio's
    wave = F.pad(wave, (w, max(0, (len(out) - 1) * o // n + w + 2 - len(wave))))
    for p in range(min(n, len(out))):
        first = p * o // n - w
        t = (cutoff * (torch.arange(first, first + 2 * w + 2) / o - p / n)).clamp(-6, 6)
        taps = cutoff / o * torch.sinc(t) * torch.cos(torch.pi * t / 12) ** 2
        windows = wave[first + w :].unfold(0, 2 * w + 2, o)[: len(out[p::n])]  # [m, 2w + 2], a view
        for block, result in zip(
            windows.split(1 << 16), out[p::n].split(1 << 16)
        ):  # @ copies its block
            result[:] = block @ taps
    return out


def mel_filters() -> np.ndarray:
    """128 triangles on Slaney's mel scale (not HTK's), linear to 1000 Hz, or 15 mel, then logarithmic: [128, 201]."""
    mels = np.linspace(0, 15 + np.log(8000 / 1000) * (27 / np.log(6.4)), N_MELS + 2)
    edges = np.where(
        mels < 15, 200 * mels / 3, 1000 * np.exp(np.log(6.4) / 27 * (mels - 15))
    )  # Hz [130]
    bins, widths = (
        np.linspace(0, SAMPLE_RATE // 2, N_FFT // 2 + 1),
        np.diff(edges)[:, None],
    )  # Hz [201], [129, 1]
    triangles = np.minimum(
        (bins - edges[:-2, None]) / widths[:-1], (edges[2:, None] - bins) / widths[1:]
    )
    return (
        np.maximum(0, triangles) * (2 / (edges[2:] - edges[:-2]))[:, None]
    )  # each of area 1 (Slaney's norm)


def hann_window() -> np.ndarray:
    """The periodic Hann window, float64 [400]: the symmetric one of 401 points without its last."""
    return np.hanning(N_FFT + 1)[:-1]


def pad_edges(wave: np.ndarray) -> np.ndarray:
    """Reflects 200 samples at each end (of a shorter clip again and again), so that frame i is around sample 160 i."""
    return np.pad(wave, N_FFT // 2, mode="reflect")


def mel_spectrum(wave: np.ndarray) -> np.ndarray:
    """float32 [samples] to normalised log-mel, float32 [128, T] with T = samples // 160: nothing is padded to 30 s.
    In float64 but for the spectrum's rounding to complex64, as transformers' WhisperFeatureExtractor does it in numpy
    (_np_extract_fbank_features); its torch path, in float32, differs in dozens of values."""
    filters, window = mel_filters(), hann_window()
    frames = np.lib.stride_tricks.sliding_window_view(pad_edges(wave), N_FFT)[
        ::HOP
    ]  # [T + 1, 400], a view
    mel = np.empty(
        (N_MELS, len(wave) // HOP), np.float32
    )  # the last frame, around the very end, is dropped
    for i in range(0, mel.shape[1], 1000):  # by ten seconds, which bounds the memory
        spectrum = np.fft.rfft(frames[:-1][i : i + 1000] * window).astype(
            np.complex64
        )  # [1000, 201]
        power = filters @ (np.abs(spectrum, dtype=np.float64) ** 2).T  # [128, 1000]
        mel[:, i : i + 1000] = np.log10(np.maximum(power, 1e-10))
    np.maximum(mel, mel.max() - 8, out=mel)  # the floor is 80 dB below this clip's own maximum
    mel += 4  # in place: an hour's log-mel is 184 MB
    mel /= 4
    return mel


def log_mel(wave: torch.Tensor) -> torch.Tensor:
    """float32 [samples] to bfloat16 [128, T], what enters the encoder: rounded so whatever the model's type."""
    return torch.from_numpy(mel_spectrum(wave.numpy())).to(torch.bfloat16)


@dataclass(frozen=True)
class EncoderConfig:
    """What is used of config.json's audio_config, by its names there."""

    downsample_hidden_size: int  # channels of the convolutions
    d_model: int
    output_dim: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    layer_norm_eps: float  # of the final norm alone
    deepstack_encoder_layer_indexes: tuple[
        int, ...
    ]  # layers whose output is a tap, in the order of their mergers
    n_window: int = 200  # half a chunk, in mel frames
    conv_chunksize: int = 64  # chunks encoded at a time, at most


def count_tokens(frames: int, n_window: int) -> int:
    """The audio tokens of a clip of `frames` mel frames; each of its chunks is rounded up."""
    chunks, rest = divmod(frames, 2 * n_window)
    return chunks * math.ceil(2 * n_window / STRIDE) + math.ceil(rest / STRIDE)


def split_chunks(mels: list[torch.Tensor], n_window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All clips' log-mels [128, T] to chunks [C, 128, t], padded with 0 to the longest, and their tokens, int64 [C].
    Padding changes a chunk's last tokens (the convolutions' biases go into it): upstream's arithmetic, to be kept."""
    chunks = [chunk for mel in mels for chunk in mel.split(2 * n_window, dim=1)]
    longest = max(chunk.shape[1] for chunk in chunks)
    padded = torch.stack([F.pad(chunk, (0, longest - chunk.shape[1])) for chunk in chunks])
    return padded, torch.tensor([count_tokens(chunk.shape[1], n_window) for chunk in chunks])


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Positions 0 to length - 1, float32 [length, width]: sines in the first half of a row, cosines in the second."""
    rates = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class EncoderAttention(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        C, L, D = x.shape
        q = (
            self.q_proj(x) * (D // self.heads) ** -0.5
        )  # scaled here, after its bias, and not in the attention
        q, k, v = (
            y.view(C, L, self.heads, -1).transpose(1, 2)
            for y in (q, self.k_proj(x), self.v_proj(x))
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)  # [C, H, L, hd]
        return self.out_proj(x.transpose(1, 2).reshape(C, L, D))


class EncoderLayer(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=1e-5)
        self.self_attn = EncoderAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=1e-5)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.activation = nn.GELU()  # exact (erf), not tanh
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[C, L, D] to the same; mask: bool [C, 1, 1, L], False for keys that are padding, or None."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        x = x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))
        return x.clamp(-64504, 64504) if x.dtype == torch.float16 else x  # float16 ends at 65504


class AudioEncoder(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config, channels, D = config, config.downsample_hidden_size, config.d_model
        self.batch = min(
            config.conv_chunksize, 8
        )  # chunks at a time: 64 are no faster, and take 3.6 GB in float32
        convs = (
            nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
            for inputs in (1, channels, channels)
        )
        self.conv1, self.conv2, self.conv3 = convs
        self.activation = nn.GELU()
        self.stem_proj = nn.Linear(channels * N_MELS // STRIDE, D)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.out_proj = (
            nn.Identity() if config.output_dim == D else nn.Linear(D, config.output_dim, bias=False)
        )

    def stem(self, chunks: torch.Tensor) -> torch.Tensor:
        """Chunks [C, 128, t] to tokens [C, L, D], L = ceil(t / 8), with positions that begin at 0 in every chunk."""
        x = chunks[:, None]  # [C, 1, 128, t]
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.activation(
                conv(x)
            )  # [C, channels, 64, t/2], [C, channels, 32, t/4], [C, channels, 16, L]
        x = self.stem_proj(
            x.permute(0, 3, 1, 2).flatten(2)
        )  # channels before mel: [C, L, channels * 16] to [C, L, D]
        return x + sinusoids(*x.shape[1:]).to(x)  # made in float32, rounded to the model's type

    def tap(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(
            x
        )  # a layer's output as it is, without the norm: [..., D] to [..., output_dim]

    def forward(
        self, mels: list[torch.Tensor], report=None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The log-mels [128, T] of a prompt's clips to the output [A, output_dim] and the taps, [A, output_dim] each. A
        is all clips' tokens, one after another. Chunks are rows of a batch: nothing crosses from one to the next.
        report, if given, is called with a line on how far it is after each batch, where there are several."""
        indexes, parts = self.config.deepstack_encoder_layer_indexes, []
        chunks, tokens = split_chunks(mels, self.config.n_window)
        for x, n in zip(chunks.split(self.batch), tokens.split(self.batch)):
            x = self.stem(x.to(self.conv1.weight))
            real = torch.arange(x.shape[1]) < n[:, None]  # [C, L], False for padding
            mask, taps = None if real.all() else real[:, None, None].to(x.device), {}
            for i, layer in enumerate(self.layers):
                x = layer(x, mask)
                if i in indexes:
                    taps[i] = self.tap(x[real])
            parts.append([self.out_proj(self.layer_norm(x[real])), *(taps[i] for i in indexes)])
            if report and len(chunks) > self.batch:
                report(
                    f"encoding: {sum(len(part[0]) for part in parts) / 12.5:.0f} of {tokens.sum() / 12.5:.0f} s"
                )
        output, *taps = (
            torch.cat([part.pop(0) for part in parts]) for _ in (0, *indexes)
        )  # pop: freed as it goes
        return output, taps
