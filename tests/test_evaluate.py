"""tools/evaluate.py: measures against numbers worked out by hand, its files, a model run by it."""

import functools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import common
import evaluate
from common import Example
from conftest import (
    FOLDER,
    GOLDEN,
    HERE,
    JFK,
    data_line,
    edit_json,
    golden_model,
    message,
    write_clip,
)
from encoder import load_audio
from evaluate import align, edit_distance, main, score, split_words, stamped_words

CLIP = "<|audio_bos|><|AUDIO|><|audio_eos|>"
PLAIN = "Transcribe the audio."
STAMPED = "Transcribe the audio with timestamps."
QUESTION = 'When is "seven" said?'
MODEL = ("--model", FOLDER, "--device", "cpu", "--max-new-tokens", "8")
NOTHING = {"n": 0, "wer": None, "cer": None, "aas_ms": None, "matched": None, "accuracy": None}


def scored(*pairs, question=False) -> dict:
    """The measures over lines of (reference, answer)."""
    lines = {i: Example(PLAIN, [], pair[0], question) for i, pair in enumerate(pairs)}
    answers = {i: pair[1] for i, pair in enumerate(pairs)}
    return score(lines, answers)["all"]


# ---- measures ----

STAMPED_WORDS = "[0.00]one[1.00][1.00]two[2.00][2.00]three[3.00]"
SEGMENT = "[0.00]go forward three meters[2.00]"
CUT = "[0.10]go[0.50][0.50]forward[1.00][1.00]three[1.50][1.50]meters[2.30]"
TURN = "[0.48]turn[0.80][0.80]left[1.12]"
TWICE = "[0.00]five[0.40][1.00]five[1.40]"
# What is measured, in words: lines of (reference, answer), and measures worked out by hand.
MEASURED = {
    # A substitution in four words, an insertion to one word; not the mean of 1/4 and 1/1.
    "all edits over all words": ([("a b c d", "a b x d"), ("go", "no go")], {"wer": 2 / 5}),
    "a rate may pass 1": ([("go", "a b c")], {"wer": 3}),
    # "turn left" has 9 characters, of which one is wrong; "go", 2, is missing.
    "all characters": ([("turn  left.", "Turn lift!"), ("go", "")], {"cer": 3 / 11}),
    "spaces are characters": ([("turn left", "turnleft")], {"cer": 1 / 9}),
    "stamps are no words": ([(TURN, "turn left"), ("turn left", TURN)], {"wer": 0, "cer": 0}),
    "thoughts are not said": ([("go", "<think>\nstop or go\n</think>\n\ngo")], {"wer": 0}),
    # 100 and 100; 10 and 30, a word missed, 20 and 60.
    "one mean over all lines": (
        [
            ("[0.00]go[0.50]", "[0.10]go[0.60]"),
            (STAMPED_WORDS, "[0.01]one[1.03][1.00]too[2.00][2.02]three[3.06]"),
        ],
        {"aas_ms": 320 / 6, "matched": 3 / 4},
    ),
    "a reference without stamps": ([("turn left", TURN)], {"aas_ms": None, "matched": None}),
    "an answer without stamps": ([("[0.00]go[0.50]", "go")], {"aas_ms": None, "matched": 0}),
    # go starts 100 ms, meters ends 300 ms off: all times that both sides have.
    "an answer cut finer": ([(SEGMENT, CUT)], {"aas_ms": 400 / 2, "matched": 1}),
    "a reference cut finer": ([(CUT, SEGMENT)], {"aas_ms": 400 / 2, "matched": 1}),
    "a word of a segment": ([(SEGMENT, "[0.10]go forward free meters[2.30]")], {"matched": 3 / 4}),
    "a start without an end": ([("[0.50]go", "[0.70]go[0.90]")], {"aas_ms": 200, "matched": 1}),
    "a word before": ([("well [0.0]go[0.5]", "well [0.1]go[0.5]")], {"aas_ms": 50, "matched": 1}),
    "the second of two missed": ([(TWICE, "[0.01]five[0.41]")], {"aas_ms": 10, "matched": 1 / 2}),
    "the first of two missed": ([(TWICE, "[1.01]five[1.41]")], {"aas_ms": 10, "matched": 1 / 2}),
    # Two substitutions, or a deletion, a match of "one" and an insertion.
    "the most matches of as few edits": (
        [("[0.00]one[0.40][0.40]two[0.80]", "[0.00]two[0.40][0.40]one[0.80]")],
        {"wer": 1, "aas_ms": 400, "matched": 1 / 2},
    ),
    # The fewest edits pair the second "go": the first was missed, however near its time is.
    "no match out of the alignment": (
        [("[0.00]go[0.50][0.50]stop[1.00][1.00]go[1.50]", "[0.00]stop[0.50][0.50]go[0.90]")],
        {"aas_ms": (500 + 500 + 500 + 600) / 4, "matched": 2 / 3},
    ),
}


