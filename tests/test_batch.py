"""tools/batch.py: prompts together, and files of them, however shared out, killed and resumed."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import batch
from conftest import (
    GOLDEN,
    HERE,
    edit_json,
    golden_model,
    golden_prompt,
    needs_cuda,
    needs_proc,
    tiny,
)
from moss_min import TINY, MossAudio, Prompt
from sample import Sampling

PLAIN = "Transcribe the audio."
STAMPED = "Transcribe the audio with timestamps."
# Answers of 3 to 60 tokens: two clips, text alone, a clip in a folder, one that is not there.
LINES = [
    {"audio": "bell.wav", "prompt": STAMPED},
    {"audio": "clips/whistle.wav", "prompt": PLAIN, "id": "w"},
    {"audio": ["telephone.wav", "cards.wav"], "prompt": PLAIN},
    {"audio": "nowhere.wav", "prompt": PLAIN, "id": "gone"},
    {"audio": "telephone.wav"},
    {"prompt": "When?", "id": 60},
    {"audio": "cards.wav", "prompt": STAMPED, "id": "卡片\n"},
]
IDS = [1, "w", 3, "gone", 5, 60, "卡片\n"]

# ---- many prompts together ----


def golden_prompts() -> list[Prompt]:
    """Prompts of different lengths, with sound and without, the last within a thought."""
    model = golden_model()
    thought = model.tokenizer.encode("<think>1", add_special_tokens=False).ids
    prompts = [golden_prompt(name) for name in ("short", "text_only", "two_audios", "short")]
    return [*prompts, Prompt(torch.tensor(thought), [])]


# On CUDA the batch's steps are captured, and those of a prompt alone are not.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.9}, {"thinking_budget": 0}])
def test_a_batch_gives_each_prompt_the_ids_that_it_has_alone(options, device):
    model = MossAudio.from_pretrained(GOLDEN / "checkpoint", device, "float32")
    prompts = golden_prompts()
    together = dict(batch.generate_batch(model, prompts, 40, seed=7, **options))
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt, 40, seed=7 + i, cuda_graph=False, **options)
        assert together[i] == list(alone)


def test_answers_of_a_batch_come_as_they_end():
    samplings = [Sampling(length, temperature=0) for length in (5, 2, 9, 1, 7)]
    ended = list(batch.generate_rows(golden_model(), golden_prompts(), samplings))
    assert [(i, len(ids)) for i, ids in ended] == [(3, 1), (1, 2), (0, 5), (4, 7), (2, 9)]


def test_a_batch_refuses_what_generate_refuses_at_the_call():
    with pytest.raises(ValueError, match="seed is 1.5; expected"):
        batch.generate_batch(golden_model(), golden_prompts(), seed=1.5)


def test_a_row_of_a_batch_ends_at_the_models_last_position(checkpoint):
    prompts = golden_prompts()[1:3]
    most = {"language_config.max_position_embeddings": len(prompts[1].ids) + 3}
    edit_json(checkpoint / "config.json", **most)
    model = MossAudio.from_pretrained(checkpoint, "cpu")
    answers = dict(batch.generate_batch(model, prompts, 20, temperature=0))
    assert [len(answers[i]) for i in (0, 1)] == [20, 3]


# ---- a file of questions ----


@functools.cache
def asked(i: int, **options) -> str:
    """The answer to a line of LINES by itself."""
    clips = LINES[i].get("audio", [])
    clips = [clips] if isinstance(clips, str) else clips
    paths = [TINY / Path(clip).name for clip in clips]
    options = {"max_new_tokens": 80, "temperature": 0} | options
    return tiny().ask(paths, LINES[i].get("prompt", "Describe this audio."), **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the sounds and in.jsonl, the manifest of LINES."""
    (tmp_path / "clips").mkdir()
    for name in ("bell.wav", "telephone.wav", "cards.wav", "clips/whistle.wav"):
        shutil.copyfile(TINY / Path(name).name, tmp_path / name)
    write_manifest(tmp_path, LINES)
    return tmp_path


def write_manifest(folder: Path, lines: list) -> None:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def arguments(folder: Path, *options) -> list[str]:
    files = ["--manifest", folder / "in.jsonl", "--out", folder / "out.jsonl"]
    usual = ["--device", "cpu", "--max-new-tokens", "80"]
    return [str(word) for word in [*files, *usual, *options]]


