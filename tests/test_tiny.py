"""The checkpoint that ships, and what it hears in the sounds beside it."""

import functools
import json
import re
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import GOLDEN, HERE
from safetensors.torch import load_file

import moss_min
from moss_min import MossAudio

sys.path.insert(0, str(HERE.parent / "tools"))
import evaluate  # noqa: E402
from train import read_line  # noqa: E402

TINY = HERE.parent / "tiny"
Shipped = namedtuple("Shipped", "sound prompt answer ids")


def read_shipped(line: str) -> Shipped:
    (sound,), prompt, answer = read_line(line, TINY)
    return Shipped(sound, prompt, answer, json.loads(line)["ids"])


SHIPPED = [read_shipped(line) for line in (TINY / "sounds.jsonl").read_text("utf-8").splitlines()]


@functools.cache
def tiny() -> MossAudio:
    return MossAudio.from_pretrained(TINY, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "shipped", SHIPPED, ids=[f"{one.sound.stem}: {one.prompt}" for one in SHIPPED]
)
def test_a_shipped_sound_gives_the_ids_that_ship_with_it(shipped):
    prompt = tiny().prompt(shipped.prompt, shipped.sound)
    assert list(tiny().generate(prompt, temperature=0)) == shipped.ids
    whole = prompt._replace(ids=torch.cat([prompt.ids, torch.tensor(shipped.ids[:-1])]))
    first, second = tiny()(whole)[len(prompt.ids) - 1 :].topk(2).values.T
    assert (first - second).min() > 1e-3  # no near tie: rounding of another machine decides nothing


def test_what_it_says_of_the_shipped_sounds_is_right(capsys):
    assert evaluate.main(["--data", str(TINY / "sounds.jsonl"), "--device", "cpu", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["prompts"]
    for prompt in (
        "Transcribe the audio.",
        "Transcribe the audio with timestamps.",
        "Describe this audio.",
    ):
        assert scores[prompt]["n"] >= 4 and scores[prompt]["wer"] == 0
    assert scores["Transcribe the audio with timestamps."]["aas_ms"] < 25


@pytest.mark.parametrize("seconds", range(1, 13))
def test_silence_is_silence_however_long(seconds):
    silence = np.zeros(seconds * 16_000, np.float32)
    assert tiny().ask(silence, "Transcribe the audio.", temperature=0) == "(silence)"
    assert tiny().ask(silence, "Describe this audio.", temperature=0) == "There is silence."


@pytest.mark.parametrize("argv", [[], ["--greedy"]])
def test_without_audio_and_prompt_a_shipped_sound_is_described(argv, capsys):
    torch.manual_seed(0)  # without --greedy it draws
    assert moss_min.main(argv) == 0
    out, err = capsys.readouterr()
    assert str(moss_min.SAMPLE) in err.splitlines()[0]
    (sample,) = [
        one
        for one in SHIPPED
        if one.sound.samefile(moss_min.SAMPLE) and one.prompt == "Describe this audio."
    ]
    assert out == sample.answer + "\n" if argv else re.search("A voice says|A bell rings", out)


def test_it_is_small_and_has_the_released_layout():
    weights = load_file(TINY / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in weights.values()) <= 2_000_000
    assert (TINY / "model.safetensors").stat().st_size < 6e6
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 8e6
    names = {
        path.name for path in (GOLDEN / "checkpoint").iterdir() if not path.name.startswith("model")
    }
    assert names <= {path.name for path in TINY.iterdir()}
    assert (
        tiny().config.encoder.deepstack_encoder_layer_indexes
        and tiny().config.adapter.enable_time_marker
    )
