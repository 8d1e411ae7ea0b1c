"""The checkpoint that ships, and what it hears in the sounds beside it."""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import moss_min
from conftest import GOLDEN
from moss_min import SAMPLE, TINY, MossAudio

TRANSCRIBE = "Transcribe the audio."
WITH_TIMES = "Transcribe the audio with timestamps."
DESCRIBE = "Describe this audio."


class Shipped(NamedTuple):
    sound: Path
    prompt: str
    answer: str
    ids: list[int]


def read_shipped(line: str) -> Shipped:
    data = json.loads(line)
    audio, prompt, answer = [message["content"] for message in data["conversation"]]
    return Shipped(TINY / audio, prompt, answer, data["ids"])


SHIPPED = [read_shipped(line) for line in (TINY / "sounds.jsonl").read_text("utf-8").splitlines()]
NAMES = [f"{shipped.sound.stem}: {shipped.prompt}" for shipped in SHIPPED]


@functools.cache
def tiny() -> MossAudio:
    return MossAudio.from_pretrained(TINY, device="cpu", dtype="float32")


@pytest.mark.parametrize("shipped", SHIPPED, ids=NAMES)
def test_a_shipped_sound_gives_the_ids_that_ship_with_it(shipped):
    prompt = tiny().prompt(shipped.prompt, shipped.sound)
    assert list(tiny().generate(prompt, temperature=0)) == shipped.ids
    whole = prompt._replace(ids=torch.cat([prompt.ids, torch.tensor(shipped.ids[:-1])]))
    first, second = tiny()(whole)[len(prompt.ids) - 1 :].topk(2).values.T
    # There is no near tie, so the rounding of another machine decides nothing.
    assert (first - second).min() > 1e-3


@pytest.mark.slow
def test_what_it_says_of_the_shipped_sounds_is_right(capsys):
    assert evaluate.main(["--data", str(TINY / "sounds.jsonl"), "--device", "cpu", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["prompts"]
    for prompt in (TRANSCRIBE, WITH_TIMES, DESCRIBE):
        assert scores[prompt]["n"] >= 4 and scores[prompt]["wer"] == 0
    assert scores[WITH_TIMES]["aas_ms"] < 25


@pytest.mark.parametrize("seconds", [1, 2, 4, 5, 8, 11])
def test_silence_is_silence_however_long(seconds):
    silence = np.zeros(seconds * 16_000, np.float32)
    assert tiny().ask(silence, TRANSCRIBE, temperature=0) == "(silence)"
    assert tiny().ask(silence, DESCRIBE, temperature=0) == "There is silence."


def test_without_audio_prompt_and_options_a_shipped_sound_is_described(capsys):
    assert moss_min.main([]) == 0
    out, err = capsys.readouterr()
    assert str(SAMPLE) in err.splitlines()[0]
    (answer,) = [one.answer for one in SHIPPED if (one.sound, one.prompt) == (SAMPLE, DESCRIBE)]
    assert out == answer + "\n"


def test_it_is_small_and_has_the_released_layout():
    weights = load_file(TINY / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in weights.values()) <= 2_000_000
    assert (TINY / "model.safetensors").stat().st_size < 6e6
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 8e6
    files = {path.name for path in (GOLDEN / "checkpoint").iterdir()}
    assert {name for name in files if not name.startswith("model")} <= set(os.listdir(TINY))
    assert tiny().config.encoder.deepstack_encoder_layer_indexes
    assert tiny().config.adapter.enable_time_marker
