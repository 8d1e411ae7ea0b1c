"""What several tools need: whole files, lines of data, random weights, saved states, progress."""

import contextlib
import datetime
import filecmp
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encoder import require
from moss_min import MossAudio, load_tokenizer, read_config, say


@contextlib.contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """Makes a folder for what is not whole yet, and removes it at the end. Whatever a killed run
    has left there goes first, also the files that libraries write beside theirs."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def as_target(path: Path) -> Path:
    """Returns the file that is to be written, where a link leads. Raises ValueError for a folder, a
    pipe or a device."""
    path = Path(os.path.realpath(path))
    good = path.is_file() or not path.exists()
    require(good, f"{path} is not an ordinary file; expected the name of one")
    return path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields where to write a file, which is then renamed: what stands at the path is always whole.
    A link stays a link."""
    path = as_target(path)
    with part_folder(path.with_name(path.name + ".part")) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


def write_text(text: str, path: Path) -> None:
    with whole(path) as part:
        part.write_text(text, "utf-8")


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata=None) -> None:
    """Writes a safetensors file with metadata, a dict of strings."""
    with whole(path) as part:
        part.touch()
        # save_file's own file is one that nobody else may read: it gets the mode of any new file.
        mode = part.stat().st_mode
        save_file(tensors, part, metadata or {"format": "pt"})
        part.chmod(mode)


def move_files(part: Path, folder: Path, last: str, old: Iterable[Path] = ()) -> None:
    """Moves the files of a checkpoint or adapter into a folder and removes the old ones; behind all
    this comes `last`, its configuration. Stopped anywhere, the folder has what it had, or what is
    new, or no configuration, without which nothing loads: never some of each."""
    names = sorted(set(os.listdir(part)) - {last})
    beside = [name for name in [*names, last] if "safetensors" not in name]
    _, changed, absent = filecmp.cmpfiles(part, folder, beside, shallow=False)
    if changed or absent:
        (folder / last).unlink(missing_ok=True)
    for name in names:
        os.replace(part / name, folder / name)
    for file in old:
        file.unlink(missing_ok=True)
    os.replace(part / last, folder / last)


def read_object(path: Path, form: str) -> dict:
    """Returns the object in a JSON file. form: what is in it, for messages."""
    expected = f"expected an object, {form}"
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read: {error}; {expected}") from error
    require(isinstance(value, dict), f"{path}: {expected}")
    return value


def read_names(path: str | None) -> dict[str, str]:
    """Returns the object in a file of --names; an empty one without a file."""
    form = '{"port\'s name": "our name"}'
    names = read_object(Path(path), form) if path else {}
    strings = all(isinstance(ours, str) for ours in names.values())
    require(strings, f"{path}: expected an object, {form}")
    return names


def our_name(theirs: str, names: dict[str, str]) -> str:
    """Returns a port's name as ours, by the first entry of --names that fits; {i} is a number."""
    for pattern, ours in names.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)", 1), theirs)
        if match:
            return ours.replace("{i}", "".join(match.groups()))
    return theirs


def read_json_lines(path: Path) -> list[tuple[int, Any]]:
    """Returns (number from 1, value) of the lines that are not empty; None for what is not JSON."""
    require(path.exists(), f"{path} is not there; expected a JSONL file")
    values = []
    # Not splitlines: a JSON string may hold other characters that end a line.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                values.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            values.append((number, None))
    return values


def each_line(path: Path, lines: Iterable[tuple[int, Any]], work: Callable) -> dict[int, Any]:
    """Returns work(value) for each (number, value) of a file's lines, by number. Raises one
    ValueError that counts the bad lines and names the first three."""
    done = {}
    wrong = []
    for number, value in lines:
        try:
            done[number] = work(value)
        # tokenizers raises TypeError for text that is not Unicode; what is nested too deep to be
        # shown, Python a RecursionError.
        except (ValueError, TypeError, RecursionError) as error:
            wrong.append(f"line {number}: {error}")
    require(not wrong, f"{path}: {len(wrong)} bad lines: {'; '.join(wrong[:3])}")
    return done


