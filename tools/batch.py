"""Answers about many clips: python tools/batch.py --manifest in.jsonl --out out.jsonl [--model FOLDER] [--batch N].

A line of the manifest is {"audio": path or list of paths, "prompt": text, "id": string or whole number}. Paths are
relative to the manifest. Without audio the prompt is text alone; without a prompt it is "Describe this audio."; without
an id it is the line's number, from 1. Other keys are left alone. The answers are lines {"id", "text"} in the manifest's
order, or {"id", "error"} where a clip can't be read, is too long, or by itself takes too much memory. What --out holds
already is kept, so that the same command goes on where a run has ended; a killed one loses the batch in hand. Line n
draws with --seed + n: its answer depends neither on its batch, nor on where a run began, nor on the number of
processes; but a product of several rows is rounded otherwise than that of one, which in bfloat16 may change an id.

`torchrun --nproc-per-node N tools/batch.py ...` answers in N processes, on a GPU each if there are any, on one machine
or on several that share the folder of --out. Each writes a part beside it, out.jsonl.part-0, -1, ...; the first merges
them when all have ended, and those that a killed run has left before any begins."""

import argparse, datetime, json, os, sys, time, warnings
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from encoder import require
from evaluate import each_line, read_json_lines
from moss_min import MossAudio, add_options, generation_options, out_of_memory
from sample import Sampling

Line = namedtuple("Line", "number prompt clips")  # of the manifest, from 1; a string; paths

# ---- files ----


def read_manifest(path: Path) -> dict[str | int, Line]:
    """The manifest's lines by their ids. Raises ValueError that names the bad ones, an id given twice, too."""

    def read(data: dict) -> tuple:
        require(
            type(data) is dict,
            'expected a JSON object like {"audio": "clip.wav", "prompt": "...", "id": "a"}',
        )
        audio, prompt, given = (
            data.get(key) for key in ("audio", "prompt", "id")
        )  # null is as if it were not there
        clips = [audio] if type(audio) is str else [] if audio is None else audio
        good = type(clips) is list and all(type(clip) is str for clip in clips)
        require(good, f"audio is {audio!r:.60}; expected a path or a list of paths")
        require(
            prompt is None or type(prompt) is str, f"prompt is {prompt!r:.60}; expected a string"
        )
        require(
            given is None or type(given) in (str, int),
            f"id is {given!r:.60}; expected a string or whole number",
        )
        require(clips or prompt is not None, "expected audio, a prompt or both")
        return (
            given,
            "Describe this audio." if prompt is None else prompt,
            [path.parent / clip for clip in clips],
        )

    lines = {}
    for number, (given, prompt, clips) in each_line(path, read_json_lines(path), read).items():
        name = number if given is None else given
        require(
            name not in lines,
            f"{path}: line {number}: id {name!r:.60} is given twice; expected one line for each",
        )
        lines[name] = Line(number, prompt, clips)
    require(len(lines) > 0, f"{path}: no lines; expected at least one")
    return lines


def read_answers(
    path: Path, lines: dict[str | int, Line]
) -> Iterator[tuple[str | int, bytes, bool]]:
    """(id, the line as it stands, whether it is an error) of an answers file, without half a line at the end. Raises
    ValueError for other lines that are no answers to the manifest's."""
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, 1):
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not text.strip() or answer is None and number == len(texts) and text.startswith(b"{"):
            continue  # a run was killed as it wrote
        good = type(answer) is dict and ("text" in answer) != ("error" in answer)
        require(
            good,
            f'{path}: line {number} is no {{"id", "text"}} or {{"id", "error"}}; expected answers alone',
        )
        name = answer.get("id")
        known = type(name) in (str, int) and name in lines
        require(
            known,
            f"{path}: line {number}: id {name!r:.60} is not in the manifest; expected another --out",
        )
        yield name, text, "error" in answer


def merge(
    out: Path, lines: dict[str | int, Line], drop_errors: bool = False
) -> dict[str | int, bool]:
    """Brings the answers of out and its parts into out, in the manifest's order, each as it stands, and removes the
    parts. Of two answers to a line the first counts. Returns whether it is an error, by id."""
    parts = sorted(
        file for file in out.parent.iterdir() if file.name.startswith(out.name + ".part-")
    )
    found = {}
    for file in [out, *parts] if out.exists() else parts:
        for name, text, failed in read_answers(file, lines):
            if not (failed and drop_errors):
                found.setdefault(name, (text, failed))
    data = b"".join(found[name][0] + b"\n" for name in lines if name in found)
    if not out.exists() or out.read_bytes() != data:
        new = out.with_name(out.name + ".new")
        new.write_bytes(data)
        os.replace(new, out)
    for part in parts:
        part.unlink()
    return {name: failed for name, (_, failed) in found.items()}


# ---- answers ----


