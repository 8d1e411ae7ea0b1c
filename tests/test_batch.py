"""tools/batch.py: answers about many clips, however they are batched, shared out, killed and resumed."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from conftest import HERE, edit_json
from moss_min import MossAudio

TINY = HERE.parent / "tiny"
TOOL = HERE.parent / "tools" / "batch.py"
sys.path.insert(0, str(TOOL.parent))
import batch  # noqa: E402

PLAIN, STAMPED = "Transcribe the audio.", "Transcribe the audio with timestamps."
LINES = [  # answers of 3 to 60 tokens; two clips, text alone, a clip in a folder and one that is not there
    {"audio": "bell.wav", "prompt": STAMPED},
    {"audio": "clips/whistle.wav", "prompt": PLAIN, "id": "w"},
    {"audio": ["telephone.wav", "cards.wav"], "prompt": PLAIN},
    {"audio": "nowhere.wav", "prompt": PLAIN, "id": "gone"},
    {"audio": "telephone.wav"},
    {"prompt": "When?", "id": 60},
    {"audio": "cards.wav", "prompt": STAMPED, "id": "卡片\n"},
]
IDS = [1, "w", 3, "gone", 5, 60, "卡片\n"]


@functools.cache
def tiny() -> MossAudio:
    return MossAudio.from_pretrained(TINY, device="cpu", dtype="float32")


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
    files = "--manifest", folder / "in.jsonl", "--out", folder / "out.jsonl"
    return [*map(str, files), "--device", "cpu", "--max-new-tokens", "80", *map(str, options)]


def answered(folder: Path, *options) -> bytes:
    """What a run that has to succeed leaves; greedy, unless the options say otherwise."""
    assert batch.main(arguments(folder, *(options or ["--greedy"]))) == 0
    assert not [path.name for path in folder.iterdir() if path.name.startswith("out.jsonl.")]
    return (folder / "out.jsonl").read_bytes()


def parsed(data: bytes) -> list[dict]:
    return [json.loads(line) for line in data.decode().splitlines()]


@functools.cache
def asked(i: int, **options) -> str:
    """The answer to a line of LINES by itself."""
    clips = LINES[i].get("audio", [])
    clips = [TINY / Path(clip).name for clip in ([clips] if isinstance(clips, str) else clips)]
    options = {"max_new_tokens": 80, "temperature": 0} | options
    return tiny().ask(clips, LINES[i].get("prompt", "Describe this audio."), **options)


# ---- the answers ----


@pytest.mark.parametrize("size", [1, 2, 7])
def test_answers_are_those_of_one_by_one_in_the_manifests_order_for_any_batch(folder, size):
    answers = parsed(answered(folder, "--greedy", "--batch", size))
    assert [answer["id"] for answer in answers] == IDS
    for i, answer in enumerate(answers):
        assert (
            "error" in answer
            if answer["id"] == "gone"
            else answer == {"id": IDS[i], "text": asked(i)}
        )


def test_line_n_draws_with_the_seed_plus_n_whatever_its_batch_and_where_the_run_began(folder):
    sampled = "--temperature", "1.5", "--seed", "40"
    alone = answered(folder, *sampled, "--batch", "1").splitlines(keepends=True)
    expected = [asked(i, temperature=1.5, seed=41 + i) for i in range(3)]
    assert [answer["text"] for answer in parsed(b"".join(alone[:3]))] == expected
    assert expected[0] != asked(0, temperature=1.5, seed=42)  # it does draw
    (folder / "out.jsonl").write_bytes(b"".join(alone[:1] + alone[4:5]))
    assert answered(folder, *sampled, "--batch", "3") == b"".join(alone)


def test_the_shared_options_reach_the_model(folder, capsys):
    write_manifest(folder, [LINES[2]])
    assert batch.main(arguments(folder, "--lora", folder)) == 2
    assert "adapter_config.json" in capsys.readouterr().err
    # hot: what is clearly heard is said with markers or without, but draws that are nearly even turn on them
    options = "--temperature", "3", "--seed", "42", "--no-time-markers", "--max-new-tokens", "20"
    (answer,) = parsed(answered(folder, *options))
    sampled = functools.partial(asked, 2, temperature=3, seed=43)
    assert answer["text"] == sampled(time_markers=False, max_new_tokens=20)
    assert answer["text"] not in (sampled(max_new_tokens=20), sampled(time_markers=False))


def test_progress_has_how_many_of_how_many_the_rate_and_the_time_left(folder, capsys):
    (folder / "out.jsonl").write_text('{"id": 3, "text": ""}\n')
    answered(folder)
    first, _, line, last = capsys.readouterr().err.splitlines()  # the second: loading
    assert "1 of 7 lines are answered, 6 are for this process" in first
    assert re.fullmatch(r"answered 6 of 6, \d+\.\d\d a second, 0:00:00 left", line)
    assert "7 of 7 lines are answered, 1 with an error" in last


# ---- resuming ----


def test_answers_that_are_there_stay_byte_for_byte_and_only_the_others_are_made(folder):
    lines = answered(folder).splitlines(keepends=True)
    lines[1] = b'{"text":"my  own \\u00e9",   "id":"w", "by": "hand"}\n'
    (folder / "out.jsonl").write_bytes(lines[1] + lines[5])
    assert answered(folder) == b"".join(lines)


def test_when_all_is_answered_nothing_is_loaded_or_written(folder, monkeypatch):
    whole = answered(folder)
    before = (folder / "out.jsonl").stat()
    monkeypatch.delattr(batch.MossAudio, "from_pretrained")
    assert answered(folder) == whole
    assert (folder / "out.jsonl").stat().st_mtime_ns == before.st_mtime_ns


def test_half_a_line_at_the_end_is_done_again(folder):
    write_manifest(folder, [LINES[5], LINES[6]])
    whole = answered(folder)
    last, character = whole.index(b"\n") + 1, whole.index("卡".encode())
    for cut in (
        0,
        last - 1,
        last + 1,
        last + 9,
        character + 1,
        character + 2,
        len(whole) - 2,
        len(whole) - 1,
    ):
        (folder / "out.jsonl").write_bytes(whole[:cut])
        assert answered(folder) == whole, cut


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_is_stopped_loses_the_batch_in_hand_alone(folder, size, monkeypatch):
    write_manifest(folder, [LINES[1], LINES[4], LINES[0], LINES[5]])
    whole = answered(folder)
    (folder / "out.jsonl").unlink()
    calls, generate_batch = [], MossAudio.generate_batch

    def stopped(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate_batch(*args, **options)

    monkeypatch.setattr(MossAudio, "generate_batch", stopped)
    assert batch.main(arguments(folder, "--greedy", "--batch", size)) == 130
    assert (folder / "out.jsonl").read_bytes() == b"".join(whole.splitlines(keepends=True)[:size])
    assert answered(folder) == whole


def test_ids_of_any_characters_are_found_again(folder):
    ids = ["", "1", 1, -1, 2**70, " a\u2028\r\n", '"\\', "\ud800", "\x00"]
    write_manifest(folder, [{"prompt": "When?", "id": one} for one in ids])
    whole = answered(folder, "--greedy", "--max-new-tokens", "1")
    assert [json.loads(line)["id"] for line in whole.split(b"\n")[:-1]] == ids
    assert answered(folder, "--greedy", "--max-new-tokens", "2") == whole


# ---- errors ----


def test_a_clip_that_fails_is_an_error_until_it_is_retried(folder):
    long = "seven " * tiny().config.decoder.max_position_embeddings
    soundfile.write(folder / "short.wav", [0.0] * 80, 16_000)
    (folder / "text.wav").write_text("no sound")
    bad = [
        {"audio": "short.wav"},
        {"audio": "text.wav"},
        {"audio": "."},
        {"audio": "\0"},
        {"prompt": long},
    ]
    write_manifest(folder, [LINES[0], *bad, LINES[3], LINES[4]])
    first = answered(folder)
    assert [{*answer} for answer in parsed(first)] == [
        {"id", "text"},
        *[{"id", "error"}] * 6,
        {"id", "text"},
    ]
    assert "nowhere.wav: No such file" in parsed(first)[6]["error"]
    shutil.copyfile(TINY / "whistle.wav", folder / "nowhere.wav")
    assert answered(folder) == first
    again = first.splitlines(keepends=True)
    again[6] = json.dumps({"id": "gone", "text": asked(1)}).encode() + b"\n"
    assert answered(folder, "--greedy", "--retry-errors") == b"".join(again)


def test_a_prompt_that_leaves_no_position_for_an_answer_is_an_error_of_its_line_alone(folder):
    most = len(tiny().prompt(STAMPED, TINY / "bell.wav").ids)
    model = shutil.copytree(TINY, folder / "model")
    edit_json(model / "config.json", **{"language_config.max_position_embeddings": most})
    write_manifest(folder, [LINES[0], LINES[5]])
    first, second = parsed(answered(folder, "--greedy", "--model", model))
    assert f"{most} tokens" in first["error"] and second["text"]


@pytest.fixture
def fails(monkeypatch):
    """Makes generate_batch fail for LINES[2], the prompt of two clips."""
    generate_batch = MossAudio.generate_batch

    def with_fault(fault: Exception) -> None:
        def failing(*args, **options):
            if any(len(prompt.mels) == 2 for prompt in args[1]):
                raise fault
            return generate_batch(*args, **options)

        monkeypatch.setattr(MossAudio, "generate_batch", failing)

    return with_fault


def test_a_bug_ends_the_run_and_is_no_answer(folder, fails):
    fails(TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        batch.main(arguments(folder, "--greedy", "--batch", "1"))
    assert [answer["id"] for answer in parsed((folder / "out.jsonl").read_bytes())] == IDS[:2]


@pytest.mark.parametrize("cpu", [False, True])
def test_no_memory_for_a_batch_ends_the_run_and_for_one_line_is_its_error(
    folder, fails, capsys, cpu
):
    fault = torch.OutOfMemoryError("all 80 GiB")
    if cpu:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**60, dtype=torch.uint8)
        fault = caught.value
    fails(fault)
    assert batch.main(arguments(folder, "--greedy", "--batch", "3")) == 2
    assert f"batch: a smaller --batch takes less: {fault}"[:380] in capsys.readouterr().err
    answers = parsed(answered(folder, "--greedy", "--batch", "1"))
    assert [answer["id"] for answer in answers] == IDS
    assert [i for i, answer in enumerate(answers) if "error" in answer] == [2, 3]
    assert answers[2]["error"] == str(fault)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"', "1 bad lines: line 2: expected a JSON object"),
        ('\n[]\n{"prompt": "b"}\n"a"', "2 bad lines: line 2: expected a JSON object"),
        ("{}", "line 1: expected audio, a prompt or both"),
        ('{"audio": [], "id": 1}', "line 1: expected audio, a prompt or both"),
        ('{"audio": 1}', "line 1: audio is 1; expected a path or a list of paths"),
        ('{"audio": ["a", ["b"]]}', "line 1: audio is ['a', ['b']]; expected"),
        ('{"audio": "a", "prompt": ["b"]}', "line 1: prompt is ['b']; expected a string"),
        ('{"audio": "a", "id": 1.0}', "line 1: id is 1.0; expected a string or whole number"),
        ('{"audio": "a", "id": true}', "line 1: id is True; expected a string or whole number"),
        (
            '{"prompt": "a", "id": "x"}\n\n{"prompt": "b", "id": "x"}',
            "line 3: id 'x' is given twice",
        ),
        ('{"prompt": "a", "id": 2}\n{"prompt": "b"}', "line 2: id 2 is given twice"),
        ("\n\n", "no lines"),
    ],
)
def test_a_bad_manifest_is_refused_with_the_lines_number_before_anything_is_loaded(
    folder, text, said, capsys
):
    (folder / "in.jsonl").write_text(text)
    assert batch.main(arguments(folder, "--model", folder / "no model")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batch: {folder / 'in.jsonl'}: ") and said in line
    assert not (folder / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--manifest", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--out", "nowhere/out.jsonl"], "nowhere is no folder"),
        (["--batch", "0"], "--batch is 0; expected a whole number from 1 up"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--seed", str(2**64 - 3)], f"seed is {2**64 + 4}"),  # the last line's
        (["--sort"], "--sort"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(folder, options, said, capsys):
    assert batch.main(arguments(folder, "--model", folder / "no model", *options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("batch: ") and said in line
    assert not (folder / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            b'{"id": "w", "text": ""}\n{"id": 2, "text": ""}\n',
            "line 2: id 2 is not in the manifest",
        ),
        (b'{"id": true, "text": ""}\n', "line 1: id True is not in the manifest"),
        (b'{"id": ["w"], "text": ""}\n', "line 1: id ['w'] is not in the manifest"),
        (b'{"id": "w"}\n', "line 1 is no"),
        (b'{"id": "w", "text": "", "error": ""}\n', "line 1 is no"),
        (
            b'{"id": "w", "te\n{"id": 1, "text": ""}\n',
            "line 1 is no",
        ),  # half a line, but not at the end
        (b"RIFF\x00\x01 a sound", "line 1 is no"),
        (json.dumps(LINES[0]).encode(), "line 1 is no"),  # the manifest
    ],
)
def test_an_out_file_of_anything_but_answers_to_the_manifest_is_refused_and_left_alone(
    folder, data, said, capsys
):
    (folder / "out.jsonl").write_bytes(data)
    assert batch.main(arguments(folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batch: {folder / 'out.jsonl'}: ") and said in line
    assert (folder / "out.jsonl").read_bytes() == data


# ---- several processes ----


def test_parts_of_any_number_of_killed_processes_are_merged_before_a_run_begins(folder):
    lines = answered(folder).splitlines(keepends=True)
    was = [f'{{"id": {name}, "text": "as it was"}}\n'.encode() for name in ('"w"', 5)]
    (folder / "out.jsonl").write_bytes(was[1])
    (folder / "out.jsonl.part-0").write_bytes(lines[6] + lines[0])
    (folder / "out.jsonl.part-1").write_bytes(was[0] + lines[3][:9])  # half a line
    (folder / "out.jsonl.part-12").write_bytes(
        lines[4]
    )  # of a line that is answered already: the first answer counts
    (folder / "out.jsonl.new").write_bytes(lines[4][:20])  # killed while it merged
    lines[1], lines[4] = was
    assert answered(folder) == b"".join(lines)


def test_a_part_that_is_not_found_at_the_end_is_no_success(folder, monkeypatch, capsys):
    monkeypatch.setattr(batch, "answer_all", lambda *_: None)
    assert batch.main(arguments(folder)) == 2
    assert (
        "0 of 7 lines are answered" in (err := capsys.readouterr().err)
        and "a part is missing" in err
    )


def torchrun(processes: int, script: Path, *argv) -> subprocess.CompletedProcess:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, script, *argv], capture_output=True, text=True, env=environment, timeout=120
    )


KILLED = """import os, signal, sys
sys.path.insert(0, {tools!r})
import batch

