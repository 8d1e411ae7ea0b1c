"""Long sound: what its log-mel, the encoder and the prompt need of memory, and what is reported."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import golden_model, needs_proc, numbers_from
from encoder import SAMPLE_RATE, AudioEncoder, mel_spectrum
from moss_min import MossAudio

CHUNK = 400  # mel frames, 4 s


def small_encoder(**values) -> AudioEncoder:
    """An encoder of random weights with one layer and one tap."""
    sizes = {"downsample_hidden_size": 2, "encoder_layers": 1, "conv_chunksize": 64}
    sizes["deepstack_encoder_layer_indexes"] = (0,)
    return AudioEncoder(replace(golden_model().config.encoder, **sizes | values))


def wide_model() -> MossAudio:
    """A model of random weights whose decoder's MLP takes 33 kB a token, three times."""
    config = golden_model().config
    decoder = replace(config.decoder, intermediate_size=8192, num_hidden_layers=1)
    return MossAudio(config._replace(decoder=decoder), golden_model().tokenizer)


def mel_of(frames: int) -> torch.Tensor:
    return torch.zeros(128, frames, dtype=torch.bfloat16)


def mel_peak(seconds: int) -> int:
    """The bytes that the log-mel of noise takes at its peak, beside the sound, by numpy's count."""
    wave = np.random.default_rng(0).standard_normal(seconds * SAMPLE_RATE, dtype=np.float32)
    tracemalloc.start()
    try:
        mel_spectrum(wave)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_log_mel_of_an_hour_takes_less_than_half_a_gigabyte_beyond_the_sound():
    one = mel_peak(60)
    three = mel_peak(180)
    # A second more takes 64 kB of padded sound and 51 kB of log-mel.
    assert one + (three - one) / 120 * (3600 - 60) < 0.5e9


@pytest.mark.parametrize(
    "conv_chunksize, batches", [(64, [8, 8, 4]), (8, [8, 8, 4]), (6, [6, 6, 6, 2])]
)
def test_at_most_8_chunks_are_encoded_at_a_time_and_no_more_than_conv_chunksize(
    conv_chunksize, batches
):
    encoder = small_encoder(conv_chunksize=conv_chunksize)
    seen = []
    encoder.conv1.register_forward_pre_hook(lambda conv, args: seen.append(len(args[0])))
    output, tap = encoder([mel_of(12 * CHUNK), mel_of(8 * CHUNK)])
    assert seen == batches and len(output) == len(tap) == 20 * 50


ENCODE = """
import torch
from conftest import high_water
from test_long_sound import CHUNK, mel_of, small_encoder

encoder = small_encoder(downsample_hidden_size=128)  # the first convolution gives 6.6 MB a chunk
with torch.inference_mode():
    for chunks in (8, 72):
        encoder([mel_of(chunks * CHUNK)])
        print(high_water())
"""
PREFILL = """
import torch
from conftest import high_water
from moss_min import Prompt
from test_long_sound import wide_model

model = wide_model()
with torch.inference_mode():
    for tokens in (500, 4000):
        model.prefill(Prompt(torch.arange(tokens) % 63, []), model.new_cache(1, tokens))
        print(high_water())
"""


@pytest.mark.slow
@needs_proc
def test_a_longer_clip_takes_hardly_more_memory_to_encode():
    short, long = numbers_from(ENCODE)
    # The log-mel, its chunks and the rows are 25 MB; 64 chunks at a time would take 840 more.
    assert long - short < 100e6


@pytest.mark.slow
@needs_proc
def test_a_longer_prompt_takes_hardly_more_memory_to_prefill():
    short, long = numbers_from(PREFILL)
    # The last slice's mask and what makes it are 30 MB; in one piece it would take 400 more.
    assert long - short < 150e6


def test_encoding_reports_how_many_seconds_are_done():
    lines = []
    # 42 s and 28 s: chunk 11 is 2 s.
    small_encoder()([mel_of(10 * CHUNK + 200), mel_of(7 * CHUNK)], lines.append)
    assert lines == ["encoding: 32 of 70 s", "encoding: 62 of 70 s", "encoding: 70 of 70 s"]