@pytest.mark.parametrize("case", MEASURED)
def test_measures_are_those_worked_out_by_hand(case):
    pairs, wanted = MEASURED[case]
    measures = scored(*pairs)
    assert {name: measures[name] for name in wanted} == pytest.approx(wanted)
    assert measures["n"] == len(pairs)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Turn LEFT, please!", ["turn", "left", "please"]),
        (TURN, ["turn", "left"]),
        ("twenty-one… “five”", ["twenty", "one", "five"]),
        ("don't don’t", ["dont", "dont"]),
        ("2.1 seconds. 3.", ["2.1", "seconds", "3"]),
        ("E\u0301te\u0301 \u00e9t\u00e9", ["\u00e9t\u00e9", "\u00e9t\u00e9"]),  # composed and not
        ("हिन्दी，你好。", ["हिन्दी", "你好"]),  # vowel signs are no punctuation
        ("[laughs] [7]", ["laughs", "7"]),  # no stamps: those have a point
        (" ... ", []),
    ],
)
def test_words_are_in_lower_case_without_stamps_and_punctuation(text, words):
    assert split_words(evaluate.STAMP.sub(" ", text)) == words


@functools.cache
def slow_distance(a: str, b: str) -> int:
    """The edit distance by its definition."""
    if a == "" or b == "":
        return len(a + b)
    substituted = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1, substituted)


def test_edit_distance_is_that_of_its_recursive_definition():
    draw = random.Random(0)
    for _ in range(300):
        a, b = ("".join(draw.choices("abc", k=draw.randrange(9))) for _ in range(2))
        wanted = slow_distance(a, b)
        assert edit_distance(a, b) == wanted
        assert align(stamped_words(" ".join(a)), stamped_words(" ".join(b))).edits == wanted


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("A bell.", "a  bell", 1),
        ("A bell.", "a bell rings", 0),
        ("At 2.1 seconds.", "At 2.2 seconds.", 0),
        ("[0.48]seven[0.80]", "[0.48]seven[0.80]", 1),
        ("[0.48]seven[0.80]", "[0.48]seven[0.81]", 0),
        ("[0.48]", "seven", 0),
    ],
)
def test_accuracy_is_the_share_of_questions_with_the_same_words_and_times(reference, answer, right):
    measures = scored((reference, answer), ("Yes.", "yes"), question=True)
    assert measures == NOTHING | {"n": 2, "accuracy": (right + 1) / 2}


