"""tools/evaluate.py: each measure against numbers worked out by hand, the files it reads, and a model run by it."""

import functools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from conftest import GOLDEN, HERE, JFK, edit_json, golden_model

TOOL = HERE.parent / "tools" / "evaluate.py"
sys.path.insert(0, str(TOOL.parent))
import evaluate  # noqa: E402
from evaluate import Line, align, edit_distance, main, score, split_words, stamped_words  # noqa: E402

PLAIN, STAMPED, QUESTION = (
    "Transcribe the audio.",
    "Transcribe the audio with timestamps.",
    'When is "seven" said?',
)
MODEL = "--model", GOLDEN / "checkpoint", "--device", "cpu", "--max-new-tokens", "8"
NOTHING = {"n": 0, "wer": None, "cer": None, "aas_ms": None, "matched": None, "accuracy": None}


def scored(*pairs, question=False) -> dict:
    """The measures over lines of (reference, answer)."""
    lines = {i: Line(PLAIN, [], reference, question) for i, (reference, _) in enumerate(pairs, 1)}
    return score(lines, {i: answer for i, (_, answer) in enumerate(pairs, 1)})["all"]


# ---- words and characters ----


def test_word_error_rate_is_all_edits_over_all_reference_words():
    # one substitution in four words, one insertion to one word: 2 of 5 (the mean of 1/4 and 1/1 would be 0.625)
    pairs = ("turn left ninety degrees", "turn left nineteen degrees"), ("go", "no go")
    assert scored(*pairs)["wer"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("reference", "answer", "edits"),
    [
        ("turn left ninety degrees", "turn left ninety degrees", 0),
        ("turn left ninety degrees", "turn ninety degrees", 1),
        ("turn left ninety degrees", "", 4),
        ("turn left ninety degrees", "left ninety degrees stop", 2),
        ("turn left ninety degrees", "a b c d e f", 6),  # 150%: a rate may pass 1
    ],
)
def test_insertions_deletions_and_substitutions_count_one_each(reference, answer, edits):
    assert scored((reference, answer))["wer"] == pytest.approx(edits / 4)


def test_character_error_rate_is_all_edits_over_all_reference_characters_spaces_included():
    # "turn left" has 9 characters, of which one is wrong; "go", 2, is missing
    assert scored(("turn  left.", "Turn lift!"), ("go", ""))["cer"] == pytest.approx(3 / 11)
    assert scored(("turn left", "turnleft"))["cer"] == pytest.approx(1 / 9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Turn LEFT, please!", ["turn", "left", "please"]),
        ("[0.48]turn[0.80][0.80]left[1.12]", ["turn", "left"]),
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


def test_stamps_do_not_count_for_error_rates_on_either_side():
    stamped, plain = "[0.48]turn[0.80][0.80]left[1.12]", "turn left"
    measures = scored((stamped, plain), (plain, stamped))
    assert (measures["wer"], measures["cer"]) == (0, 0)


def test_a_thought_is_no_part_of_an_answer():
    assert scored(("go", "<think>\nstop or go\n</think>\n\ngo"))["wer"] == 0
    assert scored(("go", "<think>\ngo"))["wer"] == 1  # cut off while thinking: nothing was said


def slow_distance(a, b) -> int:
    """The edit distance by its definition."""

    @functools.cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]),
        )

    return distance(len(a), len(b))


def test_edit_distance_is_that_of_its_recursive_definition():
    draw = random.Random(0)
    for _ in range(300):
        a, b = (draw.choices("abc", k=draw.randrange(9)) for _ in range(2))
        assert (
            edit_distance(a, b)
            == slow_distance(a, b)
            == align(*(stamped_words(" ".join(x)) for x in (a, b)))[0]
        )


# ---- times ----


def test_aas_is_one_mean_over_starts_and_ends_of_matched_words():
    # turn: 20 and 0 ms; left: 40 and 100 ms off. Their mean is 40
    pair = "[0.48]turn[0.80][0.80]left[1.12]", "[0.50]turn[0.80][0.84]left[1.22]"
    assert scored(pair)["aas_ms"] == pytest.approx(40)
    assert scored(pair)["matched"] == 1


def test_aas_is_one_mean_over_all_lines_and_matched_their_share():
    first = "[0.00]go[0.50]", "[0.10]go[0.60]"  # 100, 100
    second = (
        "[0.00]one[1.00][1.00]two[2.00][2.00]three[3.00]",
        "[0.01]one[1.03][1.00]too[2.00][2.02]three[3.06]",
    )
    measures = scored(first, second)  # 10, 30; a word missed; 20, 60
    assert measures["aas_ms"] == pytest.approx((100 + 100 + 10 + 30 + 20 + 60) / 6)
    assert measures["matched"] == pytest.approx(3 / 4)


