"""Answers questions about many clips, several at a time.

    python tools/batch.py --manifest in.jsonl --out out.jsonl --model FOLDER --greedy

A line of the manifest is {"audio": a path or a list of paths, "prompt": text, "id": a string or a
whole number}; each key may be left out. Paths are relative to the manifest, the prompt is "Describe
this audio." if there is none, and the id is the line's number, from 1. The answers are lines {"id",
"text"} in the manifest's order, with "cut": true where there was no room for more tokens, or {"id",
"error"} for a clip that can't be read, is too long, or takes too much memory by itself. Answers
that --out holds are kept: the same command continues a run that was killed, which loses its last
batch. Line n draws with seed + n, whatever its batch.

`torchrun --nproc-per-node N tools/batch.py ...` answers in N processes, each on a GPU if there
are any, on one machine or on several that share the folder of --out. Each process writes a part,
out.jsonl.part-0; the first process merges them at the end, or when the command is run again.
tools/README.md says when answers are kept."""

import argparse
import dataclasses
import datetime
import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import moss_min
from common import Progress, each_line, read_json_lines, say
from encoder import require
from lora import add_lora_option, lora_change
from moss_min import MossAudio, Prompt, Step
from sample import Picker, Sampling

Id = str | int

# ---- several prompts at a time ----


@dataclass
class Row:
    """A prompt of a batch, and its answer so far."""

    index: int
    picker: Picker
    prompt_tokens: int
    ids: list[int]


@torch.no_grad()
def generate_rows(
    model: MossAudio, prompts: list[Prompt], samplings: list[Sampling], cuda_graph=True, report=None
) -> Iterator[tuple[int, list[int]]]:
    """Yields (index of a prompt, ids of its answer) as each answer ends."""
    device = model.lm_head.weight.device
    places = [len(p.ids) + min(s.max_new_tokens, 1024) for p, s in zip(prompts, samplings)]
    cache = model.new_cache(len(prompts), max(places, default=0))  # it grows if need be
    rows = []
    logits = []  # float32 [1, V] each
    for i, (prompt, sampling) in enumerate(zip(prompts, samplings)):
        N = len(prompt.ids)
        # Each prompt is run by itself, so that its numbers don't depend on the other rows.
        own_cache = model.new_cache(1, N)
        logits.append(model.prefill(prompt, own_cache, report))
        for layer in range(len(cache.keys)):
            cache.keys[layer][i, :, :N] = own_cache.keys[layer][0, :, :N]  # [G, N, hd]
            cache.values[layer][i, :, :N] = own_cache.values[layer][0, :, :N]
        del own_cache
        picker = Picker(sampling, model.tokenizer, prompt.ids.tolist(), device)
        rows.append(Row(i, picker, N, []))
    step = None
    while rows:
        going_on = []
        for i, row in enumerate(rows):
            row.ids.append(row.picker.next(logits[i]))
            full = len(row.ids) == row.picker.sampling.max_new_tokens
            if full or row.ids[-1] in model.config.stop_ids:
                yield row.index, row.ids
            else:
                going_on.append(i)
        if not going_on:
            return
        if len(going_on) < len(rows):
            rows = [rows[i] for i in going_on]
            step = None  # it was for all rows
            # Layer by layer: no second copy of the whole cache is made.
            for layer in range(len(cache.keys)):
                cache.keys[layer] = cache.keys[layer][going_on]  # [B, G, capacity, hd]
                cache.values[layer] = cache.values[layer][going_on]
        if step is None:
            positions = [row.prompt_tokens + len(row.ids) - 1 for row in rows]
            step = Step(model, cache, positions, cuda_graph)
        logits = step(*[row.ids[-1] for row in rows]).split(1)  # [1, V] each


def generate_batch(
    model: MossAudio,
    prompts: list[Prompt],
    max_new_tokens=None,
    temperature=1.0,
    top_p=1.0,
    top_k=50,
    seed=None,
    thinking_budget=None,
    cuda_graph=True,
    report=None,
) -> Iterator[tuple[int, list[int]]]:
    """Generates for several prompts together: yields (index of a prompt, its ids) as each answer
    ends. Prompt i draws with seed + i; the arguments are those of MossAudio.generate. Raises
    ValueError at the call."""
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, thinking_budget)
    samplings = [model.fit(prompt, shift_seed(sampling, i)) for i, prompt in enumerate(prompts)]
    return generate_rows(model, prompts, samplings, cuda_graph, report)


def shift_seed(sampling: Sampling, by: int) -> Sampling:
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + by)


# ---- files ----


class Line(NamedTuple):
    """A line of the manifest."""

    number: int  # from 1
    prompt: str
    clips: list[str]  # relative to the manifest


