"""Scores transcripts and answers, those of a model or those in a file.

    python tools/evaluate.py --data test.jsonl --model FOLDER
    python tools/evaluate.py --data test.jsonl --answers answers.jsonl

The data is upstream's training format; a line may say "task": "question". Such lines count for
accuracy alone, the others for all else. An answers file has lines {"id": number of the data line
from 1, "text"}; a missing one counts as empty. A thought (<think> ... </think>) is no part of an
answer. What is computed, of a group of lines:

wer      the edit distances of all lines together over the words of all references. Words are in
         lower case, without stamps; punctuation parts them, but apostrophes vanish (don't, dont)
         and the point of a number stays (2.1).
cer      the same of characters, those of the words joined with single spaces.
aas_ms   of lines whose reference has stamps, [0.48]turn[0.80][0.80]left[1.12]: the mean of
         |start - start'| and |end - end'|, in milliseconds, over the words matched in the edit
         alignment. A text's times are the stamps right before and after it: the first word has
         its start, the last its end. A time that either side lacks is not counted. Of all shortest
         alignments it is the one with the most matched words, then times, then the least shift.
matched  the share of those references' stamped words that are matched with stamped words.
accuracy how many questions have the reference's words. Here stamps are words: times must be equal.
"""

import json
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Example, Progress, each_line, read_example, read_json_lines, say
from encoder import require
from lora import add_lora_option, lora_change
from moss_min import TINY, MossAudio, Parser, add_model_options, end
from sample import Sampling, split_thinking

STAMP = re.compile(r"\[([0-9]{1,6}\.[0-9]+)\]")

# The columns of the table, and how their numbers are written.
MEASURES = {
    "n": "d",
    "wer": ".1%",
    "cer": ".1%",
    "aas_ms": ".1f",
    "matched": ".1%",
    "accuracy": ".1%",
}


# ---- words and their alignment ----


def split_words(text: str) -> list[str]:
    """Returns a text's words in lower case, without punctuation; stamps become numbers."""
    text = unicodedata.normalize("NFC", text.lower())
    text = re.sub("['’]", "", text)
    text = re.sub(r"\.(?![0-9])", " ", text)
    is_punctuation = [c != "." and unicodedata.category(c).startswith("P") for c in text]
    return "".join(" " if bad else c for c, bad in zip(text, is_punctuation)).split()


def edit_distance(a, b) -> int:
    """Returns the fewest insertions, deletions and substitutions between two sequences."""
    codes = {item: i for i, item in enumerate({*a, *b})}
    target = np.array([codes[item] for item in b], int)
    columns = np.arange(len(b) + 1)
    row = columns
    for i, item in enumerate(a, 1):
        deleted = row[1:] + 1
        substituted = row[:-1] + (target != codes[item])
        row = np.concatenate([[i], np.minimum(deleted, substituted)])
        # Insertions: any number of steps to the right, one edit each.
        row = np.minimum.accumulate(row - columns) + columns
    return int(row[-1])


class Word(NamedTuple):
    text: str
    start: int | None  # milliseconds: whole, so that sums are exact
    end: int | None
    stamped: bool  # whether it is in a text that begins with a stamp


def stamped_words(text: str) -> list[Word]:
    before, *rest = STAMP.split(text)  # stamp, text, stamp, text, ...
    words = [Word(word, None, None, False) for word in split_words(before)]
    times = [round(float(seconds) * 1000) for seconds in rest[::2]]
    for start, end_, part in zip(times, [*times[1:], None], rest[1::2]):
        texts = split_words(part)
        for i, word in enumerate(texts):
            first = start if i == 0 else None
            last = end_ if i == len(texts) - 1 else None
            words.append(Word(word, first, last, True))
    return words


class Counts(NamedTuple):
    """What a line and the answer to it add to the sums."""

    edits: int = 0
    words: int = 0  # of the reference, like letters, stamped and questions
    letter_edits: int = 0
    letters: int = 0
    matched: int = 0  # words that are stamped on both sides
    stamped: int = 0
    times: int = 0  # starts and ends that both sides of a match have
    shift: int = 0  # milliseconds, of all those times
    right: int = 0
    questions: int = 0


def add_edit(counts: Counts) -> Counts:
    return counts._replace(edits=counts.edits + 1)


def add_match(counts: Counts, word: Word, other: Word) -> Counts:
    both = [(word.start, other.start), (word.end, other.end)]
    shifts = [abs(a - b) for a, b in both if a is not None and b is not None]
    return counts._replace(
        matched=counts.matched + (word.stamped and other.stamped),
        times=counts.times + len(shifts),
        shift=counts.shift + sum(shifts),
    )


def rank(counts: Counts) -> tuple[int, int, int, int]:
    """What the best of all alignments has the least of."""
    return counts.edits, -counts.matched, -counts.times, counts.shift


def align(reference: list[Word], answer: list[Word]) -> Counts:
    """Returns the edits, matches, times and shift of the best alignment. All are sums over steps,
    so the best way to a cell of the table goes over the best way to one of its neighbours."""
    row = [Counts(edits=j) for j in range(len(answer) + 1)]
    for i, word in enumerate(reference, 1):
        above = row
        row = [Counts(edits=i)]
        for j, other in enumerate(answer):
            paired = add_edit(above[j])
            if word.text == other.text:
                paired = add_match(above[j], word, other)
            row.append(min(add_edit(above[j + 1]), add_edit(row[j]), paired, key=rank))
    return row[-1]


# ---- scores ----


