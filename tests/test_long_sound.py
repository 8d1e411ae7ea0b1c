"""An hour of sound: what its log-mel, the encoder and the prompt need of memory, and what the encoder reports."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from adapter import AdapterConfig
from conftest import HERE
from encoder import SAMPLE_RATE, AudioEncoder, EncoderConfig, mel_spectrum
from moss_min import MossAudio, MossConfig
from qwen3 import Qwen3Config

CHUNK = 400  # mel frames, 4 s


def small_config(**values) -> EncoderConfig:
    sizes = dict(
        downsample_hidden_size=2,
        d_model=16,
        output_dim=16,
        encoder_layers=1,
        encoder_attention_heads=2,
    )
    rest = dict(encoder_ffn_dim=16, layer_norm_eps=1e-5, deepstack_encoder_layer_indexes=(0,))
    return EncoderConfig(**sizes | rest | values)


def small_encoder(**values) -> AudioEncoder:
    """An encoder of random weights, 16 wide, with one layer and one tap."""
    return AudioEncoder(small_config(**values))


def wide_model() -> MossAudio:
    """A model of random weights whose decoder has one layer, 32 wide but for its MLP: 33 kB a token there, thrice."""
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    rest = dict(
        num_key_value_heads=1,
        head_dim=16,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=8192,
    )
    adapter = AdapterConfig(
        output_dim=16, adapter_hidden_size=16, hidden_size=32, audio_token_id=63
    )
    return MossAudio(MossConfig(small_config(), adapter, Qwen3Config(**sizes | rest), ()), None)


def mel_of(frames: int) -> torch.Tensor:
    return torch.zeros(128, frames, dtype=torch.bfloat16)


def mel_peak(seconds: int) -> int:
    """The bytes that the log-mel of noise takes at its peak, beyond the sound; numpy reports them to tracemalloc."""
    wave = np.random.default_rng(0).standard_normal(seconds * SAMPLE_RATE, dtype=np.float32)
    tracemalloc.start()
    try:
        mel_spectrum(wave)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_log_mel_of_an_hour_takes_less_than_half_a_gigabyte_beyond_the_sound():
    one, six = (
        mel_peak(60),
        mel_peak(360),
    )  # the rest grows by the second: 64 kB of padded sound, 51 kB of log-mel
    assert one + (six - one) / 300 * (3600 - 60) < 0.5e9


@pytest.mark.parametrize(
    "conv_chunksize, batches", [(64, [8, 8, 4]), (8, [8, 8, 4]), (6, [6, 6, 6, 2])]
)
def test_the_encoder_takes_at_most_8_chunks_at_a_time_and_no_more_than_conv_chunksize(
    conv_chunksize, batches
):
    encoder, seen = small_encoder(conv_chunksize=conv_chunksize), []
    encoder.conv1.register_forward_pre_hook(lambda conv, args: seen.append(len(args[0])))
    output, taps = encoder([mel_of(12 * CHUNK), mel_of(8 * CHUNK)])
    assert seen == batches and len(output) == len(taps[0]) == 20 * 50


ENCODE = """
import torch
from test_long_sound import CHUNK, mel_of, small_encoder
encoder = small_encoder(downsample_hidden_size=128)  # the first convolution gives 6.6 MB a chunk
with torch.inference_mode():
    for chunks in (8, 72):
        encoder([mel_of(chunks * CHUNK)])
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
PREFILL = """
import torch
from moss_min import Prompt
from qwen3 import KVCache
from sample import prefill
from test_long_sound import wide_model
model = wide_model()
with torch.inference_mode():
    for tokens in (1000, 8000):
        cache = KVCache(model.config.decoder, 1, tokens, torch.float32, torch.device("cpu"))
        prefill(model, Prompt(torch.arange(tokens) % 63, []), cache, None)
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
from_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc"
)


def peaks(program: str) -> list[float]:
    """The numbers of kB that a program prints, run as a process of its own, in MB."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *sys.path])
    }
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    return [
        int(kilobytes) / 1e3 for kilobytes in run.stdout.split()
    ]  # getrusage would count the parent's, too


@from_proc
def test_a_longer_clip_takes_hardly_more_memory_to_encode():
    short, long = peaks(ENCODE)
    assert (
        long - short < 100
    )  # MB: the log-mel, its chunks and the rows are 25; 64 chunks at a time would be 840


@from_proc
def test_a_longer_prompt_takes_hardly_more_memory_to_prefill():
    short, long = peaks(PREFILL)
    assert (
        long - short < 250
    )  # MB: the last slice's mask and what it takes to make it are 90; one piece would be 690


def test_encoding_reports_how_many_seconds_are_done():
    lines = []
    small_encoder()(
        [mel_of(10 * CHUNK + 200), mel_of(7 * CHUNK)], lines.append
    )  # 42 s and 28 s: chunk 11 is 2 s
    assert lines == ["encoding: 32 of 70 s", "encoding: 62 of 70 s", "encoding: 70 of 70 s"]


def test_encoding_in_one_batch_reports_nothing():
    lines = []
    small_encoder()([mel_of(8 * CHUNK)], lines.append)
    assert lines == []
