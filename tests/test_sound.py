"""Sound files and arrays to a waveform, and a waveform to its log-mel, without any other library's word for it.

The tests that need ffmpeg (m4a, mp4, webm ...) are skipped where there is none on the PATH.
"""

import io
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import encoder
from conftest import GOLDEN, JFK
from encoder import (
    HOP,
    SAMPLE_RATE,
    load_audio,
    log_mel,
    mel_filters,
    mel_spectrum,
    pad_edges,
    resample,
)

# ---- resampling ----

TORCHAUDIO = load_file(GOLDEN / "resampling.safetensors")


def noise(samples: int) -> np.ndarray:
    return (0.25 * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_gives_torchaudios_figures(rate):
    ours, expected = resample(TORCHAUDIO[f"input.{rate}"], rate), TORCHAUDIO[f"output.{rate}"]
    assert ours.dtype == torch.float32 and ours.shape == expected.shape
    torch.testing.assert_close(
        ours, expected, rtol=0, atol=1e-6
    )  # a few float32 roundings of sums below 1


def interpolate(sound: np.ndarray, rate: int, sample: int) -> float:
    """One output sample by section 3.2 of the specification: in float64, but for t, which is float32 by that section.

    At an odd rate a t in float64 would be up to 1e-3 away from that, and the result up to 1e-4.
    """
    divisor = math.gcd(rate, 16_000)
    o, n = rate // divisor, 16_000 // divisor
    r = 0.99 * min(o, n)
    w = math.ceil(6 * o / r)
    m, p = divmod(sample, n)
    i = np.arange(-w, w + o, dtype=np.float32)
    t = np.float32(r) * (i / np.float32(o) - np.float32(p) / np.float32(n))
    t = np.clip(t.astype(np.float64), -6, 6)
    taps = r / o * np.sinc(t) * np.cos(np.pi * t / 12) ** 2
    padded = np.concatenate([np.zeros(w), sound, np.zeros(w + o)])
    return taps @ padded[o * m : o * m + len(taps)]


def test_an_odd_rate_is_resampled_by_the_formula():
    sound = noise(100_000)
    ours = resample(torch.from_numpy(sound), 44_101)
    assert len(ours) == 36_281  # 100,000 x 16,000 / 44,101 = 36,280.4
    samples = [
        0,
        1,
        7,
        12_345,
        15_999,
        16_000,
        16_001,
        31_999,
        32_000,
        36_270,
        36_278,
        36_279,
        36_280,
    ]
    expected = torch.tensor(
        [interpolate(sound, 44_101, sample) for sample in samples], dtype=torch.float32
    )
    torch.testing.assert_close(
        ours[samples], expected, rtol=0, atol=1e-6
    )  # float32 sums of 14 products below 1


@pytest.mark.parametrize(
    "rate, samples, length",
    [
        (
            44_101,
            27_836,
            10_099,
        ),  # 16,000 x 27,836 = 44,101 x 10,099 + 1: in float32 the quotient is 10,099
        (44_101, 27_837, 10_100),  # 10,099.4
        (44_100, 180_697, 65_559),  # 160 x 180,697 = 441 x 65,559 + 1
        (44_100, 1, 1),
        (8_000, 1, 2),
        (16_000, 12_345, 12_345),
    ],
)
def test_the_output_length_is_a_float32_quotient_rounded_up(rate, samples, length):
    assert len(resample(torch.zeros(samples), rate)) == length


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the high-water mark is read from /proc"
)
@pytest.mark.parametrize(
    "rate", [44_101, 48_000]
)  # 16,000 filters of 44,135 taps; one filter, of 41
def test_loading_takes_memory_that_is_a_small_multiple_of_the_sound(rate, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(3 * 60 * rate), rate, subtype="FLOAT")  # 32 MB
    script = f"""
import re, torch, encoder
most = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
encoder.resample(torch.zeros(1000), 8_000)  # what torch needs for itself
before = most()
print(len(encoder.load_audio({str(path)!r})), most() - before)
"""
    command, home = [sys.executable, "-c", script], Path(encoder.__file__).parent
    run = subprocess.run(command, cwd=home, capture_output=True, check=True)
    length, grown = map(int, run.stdout.split())
    assert length == 3 * 60 * 16_000
    # Four times: the file's bytes, its samples, their mean, the output and what pads it. All filters of 44,101 Hz at
    # once would be 90 times; at 48,000 Hz all windows at once 13 times.
    assert grown < 5 * path.stat().st_size