def count(line: Example, text: str) -> Counts:
    _, text = split_thinking(text)
    if line.question:
        return Counts(right=split_words(text) == split_words(line.answer), questions=1)
    counts = Counts()
    if STAMP.search(line.answer):
        reference = stamped_words(line.answer)
        stamped = sum(word.stamped for word in reference)
        counts = align(reference, stamped_words(text))._replace(stamped=stamped)
    words = split_words(STAMP.sub(" ", line.answer))
    others = split_words(STAMP.sub(" ", text))
    letters = " ".join(words)
    return counts._replace(
        edits=edit_distance(words, others),
        words=len(words),
        letter_edits=edit_distance(letters, " ".join(others)),
        letters=len(letters),
    )


def measures(rows: list[Counts]) -> dict[str, float | None]:
    """Returns the measures of a group of lines; None for one that no line has."""

    def ratio(part: str, whole: str) -> float | None:
        total = sum(getattr(row, whole) for row in rows)
        return sum(getattr(row, part) for row in rows) / total if total else None

    return {
        "n": len(rows),
        "wer": ratio("edits", "words"),
        "cer": ratio("letter_edits", "letters"),
        "aas_ms": ratio("shift", "times"),
        "matched": ratio("matched", "stamped"),
        "accuracy": ratio("right", "questions"),
    }


def score(lines: dict[int, Example], answers: dict[int, str]) -> dict:
    """Returns {"all": measures, "prompts": {prompt: measures}} of lines and answers by number."""
    rows = {}
    for number, line in lines.items():
        row = count(line, answers.get(number, ""))
        rows.setdefault(line.prompt, []).append(row)
    by_prompt = {prompt: measures(group) for prompt, group in rows.items()}
    return {"all": measures(sum(rows.values(), [])), "prompts": by_prompt}


def table(scores: dict) -> str:
    """Returns a row for each prompt and one for all; "-" for a measure that no line has."""
    rows = [["prompt", *MEASURES]]
    for prompt, values in [*scores["prompts"].items(), ("all", scores["all"])]:
        row = [" ".join(prompt.split())[:60]]
        for name, form in MEASURES.items():
            row.append("-" if values[name] is None else format(values[name], form))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


# ---- files and the model ----


def read_data(path: Path, need_sound: bool) -> dict[int, Example]:
    """Returns a data file's lines by number. Raises ValueError that names the bad ones, those whose
    sound is not there, too."""

    def read(value) -> Example:
        line = read_example(value, path.parent)
        # Not Path.is_file, which raises for a name that is too long.
        absent = [str(clip) for clip in line.clips if need_sound and not os.path.isfile(clip)]
        require(not absent, f"{', '.join(absent):.200} is not there; expected a sound file")
        return line

    lines = each_line(path, read_json_lines(path), read)
    require(lines, f"{path}: no lines; expected at least one")
    return lines


def read_answers(path: Path, lines: dict[int, Example]) -> dict[int, str]:
    """Returns an answers file's texts by data line. Raises ValueError that names the bad lines."""
    answers = {}

    def read(value) -> None:
        require(isinstance(value, dict), "expected an object with id and text")
        number = value.get("id")
        text = value.get("text")
        known = type(number) is int and number in lines
        require(known, f"id is {number!r:.60}; expected the number of a data line")
        require(number not in answers, f"a second answer to data line {number}; expected one")
        require(isinstance(text, str), f"text is {text!r:.60}; expected a string")
        answers[number] = text

    each_line(path, read_json_lines(path), read)
    return answers


def with_progress(items: Collection, what: str) -> Iterator:
    progress = Progress(what, len(items))
    for done, item in enumerate(items, 1):
        yield item
        progress.at(done)


def run_model(model: MossAudio, lines: dict[int, Example], path: Path, most: int) -> dict[int, str]:
    """Returns the model's greedy answers of at most `most` tokens. Every prompt is made once before
    the first is run, to find what is wrong with any."""

    def check(line: Example) -> None:
        model.fit(model.prompt(line.prompt, line.clips), Sampling(most))

    each_line(path, with_progress(lines.items(), "checked"), check)
    answers = {}
    for number, line in with_progress(lines.items(), "answered"):
        answers[number] = model.ask(line.clips, line.prompt, max_new_tokens=most, temperature=0)
    return answers


# ---- command line ----


def run(argv: list[str] | None) -> None:
    parser = Parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="JSONL in the training format")
    add("--answers", type=Path, metavar="FILE", help="answers to score, in place of a model's")
    add_model_options(parser)
    parser.set_defaults(model=None)
    add_lora_option(parser)
    add("--max-new-tokens", type=int, metavar="N", help="of an answer (4096, if there is room)")
    add("--json", action="store_true", help="print JSON, not a table")
    args = parser.parse_args(argv)
    has_model = args.model is not None or args.lora is not None
    require(not (has_model and args.answers), "expected --model or --answers, not both")
    Sampling(args.max_new_tokens)  # checked before anything is read
    lines = read_data(args.data, need_sound=args.answers is None)
    if args.answers:
        answers = read_answers(args.answers, lines)
    else:
        folder = args.model or TINY
        change = lora_change(args.lora, folder)
        model = MossAudio.from_pretrained(folder, args.device, args.dtype, say, change)
        answers = run_model(model, lines, args.data, args.max_new_tokens)
    scores = score(lines, answers)
    print(json.dumps(scores, indent=1) if args.json else table(scores), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    # Of the answers that the context cuts, it would be said line by line.
    warnings.filterwarnings("ignore", "the answer is cut")
    return end("evaluate", lambda: run(argv))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