class Model(batch.MossAudio):
    batches = 0

    def generate_batch(self, *args, **options):
        Model.batches += 1
        if os.environ["RANK"] == "1" and Model.batches == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate_batch(*args, **options)

batch.MossAudio = Model
sys.exit(batch.main())
"""


def test_one_of_two_processes_is_killed_and_the_run_resumed_by_three(folder):
    write_manifest(folder, lines := [line for line in LINES if "id" not in line] * 3)
    whole = answered(folder)
    assert [answer["id"] for answer in parsed(whole)] == [*range(1, len(lines) + 1)]
    (folder / "out.jsonl").unlink()
    (folder / "killed.py").write_text(KILLED.format(tools=str(TOOL.parent)))
    run = torchrun(2, folder / "killed.py", *arguments(folder, "--greedy", "--batch", "1"))
    assert run.returncode != 0 and "SIGKILL" in run.stderr
    every = whole.splitlines(keepends=True)
    assert (folder / "out.jsonl.part-1").read_bytes() == every[1] + every[3]
    mine = b'{"id": 2, "text": "not made again"}\n'
    (folder / "out.jsonl.part-1").write_bytes(mine + every[3])
    run = torchrun(3, TOOL, *arguments(folder, "--greedy"))
    assert run.returncode == 0, run.stderr
    assert (folder / "out.jsonl").read_bytes() == b"".join([every[0], mine, *every[2:]])
    assert not [path.name for path in folder.iterdir() if path.name.startswith("out.jsonl.")]
    assert run.stderr.count("loading") == 1  # one of them tells


def test_each_process_has_its_own_gpu_unless_another_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert batch.own_device("auto") == "auto"
    monkeypatch.setenv("LOCAL_RANK", "3")
    names = "auto", "cuda", "cuda:0", "cpu"
    assert [batch.own_device(name) for name in names] == ["cuda:3", "cuda:3", "cuda:0", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert batch.own_device("auto") == "auto"