def test_lines_whose_reference_has_no_stamps_do_not_count_for_times():
    assert scored(("turn left", "[0.48]turn[0.80][0.80]left[1.12]")) == NOTHING | {
        "n": 1,
        "wer": 0,
        "cer": 0,
    }
    measures = scored(("[0.00]go[0.50]", "[0.10]go[0.60]"), ("turn left", "turn left"))
    assert (measures["aas_ms"], measures["matched"]) == (pytest.approx(100), 1)


def test_an_answer_without_stamps_matches_nothing_in_time():
    assert scored(("[0.00]go[0.50]", "go")) == NOTHING | {"n": 1, "wer": 0, "cer": 0, "matched": 0}


def test_a_segments_first_word_has_its_start_and_the_last_its_end_however_the_other_side_is_cut():
    segment = "[0.00]go forward three meters[2.00]"
    words = "[0.10]go[0.50][0.50]forward[1.00][1.00]three[1.50][1.50]meters[2.30]"
    for pair in (
        (segment, words),
        (words, segment),
    ):  # go starts 100 ms, meters ends 300 ms off: all that both have
        assert scored(pair)["aas_ms"] == pytest.approx(200)
        assert scored(pair)["matched"] == 1
    assert scored((segment, "[0.10]go forward free meters[2.30]"))["matched"] == pytest.approx(
        3 / 4
    )


def test_starts_alone_are_compared_where_ends_are_not_given():
    assert scored(("[0.50]go", "[0.70]go[0.90]"))["aas_ms"] == pytest.approx(200)


def test_words_before_the_first_stamp_have_no_times():
    words = [
        (word.text, word.start, word.end)
        for word in stamped_words("well [0.48]turn[0.80][0.80]left[1.12]")
    ]
    assert words == [("well", None, None), ("turn", 480, 800), ("left", 800, 1120)]
    assert scored(("well [0.00]go[0.50]", "well [0.10]go[0.60]"))["matched"] == 1


def test_of_two_equal_words_the_one_missed_is_that_which_leaves_the_smaller_shift():
    twice = "[0.00]five[0.40][1.00]five[1.40]"
    for answer in "[0.01]five[0.41]", "[1.01]five[1.41]":
        measures = scored((twice, answer))
        assert (measures["aas_ms"], measures["matched"]) == (pytest.approx(10), 0.5)


def test_of_alignments_with_as_few_edits_the_one_with_more_words_matched_counts():
    # two substitutions, or a deletion, a match of "one" and an insertion
    measures = scored(("[0.00]one[0.40][0.40]two[0.80]", "[0.00]two[0.40][0.40]one[0.80]"))
    assert (measures["wer"], measures["matched"], measures["aas_ms"]) == (
        1,
        0.5,
        pytest.approx(400),
    )


def test_equal_words_are_not_matched_out_of_the_alignment():
    # the alignment with the fewest edits pairs the second "go"s: the first was missed, however near its time is
    measures = scored(
        ("[0.00]go[0.50][0.50]stop[1.00][1.00]go[1.50]", "[0.00]stop[0.50][0.50]go[0.90]")
    )
    assert measures["matched"] == pytest.approx(2 / 3)
    assert measures["aas_ms"] == pytest.approx((500 + 500 + 500 + 600) / 4)


# ---- questions and groups ----


def test_accuracy_is_the_share_of_questions_with_the_references_words():
    pairs = (
        ("A bell.", "a  bell"),
        ("A bell.", "a whistle"),
        ("A bell.", "a bell rings"),
        ("Yes.", "yes"),
    )
    assert scored(*pairs, question=True) == NOTHING | {"n": 4, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("at 2.1 seconds", 1),
        ("At 2.1 seconds", 1),
        ("At 2.2 seconds.", 0),
        ("At 21 seconds.", 0),
        ("At 2.10 seconds.", 0),
        ("At 2 1 seconds.", 0),
    ],
)
def test_a_questions_time_has_to_be_equal(answer, right):
    assert scored(("At 2.1 seconds.", answer), question=True)["accuracy"] == right


def test_a_questions_time_has_to_be_equal_in_stamps_too():
    pairs = (
        ("[0.48]seven[0.80]", "[0.48]seven[0.80]"),
        ("[0.48]seven[0.80]", "[0.48]seven[0.81]"),
        ("[0.48]", "seven"),
    )
    assert scored(*pairs, question=True)["accuracy"] == pytest.approx(1 / 3)