# ---- what loads ----


def tones(seconds: float, rate: int, channels: int) -> np.ndarray:
    """A 440-Hz sine, [samples, channels], of amplitude 0.1 in the first channel, 0.2 in the second, ..."""
    sine = np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return sine[:, None] * 0.1 * np.arange(1, channels + 1)


def encoded(sound: np.ndarray, rate: int = SAMPLE_RATE, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate, **({"format": "WAV"} | options))
    return file.getvalue()


EXACT, LOSSY = (
    2e-4,
    2e-2,
)  # 16-bit rounding and the ripple of the filters in the pass band; what a codec leaves out


@pytest.mark.parametrize(
    "container, rate, channels, tolerance",
    [
        ("WAV", 16_000, 1, EXACT),
        ("WAV", 44_100, 2, EXACT),
        ("WAV", 8_000, 1, EXACT),
        ("WAV", 96_000, 6, EXACT),
        ("FLAC", 48_000, 3, EXACT),
        ("FLAC", 44_101, 1, EXACT),
        ("AIFF", 32_000, 2, EXACT),
        ("OGG", 22_050, 2, LOSSY),
        ("OGG", 48_000, 1, LOSSY),
        ("MP3", 44_100, 2, LOSSY),
        ("MP3", 24_000, 1, LOSSY),
    ],
)
def test_a_file_becomes_16_khz_with_its_channels_averaged(
    container, rate, channels, tolerance, tmp_path
):
    path = tmp_path / f"clip.{container.lower()}"
    path.write_bytes(encoded(tones(1, rate, channels), rate, format=container))
    wave = load_audio(path)
    assert wave.dtype == torch.float32 and wave.shape == (16_000,)
    expected = torch.from_numpy(tones(1, SAMPLE_RATE, 1)[:, 0]).float() * (channels + 1) / 2
    edge = 400  # the sound begins and ends abruptly
    torch.testing.assert_close(wave[edge:-edge], expected[edge:-edge], rtol=0, atol=tolerance)


# Two steps: libsndfile writes 32,767ths and reads 32,768ths.
@pytest.mark.parametrize(
    "subtype, tolerance",
    [("PCM_U8", 2**-6), ("PCM_16", 2**-14), ("PCM_24", 2**-22), ("FLOAT", 0), ("DOUBLE", 0)],
)
def test_samples_of_every_width_are_read(subtype, tolerance):
    sound = noise(4000).clip(-0.99, 0.99)
    wave = load_audio(io.BytesIO(encoded(sound, subtype=subtype)))
    torch.testing.assert_close(wave, torch.from_numpy(sound), rtol=0, atol=tolerance)


def test_a_path_may_be_a_string():
    assert torch.equal(load_audio(str(JFK)), load_audio(JFK))


def test_a_binary_file_loads_as_its_path_does():
    with open(JFK, "rb") as file:
        assert torch.equal(load_audio(file), load_audio(JFK))


def through_a_pipe(data: bytes) -> torch.Tensor:
    """load_audio on the reading end of a pipe, which can't seek."""
    reading, writing = os.pipe()

    def write():
        with open(writing, "wb") as file:
            file.write(data)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with open(reading, "rb") as file:
            return load_audio(file)
    finally:
        writer.join()


