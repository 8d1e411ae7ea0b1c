"""Sound files and arrays to a waveform, and a waveform to its log-mel, against known numbers.

The tests that need ffmpeg (m4a, mp4, webm ...) are skipped where there is none on the PATH.
"""

import io
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from conftest import GOLDEN, JFK, needs_proc, noise, numbers_from, refusal
from encoder import HOP, SAMPLE_RATE, load_audio, log_mel, mel_spectrum, resample

# ---- resampling ----

TORCHAUDIO = load_file(GOLDEN / "resampling.safetensors")


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_gives_torchaudios_figures(rate):
    ours = resample(TORCHAUDIO[f"input.{rate}"], rate)
    expected = TORCHAUDIO[f"output.{rate}"]
    assert ours.dtype == torch.float32
    # A few float32 roundings of sums below 1.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "rate, samples, length",
    [
        (44_100, 180_697, 65_559),  # 160 x 180,697 = 441 x 65,559 + 1, in float32 441 x 65,559
        (44_100, 180_700, 65_561),  # 65,560.1
        (44_100, 1, 1),
        (8_000, 1, 2),
        (16_000, 12_345, 12_345),
    ],
)
def test_the_output_length_is_a_float32_quotient_rounded_up(rate, samples, length):
    assert len(resample(torch.zeros(samples), rate)) == length


def interpolate(sound: np.ndarray, rate: int, sample: int) -> float:
    """One output sample by section 3.2 of the specification, in float64 but for t, as there.

    At an odd rate t would be up to 1e-3 away in float64, and the result up to 1e-4.
    """
    divisor = math.gcd(rate, 16_000)
    old = rate // divisor
    new = 16_000 // divisor
    cutoff = 0.99 * min(old, new)
    width = math.ceil(6 * old / cutoff)
    first, phase = divmod(sample, new)
    i = np.arange(-width, width + old, dtype=np.float32)
    t = np.float32(cutoff) * (i / np.float32(old) - np.float32(phase) / np.float32(new))
    t = np.clip(t.astype(np.float64), -6, 6)
    taps = cutoff / old * np.sinc(t) * np.cos(np.pi * t / 12) ** 2
    padded = np.concatenate([np.zeros(width), sound, np.zeros(width + old)])
    return taps @ padded[old * first : old * first + len(taps)]


def test_an_odd_rate_is_resampled_by_the_formula():
    sound = noise(50_000)
    ours = resample(torch.from_numpy(sound), 44_101)
    assert len(ours) == 18_141  # 50,000 x 16,000 / 44,101 = 18,140.2
    samples = [0, 1, 7, 12_345, 15_999, 16_000, 16_001, 18_130, 18_138, 18_139, 18_140]
    expected = torch.tensor([interpolate(sound, 44_101, sample) for sample in samples])
    # Float32 sums of 14 products below 1.
    torch.testing.assert_close(ours[samples], expected.float(), rtol=0, atol=1e-6)


LOAD = """
import sys
import torch
from conftest import JFK, high_water
from encoder import load_audio, resample

load_audio(JFK)  # what the libraries need for themselves
resample(torch.zeros(1000), 8_000)
before = high_water()
length = 0
try:
    length = len(load_audio(sys.argv[1]))
except ValueError as error:
    assert "to an hour" in str(error)
print(length, high_water() - before)
"""


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("rate", [44_101, 48_000])
def test_resampling_takes_memory_that_is_a_small_multiple_of_the_sound(rate, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(3 * 60 * rate), rate, subtype="FLOAT")  # 32 MB
    # Four times: the file's bytes, its samples, their mean, the output and what pads it. At 44,101
    # Hz all 16,000 filters of 44,135 taps at once would be 90 times, at 48,000 Hz all windows 13.
    length, grown = numbers_from(LOAD, path)
    assert length == 3 * 60 * 16_000
    assert grown < 5 * path.stat().st_size


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("rate, channels, minutes", [(16_000, 8, 20), (1000, 1, 4000)])
def test_many_channels_and_many_hours_take_little_memory(rate, channels, minutes, tmp_path):
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", rate, channels, "PCM_16") as file:
        for _ in range(minutes):
            file.write(np.zeros((60 * rate, channels), np.int16))
    assert path.stat().st_size < 5e6
    mono = 4 * rate * 60 * min(minutes, 60)
    length, grown = numbers_from(LOAD, path)
    assert length == (0 if minutes > 60 else 60 * minutes * 16_000)
    assert grown < 2 * mono + 200e6 + 16_000 * 4 * 3600 * (rate < 16_000)


