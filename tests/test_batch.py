"""tools/batch.py: prompts together, and files of them, however shared out, killed and resumed."""

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

import batch
from conftest import GOLDEN, HERE, edit_json, golden_model, golden_prompt
from moss_min import MossAudio, Prompt
from sample import Sampling

TINY = HERE.parent / "tiny"
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


def one_by_one(model: MossAudio, prompts: list[Prompt], seed=None, **options) -> dict:
    answers = {}
    for i, prompt in enumerate(prompts):
        own = None if seed is None else seed + i
        answers[i] = list(model.generate(prompt, seed=own, **options))
    return answers


OPTIONS = [
    {"temperature": 0},
    {"seed": 7},
    {"seed": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
    {"temperature": 0, "thinking_budget": 0},
    {"temperature": 0, "max_new_tokens": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_gives_each_prompt_the_ids_that_it_has_alone(options):
    model = golden_model()
    prompts = golden_prompts()
    options = {"max_new_tokens": 40} | options
    together = dict(batch.generate_batch(model, prompts, **options))
    assert together == one_by_one(model, prompts, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_captured_steps_of_a_batch_give_the_plain_steps_ids(options):
    model = MossAudio.from_pretrained(GOLDEN / "checkpoint", "cuda", "float32")
    prompts = golden_prompts()
    options = {"max_new_tokens": 32} | options
    plain = one_by_one(model, prompts, cuda_graph=False, **options)
    assert dict(batch.generate_batch(model, prompts, **options)) == plain


def test_answers_of_a_batch_come_as_they_end():
    model = golden_model()
    prompts = golden_prompts()
    lengths = [5, 2, 9, 1, 7]
    samplings = [Sampling(length, temperature=0) for length in lengths]
    ended = list(batch.generate_rows(model, prompts, samplings))
    assert [i for i, _ in ended] == [3, 1, 0, 4, 2]
    for i, ids in ended:
        assert ids == list(model.generate(prompts[i], lengths[i], temperature=0))


def test_an_empty_batch_gives_nothing():
    assert list(batch.generate_batch(golden_model(), [])) == []


@pytest.mark.parametrize("seed", [True, 1.5, "7"])
def test_a_batch_refuses_what_generate_refuses_at_the_call(seed):
    with pytest.raises(ValueError, match="seed is .*; expected"):
        batch.generate_batch(golden_model(), golden_prompts(), seed=seed)


def test_a_row_of_a_batch_ends_at_the_models_last_position(checkpoint):
    prompts = golden_prompts()[1:3]
    most = {"language_config.max_position_embeddings": len(prompts[1].ids) + 3}
    edit_json(checkpoint / "config.json", **most)
    model = MossAudio.from_pretrained(checkpoint, "cpu")
    answers = dict(batch.generate_batch(model, prompts, 20, temperature=0))
    assert len(answers[0]) == 20
    assert len(answers[1]) == 3


# ---- a file of questions ----


@functools.cache
def tiny() -> MossAudio:
    return MossAudio.from_pretrained(TINY, device="cpu", dtype="float32")


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
    assert list(folder.glob("out.jsonl.*")) == []
    return (folder / "out.jsonl").read_bytes()


def lines_of(data: bytes) -> list[bytes]:
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


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


def test_the_shared_options_reach_the_model(folder, capsys):
    write_manifest(folder, [LINES[2]])
    assert batch.main(arguments(folder, "--lora", folder)) == 2
    assert "adapter_config.json" in capsys.readouterr().err
    # So hot that draws are nearly even, and turn on whether there are markers.
    options = ["--temperature", "3", "--seed", "42", "--no-time-markers", "--max-new-tokens", "20"]
    (answer,) = parsed(answered(folder, *options))
    hot = {"temperature": 3, "seed": 43, "max_new_tokens": 20}
    assert answer["text"] == asked(2, time_markers=False, **hot)
    assert answer["text"] != asked(2, **hot)


def test_progress_says_how_many_are_answered_and_the_time_left(folder, capsys):
    (folder / "out.jsonl").write_text('{"id": 3, "text": ""}\n')
    answered(folder)
    first, loading, line, last = capsys.readouterr().err.splitlines()
    assert "1 of 7 lines are answered, 6 are for this process" in first
    assert re.fullmatch(r"answered 6 of 6, .*0:00:00 left", line)
    assert "7 of 7 lines are answered, 1 with an error" in last


# ---- resuming ----


def test_answers_that_are_there_stay_byte_for_byte_and_only_the_others_are_made(folder):
    lines = lines_of(answered(folder))
    lines[1] = b'{"text":"my  own \\u00e9",   "id":"w", "by": "hand"}\n'
    (folder / "out.jsonl").write_bytes(lines[1] + lines[5])
    assert answered(folder) == b"".join(lines)


def test_when_all_is_answered_nothing_is_loaded_or_written(folder, monkeypatch):
    whole = answered(folder)
    before = (folder / "out.jsonl").stat()
    monkeypatch.delattr(batch.MossAudio, "from_pretrained")
    assert answered(folder) == whole
    assert (folder / "out.jsonl").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.slow
def test_half_a_line_at_the_end_is_done_again(folder):
    write_manifest(folder, [LINES[5], LINES[6]])
    whole = answered(folder)
    second = whole.index(b"\n") + 1
    character = whole.index("卡".encode())
    cuts = [0, second - 1, second + 1, second + 9, character + 1, len(whole) - 2, len(whole) - 1]
    for cut in cuts:
        (folder / "out.jsonl").write_bytes(whole[:cut])
        assert answered(folder) == whole, cut


@pytest.mark.slow
def test_a_run_that_is_stopped_loses_the_batch_in_hand_alone(folder, monkeypatch):
    whole = lines_of(answered(folder))
    (folder / "out.jsonl").unlink()
    answer_batch = batch.answer_batch

    def stop(model, lines, *rest):
        if 5 in lines:
            raise KeyboardInterrupt
        return answer_batch(model, lines, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(batch, "answer_batch", stop)
        assert batch.main(arguments(folder, "--greedy", "--batch", "2")) == 130
    assert (folder / "out.jsonl").read_bytes() == b"".join(whole[:4])
    assert answered(folder) == b"".join(whole)


def test_ids_of_any_characters_are_found_again(folder):
    ids = ["", "1", 1, -1, 2**70, " a\u2028\r\n", '"\\', "\ud800", "\x00"]
    write_manifest(folder, [{"prompt": "When?", "id": one} for one in ids])
    whole = answered(folder, "--greedy", "--max-new-tokens", "1")
    assert [answer["id"] for answer in parsed(whole)] == ids
    assert answered(folder, "--greedy", "--max-new-tokens", "2") == whole


# ---- errors ----


def test_a_clip_that_fails_is_an_error_until_it_is_retried(folder):
    soundfile.write(folder / "short.wav", [0.0] * 80, 16_000)
    (folder / "text.wav").write_text("no sound")
    long = "seven " * tiny().config.decoder.max_position_embeddings
    clips = [{"audio": name} for name in ("short.wav", "text.wav", ".", "\0")]
    write_manifest(folder, [LINES[4], *clips, {"prompt": long}, LINES[3], LINES[0]])
    first = lines_of(answered(folder))
    failed = ["error" in answer for answer in parsed(b"".join(first))]
    assert failed == [False, *[True] * 6, False]
    shutil.copyfile(TINY / "whistle.wav", folder / "nowhere.wav")
    assert answered(folder) == b"".join(first)
    again = lines_of(answered(folder, "--greedy", "--retry-errors"))
    assert parsed(again.pop(6)) == [{"id": "gone", "text": asked(1)}]
    assert again == first[:6] + first[7:]


def test_a_prompt_that_leaves_no_position_for_an_answer_is_an_error_of_its_line_alone(folder):
    most = len(tiny().prompt(STAMPED, TINY / "bell.wav").ids)
    model = shutil.copytree(TINY, folder / "model")
    edit_json(model / "config.json", **{"language_config.max_position_embeddings": most})
    write_manifest(folder, [LINES[0], LINES[5]])
    first, second = parsed(answered(folder, "--greedy", "--model", model))
    assert f"{most} tokens" in first["error"]
    assert second["text"]


@pytest.fixture
def fails(monkeypatch):
    """Makes generating fail for LINES[2], the prompt of two clips."""
    generate_rows = batch.generate_rows

    def with_fault(fault: Exception) -> None:
        def failing(model, prompts, *rest):
            if any(len(prompt.mels) == 2 for prompt in prompts):
                raise fault
            return generate_rows(model, prompts, *rest)

        monkeypatch.setattr(batch, "generate_rows", failing)

    return with_fault


def test_a_bug_ends_the_run_and_is_no_answer(folder, fails):
    fails(TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        batch.main(arguments(folder, "--greedy", "--batch", "1"))
    assert [answer["id"] for answer in parsed((folder / "out.jsonl").read_bytes())] == IDS[:2]


def test_no_memory_for_a_batch_ends_the_run_and_for_one_line_is_its_error(folder, fails, capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    fails(caught.value)
    assert batch.main(arguments(folder, "--greedy", "--batch", "3")) == 2
    said = f"batch: a smaller --batch takes less: {caught.value}"
    assert " ".join(said.split())[:380] in capsys.readouterr().err
    answers = parsed(answered(folder, "--greedy", "--batch", "1"))
    assert [i for i, answer in enumerate(answers) if "error" in answer] == [2, 3]
    assert answers[2]["error"] == str(caught.value)


# ---- what is refused ----


def refused(folder: Path, capsys, *options) -> str:
    """The one line with which a run ends."""
    assert batch.main(arguments(folder, *options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"', "1 bad lines: line 2: expected a JSON object"),
        ('\n[]\n{"prompt": "b"}\n"a"', "2 bad lines: line 2: expected a JSON object"),
        ('{"audio": [], "id": 1}', "line 1: expected audio, a prompt or both"),
        ('{"audio": ["a", ["b"]]}', "line 1: audio is ['a', ['b']]; expected"),
        ('{"audio": "a", "prompt": ["b"]}', "line 1: prompt is ['b']; expected a string"),
        ('{"audio": "a", "id": true}', "line 1: id is True; expected a string or whole number"),
        ('{"prompt": "a", "id": 2}\n{"prompt": "b"}', "line 2: id 2 is given twice"),
        ("\n\n", "no lines"),
    ],
)
def test_a_bad_manifest_is_refused_before_anything_is_loaded(folder, text, said, capsys):
    (folder / "in.jsonl").write_text(text)
    line = refused(folder, capsys, "--model", folder / "no model")
    assert line.startswith(f"batch: {folder / 'in.jsonl'}: ")
    assert said in line
    assert not (folder / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--manifest", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--out", "nowhere/out.jsonl"], "nowhere is no folder"),
        (["--batch", "0"], "--batch is 0; expected a whole number from 1 up"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--seed", str(2**64 - 3)], f"seed is {2**64 + 4}"),  # the last line's
        (["--sort"], "--sort"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(folder, options, said, capsys):
    assert said in refused(folder, capsys, "--model", folder / "no model", *options)
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
        (b'{"id": "w", "text": "", "error": ""}\n', "line 1 is no"),
        # Half a line, but not at the end.
        (b'{"id": "w", "te\n{"id": 1, "text": ""}\n', "line 1 is no"),
        (b"RIFF\x00\x01 a sound", "line 1 is no"),
        (b'{"audio": "the manifest"}', "line 1 is no"),
    ],
)
def test_an_out_file_of_anything_but_answers_is_refused_and_left_alone(folder, data, said, capsys):
    (folder / "out.jsonl").write_bytes(data)
    line = refused(folder, capsys)
    assert line.startswith(f"batch: {folder / 'out.jsonl'}: ")
    assert said in line
    assert (folder / "out.jsonl").read_bytes() == data


# ---- several processes ----


def test_parts_of_any_number_of_killed_processes_are_merged_before_a_run_begins(folder):
    lines = lines_of(answered(folder))
    own = [b'{"id": "w", "text": "as it was"}\n', b'{"id": 5, "text": "as it was"}\n']
    (folder / "out.jsonl").write_bytes(own[1])
    (folder / "out.jsonl.part-0").write_bytes(lines[6] + lines[0])
    (folder / "out.jsonl.part-1").write_bytes(own[0] + lines[3][:9])  # half a line
    (folder / "out.jsonl.part-12").write_bytes(lines[4])  # answered already: the first counts
    (folder / "out.jsonl.new").write_bytes(lines[4][:20])  # killed while it merged
    lines[1] = own[0]
    lines[4] = own[1]
    assert answered(folder) == b"".join(lines)


def test_a_part_that_is_not_found_at_the_end_is_no_success(folder, monkeypatch, capsys):
    monkeypatch.setattr(batch, "answer_all", lambda *_: None)
    assert batch.main(arguments(folder)) == 2
    said = capsys.readouterr().err
    assert "0 of 7 lines are answered" in said
    assert "a part is missing" in said


def test_each_process_has_its_own_gpu_unless_another_device_is_named(monkeypatch):
    names = ["auto", "cuda", "cuda:0", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [batch.own_device(name) for name in names] == names
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [batch.own_device(name) for name in names] == ["cuda:3", "cuda:3", "cuda:0", "cpu"]


def torchrun(processes: int, script: Path, *argv) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={processes}", script, *argv]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent / "tools")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


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
    assert list(folder.glob("out.jsonl.*")) == []
    assert run.stderr.count("loading") == 1  # one of them tells
