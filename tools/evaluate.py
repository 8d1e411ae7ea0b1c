"""Scores transcripts and answers: python tools/evaluate.py --data test.jsonl [--model FOLDER | --answers FILE].

The data is upstream's training format; a line may say "task": "question". Such lines count for accuracy alone, the
others for error rates alone. An answers file has lines {"id": number of the data line from 1, "text"}; a missing one
counts as empty. A thought (<think> ... </think>) is no part of an answer. What is computed, of a group of lines:

wer      the edit distances of all lines together over the words of all references. Words are in lower case, without
         stamps; punctuation parts them, but apostrophes vanish (don't, dont) and the point of a number stays (2.1).
cer      the same of characters, those of the words joined with single spaces.
aas_ms   of lines whose reference has stamps, [0.48]turn[0.80][0.80]left[1.12]: the mean of |start - start'| and
         |end - end'|, in milliseconds, over the words matched in the edit alignment. A text's times are the stamps
         right before and after it. If it holds several words the first has its start and the last its end, however
         the other side is cut; a time that either side lacks is not counted. Of all shortest alignments it is the one
         with the most matched words, then the most times, then the smallest shifts (which of two "five" was missed?).
matched  what part of those references' stamped words is matched, with stamped ones: what aas_ms speaks of.
accuracy how many questions have the reference's words. Here stamps are words, their numbers: times must be equal."""

import argparse, datetime, json, os, re, sys, time, unicodedata, warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from encoder import require
from moss_min import TINY, MossAudio
from sample import Sampling, split_thinking

STAMP = re.compile(r"\[([0-9]{1,6}\.[0-9]+)\]")
MEASURES = "n", "wer", "cer", "aas_ms", "matched", "accuracy"
KINDS = (
    ("user", "audio"),
    ("user", "text"),
    ("assistant", "text"),
)  # the messages of a line: role, message_type

Line = namedtuple(
    "Line", "prompt clips answer question"
)  # a string, paths, a string, whether it's a question
Word = namedtuple(
    "Word", "text start end stamped"
)  # times in milliseconds or None; whether it's in a stamped text
Counts = namedtuple(
    "Counts", "n edits words letter_edits letters shift times matched stamped right questions"
)