class Example(NamedTuple):
    """A line of upstream's training format."""

    prompt: str
    clips: list[Path]
    answer: str
    question: bool  # "task": "question", ours: its answer is right or wrong


def read_example(value: Any, folder: Path) -> Example:
    """Reads a line's JSON value, its clips' paths relative to the folder. Raises ValueError."""
    try:
        turns = [(t["role"], t["message_type"], t["content"]) for t in value["conversation"]]
    except (KeyError, TypeError):
        raise ValueError("expected turns of role, message_type and content") from None
    require(all(isinstance(content, str) for *_, content in turns), "a content that is no string")
    clips = [folder / content for *kind, content in turns if kind == ["user", "audio"]]
    prompts = [content for *kind, content in turns if kind == ["user", "text"]]
    answers = [content for *kind, content in turns if kind == ["assistant", "text"]]
    known = len(clips) + len(prompts) + len(answers) == len(turns)
    require(known, "a message that is neither the user's audio or text nor the assistant's text")
    require(clips, "no audio")
    require(len(prompts) == 1, f"{len(prompts)} texts of the user's; expected one")
    require(prompts[0].strip(), "the user's text is empty")
    require(any(answer.strip() for answer in answers), "no answer")
    require(len(answers) == 1, f"{len(answers)} answers; expected one")
    task = value.get("task")
    require(task in (None, "question"), f"task is {task!r:.60}; expected question, or none")
    return Example(prompts[0], clips, answers[0], task == "question")


def random_model(folder: Path, seed: int) -> MossAudio:
    """Returns a model with a checkpoint folder's configuration and tokenizer and random weights, as
    PyTorch draws them but for the embeddings, N(0, 0.02)."""
    torch.manual_seed(seed)
    model = MossAudio(read_config(folder), load_tokenizer(folder))
    nn.init.normal_(model.language_model.embed_tokens.weight, std=0.02)
    return model


def save_state(path: Path, tensors: dict[str, torch.Tensor], run: dict) -> None:
    """Writes what a training goes on from: tensors, and run (options and step) as JSON."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(kept, path, {"run": json.dumps(run)})


def read_run(path: Path, run: dict) -> dict:
    """Returns the run of a saved state, which may hold more than the given one: the step. Raises
    ValueError for the state of another run."""
    require(path.is_file(), f"{path} is not an ordinary file; expected a saved state")
    try:
        with safe_open(path, "pt") as file:
            saved = json.loads(file.metadata()["run"])
    except (SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error!r:.200}; expected a saved state") from error
    good = type(saved) is dict and type(saved.get("step")) is int and saved["step"] >= 0
    require(good, f"{path}: its run is {saved!r:.60}; expected an object with a step")
    other = ", ".join(name for name in run if saved.get(name) != run[name])
    require(not other, f"{path}: a run with another {other}; expected the same, or another --out")
    return saved


def load_state(path: Path, run: dict, like=()) -> tuple[dict[str, torch.Tensor], dict]:
    """Returns a state's tensors and its run; see read_run. Raises ValueError, too, if it lacks one
    of the tensors in the dict `like`, or has it in another shape."""
    saved = read_run(path, run)
    tensors = load_file(path)
    for name, tensor in dict(like).items():
        good = name in tensors and tensors[name].shape == tensor.shape
        found = f"{path}: {name} is missing or has another shape"
        require(good, f"{found}; expected it as it was saved")
    return tensors, saved


def end_with_parent() -> None:
    """Ends this process as soon as its parent is gone: torchrun, killed hard, ends nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Progress:
    """Says on stderr, at most every five seconds and at the end, how far some work is."""

    def __init__(self, what: str, total: int):
        self.what = what
        self.total = total
        self.start = time.monotonic()
        self.said = self.start

    def at(self, done: int, note: str = "") -> None:
        """Says how many are done, the note (", ...") and the time left, if it is time to."""
        now = time.monotonic()
        if now - self.said < 5 and done < self.total:
            return
        self.said = now
        seconds = (now - self.start) / done * (self.total - done)
        left = datetime.timedelta(seconds=round(seconds))
        say(f"{self.what} {done} of {self.total}{note}, {left} left")
