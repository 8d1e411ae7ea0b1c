"""What the tests share: upstream's figures (tests/golden, see its README.md) and the model they were made with."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from moss_min import MossAudio, load_audio

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
QWEN3_TOKENIZER = HERE / "qwen3_tokenizer"
JFK = GOLDEN / "jfk.wav"


@functools.cache
def golden_model(checkpoint: str = "checkpoint", dtype: str = "float32") -> MossAudio:
    """The golden checkpoint ("checkpoint" or "variant/checkpoint") on the CPU."""
    return MossAudio.from_pretrained(GOLDEN / checkpoint, device="cpu", dtype=dtype)


@functools.cache
def golden_case(name: str) -> SimpleNamespace:
    """One case: its tensors (floats as they are stored), text, clips, options and the text that upstream generated."""
    path = GOLDEN / ("variant" if name == "variant" else "cases") / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    case = json.loads(metadata["case"])
    if name.endswith(".bfloat16"):
        clips = golden_case(name.removesuffix(".bfloat16")).clips
    elif case["audio"] and "file" in case["audio"][0]:
        clips = [
            load_audio(GOLDEN / audio["file"]).repeat(audio["times"]) for audio in case["audio"]
        ]
    else:
        clips = [tensors[f"waveform.{i}"] for i in range(len(case["audio"]))]
    return SimpleNamespace(
        name=name,
        dtype=metadata["dtype"],
        checkpoint="variant/checkpoint" if name == "variant" else "checkpoint",
        tensors=tensors,
        text=case["text"],
        clips=clips,
        time_markers=case.get("time_markers"),
        max_new_tokens=case["max_new_tokens"],
        sampling=case.get("sample", {"temperature": 0}),
        answer=metadata["text"],
    )


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the golden checkpoint folder, to be spoilt."""
    return Path(shutil.copytree(GOLDEN / "checkpoint", tmp_path / "checkpoint"))


# torch 2.6 draws other numbers from the same seed than upstream's torch 2.13 (2.7 and newer: the same).
draws_as_upstream = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 draws other numbers"
)


def edit_json(path: Path, **values) -> None:
    """Sets values in a JSON file; a key "a.b" is b in the object a, and the value ... takes the key away."""
    data = json.loads(path.read_text())
    for name, value in values.items():
        *parents, key = name.split(".")
        target = data
        for parent in parents:
            target = target[parent]
        if value is ...:
            target.pop(key, None)
        else:
            target[key] = value
    path.write_text(json.dumps(data))