def test_a_pipe_that_cannot_seek_loads():
    assert torch.equal(through_a_pipe(JFK.read_bytes()), load_audio(JFK))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_numpy_array_is_taken_as_16_khz(dtype):
    array = noise(1000).astype(dtype)
    wave = load_audio(array)
    assert wave.dtype == torch.float32 and np.array_equal(wave.numpy(), array.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_torch_tensor_is_taken_as_16_khz(dtype):
    tensor = torch.from_numpy(noise(1000)).to(dtype).requires_grad_()
    wave = load_audio(tensor)
    assert (
        wave.dtype == torch.float32
        and not wave.requires_grad
        and torch.equal(wave, tensor.detach().float())
    )


def test_one_hop_is_enough():
    assert len(load_audio(np.zeros(HOP, np.float32))) == 160
    assert (
        len(load_audio(io.BytesIO(encoded(np.zeros(478), 48_000)))) == 160
    )  # 478 / 3 = 159.3, rounded up


def test_a_wav_whose_data_is_cut_short_gives_what_is_there():
    sound = (32_767 * noise(8000).clip(-1, 1)).astype(np.int16)
    data = encoded(sound)
    assert len(data) == 44 + 16_000
    wave = load_audio(io.BytesIO(data[: 44 + 6001]))  # 3000 samples and half of one more
    assert torch.equal(wave, torch.from_numpy(sound[:3000] / np.float32(32_768)))


def test_an_mp3_that_is_cut_short_gives_no_more_than_was_decoded():
    data = encoded(noise(160_000), format="MP3")
    wave = load_audio(
        io.BytesIO(data[: len(data) // 2])
    )  # its header still promises 160,000 samples
    assert 70_000 < len(wave) < 90_000


# ---- what is refused ----


def refusal(source) -> str:
    """The sentence with which load_audio refuses a sound."""
    with pytest.raises(ValueError) as error:
        load_audio(source)
    sentence = str(error.value)
    assert len(sentence.splitlines()) == 1 and len(sentence) < 400
    return sentence


@pytest.fixture
def no_ffmpeg(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


GARBAGE = np.random.default_rng(1).bytes(5000)
NOT_SOUND = {
    "empty.wav": b"",
    "empty.raw": b"",
    "text.txt": b"This is no sound.\n" * 100,
    "text.wav": b"This is no sound.\n" * 100,
    "header.wav": encoded(np.zeros(1000))[:30],
    "no_samples.flac": encoded(np.zeros(0), format="FLAC"),
} | {f"garbage.{suffix}": GARBAGE for suffix in ("mp3", "wav", "flac", "ogg", "m4a", "raw")}


@pytest.mark.parametrize("name", NOT_SOUND)
def test_without_ffmpeg_what_soundfile_cannot_read_is_refused_and_ffmpeg_missed(
    name, tmp_path, no_ffmpeg
):
    path = tmp_path / name
    path.write_bytes(NOT_SOUND[name])
    sentence = refusal(path)
    assert name in sentence and "ffmpeg" in sentence and "PATH" in sentence


@pytest.mark.parametrize("name, reason", [("missing.wav", "No such file"), ("", "directory")])
def test_what_is_no_file_is_refused_by_its_name(name, reason, tmp_path):
    sentence = refusal(tmp_path / name)
    assert (
        str(tmp_path / name) in sentence
        and reason in sentence
        and "expected a sound file" in sentence
    )


EMPTY, SHORT, NOT_FINITE = ["0 samples", "160"], ["159 samples", "160"], ["NaN", "infini"]


def spoilt(value: float) -> np.ndarray:
    return np.insert(noise(1000), 500, value)


@pytest.mark.parametrize(
    "name, sound, rate, words",
    [
        ("no_samples.wav", np.zeros(0), 16_000, EMPTY),
        ("short.wav", np.zeros(159), 16_000, SHORT),
        ("short_at_48_khz.wav", np.zeros(477), 48_000, SHORT),  # 159 at 16 kHz
        ("nan.wav", spoilt(math.nan), 16_000, NOT_FINITE),
        ("infinity.wav", spoilt(math.inf), 16_000, NOT_FINITE),
        ("resampled_infinity.wav", spoilt(-math.inf), 44_100, NOT_FINITE),
    ],
)
def test_a_file_with_bad_samples_is_refused(name, sound, rate, words, tmp_path):
    soundfile.write(tmp_path / name, sound, rate, subtype="FLOAT")
    sentence = refusal(tmp_path / name)
    assert name in sentence and all(word in sentence for word in words), sentence


INTEGERS, TWO_DIMENSIONS, NO_DIMENSION = (
    ["int16", "float"],
    ["[2, 1000]", "[samples]"],
    ["[]", "[samples]"],
)


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros(1000, np.int16), INTEGERS),
        (np.zeros((2, 1000), np.float32), TWO_DIMENSIONS),
        (np.float32(0), NO_DIMENSION),
        (np.zeros(0, np.float32), EMPTY),
        (np.zeros(159, np.float32), SHORT),
        (spoilt(math.nan), NOT_FINITE),
        (spoilt(math.inf), NOT_FINITE),
        (np.full(1000, 1e39), NOT_FINITE),  # finite in float64 alone
    ],
)
def test_a_bad_array_is_refused(array, words, make):
    sentence = refusal(make(array))
    assert all(word in sentence for word in words), sentence
    assert not sentence.startswith("None"), sentence  # a tensor has a name, and it is None


# ---- ffmpeg ----

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="there is no ffmpeg on the PATH")


