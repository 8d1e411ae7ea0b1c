"""What the tests share: upstream's figures (golden/README.md), models, measures, an option."""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from encoder import load_audio
from moss_min import TINY, MossAudio, Prompt, main

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
QWEN3_TOKENIZER = HERE / "qwen3_tokenizer"
JFK = GOLDEN / "jfk.wav"
FOLDER = GOLDEN / "checkpoint"

# ---- options ----

left_out = []  # the slow tests that this run leaves out


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, too")


def pytest_configure(config):
    if config.option.slow:
        config.option.markexpr = ""


def pytest_deselected(items):
    left_out.extend(item for item in items if item.get_closest_marker("slow"))


def pytest_terminal_summary(terminalreporter):
    if left_out:
        count = len(left_out)
        terminalreporter.write_line(f"Left out as slow: {count} (python -m pytest --slow runs all)")


# ---- models and upstream's figures ----


@functools.cache
def golden_model(checkpoint: str = "checkpoint", dtype: str = "float32") -> MossAudio:
    """The golden checkpoint ("checkpoint" or "variant/checkpoint") on the CPU."""
    return MossAudio.from_pretrained(GOLDEN / checkpoint, device="cpu", dtype=dtype)


@functools.cache
def tiny() -> MossAudio:
    """The checkpoint that ships, on the CPU."""
    return MossAudio.from_pretrained(TINY, device="cpu")


@functools.cache
def golden_case(name: str) -> SimpleNamespace:
    """One case: its tensors as they are stored, text, clips, options and upstream's answer."""
    path = GOLDEN / ("variant" if name == "variant" else "cases") / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    case = json.loads(metadata["case"])
    if name.endswith(".bfloat16"):
        clips = golden_case(name.removesuffix(".bfloat16")).clips
    elif case["audio"] and "file" in case["audio"][0]:
        clips = [load_audio(GOLDEN / one["file"]).repeat(one["times"]) for one in case["audio"]]
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


def golden_prompt(name: str) -> Prompt:
    """A case's prompt, as this implementation makes it."""
    case = golden_case(name)
    return golden_model(case.checkpoint).prompt(case.text, case.clips, case.time_markers)


# torch 2.6 draws other numbers from the same seed than 2.7 to 2.13, which upstream ran on.
draws_as_upstream = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 draws other numbers"
)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def write_clip(path: Path, wave) -> Path:
    """A clip as a 16-kHz file, no bit lost."""
    soundfile.write(path, np.asarray(wave), 16_000, subtype="FLOAT")
    return path


def noise(samples: int) -> np.ndarray:
    return (0.25 * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)


# ---- what is refused ----


def refusal(call, *args, **options) -> str:
    """The sentence of the ValueError that a call has to raise."""
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    assert caught.type is ValueError  # not a library's UnicodeDecodeError, say
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.fixture
def refused(capfd):
    """The line in which a program refuses its arguments, after those on progress, if there are."""

    def refused(program, *argv, progress=("loading ", "checked ")) -> str:
        capfd.readouterr()
        assert program([*map(str, argv)]) == 2
        out, err = capfd.readouterr()
        *before, line = err.splitlines()
        assert out == ""
        assert [told for told in before if not told.startswith(progress)] == []
        assert line.startswith(f"{program.__module__}: ") and len(line) < 400
        return line

    return refused


@pytest.fixture
def complaint(refused):
    """The line in which moss_min.py refuses its arguments."""
    return functools.partial(refused, main, "--device", "cpu", "--quiet", progress=())


# ---- a browser ----


@contextlib.contextmanager
def browse(address: str, **options):
    """A page of a browser, opened at an address with playwright's options. It may say nothing on
    the console, and fetch nothing but from there."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs chromium")
    names = ["chromium", "google-chrome"]
    chromium = next(filter(None, map(shutil.which, names)), None) or pytest.skip("needs chromium")
    told = []
    with playwright.sync_playwright() as started:
        arguments = {"executable_path": chromium, "args": ["--no-sandbox"]}
        page = started.chromium.launch(**arguments).new_page(**options)
        page.set_default_timeout(120_000)
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error.stack)))
        page.on("request", lambda request: told.append(request.url))
        page.goto(address)
        yield page
    allowed = (address.partition("#")[0], "blob:")
    told = [line for line in told if not line.startswith(allowed)]
    # gradio's own scripts fail in some runs and not in others.
    assert [line for line in told if f"{address}assets/" not in line] == []


# ---- a folder to be spoilt ----


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the golden checkpoint folder."""
    return Path(shutil.copytree(GOLDEN / "checkpoint", tmp_path / "checkpoint"))


def edit_json(path: Path, **values) -> None:
    """Sets values in a JSON file; "a.b" is b in the object a; the value ... takes the key away."""
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


# ---- files of the tools ----


def message(role: str, kind: str, content) -> dict:
    return {"role": role, "message_type": kind, "content": content}


def data_line(clips, prompt: str, answer: str, **more) -> dict:
    """A line of upstream's training format."""
    turns = [message("user", "audio", str(clip)) for clip in clips]
    turns += [message("user", "text", prompt), message("assistant", "text", answer)]
    return {"conversation": turns} | more


def rewrite_dump(dump: Path, target: Path, tensors: dict, **metadata: str | None) -> Path:
    """Writes other tensors with a dump's metadata, some of it changed; None takes one away."""
    with safe_open(dump, "pt") as file:
        said = file.metadata() | metadata
    save_file(tensors, target, {key: value for key, value in said.items() if value is not None})
    return target


# ---- measures ----


def largest_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, over the largest exact value."""
    assert ours.shape == exact.shape
    return float((ours - exact).abs().max() / exact.abs().max())


def assert_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Float32 sums in another order come to 1e-6 of the largest value (golden/README.md)."""
    assert largest_error(ours, exact) <= 3e-6


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The root mean square of the difference, over that of the exact values."""
    return float((x.float() - exact).norm() / exact.norm())


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc"
)


def high_water() -> int:
    """The most bytes that this process has held; getrusage would begin with its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def numbers_from(program: str, *arguments) -> list[int]:
    """The whole numbers that a program prints in a process of its own; it may import the tests."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), *sys.path])
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": path}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return [int(word) for word in run.stdout.split()]


def slow(*values) -> list:
    """Returns values for parametrize whose tests are slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