def answered(folder: Path, *options) -> bytes:
    """What a run leaves that has to succeed; greedy, unless the options say otherwise."""
    assert batch.main(arguments(folder, *(options or ["--greedy"]))) == 0
    assert list(folder.glob("out.jsonl.*")) == [folder / "out.jsonl.run"]
    return (folder / "out.jsonl").read_bytes()


def begin(folder: Path, *options) -> None:
    """Leaves what a greedy run leaves that is killed before its first answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch.MossAudio, "from_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch.main(arguments(folder, "--greedy", *options))


def lines_of(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def parsed(data: bytes) -> list[dict]:
    return [json.loads(line) for line in lines_of(data)]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_answers_are_those_of_one_by_one_in_the_manifests_order_for_any_batch(folder, size):
    answers = parsed(answered(folder, "--greedy", "--batch", size))
    assert [answer["id"] for answer in answers] == IDS
    assert "nowhere.wav: No such file" in answers.pop(3)["error"]
    assert [answer["text"] for answer in answers] == [asked(i) for i in (0, 1, 2, 4, 5, 6)]


def test_line_n_draws_with_the_seed_plus_n_whatever_its_batch_and_where_the_run_began(folder):
    sampled = ["--temperature", "1.5", "--seed", "40"]
    alone = lines_of(answered(folder, *sampled, "--batch", "1"))
    expected = [asked(i, temperature=1.5, seed=41 + i) for i in range(3)]
    assert [answer["text"] for answer in parsed(b"".join(alone[:3]))] == expected
    assert expected[0] != asked(0, temperature=1.5, seed=42)  # it does draw
    (folder / "out.jsonl").write_bytes(alone[0] + alone[4])
    assert answered(folder, *sampled, "--batch", "3") == b"".join(alone)


def test_the_shared_options_reach_the_model(folder, refused):
    write_manifest(folder, [LINES[2]])
    no_adapter = arguments(folder, "--lora", folder)
    assert "adapter_config.json" in refused(batch.main, *no_adapter, progress=str(folder))
    # So hot that draws are nearly even, and turn on whether there are markers.
    options = ["--temperature", "3", "--seed", "42", "--no-time-markers", "--max-new-tokens", "20"]
    (answer,) = parsed(answered(folder, *options))
    hot = {"temperature": 3, "seed": 43, "max_new_tokens": 20}
    assert answer["text"] == asked(2, time_markers=False, **hot)
    assert answer["text"] != asked(2, **hot)


def test_progress_says_how_many_are_answered_and_the_time_left(folder, capsys):
    begin(folder)
    (folder / "out.jsonl").write_text('{"id": 3, "text": ""}\n')
    capsys.readouterr()
    answered(folder)
    first, loading, line, last = capsys.readouterr().err.splitlines()
    assert "1 of 7 lines are answered, 6 are for this process" in first
    assert re.fullmatch(r"answered 6 of 6, .*0:00:00 left", line)
    assert "7 of 7 lines are answered, 1 with an error" in last


# ---- resuming ----


def test_when_all_is_answered_nothing_is_loaded_or_written(folder, monkeypatch):
    whole = answered(folder)
    monkeypatch.delattr(batch.MossAudio, "from_pretrained")
    monkeypatch.delattr(batch.os, "replace")
    assert answered(folder) == whole


def test_a_batch_is_on_disk_before_the_next_begins(folder, monkeypatch):
    on_disk = []

    def look(*_):
        on_disk.append(len(lines_of((folder / "out.jsonl").read_bytes())))

    monkeypatch.setattr(batch.Progress, "at", look)
    answered(folder, "--greedy", "--batch", "3")
    assert on_disk == [3, 6, 7]


def test_ids_of_any_characters_are_found_again(folder, monkeypatch):
    ids = ["", "1", 1, -1, 2**70, " a\u2028\r\n", '"\\', "\ud800", "\x00"]
    write_manifest(folder, [{"prompt": "When?", "id": one} for one in ids])
    whole = answered(folder, "--greedy", "--max-new-tokens", "1")
    assert [answer["id"] for answer in parsed(whole)] == ids
    monkeypatch.delattr(batch.MossAudio, "from_pretrained")
    assert answered(folder, "--greedy", "--max-new-tokens", "1") == whole


def test_answers_and_parts_of_killed_runs_stay_byte_for_byte_and_only_the_others_are_made(folder):
    lines = lines_of(answered(folder))
    lines[1] = b'{"text":"my  own \\u00e9",   "id":"w", "by": "hand"}\n'
    another, lines[4] = lines[4], b'{"id": 5, "text": "as it was"}\n'
    (folder / "out.jsonl").write_bytes(lines[4])
    (folder / "out.jsonl.part-0").write_bytes(lines[6] + lines[0])
    (folder / "out.jsonl.part-1").write_bytes(lines[1] + lines[3][:9])  # half a line
    (folder / "out.jsonl.part-12").write_bytes(another)  # the first answer to a line counts
    (folder / "out.jsonl.part").mkdir()  # killed while it merged
    (folder / "out.jsonl.part" / "out.jsonl").write_bytes(another[:20])
    assert answered(folder) == b"".join(lines)


ANOTHER = {
    "max_new_tokens": ["--greedy", "--max-new-tokens", "5"],
    "temperature": ["--temperature", "0.5"],
    "seed": ["--greedy", "--seed", "5"],
    "time_markers": ["--greedy", "--no-time-markers"],
    "dtype": ["--greedy", "--dtype", "bfloat16"],
    "model": ["--greedy", "--model", str(GOLDEN / "checkpoint")],
    "lora": ["--greedy", "--lora", str(GOLDEN / "training" / "lora")],
}


@pytest.mark.parametrize("other", ANOTHER)
def test_answers_of_another_run_are_refused_and_left_alone(other, folder, refused):
    begin(folder)
    (folder / "out.jsonl").write_text('{"id": 3, "text": "as it was"}\n')
    before = {path: path.read_bytes() for path in folder.glob("out*")}
    line = refused(batch.main, *arguments(folder, *ANOTHER[other]))
    said = f"its answers have another {other}; expected the same run, or another --out"
    assert line.endswith(said)
    assert {path: path.read_bytes() for path in folder.glob("out*")} == before


def test_a_model_of_other_weights_is_another_though_its_shapes_are_the_same(folder, refused):
    shutil.copytree(TINY, folder / "tiny")
    begin(folder, "--model", folder / "tiny")
    (folder / "out.jsonl").write_text('{"id": 3, "text": ""}\n')
    path = folder / "tiny" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[500_000] ^= 1
    path.write_bytes(data)
    options = arguments(folder, "--greedy", "--model", folder / "tiny")
    assert "another model;" in refused(batch.main, *options)


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{}", '{"lines": []}', "{" * 10**5, "\x00", "{}\n"]
)
def test_answers_of_nobody_knows_what_are_refused(text, folder, refused):
    (folder / "out.jsonl").write_text('{"id": 3, "text": ""}\n')
    if text is not None:
        (folder / "out.jsonl.run").write_text(text)
    line = refused(batch.main, *arguments(folder, "--greedy"))
    assert "out.jsonl.run" in line and line.endswith("expected the same run, or another --out")


def test_a_line_that_has_changed_is_answered_again_and_no_other(folder):
    begin(folder)
    old = [{"id": name, "text": "as it was"} for name in IDS]
    text = "".join(json.dumps(answer) + "\n" for answer in old)
    (folder / "out.jsonl").write_text(text)
    lines = [*LINES[:1], LINES[1] | {"prompt": "When?"}, *LINES[2:5], LINES[5] | {"audio": "no"}]
    write_manifest(folder, [*lines, {"prompt": "New"}, LINES[6]])
    answers = parsed(answered(folder))
    assert [answer.pop("id") for answer in answers] == [*IDS[:6], 7, IDS[6]]
    again = [answer != {"text": "as it was"} for answer in answers]
    assert again == [False, True, False, False, False, True, True, False]


def test_with_a_seed_a_line_that_has_moved_draws_anew(folder):
    write_manifest(folder, [LINES[1], LINES[5]])
    seeded = ["--seed", "40", "--max-new-tokens", "3"]
    answered(folder, *seeded)
    write_manifest(folder, [LINES[5], LINES[1]])
    moved = answered(folder, *seeded)
    (folder / "out.jsonl").unlink()
    assert answered(folder, *seeded) == moved


def test_the_answers_may_be_a_link_but_no_pipe(folder, refused):
    (folder / "elsewhere").mkdir()
    (folder / "out.jsonl").symlink_to(folder / "elsewhere" / "out.jsonl")
    write_manifest(folder, LINES[3:4])
    assert batch.main(arguments(folder, "--greedy")) == 0
    assert (folder / "out.jsonl").is_symlink()
    assert len(lines_of((folder / "elsewhere" / "out.jsonl").read_bytes())) == 1
    (folder / "out.jsonl").unlink()
    os.mkfifo(folder / "out.jsonl")
    line = refused(batch.main, *arguments(folder, "--greedy"))
    assert "out.jsonl is not an ordinary file" in line


# ---- errors, and what is refused ----


def test_a_line_that_fails_is_an_error_until_it_is_retried(folder):
    long = "seven " * tiny().config.decoder.max_position_embeddings
    bad = [{"audio": "in.jsonl"}, {"audio": "."}, {"audio": "\0"}, {"prompt": long}, LINES[3]]
    write_manifest(folder, [LINES[4], *bad, LINES[0]])
    first = lines_of(answered(folder))
    failed = ["error" in answer for answer in parsed(b"".join(first))]
    assert failed == [False, *[True] * 5, False]
    shutil.copyfile(TINY / "whistle.wav", folder / "nowhere.wav")
    assert answered(folder) == b"".join(first)
    again = lines_of(answered(folder, "--greedy", "--retry-errors"))
    assert parsed(again.pop(5)) == [{"id": "gone", "text": asked(1)}]
    assert again == first[:5] + first[6:]


def fail(monkeypatch, fault: Exception) -> None:
    """Makes generating fail for LINES[2], the prompt of two clips."""
    generate_rows = batch.generate_rows

    def failing(model, prompts, *rest):
        if any(len(prompt.mels) == 2 for prompt in prompts):
            raise fault
        return generate_rows(model, prompts, *rest)

    monkeypatch.setattr(batch, "generate_rows", failing)


def test_a_bug_ends_the_run_and_is_no_answer(folder, monkeypatch):
    fail(monkeypatch, TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        batch.main(arguments(folder, "--greedy", "--batch", "1"))
    assert [answer["id"] for answer in parsed((folder / "out.jsonl").read_bytes())] == IDS[:2]


def test_no_memory_ends_the_run_of_a_batch_and_is_the_error_of_a_line(folder, monkeypatch, capsys):
    fail(monkeypatch, torch.OutOfMemoryError("no room"))
    assert batch.main(arguments(folder, "--greedy", "--batch", "3")) == 2
    assert "batch: a smaller --batch takes less: no room" in capsys.readouterr().err
    answers = parsed(answered(folder, "--greedy", "--batch", "1"))
    assert answers[2] == {"id": 3, "error": "no room"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("in", '\n[]\n{"prompt": "b"}\n"a"', "2 bad lines: line 2: expected a JSON object"),
        ("in", '{"audio": [], "id": 1}', "line 1: expected audio, a prompt or both"),
        ("in", '{"audio": ["a", ["b"]]}', "line 1: audio is ['a', ['b']]; expected"),
        ("in", '{"audio": "a", "prompt": ["b"]}', "line 1: prompt is ['b']; expected a string"),
        ("in", '{"prompt": "a", "id": true}', "line 1: id is True; expected a string or whole"),
        ("in", '{"prompt": "a", "id": 2}\n{"prompt": "b"}', "line 2: id 2 is given twice"),
        ("in", "\n\n", "no lines; expected at least one"),
        ("out", '{"id": "w", "text": ""}\n{"id": 2, "text": ""}\n', "line 2: id 2 is not in"),
        ("out", '{"id": true, "text": ""}\n', "line 1: id True is not in the manifest"),
        ("out", '{"id": "w", "text": "", "error": ""}\n', "line 1 is no"),
        ("out", '{"id": "w", "te\n{"id": 1, "text": ""}\n', "line 1 is no"),
        ("out", "RIFF\0 a sound", "line 1 is no"),
        ("out", '{"audio": "the manifest"}', "line 1 is no"),
    ],
)
def test_a_bad_file_is_refused_at_once_and_left_alone(folder, name, text, said, refused):
    path = folder / f"{name}.jsonl"
    path.write_text(text)
    line = refused(batch.main, *arguments(folder, "--model", "nowhere"))
    assert line.startswith(f"batch: {path}: ")
    assert said in line
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--manifest", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--out", "nowhere/out.jsonl"], "nowhere is no folder"),
        (["--batch", "0"], "--batch is 0; expected a whole number from 1 up"),
        (["--seed", str(2**64 - 3)], f"seed is {2**64 + 4}"),  # the last line's
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(folder, options, said, refused):
    assert said in refused(batch.main, *arguments(folder, "--model", "nowhere", *options))
    assert not (folder / "out.jsonl").exists()


# ---- several processes ----


def test_a_part_that_is_not_found_at_the_end_is_no_success(folder, monkeypatch, capsys):
    monkeypatch.setattr(batch, "answer_all", lambda *_: None)
    assert batch.main(arguments(folder)) == 2
    assert "a part is missing" in capsys.readouterr().err


def test_each_process_has_its_own_gpu_unless_another_device_is_named(monkeypatch):
    names = ["auto", "cuda", "cuda:0", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [batch.own_device(name) for name in names] == names
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [batch.own_device(name) for name in names] == ["cuda:3", "cuda:3", "cuda:0", "cpu"]


def start_torchrun(processes: int, script: Path, *argv) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={processes}", script, *argv]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent / "tools")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def torchrun(processes: int, script: Path, *argv) -> subprocess.CompletedProcess:
    process = start_torchrun(processes, script, *argv)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


KILLED = """
import os, signal, sys
import batch
answer_batch = batch.answer_batch