# ---- what is counted ----


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; stamps become numbers."""
    text = unicodedata.normalize("NFC", text.lower())
    text = re.sub(r"\.(?![0-9])", " ", re.sub("['’]", "", text))
    return "".join(
        " " if c != "." and unicodedata.category(c)[0] == "P" else c for c in text
    ).split()


def edit_distance(a, b) -> int:
    """The fewest insertions, deletions and substitutions between two sequences; a row of the table at a time."""
    codes = {item: i for i, item in enumerate({*a, *b})}
    columns, b = np.arange(len(b) + 1), np.array([codes[item] for item in b], int)
    row = columns
    for i, item in enumerate(a, 1):
        row = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (b != codes[item]))])
        row = (
            np.minimum.accumulate(row - columns) + columns
        )  # insertions: any number of steps to the right
    return int(row[-1])


def stamped_words(text: str) -> list[Word]:
    before, *rest = STAMP.split(text)  # stamp, text, stamp, text, ...
    words, times = [Word(word, None, None, False) for word in split_words(before)], rest[::2]
    times = [round(float(seconds) * 1000) for seconds in times] + [
        None
    ]  # whole, so that sums are exact
    for start, end, part in zip(times, times[1:], rest[1::2]):
        texts = split_words(part)
        starts, ends = [start] + [None] * (len(texts) - 1), [None] * (len(texts) - 1) + [end]
        words += [Word(*word, True) for word in zip(texts, starts, ends)]
    return words


def align(reference: list[Word], answer: list[Word]) -> tuple[int, int, int, int]:
    """Of the best alignment: edits, minus the stamped words matched, minus the times compared, their shift in ms. All
    four are sums over steps, so the table holds them together and the least of them is the best."""

    def after(so_far, *step):
        return tuple(map(sum, zip(so_far, step)))

    row = [(j, 0, 0, 0) for j in range(len(answer) + 1)]
    for i, word in enumerate(reference, 1):
        above, row = row, [(i, 0, 0, 0)]
        for j, other in enumerate(answer):
            ways = [after(above[j + 1], 1, 0, 0, 0), after(row[j], 1, 0, 0, 0)]
            if word.text == other.text:
                pairs = (word.start, other.start), (word.end, other.end)
                shifts = [abs(a - b) for a, b in pairs if a is not None and b is not None]
                ways.append(
                    after(above[j], 0, -(word.stamped and other.stamped), -len(shifts), sum(shifts))
                )
            else:
                ways.append(after(above[j], 1, 0, 0, 0))
            row.append(min(ways))
    return row[-1]


def count(line: Line, text: str) -> Counts:
    """What one line and the answer to it add to the sums."""
    text = split_thinking(text)[1]
    if line.question:
        return Counts(1, *[0] * 8, split_words(text) == split_words(line.answer), 1)
    words, others = (split_words(STAMP.sub(" ", said)) for said in (line.answer, text))
    edits, letter_edits = (
        edit_distance(words, others),
        edit_distance(" ".join(words), " ".join(others)),
    )
    shift = times = matched = stamped = 0
    if STAMP.search(line.answer):
        reference = stamped_words(line.answer)
        _, matched, times, shift = align(reference, stamped_words(text))
        stamped = sum(word.stamped for word in reference)
    return Counts(
        1,
        edits,
        len(words),
        letter_edits,
        len(" ".join(words)),
        shift,
        -times,
        -matched,
        stamped,
        0,
        0,
    )


def measures(rows: list[Counts]) -> dict[str, float | None]:
    """The measures of a group of lines; None for one that no line has."""
    c = Counts(*map(sum, zip(*rows)))
    ratios = (
        (c.edits, c.words),
        (c.letter_edits, c.letters),
        (c.shift, c.times),
        (c.matched, c.stamped),
        (c.right, c.questions),
    )
    return dict(zip(MEASURES, [c.n, *(part / whole if whole else None for part, whole in ratios)]))


def score(lines: dict[int, Line], answers: dict[int, str]) -> dict:
    """{"all": measures, "prompts": {prompt: measures}} of lines and answers by their numbers."""
    rows = {number: count(line, answers.get(number, "")) for number, line in lines.items()}
    prompts = {line.prompt: [] for line in lines.values()}
    for number, line in lines.items():
        prompts[line.prompt].append(rows[number])
    by_prompt = {prompt: measures(group) for prompt, group in prompts.items()}
    return {"all": measures([*rows.values()]), "prompts": by_prompt}


# ---- files and the model ----


def each_line(path: Path, lines, work) -> dict:
    """work(line) for (number, line) of a file's lines, by number. Raises ValueError that names the bad lines."""
    done, wrong = {}, []
    for number, line in lines:
        try:
            done[number] = work(line)
        except (
            ValueError,
            TypeError,
        ) as error:  # tokenizers' TypeError is for text that is no Unicode
            wrong.append(f"line {number}: {error}")
    require(not wrong, f"{path}: {len(wrong)} bad lines: {'; '.join(wrong[:3])}")
    return done


def read_json_lines(path: Path) -> list:
    """(number from 1, value) of the lines that are not empty; the value is None for one that is not JSON."""
    try:
        lines, values = (
            path.read_bytes().split(b"\n"),
            [],
        )  # not splitlines: a JSON string may hold other line ends
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected a JSONL file") from error
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                values.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            values.append((number, None))
    return values


def read_data(path: Path, need_sound: bool) -> dict[int, Line]:
    """The data lines by their numbers. Raises ValueError that names the bad ones, a sound not there, too."""

    def read(data: dict) -> Line:
        try:
            turns = [
                ((turn["role"], turn["message_type"]), turn["content"])
                for turn in data["conversation"]
            ]
        except (KeyError, TypeError):
            raise ValueError(
                "expected a conversation of messages with role, message_type and content"
            ) from None
        turns = [
            turn for turn in turns if type(turn[1]) is not str or turn[1].strip()
        ]  # an empty answer is none
        clips, prompts, answers = (
            [content for kind, content in turns if kind == wanted] for wanted in KINDS
        )
        good = all(type(content) is str for _, content in turns) and len(turns) == len(
            clips + prompts + answers
        )
        require(good, f"a message of another kind; expected strings from {KINDS}")
        require(clips, "no audio")
        require(len(prompts) == 1, f"{len(prompts)} texts of the user's; expected one")
        require(len(answers) == 1, f"{len(answers)} answers; expected one")
        task = data.get("task")
        require(task in (None, "question"), f"task is {task!r:.60}; expected question, or none")
        paths = [path.parent / clip for clip in clips]
        absent = [
            str(clip) for clip in paths if need_sound and not os.path.isfile(clip)
        ]  # Path.is_file may raise
        require(not absent, f"{', '.join(absent):.200} is not there; expected a sound file")
        return Line(prompts[0], paths, answers[0], task == "question")

    lines = each_line(path, read_json_lines(path), read)
    require(lines, f"{path}: no lines; expected at least one")
    return lines