def make(path: Path, *options: str) -> Path:
    """A file that ffmpeg makes of jfk.wav (11 s)."""
    command = [FFMPEG, "-nostdin", "-v", "error", "-i", str(JFK), *options, f"file:{path}"]
    subprocess.run(command, check=True)
    return path


AAC = ["-c:a", "aac"]  # in m4a the index (moov) comes last, unless faststart is asked for
PICTURE = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=10", "-t", "11", "-c:v", "mpeg4"]
FORMATS = {
    "index_at_the_end.m4a": AAC,
    "index_at_the_start.m4a": [*AAC, "-movflags", "+faststart"],
    "opus.webm": ["-c:a", "opus", "-strict", "experimental"],
    "vorbis.mka": ["-c:a", "vorbis", "-strict", "experimental", "-ac", "2"],
    "film.mp4": [*PICTURE, *AAC],
    "film.mkv": [*PICTURE, *AAC],
    "stream.aac": AAC,
    "windows.wma": [],
}


def likeness(wave: torch.Tensor, other: torch.Tensor) -> float:
    """The largest correlation of two sounds over all shifts up to 0.2 s: decoders keep or drop an encoder's delay."""
    n = min(len(wave), len(other))
    a, b = (torch.fft.rfft(sound, 2 * n) for sound in (wave[:n], other[:n]))
    products = torch.fft.irfft(a * b.conj(), 2 * n)
    near = torch.cat([products[:3200], products[-3200:]])
    return float(near.max() / (wave[:n].norm() * other[:n].norm()))


@needs_ffmpeg
@pytest.mark.parametrize("name", FORMATS)
def test_ffmpeg_reads_the_whole_sound(name, tmp_path):
    wave, original = load_audio(make(tmp_path / name, *FORMATS[name])), load_audio(JFK)
    assert (
        abs(len(wave) - len(original)) <= 2048
    )  # a codec's frame of at most 1024 samples at either end
    assert likeness(wave, original) > 0.98


@needs_ffmpeg
def test_ffmpeg_loses_nothing_of_lossless_sound(tmp_path):
    assert torch.equal(load_audio(make(tmp_path / "lossless.m4a", "-c:a", "alac")), load_audio(JFK))


@needs_ffmpeg
def test_ffmpeg_averages_channels_and_resamples(tmp_path):
    left_only = "aresample=44100,pan=stereo|c0=c0|c1=0*c0"
    wave = load_audio(make(tmp_path / "left.m4a", "-af", left_only, "-c:a", "alac"))
    assert abs(len(wave) - len(load_audio(JFK))) <= 1
    expected = load_audio(JFK)[:-10] / 2
    assert (
        float((wave[: len(expected)] - expected).norm() / expected.norm()) < 0.02
    )  # two resamplers' ways at 8 kHz


NAMES = ["with spaces.m4a", "http:colon.m4a", "concat:a|b.m4a", "-i.m4a", "50%d.m4a", "ünï日本.m4a"]


@needs_ffmpeg
@pytest.mark.parametrize("name", NAMES)
def test_ffmpeg_reads_a_file_whatever_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "plain.m4a", *AAC).rename(name)
    assert len(load_audio(name)) >= len(load_audio(JFK))


@needs_ffmpeg
def test_ffmpeg_reads_what_comes_through_a_pipe(tmp_path):
    path = make(tmp_path / "lossless.m4a", "-c:a", "alac")
    assert torch.equal(through_a_pipe(path.read_bytes()), load_audio(JFK))


@needs_ffmpeg
def test_a_film_without_sound_is_refused(tmp_path):
    path = make(tmp_path / "silent.mp4", *PICTURE, "-map", "1:v")
    assert "silent.mp4" in refusal(path)


@needs_ffmpeg
@pytest.mark.parametrize("name", NOT_SOUND)
def test_with_ffmpeg_what_is_not_sound_is_refused(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(NOT_SOUND[name])
    assert name in refusal(path)


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:12\n#EXTINF:11,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
}