def read_line(value: Any) -> tuple[Id | None, str, list[str]]:
    """Reads a manifest line's JSON value: its id (None: without), prompt and clips."""
    require(type(value) is dict, 'expected a JSON object like {"audio": "clip.wav", "id": "a"}')
    name = value.get("id")
    prompt = value.get("prompt")
    audio = value.get("audio")
    clips = [audio] if type(audio) is str else audio
    if clips is None:
        clips = []
    good = type(clips) is list and all(type(clip) is str for clip in clips)
    require(good, f"audio is {audio!r:.60}; expected a path or a list of paths")
    good = prompt is None or type(prompt) is str
    require(good, f"prompt is {prompt!r:.60}; expected a string")
    good = name is None or type(name) in (str, int)
    require(good, f"id is {name!r:.60}; expected a string or whole number")
    require(clips or prompt is not None, "expected audio, a prompt or both")
    prompt = "Describe this audio." if prompt is None else prompt
    return name, prompt, clips


def read_manifest(path: Path) -> dict[Id, Line]:
    """Reads the lines, by id. Raises ValueError that names the bad ones, an id given twice too."""
    lines = {}
    values = each_line(path, read_json_lines(path), read_line)
    for number, (name, prompt, clips) in values.items():
        name = number if name is None else name
        require(name not in lines, f"{path}: line {number}: id {name!r:.60} is given twice")
        lines[name] = Line(number, prompt, clips)
    require(len(lines) > 0, f"{path}: no lines; expected at least one")
    return lines


def read_answers(path: Path, lines: dict[Id, Line]) -> Iterator[tuple[Id, bytes, bool]]:
    """Yields (id, the line as it stands, whether it is an error) for each answer in a file. Raises
    ValueError for anything else but the half of a line that a killed run has left at the end."""
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, 1):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        half = value is None and number == len(texts) and text.startswith(b"{")
        if half or not text.strip():
            continue
        good = type(value) is dict and ("text" in value) != ("error" in value)
        require(good, f'{path}: line {number} is no {{"id", "text"}} or {{"id", "error"}}')
        name = value.get("id")
        known = type(name) in (str, int) and name in lines
        require(known, f"{path}: line {number}: id {name!r:.60} is not in the manifest")
        yield name, text, "error" in value


def merge(out: Path, lines: dict[Id, Line], dropped=()) -> dict[Id, bool]:
    """Brings the answers of out and its parts into out, in the manifest's order and without those
    that are dropped, and removes the parts. Of two answers to a line the first counts. Returns
    whether it is an error, by id."""
    parts = sorted(out.parent.glob(glob.escape(out.name) + ".part-*"))
    texts = {}
    failures = {}
    for file in [out, *parts] if out.exists() else parts:
        for name, text, failed in read_answers(file, lines):
            if name not in texts and name not in dropped:
                texts[name] = text
                failures[name] = failed
    data = b"".join(texts[name] + b"\n" for name in lines if name in texts)
    if not out.exists() or out.read_bytes() != data:
        with common.whole(out) as new:
            new.write_bytes(data)
    for part in parts:
        part.unlink()
    return failures


# ---- what decides an answer ----


def known_as(folder: str | Path) -> list[str]:
    """Returns what a checkpoint or an adapter is known by: its folder's name, and a digest of the
    beginnings of its files, with the names and shapes of its tensors."""
    folder = Path(folder).resolve()
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".safetensors") and path.is_file():
            with open(path, "rb") as file:
                digest.update(file.read(1_000_000))
    return [folder.name, digest.hexdigest()]


def describe_run(lines: dict[Id, Line], args: argparse.Namespace) -> dict:
    """Returns what decides the answers."""
    run = dataclasses.asdict(args.sampling)
    run |= {"dtype": args.dtype, "time_markers": args.time_markers}
    run |= {"model": known_as(args.model), "lora": None, "lines": {}}
    if args.lora:
        run["lora"] = known_as(args.lora)
    for name, line in lines.items():
        seed = shift_seed(args.sampling, line.number).seed
        decides = json.dumps([line.clips, line.prompt, seed]).encode()
        run["lines"][json.dumps(name)] = hashlib.sha256(decides).hexdigest()[:16]
    return run


def start_run(out: Path, lines: dict[Id, Line], args: argparse.Namespace) -> None:
    """Brings together what earlier runs have answered, without what is to be answered again. Raises
    ValueError if that was another run than this."""
    side = out.with_name(out.name + ".run")
    now = describe_run(lines, args)
    saved = {}
    failures = merge(out, lines)
    dropped = {name for name, failed in failures.items() if failed and args.retry_errors}
    if failures:
        expected = "expected the same run, or another --out"
        require(side.exists(), f"{out}: no {side.name} says what its answers are to; {expected}")
        saved = dict(read_json_lines(side)).get(1)
        good = type(saved) is dict and type(saved.get("lines")) is dict
        require(good, f"{side} is damaged; {expected}")
        others = [key for key in now if key != "lines" and saved.get(key) != now[key]]
        require(not others, f"{out}: its answers have another {', '.join(others)}; {expected}")
        for name in failures:
            key = json.dumps(name)
            if saved["lines"].get(key) != now["lines"][key]:
                dropped.add(name)
    merge(out, lines, dropped)
    if saved != now:
        common.write_text(json.dumps(now), side)