def killed(model, lines, *rest):
    if 6 in lines:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer_batch(model, lines, *rest)

batch.answer_batch = killed
sys.exit(batch.main())
"""


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_the_run_resumed_by_three(folder):
    write_manifest(folder, [LINES[0], LINES[2], LINES[4]] * 3)
    whole = lines_of(answered(folder))
    (folder / "out.jsonl").unlink()
    (folder / "killed.py").write_text(KILLED)
    options = arguments(folder, "--greedy", "--batch", "1")
    run = torchrun(2, folder / "killed.py", *options)
    assert run.returncode != 0
    assert "SIGKILL" in run.stderr
    # The second process has every other line: 2, 4, 6.
    assert (folder / "out.jsonl.part-1").read_bytes() == whole[1] + whole[3]
    whole[1] = b'{"id": 2, "text": "not made again"}\n'
    (folder / "out.jsonl.part-1").write_bytes(whole[1] + whole[3])
    run = torchrun(3, HERE.parent / "tools" / "batch.py", *options)
    assert run.returncode == 0, run.stderr
    assert (folder / "out.jsonl").read_bytes() == b"".join(whole)
    assert list(folder.glob("out.jsonl.*")) == [folder / "out.jsonl.run"]
    assert run.stderr.count("loading") == 1  # one of them tells


WAITING = """
import os, sys, time
from pathlib import Path
import batch

def answer_batch(model, lines, args, report):
    Path(args.manifest.parent, f"pid-{os.getpid()}").touch()
    if report:  # the first process answers for long, and the other waits for it
        time.sleep(600)
    return []

batch.answer_batch = answer_batch
sys.exit(batch.main())
"""


def is_alive(process: str) -> bool:
    """Whether a process is there, and not only because nobody has asked how it ended."""
    path = Path("/proc", process, "stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@needs_proc
@pytest.mark.slow
def test_when_torchrun_is_killed_its_processes_end(folder):
    (folder / "waiting.py").write_text(WAITING)
    launcher = start_torchrun(2, folder / "waiting.py", *arguments(folder, "--greedy"))
    wait_until(lambda: len(list(folder.glob("pid-*"))) == 2, 200)
    launcher.kill()
    workers = [path.name.removeprefix("pid-") for path in folder.glob("pid-*")]
    wait_until(lambda: not any(is_alive(worker) for worker in workers), 30)
