"""Good inputs, spoilt by the hundred as a seed draws them, through the programs' own main: status 0
or 2, one line for a refusal, no traceback, nothing left over, and memory that is bounded."""

import copy
import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

import batch
import moss_min
import parity
import train
from conftest import FOLDER, GOLDEN, data_line, golden_model, high_water, needs_proc, noise
from moss_min import load_tokenizer

pytestmark = [pytest.mark.slow, needs_proc]

NESTED = "[" * 100_000
ODD = [None, True, -1, 0, 1.5, 1e308, float("nan"), 2**31, 2**63, 10**400, "", "x", "\0", "\ud800"]
ODD += [[], {}, [[]], {"a": {}}, "a" * 10_000, list(range(1000)), "../x", "/dev/zero", "[1.5]"]
NUMBERS = [b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0", b"\xff" * 8]


def spoil_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes a few bytes, most of them near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(len(data) * rng.random() ** rng.integers(1, 9))
        length = int(rng.integers(1, 65))
        kind = rng.integers(6)
        if kind == 0:
            data[at : at + 1] = rng.bytes(1)
        elif kind == 1:
            number = NUMBERS[rng.integers(len(NUMBERS))]
            data[at : at + len(number)] = number
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = rng.bytes(length)
        elif kind == 4:
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def spoil_value(value, rng: np.random.Generator):
    """Returns a JSON value with one of its parts replaced or taken away."""
    value = copy.deepcopy(value)
    inside = value
    while True:
        keys = list(inside) if isinstance(inside, dict) else range(len(inside))
        key = keys[rng.integers(len(keys))]
        deep = isinstance(inside[key], (dict, list)) and len(inside[key]) > 0
        if not deep or rng.random() < 0.2:
            break
        inside = inside[key]
    if rng.random() < 0.1:
        del inside[key]
    else:
        inside[key] = ODD[rng.integers(len(ODD))]
    return value


def spoil_json(text: bytes, rng: np.random.Generator) -> bytes:
    if rng.random() < 0.2:
        return spoil_bytes(text, rng)
    if rng.random() < 0.02:
        return NESTED.encode()
    return json.dumps(spoil_value(json.loads(text), rng)).encode()


def spoil_safetensors(data: bytes, rng: np.random.Generator) -> bytes:
    """Spoils the header's JSON and keeps its length right, or any bytes."""
    if rng.random() < 0.4:
        return spoil_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header = spoil_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


class Judge:
    """Runs a program's main on one input after another."""

    def __init__(self, capfd, folder: Path):
        self.capfd = capfd
        self.folder = folder
        self.before = high_water()
        self.refused = 0
        self.runs = 0

    def run(self, main, argv, case, ends=(0, 2)) -> None:
        there = sorted(self.folder.rglob("*"))
        self.capfd.readouterr()
        status = main([str(word) for word in argv])
        err = self.capfd.readouterr().err
        assert status in ends, case
        assert "Traceback" not in err and "panicked" not in err, (case, err)
        if status == 2:
            # Without a process of its own, --quiet does not reach what libraries print.
            own = re.findall(r"^(?:moss_min|batch|train|parity): .+$", err, re.MULTILINE)
            assert len(own) == 1, (case, err)
            self.refused += 1
        self.runs += 1
        assert sorted(self.folder.rglob("*")) == there, case

    def end(self, least: float) -> None:
        """So many inputs have to be refused, or they are hardly spoilt."""
        assert self.refused >= least * self.runs
        assert high_water() - self.before < 500e6


@pytest.fixture
def judge(capfd, tmp_path) -> Judge:
    return Judge(capfd, tmp_path)


QUICK = ["--device", "cpu", "--quiet", "--greedy", "--max-new-tokens", "2", "--prompt", "Hello"]


def spoil_folder(judge, folder, name, spoil, count, least=0.3) -> None:
    """Spoils a file of a checkpoint folder and asks the model."""
    good = (folder / name).read_bytes()
    for seed in range(count):
        (folder / name).write_bytes(spoil(good, np.random.default_rng(seed)))
        judge.run(moss_min.main, [*QUICK, "--model", folder], (name, seed))
    (folder / name).write_bytes(good)
    judge.end(least)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_spoilt_weights(name, checkpoint, judge):
    spoil = spoil_safetensors if name.endswith("s") else spoil_json
    spoil_folder(judge, checkpoint, name, spoil, 150)


@pytest.mark.parametrize("name", ["config", "processor_config", "generation_config"])
def test_spoilt_configurations(name, checkpoint, judge):
    spoil_folder(judge, checkpoint, f"{name}.json", spoil_json, 150)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_spoilt_files_of_a_tokenizer(name, checkpoint, judge):
    spoil = spoil_bytes if name == "merges.txt" else spoil_json
    spoil_folder(judge, checkpoint, name, spoil, 100, least=0.05)


def test_spoilt_tokenizers(checkpoint, judge):
    load_tokenizer(checkpoint).save(str(checkpoint / "tokenizer.json"))
    spoil_folder(judge, checkpoint, "tokenizer.json", spoil_json, 300)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF"])
def test_spoilt_sounds(container, judge, tmp_path, monkeypatch):
    model = golden_model()
    monkeypatch.setattr(moss_min.MossAudio, "from_pretrained", lambda *_: model)
    clip = tmp_path / "clip"
    sound = np.stack([noise(4000), -noise(4000)], axis=1)
    soundfile.write(clip, sound, 44_100 if container == "MP3" else 8000, format=container)
    good = clip.read_bytes()
    for seed in range(150):
        clip.write_bytes(spoil_bytes(good, np.random.default_rng(seed)))
        judge.run(moss_min.main, [*QUICK, clip], (container, seed))
    judge.end(0.1)


@pytest.fixture
def clip(tmp_path) -> Path:
    soundfile.write(tmp_path / "a.wav", noise(4000), 16_000)
    return tmp_path / "a.wav"


def test_spoilt_manifests_and_answers(judge, clip, tmp_path, monkeypatch):
    model = golden_model()
    monkeypatch.setattr(batch.MossAudio, "from_pretrained", lambda *_: model)
    line = {"audio": ["a.wav"], "prompt": "Hello", "id": "x"}
    files = [tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.jsonl.run")]
    argv = ["--manifest", files[0], "--out", files[1], *QUICK[:2], *QUICK[3:6], "--model", FOLDER]
    files[0].write_text(json.dumps(line))
    assert batch.main([str(word) for word in argv]) == 0
    good = [path.read_bytes() for path in files]
    for seed in range(300):
        for path, data in zip(files, good):
            path.write_bytes(data)
        spoilt = spoil_json(good[seed % 3], np.random.default_rng(seed))
        files[seed % 3].write_bytes(spoilt)
        judge.run(batch.main, argv, seed)
    judge.end(0.2)


def test_spoilt_data_lines(judge, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", lambda *_: golden_model())
    monkeypatch.setattr(train, "train", lambda *_: None)
    monkeypatch.setattr(train, "save_checkpoint", lambda *_: None)
    line = data_line(["a.wav"], "Hello", "Yes", task="question")
    data = tmp_path / "in.jsonl"
    for seed in range(300):
        data.write_bytes(spoil_json(json.dumps(line).encode(), np.random.default_rng(seed)))
        argv = ["--data", data, "--model", FOLDER, "--out", tmp_path / "out", *QUICK[:2]]
        judge.run(train.main, argv, seed)
    judge.end(0.3)


@pytest.mark.parametrize("kind", ["reference", "safetensors", "npz", "npy"])
def test_spoilt_dumps(kind, judge, tmp_path):
    reference = tmp_path / "reference.safetensors"
    dump = ["dump", "-o", reference, "--model", FOLDER, "--device", "cpu", "--prompt", "Hello"]
    assert parity.main([*map(str, dump), "--max-new-tokens", "2"]) == 0
    tensors = {name: x.numpy() for name, x in parity.read_tensors(reference)[0].items()}
    kept = {name: tensors[name] for name in ("input_ids", "final_norm", "logits")}
    port = tmp_path / f"port.{kind}"
    spoilt = port
    spoil = spoil_bytes
    if kind == "npz":
        np.savez_compressed(port, **kept)
    elif kind == "npy":
        port.mkdir()
        for name, x in kept.items():
            np.save(port / name, x)
        spoilt = port / "logits.npy"
    else:
        port = tmp_path / "port.safetensors"
        shutil.copyfile(reference, port)
        spoilt = reference if kind == "reference" else port
        spoil = spoil_safetensors
    good = spoilt.read_bytes()
    for seed in range(200):
        spoilt.write_bytes(spoil(good, np.random.default_rng(seed)))
        argv = ["compare", reference, port, "--model", GOLDEN / "checkpoint", "--device", "cpu"]
        judge.run(parity.main, argv, (kind, seed), ends=(0, 1, 2))
    judge.end(0.1)