LINES = {
    1: Example(PLAIN, [Path("a.wav")], "turn left", False),
    2: Example(QUESTION, [Path("a.wav")], "At 2.1 seconds.", True),
    3: Example(PLAIN, [Path("b.wav")], "go", False),
    5: Example(STAMPED, [Path("b.wav")], "[0.00]go[0.50]", False),
}
ANSWERS = {1: "turn right", 2: "At 2.1 seconds.", 5: "[0.10]go[0.50]"}  # none to 3
# Characters: from left to right 4 edits, the missing "go" 2, of 9 + 2; the last line has 2 more.
TIMED = {"aas_ms": 50.0, "matched": 1.0}
SCORES = {
    "all": {"n": 4, "wer": 2 / 4, "cer": 6 / 13, **TIMED, "accuracy": 1.0},
    "prompts": {
        PLAIN: NOTHING | {"n": 2, "wer": 2 / 3, "cer": 6 / 11},
        QUESTION: NOTHING | {"n": 1, "accuracy": 1.0},
        STAMPED: NOTHING | {"n": 1, "wer": 0.0, "cer": 0.0, **TIMED},
    },
}


def test_groups_are_the_prompts_and_a_missing_answer_counts_as_empty():
    scores = score(LINES, ANSWERS)
    assert scores == SCORES
    assert list(scores["prompts"]) == [PLAIN, QUESTION, STAMPED]  # as the data has them


# ---- files ----


def line_of(example: Example) -> dict:
    more = {"task": "question"} if example.question else {}
    return data_line(example.clips, example.prompt, example.answer, **more)


