"""Sound to audio features: file, 16-kHz waveform, log-mel, 4-s chunks, encoder output and taps.
The file reads in the order in which sound goes through it. Shapes: T mel frames (100 a second),
A audio tokens (12.5 a second), C chunks, t frames and L tokens of a chunk, D the encoder's width
(d_model), E its output_dim, H heads, hd head size."""

import io
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE_RATE = 16_000
N_FFT = 400  # samples in a mel frame, 25 ms
HOP = 160  # samples from one frame to the next, 10 ms
N_MELS = 128
STRIDE = 8  # mel frames in an audio token: three convolutions of stride 2

# ffmpeg may open these formats alone: none of them leads on to another file or address.
CONTAINERS = "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg"
ONLY = f"-protocol_whitelist file -format_whitelist {CONTAINERS},tta,w64,wav,wv"
LONGEST = 3600  # seconds: 40,960 positions hold 54.6 minutes without time markers
READ = f"ffmpeg -v error -nostdin {ONLY} -i file:a -map 0:a:0 -t {LONGEST + 1}"
FFMPEG = f"{READ} -c:a pcm_f32le file:b.caf"


def require(good: bool, sentence: str) -> None:
    """Raises ValueError with the sentence unless it is good."""
    if not good:
        raise ValueError(sentence)


def load_audio(source) -> Tensor:
    """Returns a sound as float32 [samples], 16 kHz, mono. source: a path, an open binary file, or a
    float array [samples] at 16 kHz. Raises ValueError for what is no sound, is shorter than one hop
    of 10 ms or longer than an hour, or holds NaN, infinity or values beyond 10,000."""
    require(source is not None, "no sound, but None; expected a sound file or an array")
    is_path = isinstance(source, (str, os.PathLike))
    name = source if is_path else getattr(source, "name", None) or "sound"
    try:
        if is_path or hasattr(source, "read"):
            with open(source, "rb") if is_path else io.BytesIO(source.read()) as file:
                wave = resample(*decode(file, name))
        else:
            wave = source if torch.is_tensor(source) else torch.as_tensor(np.array(source))
    except (OSError, MemoryError, TypeError, RuntimeError) as error:
        said = getattr(error, "strerror", error)
        raise ValueError(f"{name}: {said}; expected a sound file or an array") from error
    good = wave.ndim == 1 and wave.is_floating_point()
    require(good, f"{name}: {wave.dtype} {[*wave.shape]}; expected floats [samples] at 16 kHz")
    good = HOP <= len(wave) <= LONGEST * SAMPLE_RATE
    require(good, f"{name}: {len(wave)} samples at 16 kHz; expected {HOP} (10 ms) to an hour")
    wave = wave.detach().cpu().float()
    low, high = wave.aminmax()  # NaN if a sample is
    good = bool(low >= -10_000 and high <= 10_000)
    require(good, f"{name}: samples that are NaN, infinite or beyond 10,000; full scale is 1")
    return wave


def read_mono(source, name: str) -> tuple[Tensor, int]:
    """Returns a sound's samples, float32 [samples], averaged over its channels, and its rate."""
    # soundfile believes a name that ends in .raw, and reads no header.
    if isinstance(source, io.BufferedReader):
        source.raw.name = "sound"
    with soundfile.SoundFile(source) as file:
        # Else soundfile seeks after each block, and the next of an MP3 file is not what it was.
        file.seekable = lambda: False
        rate = file.samplerate
        require(1000 <= rate <= 768_000, f"{name}: {rate} Hz; expected from 1,000 to 768,000")
        # The header may lie about the length. Memory is taken by what is written alone.
        mono = np.empty(min(file.frames, LONGEST * rate + 1), np.float32)
        count = 0
        for start in range(0, len(mono), 1 << 14):
            block = file.read(1 << 14, "float32", always_2d=True)[: len(mono) - start]
            mono[start : start + len(block)] = block.mean(axis=1)  # of [n, channels]
            count += len(block)
    return torch.from_numpy(mono[:count]), rate


def decode(file, name: str) -> tuple[Tensor, int]:
    """Returns an open sound file's samples and rate, as read_mono. What soundfile can't read (m4a,
    mp4, webm, ...), ffmpeg does where there is one."""
    if not file.seekable():  # a pipe
        file = io.BytesIO(file.read())
    require(file.seek(0, io.SEEK_END) > 0, f"{name}: an empty file; expected a sound")
    file.seek(0)
    try:
        return read_mono(file, name)
    except soundfile.SoundFileError as error:
        said = getattr(error, "error_string", error)  # str(error) has an address in memory
        found = shutil.which("ffmpeg") is not None
        require(found, f"{name}: {said} For other formats an ffmpeg on the PATH is needed")
        with tempfile.TemporaryDirectory() as folder:
            # Alone in a folder, under a name that tells ffmpeg nothing.
            file.seek(0)
            with open(Path(folder, "a"), "wb") as copy:
                shutil.copyfileobj(file, copy)
            run = subprocess.run(FFMPEG.split(), cwd=folder, capture_output=True)
            stderr = run.stderr.decode(errors="replace").replace("file:a: ", "")
            silent = "matches no streams" in stderr
            require(not silent, f"{name}: there is no sound in it; expected a file with some")
            said = stderr.strip().splitlines() or ["no sound"]
            message = f"{name}: soundfile and ffmpeg can't read it as a sound: {said[-1]}"
            require(run.returncode == 0, message)
            return read_mono(Path(folder, "b.caf"), name)