def answer(
    model: MossAudio, lines: dict[str | int, Line], time_markers: bool | None, options: dict
) -> list[dict]:
    """An {"id", "text"} or {"id", "error"} for each line, in their order; generated together."""
    answers, prompts, seed = dict.fromkeys(lines), {}, options["seed"]
    for name, line in lines.items():
        try:
            prompt = model.prompt(line.prompt, line.clips, time_markers)
            model.generate(
                prompt, **options
            )  # an iterator: runs nothing, but wants a position to generate at
            prompts[name] = prompt
        except (ValueError, OSError) as error:
            answers[name] = {"id": name, "error": str(error)}
    if prompts:
        names = [*prompts]
        seeds = None if seed is None else [seed + lines[name].number for name in names]
        try:
            for i, ids in model.generate_batch([*prompts.values()], **options | {"seed": seeds}):
                answers[names[i]] = {"id": names[i], "text": model.tokenizer.decode(ids)}
        except Exception as error:
            if not out_of_memory(error) or len(prompts) > 1:  # by itself each may have room
                raise
            answers[names[0]] = {"id": names[0], "error": str(error)}
    return [*answers.values()]


def answer_all(
    model: MossAudio, lines: dict[str | int, Line], path: Path, args: argparse.Namespace, report
) -> None:
    """Answers lines, batch by batch, and appends each batch to a file; report gets a line on how it goes."""
    options = generation_options(args) | {"report": report}
    names, start = [*lines], time.monotonic()
    shown = start
    with open(path, "ab") as file:
        for i in range(0, len(names), args.batch):
            batch = {name: lines[name] for name in names[i : i + args.batch]}
            for said in answer(model, batch, args.time_markers, options):
                text = json.dumps(said, ensure_ascii=False) + "\n"
                file.write(
                    text.encode(errors="backslashreplace")
                )  # a lone surrogate is \ud800 in JSON, too
            file.flush()
            done, now = i + len(batch), time.monotonic()
            if now - shown >= 5 or done == len(lines):
                rate, shown = done / (now - start), now
                left = datetime.timedelta(seconds=round((len(lines) - done) / rate))
                report(f"answered {done} of {len(lines)}, {rate:.2f} a second, {left} left")


def own_device(name: str) -> str:
    """Under torchrun, for auto and cuda, this process's own GPU."""
    shared = "LOCAL_RANK" in os.environ and name in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{os.environ['LOCAL_RANK']}" if shared else name


def run(args: argparse.Namespace) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    report = (
        (lambda line: print(line, file=sys.stderr, flush=True))
        if rank == 0
        else (lambda line: None)
    )
    generation_options(args)  # what is wrong with any of these is said before anything is loaded
    require(args.batch > 0, f"--batch is {args.batch}; expected a whole number from 1 up")
    lines = read_manifest(args.manifest)
    if args.seed is not None:
        Sampling(
            seed=args.seed + max(line.number for line in lines.values())
        )  # the last line's is in range, too
    require(
        args.out.parent.is_dir(),
        f"{args.out.parent} is no folder; expected --out in one that is there",
    )
    if rank == 0:
        merge(args.out, lines, args.retry_errors)
    if world > 1:
        dist.init_process_group(
            "gloo", timeout=datetime.timedelta(days=365)
        )  # the first waits for the slowest
        dist.barrier()  # of one file, merged, all take different lines
    kept = {name for name, *_ in read_answers(args.out, lines)}
    own = [name for name in lines if name not in kept][rank::world]
    report(
        f"{args.out}: {len(kept)} of {len(lines)} lines are answered, {len(own)} are for this process"
    )
    if own:
        model = MossAudio.from_pretrained(
            args.model, own_device(args.device), args.dtype, report, args.lora
        )
        path = args.out.with_name(f"{args.out.name}.part-{rank}") if world > 1 else args.out
        answer_all(model, {name: lines[name] for name in own}, path, args, report)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        failed = merge(args.out, lines).values()
        report(
            f"{args.out}: {len(failed)} of {len(lines)} lines are answered, {sum(failed)} with an error"
        )
        require(
            len(failed) == len(lines),
            f"{args.out}: a part is missing; expected to be run again, alone",
        )


# ---- command line ----


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "batch.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error, add = lambda message: require(False, message), parser.add_argument
    add("--manifest", type=Path, required=True, metavar="FILE", help="JSONL of clips and prompts")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL of answers; those in it are kept",
    )
    add(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="lines to be answered together (%(default)s)",
    )
    add(
        "--retry-errors", action="store_true", help="do the lines again that have an error in --out"
    )
    add_options(parser)
    warnings.filterwarnings(
        "ignore", "max_new_tokens is cut"
    )  # to what the context leaves: it would come line by line
    try:
        run(parser.parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        short = out_of_memory(error)
        if not isinstance(error, (ValueError, OSError)) and not short:
            raise
        said = "a smaller --batch takes less: " * short + " ".join(str(error).split())
        print(f"batch: {said:.380}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