def read_answers(path: Path, lines: dict[int, Line]) -> dict[int, str]:
    """An answers file's texts by data line. Raises ValueError that names the bad lines."""
    answers = {}

    def read(data: dict) -> None:
        require(type(data) is dict, "expected an object with id and text")
        number, text = data.get("id"), data.get("text")
        require(
            type(number) is int and number in lines,
            f"id is {number!r:.60}; expected the number of a data line",
        )
        require(number not in answers, f"a second answer to data line {number}; expected one")
        require(type(text) is str, f"text is {text!r:.60}; expected a string")
        answers[number] = text

    each_line(path, read_json_lines(path), read)
    return answers


def with_progress(items, what: str):
    """The items; on stderr, at most every five seconds and at the end, how many are done and the time that is left."""
    start = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= 5 or done == len(items):
            left = datetime.timedelta(seconds=round((now - start) / done * (len(items) - done)))
            print(f"{what} {done} of {len(items)}, {left} left", file=sys.stderr, flush=True)
            shown = now


def run_model(
    model: MossAudio, lines: dict[int, Line], max_new_tokens: int, path: Path
) -> dict[int, str]:
    """The model's greedy answers. Every prompt is made once before the first is run, to find what is wrong with any."""

    def check(line: Line) -> None:
        model.generate(
            model.prompt(line.prompt, line.clips), max_new_tokens, 0
        )  # an iterator: runs nothing

    each_line(path, with_progress(lines.items(), "checked"), check)
    return {
        number: model.ask(line.clips, line.prompt, max_new_tokens=max_new_tokens, temperature=0)
        for number, line in with_progress(lines.items(), "answered")
    }


# ---- command line ----


def table(scores: dict) -> str:
    """A row for each prompt and one for all; "-" for a measure that no line has."""
    forms = "{:d}", "{:.1%}", "{:.1%}", "{:.1f}", "{:.1%}", "{:.1%}"
    rows = [("prompt", *MEASURES)]
    for prompt, values in [*scores["prompts"].items(), ("all", scores["all"])]:
        cells = (
            "-" if values[name] is None else form.format(values[name])
            for name, form in zip(MEASURES, forms)
        )
        rows.append((" ".join(prompt.split())[:60], *cells))
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = ((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])) for row in rows)
    return "\n".join("  ".join(row) for row in cells)


def run(args: argparse.Namespace) -> None:
    require(args.model is None or args.answers is None, "expected --model or --answers, not both")
    Sampling(args.max_new_tokens, temperature=0)  # checked before anything is read
    lines = read_data(args.data, need_sound=args.answers is None)
    if args.answers:
        answers = read_answers(args.answers, lines)
    else:
        report = lambda line: print(line, file=sys.stderr, flush=True)
        model = MossAudio.from_pretrained(args.model or TINY, args.device, args.dtype, report)
        answers = run_model(model, lines, args.max_new_tokens, args.data)
    scores = score(lines, answers)
    print(json.dumps(scores, indent=1) if args.json else table(scores), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "evaluate.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error, add = lambda message: require(False, message), parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="JSONL in the training format")
    add(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="checkpoint folder, to be run greedily (the small one in tiny/)",
    )
    add(
        "--answers",
        type=Path,
        metavar="FILE",
        help='JSONL of {"id": data line from 1, "text"}, to be scored instead',
    )
    add("--device", default="auto", help="auto (the first that is there of), cuda, mps, cpu")
    add(
        "--dtype",
        default="auto",
        help="auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="end an answer after N tokens (%(default)s)",
    )
    add("--json", action="store_true", help="print JSON, not a table")
    warnings.filterwarnings(
        "ignore", "max_new_tokens is cut"
    )  # to what the context leaves: it would come line by line
    try:
        run(parser.parse_args(argv))
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"evaluate: {' '.join(str(error).split()):.380}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