def write_lines(path: Path, *lines) -> Path:
    """A JSONL file; lines that are strings are written as they are."""
    texts = [line if type(line) is str else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8", errors="surrogateescape")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """LINES in a file, line 4 of which is empty; the sounds are not there."""
    lines = [line_of(LINES[i]) if i in LINES else "" for i in range(1, 6)]
    return write_lines(tmp_path / "test.jsonl", *lines)


@pytest.fixture
def answers(tmp_path) -> Path:
    lines = [{"id": number, "text": text} for number, text in ANSWERS.items()]
    return write_lines(tmp_path / "answers.jsonl", *reversed(lines))  # in any order


def said(capfd, *argv) -> str:
    """stdout of a command line that has to succeed."""
    assert main([*map(str, argv)]) == 0
    return capfd.readouterr().out


def test_the_table_has_a_row_for_each_prompt_and_a_dash_for_what_no_line_has(data, answers, capfd):
    out = said(capfd, "--data", data, "--answers", answers)
    assert [line.rsplit(maxsplit=6) for line in out.splitlines()] == [
        ["prompt", "n", "wer", "cer", "aas_ms", "matched", "accuracy"],
        [PLAIN, "2", "66.7%", "54.5%", "-", "-", "-"],
        [QUESTION, "1", "-", "-", "-", "-", "100.0%"],
        [STAMPED, "1", "0.0%", "0.0%", "50.0", "100.0%", "-"],
        ["all", "4", "50.0%", "46.2%", "50.0", "100.0%", "100.0%"],
    ]
    assert len({len(line) for line in out.splitlines()}) == 1  # columns stand under each other


def test_a_line_ends_at_a_newline_alone(tmp_path, capfd):
    # U+2028 and U+0085 are allowed in a JSON string, and are line ends to str.splitlines.
    line = Example("Transcribe\u2028the\u0085audio.", [Path("a.wav")], "go", False)
    data = write_lines(tmp_path / "test.jsonl", line_of(line), line_of(line))
    answers = write_lines(tmp_path / "answers.jsonl", {"id": 2, "text": "go"})
    scores = json.loads(said(capfd, "--data", data, "--answers", answers, "--json"))
    assert scores["all"] == NOTHING | {"n": 2, "wer": 0.5, "cer": 0.5}


GOOD = line_of(LINES[1])
AUDIO, TEXT, ANSWER = GOOD["conversation"]
BAD_LINES = {
    "not JSON": '{"conversation": [',
    "nested too deep": "[" * 100_000,
    "not UTF-8": '{"text": "\udcff"}',  # surrogateescape: the byte FF
    "no object": [1],
    "a message without content": {"conversation": [AUDIO, TEXT, {"role": "user"}]},
    "content of another type": {"conversation": [AUDIO, TEXT, message("assistant", "text", 5)]},
    "no audio": {"conversation": [TEXT, ANSWER]},
    "no prompt": {"conversation": [AUDIO, ANSWER]},
    "an empty prompt": {"conversation": [AUDIO, message("user", "text", " "), ANSWER]},
    "two prompts": {"conversation": [AUDIO, TEXT, TEXT, ANSWER]},
    "no answer": {"conversation": [AUDIO, TEXT]},
    "an empty answer": {"conversation": [AUDIO, TEXT, message("assistant", "text", " ")]},
    "a system message": {"conversation": [message("system", "text", "Hi."), AUDIO, TEXT, ANSWER]},
    "another task": GOOD | {"task": "Question"},
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_data_line_is_named_by_its_number(bad, tmp_path, answers, refused):
    data = write_lines(tmp_path / "bad.jsonl", GOOD, "", bad, GOOD, GOOD)
    assert f"{data}: 1 bad lines: line 3: " in refused(main, "--data", data, "--answers", answers)


OF_NO_LINE = [{"id": number, "text": ""} for number in (0, 4, 6, True, "1", None)]
BAD_ANSWERS = [*OF_NO_LINE, {"id": 1}, {"id": 1, "text": None}, {"id": 5, "text": "again"}, [], "{"]


@pytest.mark.parametrize("bad", BAD_ANSWERS, ids=repr)
def test_a_bad_answer_is_named_by_its_line(bad, tmp_path, data, refused):
    answers = write_lines(tmp_path / "bad.jsonl", {"id": 5, "text": "go"}, bad)
    assert f"{answers}: 1 bad lines: line 2: " in refused(
        main, "--data", data, "--answers", answers
    )


def test_files_that_are_not_there_or_empty_are_named(tmp_path, data, answers, refused):
    absent = tmp_path / "absent.jsonl"
    empty = write_lines(tmp_path / "empty.jsonl")
    assert str(absent) in refused(main, "--data", absent, "--answers", answers)
    assert str(absent) in refused(main, "--data", data, "--answers", absent)
    assert str(empty) in refused(main, "--data", empty, "--answers", answers)
    assert str(tmp_path) in refused(main, "--data", tmp_path, "--answers", answers)


def test_arguments_that_make_no_sense_are_refused(data, answers, refused):
    assert "not both" in refused(main, "--data", data, "--answers", answers, *MODEL)
    assert "max_new_tokens is 0" in refused(main, "--data", data, *MODEL, "--max-new-tokens", 0)
    assert "--data" in refused(main, "--answers", answers)


# ---- a model ----


def ask(model, folder: Path, clips, prompt: str) -> str:
    return model.ask([folder / clip for clip in clips], prompt, temperature=0, max_new_tokens=8)


@pytest.fixture
def sounds(tmp_path) -> Path:
    """A folder with a sound and three lines: one has two clips, one is a question."""
    (tmp_path / "sounds").mkdir()
    write_clip(tmp_path / "sounds" / "short.wav", load_audio(JFK)[:32_000])
    short = Path("sounds/short.wav")
    lines = (
        Example("Transcribe.", [short], "ask not", False),
        Example("Compare.", [JFK, short], "what", False),
        Example("Which?", [short], ask(golden_model(), tmp_path, [short], "Which?"), True),
    )
    write_lines(tmp_path / "test.jsonl", *map(line_of, lines))
    return tmp_path


@pytest.mark.parametrize("lora", [None, GOLDEN / "training" / "lora"])
def test_a_model_is_scored_on_its_greedy_answers_to_the_sounds_beside_the_data(lora, sounds, capfd):
    change = evaluate.lora_change(lora, FOLDER)
    model = evaluate.MossAudio.from_pretrained(FOLDER, "cpu", change=change)
    lines = evaluate.read_data(sounds / "test.jsonl", need_sound=True)
    texts = {i: ask(model, sounds, line.clips, line.prompt) for i, line in lines.items()}
    assert len(set(texts.values())) == 3  # the clips and prompts matter
    options = ["--lora", str(lora)] if lora else []
    data = str(sounds / "test.jsonl")
    assert main(["--data", data, *map(str, MODEL), "--json", *options]) == 0
    out, err = capfd.readouterr()
    scores = json.loads(out)
    assert scores == score(lines, texts)
    assert "checked 3 of 3, 0:00:00 left\nanswered 3 of 3, 0:00:00 left\n" in err
    assert scores["all"]["accuracy"] == (0 if lora else 1)


def test_progress_tells_the_time_left_at_most_every_five_seconds(monkeypatch, capfd):
    seconds = iter([0, 4, 6, 10, 14, 20])  # the start, and when each of five is done
    monkeypatch.setattr(common.time, "monotonic", lambda: next(seconds))
    progress = common.Progress("answered", 5)
    for done in range(1, 6):
        progress.at(done)
    assert capfd.readouterr().err.splitlines() == [
        "answered 2 of 5, 0:00:09 left",
        "answered 4 of 5, 0:00:04 left",
        "answered 5 of 5, 0:00:00 left",
    ]


MISSING = {
    "not there": data_line(["sounds/none.wav"], "Which?", "yes"),
    "a folder": data_line(["sounds"], "Which?", "yes"),
    "no possible name": data_line(["long" * 999], "Which?", "yes"),
}
UNFIT = {
    "no sound": data_line(["test.jsonl"], "Which?", "yes"),
    "no Unicode": data_line(["sounds/short.wav"], "\ud800", "yes"),
    "placeholders": data_line(["sounds/short.wav"], CLIP * 2, "yes"),
}


@pytest.mark.parametrize("kind", [*MISSING, *UNFIT])
def test_a_bad_line_is_named_before_the_first_is_run(kind, sounds, refused, monkeypatch):
    with open(sounds / "test.jsonl", "a") as file:
        file.write(json.dumps((MISSING | UNFIT)[kind]))
    model = evaluate.MossAudio
    monkeypatch.setattr(model, "ask", lambda *_, **__: pytest.fail("a line was run"))
    if kind in MISSING:
        monkeypatch.setattr(model, "from_pretrained", lambda *_: pytest.fail("it was loaded"))
    assert "1 bad lines: line 4: " in refused(main, "--data", sounds / "test.jsonl", *MODEL)


def test_a_context_that_cuts_answers_is_not_told_for_every_line(sounds, checkpoint, capfd, recwarn):
    edit_json(checkpoint / "config.json", **{"language_config.max_position_embeddings": 300})
    said(capfd, "--data", sounds / "test.jsonl", "--model", checkpoint, "--device", "cpu")
    assert recwarn.list == []


def test_a_clip_without_room_for_an_answer_is_named(sounds, checkpoint, refused, monkeypatch):
    _, longest, _ = evaluate.read_data(sounds / "test.jsonl", need_sound=True).values()
    positions = len(golden_model().prompt(longest.prompt, longest.clips).ids)
    edit_json(checkpoint / "config.json", **{"language_config.max_position_embeddings": positions})
    monkeypatch.setattr(evaluate.MossAudio, "ask", lambda *_, **__: pytest.fail("a line was run"))
    line = refused(main, "--data", sounds / "test.jsonl", *MODEL, "--model", checkpoint)
    assert "1 bad lines: line 2: " in line and str(positions) in line


def test_the_file_scores_answers_from_any_folder_without_model_and_sounds(data, answers, tmp_path):
    tool = HERE.parent / "tools" / "evaluate.py"
    command = sys.executable, tool, "--data", data.name, "--answers", answers.name, "--json"
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, json.loads(run.stdout), run.stderr) == (0, SCORES, "")