@needs_ffmpeg
@pytest.mark.parametrize("name", ["list.m3u8", "list.m4a"])
@pytest.mark.parametrize("other", ["other.ts", "{folder}/other.ts", "file:{folder}/other.ts"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_that_names_another_file_is_refused(kind, other, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "other.ts", *AAC)
    Path(name).write_text(PLAYLISTS[kind].format(other.format(folder=tmp_path)))
    assert name in refusal(name)


# ---- log-mel ----


@pytest.mark.parametrize(
    "samples, frames", [(160, 1), (319, 1), (320, 2), (16_000, 100), (175_999, 1099)]
)
def test_a_log_mel_has_a_frame_for_every_whole_hop_and_is_bfloat16_made_of_float32(samples, frames):
    mel, spectrum = log_mel(torch.from_numpy(noise(samples))), mel_spectrum(noise(samples))
    assert mel.shape == spectrum.shape == (128, frames)
    assert mel.dtype == torch.bfloat16 and spectrum.dtype == np.float32


def test_the_log_mel_is_a_fourier_transform_written_out():
    wave = noise(1600).astype(np.float64)
    padded = np.concatenate([wave[200:0:-1], wave, wave[-2:-202:-1]])
    n, k = np.arange(400), np.arange(201)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 400)
    angles = 2 * np.pi * np.outer(k, n) / 400
    expected = np.empty((128, 10))
    for i in range(10):
        frame = padded[160 * i : 160 * i + 400] * window
        power = (np.cos(angles) @ frame) ** 2 + (np.sin(angles) @ frame) ** 2
        expected[:, i] = np.log10(mel_filters() @ power)
    expected = np.maximum(expected, expected.max() - 8) / 4 + 1
    np.testing.assert_allclose(
        mel_spectrum(wave.astype(np.float32)), expected, rtol=0, atol=1e-6
    )  # complex64, float32


# 130 points, evenly spaced from 0 to 15 + 27 ln(8) / ln(6.4) = 45.245641 mel, are 0.350741 mel apart: below 1000 Hz
# (15 mel), where a mel is 66.667 Hz, by 23.383 Hz, above it by the factor 6.4 ** (0.350741 / 27). Bins are 40 Hz apart.
@pytest.mark.parametrize(
    "filter, bin, value",
    [
        (0, 0, 0.0),
        (0, 1, (46.765456 - 40) / 23.382728 * 2 / 46.765456),  # falling from 23.38 to 46.77 Hz
        (1, 1, (40 - 23.382728) / 23.382728 * 2 / 46.765456),  # rising from 23.38 to 46.77 Hz
        (2, 1, 0.0),  # from 46.77 Hz on
        (127, 200, 0.0),  # 8000 Hz, where it ends
        (
            127,
            198,
            (8000 - 7920) / 190.605 * 2 / 376.669,
        ),  # falling from 7809.395 to 8000 Hz, from 7623.331 on
    ],
)
def test_a_mel_filter_has_the_value_that_slaneys_scale_gives(filter, bin, value):
    assert mel_filters()[filter, bin] == pytest.approx(value, rel=1e-5)


def test_silence_is_the_logarithm_of_the_floor():
    assert (mel_spectrum(np.zeros(1600, np.float32)) == -1.5).all()  # (log10(1e-10) + 4) / 4


def test_nothing_is_more_than_80_decibels_below_the_clips_loudest_value():
    mel = mel_spectrum(np.concatenate([noise(8000), np.zeros(8000, np.float32)]))
    assert (
        mel.min() == mel[:, 60:].max() == pytest.approx(mel.max() - 2)
    )  # 80 dB is 8 in log10, and a quarter of it 2


def test_a_clip_40_decibels_louder_is_higher_by_1_everywhere():
    wave = np.concatenate([noise(8000), np.zeros(8000, np.float32)])
    shift = mel_spectrum(100 * wave) - mel_spectrum(
        wave
    )  # of the silence too: the maximum is the clip's own
    np.testing.assert_allclose(
        shift, 1, rtol=0, atol=1e-5
    )  # 100 x wave is rounded too: 1e-7, and more of what cancels


def test_a_clip_under_201_samples_is_reflected_again_and_again():
    there_and_back = [0, 1, 2, 1] * 101  # of 0, 1, 2, whose first sample is at 200, a multiple of 4
    assert pad_edges(np.arange(3.0)).tolist() == there_and_back[:403]