LINES = {
    1: Line(PLAIN, [Path("a.wav")], "turn left", False),
    2: Line(QUESTION, [Path("a.wav")], "At 2.1 seconds.", True),
    3: Line(PLAIN, [Path("b.wav")], "go", False),
    5: Line(STAMPED, [Path("b.wav")], "[0.00]go[0.50]", False),
}
ANSWERS = {1: "turn right", 2: "At 2.1 seconds.", 5: "[0.10]go[0.50]"}  # none to 3
SCORES = {
    "all": {"n": 4, "wer": 2 / 4, "cer": 6 / 13, "aas_ms": 50.0, "matched": 1.0, "accuracy": 1.0},
    "prompts": {
        PLAIN: {
            "n": 2,
            "wer": 2 / 3,
            "cer": 6 / 11,
            "aas_ms": None,
            "matched": None,
            "accuracy": None,
        },
        QUESTION: {
            "n": 1,
            "wer": None,
            "cer": None,
            "aas_ms": None,
            "matched": None,
            "accuracy": 1.0,
        },
        STAMPED: {"n": 1, "wer": 0.0, "cer": 0.0, "aas_ms": 50.0, "matched": 1.0, "accuracy": None},
    },
}  # characters: from left to right 4 edits, and the missing "go" 2, of 9 + 2 and, with the last line, 2 more


def test_groups_are_the_prompts_and_a_missing_answer_counts_as_empty():
    scores = score(LINES, ANSWERS)
    assert scores == SCORES
    assert list(scores["prompts"]) == [PLAIN, QUESTION, STAMPED]  # as the data has them


# ---- files ----


def message(role: str, kind: str, content) -> dict:
    return {"role": role, "message_type": kind, "content": content}


def data_line(line: Line) -> dict:
    turns = [message("user", "audio", str(clip)) for clip in line.clips]
    turns += [message("user", "text", line.prompt), message("assistant", "text", line.answer)]
    return {"conversation": turns} | ({"task": "question"} if line.question else {})