# ---- answers ----


def answer_batch(model: MossAudio, lines: dict[Id, Line], args, report) -> list[dict]:
    """Returns {"id", "text"} or {"id", "error"} for each line, in their order."""
    answers = dict.fromkeys(lines)
    names = []
    prompts = []
    samplings = []
    for name, line in lines.items():
        try:
            clips = [args.manifest.parent / clip for clip in line.clips]
            prompt = model.prompt(line.prompt, clips, args.time_markers)
            samplings.append(model.fit(prompt, shift_seed(args.sampling, line.number)))
            prompts.append(prompt)
            names.append(name)
        except (ValueError, OSError) as error:
            answers[name] = {"id": name, "error": str(error)}
    try:
        for i, ids in generate_rows(model, prompts, samplings, args.cuda_graph, report):
            answers[names[i]] = {"id": names[i], "text": model.tokenizer.decode(ids)}
            if model.is_cut(ids):
                answers[names[i]]["cut"] = True
    except Exception as error:
        no_memory = moss_min.out_of_memory(error)
        if not no_memory and not isinstance(error, ValueError):
            raise
        alone = len(names) == 1  # so it may have room
        require(alone or not no_memory, f"a smaller --batch takes less: {error}")
        if alone:
            answers[names[0]] = {"id": names[0], "error": str(error)}
        else:
            # Which line has logits that are not finite shows when each is answered by itself.
            for name in names:
                (answers[name],) = answer_batch(model, {name: lines[name]}, args, report)
    return list(answers.values())


def answer_all(model: MossAudio, lines: dict[Id, Line], path: Path, args, rank: int) -> None:
    """Answers lines, batch by batch, and appends each batch to a file."""
    progress = Progress("answered", len(lines))
    names = list(lines)
    done = 0
    with open(path, "ab") as file:
        while done < len(names):
            batch = {name: lines[name] for name in names[done : done + args.batch]}
            for answer in answer_batch(model, batch, args, say if rank == 0 else None):
                text = json.dumps(answer, ensure_ascii=False) + "\n"
                # Half of a surrogate pair, in an id, becomes \ud800, as JSON writes it, too.
                file.write(text.encode(errors="backslashreplace"))
            file.flush()
            done += len(batch)
            if rank == 0:
                progress.at(done)


def own_device(name: str) -> str:
    """Returns, under torchrun, this process's own GPU for auto and cuda."""
    if "LOCAL_RANK" in os.environ and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def run(args: argparse.Namespace) -> None:
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))

    def report(line: str) -> None:
        if rank == 0:
            say(line)

    # What is wrong with the options, the last line's seed too, is said before anything is loaded.
    args.sampling = moss_min.read_sampling(args)
    require(args.batch > 0, f"--batch is {args.batch}; expected a whole number from 1 up")
    lines = read_manifest(args.manifest)
    shift_seed(args.sampling, max(line.number for line in lines.values()))
    args.out = common.as_target(args.out)
    folder = args.out.parent
    require(folder.is_dir(), f"{folder} is no folder; expected --out in one that is there")
    if rank == 0:
        start_run(args.out, lines, args)
    path = args.out
    if world > 1:
        path = args.out.with_name(f"{args.out.name}.part-{rank}")
        common.end_with_parent()
        dist.init_process_group("gloo")
        # The first process waits for the slowest. All take their lines of one merged file.
        everybody = dist.new_group(timeout=datetime.timedelta(days=365))
        dist.barrier(everybody)
    kept = {name for name, *_ in read_answers(args.out, lines)}
    left = [name for name in lines if name not in kept]
    own = {name: lines[name] for name in left[rank::world]}
    said = f"{len(kept)} of {len(lines)} lines are answered, {len(own)} are for this process"
    report(f"{args.out}: {said}")
    if own:
        change = lora_change(args.lora, args.model)
        device = own_device(args.device)
        model = MossAudio.from_pretrained(args.model, device, args.dtype, report, change)
        answer_all(model, own, path, args, rank)
    if world > 1:
        dist.barrier(everybody)
        dist.destroy_process_group()
    if rank == 0:
        failures = merge(args.out, lines)
        said = f"{len(failures)} of {len(lines)} lines are answered"
        report(f"{args.out}: {said}, {sum(failures.values())} with an error")
        good = len(failures) == len(lines)
        require(good, f"{args.out}: a part is missing; expected to be run again, alone")


# ---- command line ----


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = moss_min.Parser("batch.py", __doc__)
    add = parser.add_argument
    add("--manifest", type=Path, required=True, metavar="FILE", help="questions, in JSONL")
    add("--out", type=Path, required=True, metavar="FILE", help="answers; those in it are kept")
    add("--batch", type=int, default=8, metavar="N", help="lines answered together (%(default)s)")
    add("--retry-errors", action="store_true", help="answer again the lines that ended in an error")
    moss_min.add_model_options(parser)
    add_lora_option(parser)
    moss_min.add_sampling_options(parser)
    return moss_min.end("batch", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