def resample(wave: Tensor, rate: int) -> Tensor:
    """Resamples [samples] from `rate` Hz to 16 kHz by windowed-sinc interpolation, as torchaudio
    does. With `old` and `new` the rates over their greatest common divisor, output new x m + phase
    is filter `phase` on the inputs around old x m + old x phase / new."""
    if rate == SAMPLE_RATE:
        return wave
    old = rate // math.gcd(rate, SAMPLE_RATE)
    new = SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE)
    cutoff = 0.99 * min(old, new)
    half_width = math.ceil(6 * old / cutoff)
    taps = 2 * half_width + 2
    # torchaudio rounds this quotient to float32, which matters in clips of many minutes.
    length = math.ceil(np.float32(new * len(wave) / old))
    result = torch.empty(min(length, new * (len(wave) // old + 1)))
    last = (len(result) - 1) * old // new
    wave = F.pad(wave, (half_width, max(0, last + half_width + 2 - len(wave))))
    # A filter at a time, and only its taps that are not 0: at an odd rate (44,101 Hz), the whole
    # table takes gigabytes.
    for phase in range(min(new, len(result))):
        first = phase * old // new - half_width
        t = (cutoff * (torch.arange(first, first + taps) / old - phase / new)).clamp(-6, 6)
        kernel = cutoff / old * torch.sinc(t) * torch.cos(torch.pi * t / 12) ** 2  # [taps]
        outputs = result[phase::new]  # [m], a view
        windows = wave[first + half_width :].unfold(0, taps, old)[: len(outputs)]  # [m, taps]
        # A product copies its windows; in blocks that takes little memory.
        for block, inputs in zip(outputs.split(1 << 16), windows.split(1 << 16)):
            block[:] = inputs @ kernel
    return result


def mel_filters() -> np.ndarray:
    """Returns 128 triangular filters on Slaney's mel scale (not HTK's), float64 [128, 201]: linear
    up to 1000 Hz, which is 15 mel, and logarithmic from there."""
    step = np.log(6.4) / 27  # of a mel above 15, in the logarithm of a frequency
    mels = np.linspace(0, 15 + np.log(8000 / 1000) / step, N_MELS + 2)
    edges = np.where(mels < 15, 200 * mels / 3, 1000 * np.exp(step * (mels - 15)))  # Hz [130]
    bins = np.linspace(0, SAMPLE_RATE // 2, N_FFT // 2 + 1)  # Hz [201]
    widths = np.diff(edges)[:, None]  # [129, 1]
    rising = (bins - edges[:-2, None]) / widths[:-1]
    falling = (edges[2:, None] - bins) / widths[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return triangles * (2 / (edges[2:] - edges[:-2]))[:, None]  # each of area 1: Slaney's norm


def mel_spectrum(wave: np.ndarray) -> np.ndarray:
    """Returns the normalised log-mel of float32 [samples]: float32 [128, T], T = samples // 160. It
    is computed in float64 but for the spectrum's rounding to complex64, as transformers does in
    numpy (WhisperFeatureExtractor._np_extract_fbank_features; its torch path, in float32, differs
    in dozens of values). Nothing is padded to 30 s."""
    filters = mel_filters()
    window = np.hanning(N_FFT + 1)[:-1]  # periodic: the symmetric one of 401 without its last
    padded = np.pad(wave, N_FFT // 2, mode="reflect")  # frame i is centred on sample 160 i
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]  # [T + 1, 400], a view
    frames = frames[:-1]  # the frame around the very end is dropped
    mel = np.empty((N_MELS, len(wave) // HOP), np.float32)
    for i in range(0, mel.shape[1], 1000):  # ten seconds at a time bound the memory
        spectrum = np.fft.rfft(frames[i : i + 1000] * window).astype(np.complex64)  # [1000, 201]
        power = filters @ (np.abs(spectrum, dtype=np.float64) ** 2).T  # [128, 1000]
        mel[:, i : i + 1000] = np.log10(np.maximum(power, 1e-10))
    # The floor is 80 dB below this clip's own maximum. In place: an hour's log-mel is 184 MB.
    np.maximum(mel, mel.max() - 8, out=mel)
    mel += 4
    mel /= 4
    return mel


def log_mel(wave: Tensor) -> Tensor:
    """Returns what enters the encoder, of float32 [samples]: the log-mel, bfloat16 [128, T]. It is
    rounded so whatever the model's own type."""
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
    deepstack_encoder_layer_indexes: tuple[int, ...]  # the taps, in the order of their mergers
    n_window: int = 200  # half a chunk, in mel frames
    conv_chunksize: int = 64  # the most chunks that are encoded at a time


def count_tokens(frames: int, n_window: int) -> int:
    """Returns how many audio tokens a clip of so many mel frames has: each chunk is rounded up."""
    chunks, rest = divmod(frames, 2 * n_window)
    return chunks * math.ceil(2 * n_window / STRIDE) + math.ceil(rest / STRIDE)


def split_chunks(mels: list[Tensor], n_window: int) -> tuple[Tensor, Tensor]:
    """Cuts all clips' log-mels [128, T] into chunks [C, 128, t]; returns them and their tokens [C].
    Chunks are padded with 0 to the longest. That changes a chunk's last tokens, since the
    convolutions' biases make something of the padding: upstream's arithmetic, to be kept."""
    chunks = []
    for mel in mels:
        chunks += mel.split(2 * n_window, dim=1)
    longest = max(chunk.shape[1] for chunk in chunks)
    padded = [F.pad(chunk, (0, longest - chunk.shape[1])) for chunk in chunks]
    tokens = [count_tokens(chunk.shape[1], n_window) for chunk in chunks]
    return torch.stack(padded), torch.tensor(tokens)


def sinusoids(length: int, width: int) -> Tensor:
    """Returns the encodings of positions 0 to length - 1, float32 [length, width]: sines in the
    first half of a row, cosines in the second."""
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

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        C, L, D = x.shape
        q = self.q_proj(x) * (D // self.heads) ** -0.5  # scaled here, after its bias
        q = q.view(C, L, self.heads, -1).transpose(1, 2)  # [C, H, L, hd]
        k = self.k_proj(x).view(C, L, self.heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(C, L, self.heads, -1).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)  # [C, H, L, hd]
        return self.out_proj(x.transpose(1, 2).reshape(C, L, D))


class EncoderLayer(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        # The epsilon of these two norms is 1e-5 whatever the configuration says.
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=1e-5)
        self.self_attn = EncoderAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=1e-5)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.activation = nn.GELU()  # exact (erf), not tanh
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[C, L, D] to the same; mask: bool [C, 1, 1, L], False for keys that are padding."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        x = x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))
        return x.clamp(-64504, 64504) if x.dtype == torch.float16 else x  # float16 ends at 65504


class AudioEncoder(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        D = config.d_model
        channels = config.downsample_hidden_size
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.activation = nn.GELU()
        self.stem_proj = nn.Linear(channels * N_MELS // STRIDE, D)
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        same = config.output_dim == D
        self.out_proj = nn.Identity() if same else nn.Linear(D, config.output_dim, bias=False)
        # 64 at a time are no faster than 8, and take 3.6 GB in float32.
        self.chunks_at_a_time = min(config.conv_chunksize, 8)

    def stem(self, chunks: Tensor) -> Tensor:
        """Takes chunks [C, 128, t] to tokens [C, L, D] with L = ceil(t / 8)."""
        x = self.activation(self.conv1(chunks[:, None]))  # [C, channels, 64, t / 2]
        x = self.activation(self.conv2(x))  # [C, channels, 32, t / 4]
        x = self.activation(self.conv3(x))  # [C, channels, 16, L]
        x = self.stem_proj(x.permute(0, 3, 1, 2).flatten(2))  # channels before mel; [C, L, D]
        # Positions begin at 0 in every chunk; made in float32, they are rounded to x's type.
        return x + sinusoids(x.shape[1], x.shape[2]).to(x)

    def forward(self, mels: list[Tensor], report=None) -> list[Tensor]:
        """Takes the log-mels [128, T] of a prompt's clips to its output and its taps, [A, E] each.
        A counts all clips' tokens, one clip after another. Chunks are rows of a batch: nothing
        crosses from one to the next. report, if given, is called with a line after each batch but
        a lone one."""
        indexes = self.config.deepstack_encoder_layer_indexes
        chunks, tokens = split_chunks(mels, self.config.n_window)
        parts = []
        for start in range(0, len(chunks), self.chunks_at_a_time):
            end = start + self.chunks_at_a_time
            x = self.stem(chunks[start:end].to(self.conv1.weight))  # [C, L, D]
            real = torch.arange(x.shape[1]) < tokens[start:end, None]  # [C, L], False for padding
            mask = None if real.all() else real[:, None, None].to(x.device)
            taps = {}
            for i, layer in enumerate(self.layers):
                x = layer(x, mask)
                if i in indexes:
                    taps[i] = self.out_proj(x[real])  # a layer's own output, without the norm
            output = self.out_proj(self.layer_norm(x[real]))
            parts.append([output, *[taps[i] for i in indexes]])
            if report and len(chunks) > self.chunks_at_a_time:
                report(f"encoding: {tokens[:end].sum() / 12.5:.0f} of {tokens.sum() / 12.5:.0f} s")
        return [torch.cat(rows) for rows in zip(*parts)]