# ---- what loads ----


def tones(seconds: float, rate: int, channels: int) -> np.ndarray:
    """A 440-Hz sine, [samples, channels], of amplitude 0.1, 0.2, ... channel by channel."""
    sine = np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return sine[:, None] * 0.1 * np.arange(1, channels + 1)


def encoded(sound: np.ndarray, rate: int = SAMPLE_RATE, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate, **({"format": "WAV"} | options))
    return file.getvalue()


EXACT = 2e-4  # 16-bit rounding, and the ripple of the filters in the pass band
LOSSY = 2e-2  # what a codec leaves out


@pytest.mark.parametrize(
    "container, rate, channels, tolerance",
    [
        ("WAV", 44_101, 1, EXACT),  # an odd rate: 16,000 filters
        ("WAV", 96_000, 6, EXACT),
        ("FLAC", 48_000, 3, EXACT),
        ("OGG", 48_000, 1, LOSSY),
        ("MP3", 44_100, 2, LOSSY),
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


def test_a_sound_may_be_a_string_an_open_file_or_a_pipe_that_cannot_seek():
    expected = load_audio(JFK)
    assert torch.equal(load_audio(str(JFK)), expected)
    with open(JFK, "rb") as file:
        assert torch.equal(load_audio(file), expected)
    with subprocess.Popen(["cat", JFK], stdout=subprocess.PIPE) as process:
        assert torch.equal(load_audio(process.stdout), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_an_array_or_a_tensor_is_taken_as_16_khz(dtype):
    tensor = torch.from_numpy(noise(1000)).to(dtype)
    for source in (tensor.numpy(), tensor.requires_grad_()):
        wave = load_audio(source)
        assert wave.dtype == torch.float32 and not wave.requires_grad
        assert torch.equal(wave, tensor.detach().float())


def test_one_hop_is_enough():
    assert len(load_audio(np.zeros(HOP, np.float32))) == 160
    # 478 / 3 = 159.3, rounded up.
    assert len(load_audio(io.BytesIO(encoded(np.zeros(478), 48_000)))) == 160


def test_a_wav_whose_data_is_cut_short_gives_what_is_there():
    sound = (32_767 * noise(8000).clip(-1, 1)).astype(np.int16)
    data = encoded(sound)
    assert len(data) == 44 + 16_000
    wave = load_audio(io.BytesIO(data[: 44 + 6001]))  # 3000 samples and half of one more
    assert torch.equal(wave, torch.from_numpy(sound[:3000] / np.float32(32_768)))


def test_an_mp3_that_is_cut_short_gives_no_more_than_was_decoded():
    data = encoded(noise(160_000), format="MP3")
    # Its header still promises 160,000 samples.
    wave = load_audio(io.BytesIO(data[: len(data) // 2]))
    assert 70_000 < len(wave) < 90_000


# ---- what is refused ----


GARBAGE = np.random.default_rng(1).bytes(5000)
NOT_SOUND = {
    "text.wav": b"This is no sound.\n" * 100,
    "header.wav": encoded(np.zeros(1000))[:30],
} | {f"garbage.{suffix}": GARBAGE for suffix in ("mp3", "wav", "flac", "ogg", "m4a", "raw")}


@pytest.mark.parametrize("name", NOT_SOUND)
def test_what_is_not_sound_is_refused_with_ffmpeg_and_without(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_bytes(NOT_SOUND[name])
    assert name in refusal(load_audio, path)
    monkeypatch.setenv("PATH", str(tmp_path))
    sentence = refusal(load_audio, path)
    assert name in sentence and "ffmpeg" in sentence and "PATH" in sentence
    assert "<" not in sentence  # no address in memory, which would differ from run to run


def test_a_folder_in_place_of_a_sound_is_refused_by_its_name(tmp_path):
    sentence = refusal(load_audio, tmp_path)
    assert str(tmp_path) in sentence and "directory" in sentence
    assert "expected a sound file" in sentence


SHORT = ["159 samples", "160"]
NOT_FINITE = ["NaN", "infini"]


def spoilt(value: float) -> np.ndarray:
    return np.insert(noise(1000), 500, value)


def test_a_file_with_bad_samples_is_refused_by_its_name(tmp_path):
    for sound, rate, words in [
        (np.zeros(477), 48_000, SHORT),  # 159 at 16 kHz
        (spoilt(-math.inf), 44_100, NOT_FINITE),
    ]:
        soundfile.write(tmp_path / "clip.wav", sound, rate, subtype="FLOAT")
        sentence = refusal(load_audio, tmp_path / "clip.wav")
        assert all(word in sentence for word in ["clip.wav", *words]), sentence


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros(1000, np.int16), ["int16", "float"]),
        (np.zeros((2, 1000), np.float32), ["[2, 1000]", "[samples]"]),
        (np.float32(0), ["[]", "[samples]"]),
        (np.zeros(159, np.float32), SHORT),
        (spoilt(math.nan), NOT_FINITE),
        (np.full(1000, 1e39), NOT_FINITE),  # finite in float64 alone
    ],
)
def test_a_bad_array_is_refused(array, words):
    for source in (np.asarray(array), torch.as_tensor(array)):
        sentence = refusal(load_audio, source)
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
    "film.mp4": [*PICTURE, *AAC],
}


@needs_ffmpeg
@pytest.mark.parametrize("name", FORMATS)
def test_ffmpeg_reads_the_whole_sound(name, tmp_path):
    wave = load_audio(make(tmp_path / name, *FORMATS[name]))
    original = load_audio(JFK)
    assert abs(len(wave) - len(original)) <= 2048  # a codec's frame of 1024 at either end
    # A decoder may shift the sound, which these do not show.
    magnitudes = [torch.fft.rfft(sound, 200_000).abs() for sound in (wave, original)]
    assert torch.cosine_similarity(*magnitudes, dim=0) > 0.98


@needs_ffmpeg
def test_ffmpeg_averages_channels_and_resamples(tmp_path):
    left_only = "aresample=44100,pan=stereo|c0=c0|c1=0*c0"
    wave = load_audio(make(tmp_path / "left.m4a", "-af", left_only, "-c:a", "alac"))
    assert abs(len(wave) - len(load_audio(JFK))) <= 1
    expected = load_audio(JFK)[:-10] / 2
    # At 8 kHz two resamplers differ.
    assert float((wave[: len(expected)] - expected).norm() / expected.norm()) < 0.02


NAMES = ["with spaces.m4a", "http:colon.m4a", "concat:a|b.m4a", "-i.m4a", "50%d.m4a", "ünï日本.m4a"]


@needs_ffmpeg
def test_ffmpeg_reads_lossless_sound_to_the_bit_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = make(tmp_path / "plain.m4a", "-c:a", "alac")
    expected = load_audio(JFK)
    for name in NAMES:
        plain = plain.rename(name)
        assert torch.equal(load_audio(name), expected), name


@needs_ffmpeg
def test_a_film_without_sound_is_refused(tmp_path):
    path = make(tmp_path / "silent.mp4", *PICTURE, "-map", "1:v")
    assert "silent.mp4: there is no sound in it" in refusal(load_audio, path)


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:12\n#EXTINF:11,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
}


@needs_ffmpeg
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_that_names_another_file_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "other.ts", *AAC)
    for other in ("other.ts", f"{tmp_path}/other.ts", f"file:{tmp_path}/other.ts"):
        for name in ("list.m3u8", "list.m4a"):
            Path(name).write_text(PLAYLISTS[kind].format(other))
            assert name in refusal(load_audio, name)


# ---- log-mel ----


@pytest.mark.parametrize(
    "samples, frames", [(160, 1), (319, 1), (320, 2), (16_000, 100), (175_999, 1099)]
)
def test_a_log_mel_has_a_frame_for_every_whole_hop_and_is_bfloat16_made_of_float32(samples, frames):
    mel = log_mel(torch.from_numpy(noise(samples)))
    spectrum = mel_spectrum(noise(samples))
    assert mel.shape == spectrum.shape == (128, frames)
    assert mel.dtype == torch.bfloat16 and spectrum.dtype == np.float32