def write_lines(path: Path, *lines) -> Path:
    """A JSONL file; lines that are strings are written as they are."""
    texts = [line if type(line) is str else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8", errors="surrogateescape")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """LINES in a file, line 4 of which is empty; the sounds are not there."""
    return write_lines(
        tmp_path / "test.jsonl", *(data_line(LINES[i]) if i in LINES else "" for i in range(1, 6))
    )


@pytest.fixture
def answers(tmp_path) -> Path:
    lines = [{"id": number, "text": text} for number, text in ANSWERS.items()]
    return write_lines(tmp_path / "answers.jsonl", *reversed(lines))  # in any order


@pytest.fixture
def said(capfd):
    """stdout and stderr of a command line that has to succeed."""

    def said(*argv) -> tuple[str, str]:
        assert main([*map(str, argv)]) == 0
        return capfd.readouterr()

    return said


@pytest.fixture
def complaint(capfd):
    """What the command line says, in one line after those on its progress, of arguments that it has to refuse."""

    def complaint(*argv) -> str:
        assert main([*map(str, argv)]) == 2
        out, err = capfd.readouterr()
        [line] = [
            line for line in err.splitlines() if not line.startswith(("loading ", "checked "))
        ]
        assert (
            out == ""
            and err.endswith(line + "\n")
            and line.startswith("evaluate: ")
            and len(line) < 400
        )
        return line

    return complaint


def test_answers_are_scored_without_model_and_sounds_and_json_has_exactly_these_keys(
    data, answers, said
):
    out, err = said("--data", data, "--answers", answers, "--json")
    assert json.loads(out) == SCORES
    assert err == ""


def test_the_table_has_a_row_for_each_prompt_and_a_dash_for_what_no_line_has(data, answers, said):
    out, _ = said("--data", data, "--answers", answers)
    assert [line.rsplit(maxsplit=6) for line in out.splitlines()] == [
        ["prompt", "n", "wer", "cer", "aas_ms", "matched", "accuracy"],
        [PLAIN, "2", "66.7%", "54.5%", "-", "-", "-"],
        [QUESTION, "1", "-", "-", "-", "-", "100.0%"],
        [STAMPED, "1", "0.0%", "0.0%", "50.0", "100.0%", "-"],
        ["all", "4", "50.0%", "46.2%", "50.0", "100.0%", "100.0%"],
    ]
    assert len({len(line) for line in out.splitlines()}) == 1  # columns stand under each other


def test_a_line_ends_at_a_newline_alone(tmp_path, said):
    # U+2028 and U+0085 are allowed in a JSON string, and are line ends to str.splitlines
    line = Line("Transcribe\u2028the\u0085audio.", [Path("a.wav")], "go", False)
    data = write_lines(tmp_path / "test.jsonl", data_line(line), data_line(line))
    answers = write_lines(tmp_path / "answers.jsonl", {"id": 2, "text": "go"})
    scores = json.loads(said("--data", data, "--answers", answers, "--json")[0])
    assert scores["all"] == NOTHING | {"n": 2, "wer": 0.5, "cer": 0.5}


GOOD = data_line(LINES[1])
AUDIO, TEXT, ANSWER = GOOD["conversation"]
BAD_LINES = {
    "not JSON": '{"conversation": [',
    "nested too deep": "[" * 100_000,
    "not UTF-8": '{"text": "\udcff"}',  # surrogateescape: the byte FF
    "no object": [1],
    "no conversation": {},
    "a conversation of no messages": {"conversation": ["hello"]},
    "a message without content": {
        "conversation": [AUDIO, TEXT, {"role": "assistant", "message_type": "text"}]
    },
    "content of another type": {"conversation": [AUDIO, TEXT, message("assistant", "text", 5)]},
    "no audio": {"conversation": [TEXT, ANSWER]},
    "no prompt": {"conversation": [AUDIO, ANSWER]},
    "two prompts": {"conversation": [AUDIO, TEXT, TEXT, ANSWER]},
    "no answer": {"conversation": [AUDIO, TEXT]},
    "an empty answer": {"conversation": [AUDIO, TEXT, message("assistant", "text", " ")]},
    "a system message": {
        "conversation": [message("system", "text", "Be brief."), AUDIO, TEXT, ANSWER]
    },
    "another task": GOOD | {"task": "Question"},
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_data_line_is_named_by_its_number(bad, tmp_path, answers, complaint):
    data = write_lines(tmp_path / "bad.jsonl", GOOD, "", bad, GOOD, GOOD)
    assert f"{data}: 1 bad lines: line 3: " in complaint("--data", data, "--answers", answers)


def test_all_bad_lines_are_counted(tmp_path, answers, complaint):
    data = write_lines(tmp_path / "bad.jsonl", {}, GOOD, "{", GOOD, [])
    line = complaint("--data", data, "--answers", answers)
    assert all(part in line for part in ("3 bad lines", "line 1: ", "line 3: ", "line 5: "))


@pytest.mark.parametrize(
    "bad",
    [
        {"id": 4, "text": "to an empty line"},
        {"id": 6, "text": ""},
        {"id": 0, "text": ""},
        {"id": True, "text": ""},
        {"id": "1", "text": ""},
        {"text": "go"},
        {"id": 1},
        {"id": 1, "text": None},
        {"id": 5, "text": "a second"},
        [],
        "{",
    ],
    ids=repr,
)
def test_a_bad_answer_is_named_by_its_line(bad, tmp_path, data, complaint):
    answers = write_lines(tmp_path / "bad.jsonl", {"id": 5, "text": "go"}, bad)
    assert f"{answers}: 1 bad lines: line 2: " in complaint("--data", data, "--answers", answers)


def test_files_that_are_not_there_or_empty_are_named(tmp_path, data, answers, complaint):
    absent, empty = tmp_path / "absent.jsonl", write_lines(tmp_path / "empty.jsonl")
    assert str(absent) in complaint("--data", absent, "--answers", answers)
    assert str(absent) in complaint("--data", data, "--answers", absent)
    assert str(empty) in complaint("--data", empty, "--answers", answers)
    assert str(tmp_path) in complaint("--data", tmp_path, "--answers", answers)


def test_arguments_that_make_no_sense_are_refused(data, answers, complaint):
    assert "not both" in complaint("--data", data, "--answers", answers, *MODEL)
    assert "max_new_tokens is 0" in complaint("--data", data, *MODEL, "--max-new-tokens", 0)
    assert "--data" in complaint("--answers", answers)


# ---- a model ----


@pytest.fixture
def sounds(tmp_path) -> Path:
    """A folder with a data file of three lines on sounds beside it, one with two clips and one a question."""
    (tmp_path / "sounds").mkdir()
    shutil.copy(JFK, tmp_path / "sounds" / "long.wav")
    samples, rate = soundfile.read(JFK, dtype="int16")
    soundfile.write(tmp_path / "sounds" / "short.wav", samples[: 2 * rate], rate)
    long, short = Path("sounds/long.wav"), Path("sounds/short.wav")
    lines = (
        Line("Transcribe.", [short], "ask not", False),
        Line("Compare.", [long, short], "what", False),
        Line("Which?", [short], ask(tmp_path, [short], "Which?"), True),
    )
    write_lines(tmp_path / "test.jsonl", *map(data_line, lines))
    return tmp_path


def ask(folder: Path, clips, prompt: str) -> str:
    return golden_model().ask(
        [folder / clip for clip in clips], prompt, temperature=0, max_new_tokens=8
    )


def test_a_model_is_scored_on_its_greedy_answers_to_the_sounds_beside_the_data(sounds, said):
    lines = evaluate.read_data(sounds / "test.jsonl", need_sound=True)
    texts = [{"id": i, "text": ask(sounds, line.clips, line.prompt)} for i, line in lines.items()]
    assert len({text["text"] for text in texts}) == 3  # the clips and prompts matter
    answers = write_lines(sounds / "answers.jsonl", *texts)
    wanted = json.loads(said("--data", sounds / "test.jsonl", "--answers", answers, "--json")[0])
    out, err = said("--data", sounds / "test.jsonl", *MODEL, "--json")
    assert json.loads(out) == wanted
    assert wanted["all"]["accuracy"] == 1
    assert {"checked 3 of 3, 0:00:00 left", "answered 3 of 3, 0:00:00 left"} <= set(
        err.splitlines()
    )


def test_progress_tells_the_time_left(monkeypatch, capfd):
    seconds = iter([0, 4, 6, 10, 14, 20])  # the start, and when each of five is done
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(seconds))
    assert list(evaluate.with_progress("abcde", "answered")) == list("abcde")
    # 6 s for two of five; the next line no sooner than 5 s later: 14 s for four of them
    assert capfd.readouterr().err.splitlines() == [
        "answered 2 of 5, 0:00:09 left",
        "answered 4 of 5, 0:00:04 left",
        "answered 5 of 5, 0:00:00 left",
    ]


def spoil(folder: Path, kind: str) -> None:
    """Spoils the sound of the last of the data file's lines."""
    path = folder / "sounds" / "third.wav"
    shutil.copy(folder / "sounds" / "short.wav", path)
    if kind == "not there":
        path.unlink()
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "no sound":
        path.write_bytes(b"RIFF")
    *lines, last = map(json.loads, (folder / "test.jsonl").read_text().splitlines())
    last["conversation"][0]["content"] = (
        "long" * 999 if kind == "no possible name" else "sounds/third.wav"
    )
    if kind == "no Unicode":
        last["conversation"][1]["content"] = "\ud800"
    if kind == "a placeholder too many":
        last["conversation"][1]["content"] = "<|audio_bos|><|AUDIO|><|audio_eos|>" * 2
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines, last)))


MISSING, UNFIT = (
    ["not there", "a folder", "no possible name"],
    ["no sound", "no Unicode", "a placeholder too many"],
)


@pytest.mark.parametrize("kind", MISSING + UNFIT)
def test_a_line_that_cannot_be_run_is_named_before_the_first_is(
    kind, sounds, complaint, monkeypatch
):
    spoil(sounds, kind)
    monkeypatch.setattr(evaluate.MossAudio, "ask", lambda *_, **__: pytest.fail("a line was run"))
    if kind in MISSING:
        monkeypatch.setattr(
            evaluate.MossAudio, "from_pretrained", lambda *_: pytest.fail("the model was loaded")
        )
    assert "1 bad lines: line 3: " in complaint("--data", sounds / "test.jsonl", *MODEL)


def test_a_context_that_cuts_answers_short_is_not_told_for_every_line(
    sounds, checkpoint, said, recwarn
):
    edit_json(checkpoint / "config.json", **{"language_config.max_position_embeddings": 300})
    said("--data", sounds / "test.jsonl", "--model", checkpoint, "--device", "cpu")
    assert recwarn.list == []


@pytest.mark.parametrize("free", [0, -1])
def test_a_clip_that_leaves_no_room_for_an_answer_is_named_before_any_is_run(
    free, sounds, checkpoint, complaint, monkeypatch
):
    _, longest, _ = evaluate.read_data(sounds / "test.jsonl", need_sound=True).values()
    positions = len(golden_model().prompt(longest.prompt, longest.clips).ids) + free
    edit_json(checkpoint / "config.json", **{"language_config.max_position_embeddings": positions})
    monkeypatch.setattr(evaluate.MossAudio, "ask", lambda *_, **__: pytest.fail("a line was run"))
    line = complaint("--data", sounds / "test.jsonl", "--model", checkpoint, "--device", "cpu")
    assert "1 bad lines: line 2: " in line and str(positions) in line


def test_the_file_runs_from_any_folder(data, answers, tmp_path):
    command = sys.executable, TOOL, "--data", data.name, "--answers", answers.name, "--json"
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, json.loads(run.stdout), run.stderr) == (0, SCORES, "")
