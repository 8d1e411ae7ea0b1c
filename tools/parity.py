"""Finds the first wrong number in a port of MOSS-Audio, and which known mistake made it.

    python tools/parity.py dump [AUDIO ...] -o reference.safetensors [--model FOLDER] ...
    python tools/parity.py compare reference.safetensors PORT [--model FOLDER] ...
    python tools/parity.py diagnose reference.safetensors PORT --model FOLDER ...

dump writes every stage of one greedy run. PORT holds a port's stages of the same run, all or some:
a .safetensors, an .npz, or a folder of .npy. compare says where it first differs; diagnose repeats
the run with known mistakes made until the port's numbers come out. Both exit with 0 if the two are
equal, 1 if they differ, and 2, with a line on stderr, if the input can't be used. tools/README.md
explains the others: weights and ids, which come before these three, and server, which comes after.
"""

import argparse
import hashlib
import json
import math
import platform
import struct
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prompts
import server
import weights
from common import our_name, read_names, say, whole
from decoding import ANSWER, common_count, greedy
from diagnose import (
    ANOTHER_SHAPE,
    TOLERANCES,
    Difference,
    Port,
    Search,
    Tolerance,
    Walk,
    failing,
    largest,
    measure,
    measure_ids,
    start,
    walk,
)
from encoder import HOP, STRIDE, load_audio, require
from mistakes import MISTAKES
from moss_min import TINY, MossAudio, Parser, end
from sample import Sampling
from stages import (
    HIDDEN,
    IDS,
    KINDS,
    Run,
    chunk_frames,
    chunk_tokens,
    compute,
    kind,
    layer_of,
    table,
)

# ---- dump ----

FORMAT = "moss-min parity"
VERSION = "2"
READ = ("1", "2")  # 1 has no step_logits and does not say when an answer ends
PLAIN = {"format", "version", "prompt", "dtype", "config"}  # the metadata that is not JSON
QUESTION = "Describe this audio."


def write(
    path: Path, metadata: dict[str, str], stages: Iterable[tuple[str, torch.Tensor]], count: int
) -> None:
    """Writes up to count stages as safetensors, one by one: the header's length in eight bytes, the
    header in JSON, raw data. Room for the header is left before the data and filled with spaces."""
    header = {"__metadata__": metadata}
    room = (len(json.dumps(metadata)) + 256 * count) // 8 * 8
    with whole(path) as part, open(part, "wb") as file:
        file.seek(8 + room)
        for name, x in stages:
            # All floats in float32, mel's bfloat16 values too: numpy has no bfloat16.
            type_name = "I32" if name in IDS else "F32"
            x = x.cpu().int() if name in IDS else x.cpu().float()
            begin = file.tell() - 8 - room
            file.write(x.contiguous().numpy())
            offsets = [begin, file.tell() - 8 - room]
            header[name] = {"dtype": type_name, "shape": [*x.shape], "data_offsets": offsets}
        file.seek(0)
        file.write(struct.pack("<Q", room) + json.dumps(header).encode().ljust(room))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def dump(args: argparse.Namespace) -> int:
    audio = args.audio
    text = args.prompt
    if text is None:
        audio = audio or [str(TINY / "telephone.wav")]
        text = QUESTION
    waves = [load_audio(name) for name in audio]
    if waves:
        warn_of_blind_spots([len(wave) // HOP for wave in waves])
    model = MossAudio.from_pretrained(args.model, args.device, args.dtype)
    prompt = model.prompt(text, waves, args.time_markers)
    run = Run(model, text, args.time_markers, len(waves))
    run.inside = opened(run, args.inside)
    names = [name for name in table(run) if name not in HIDDEN] + [*ANSWER]
    kept = chosen(names, args.stages.split(",") if args.stages else ["*"])
    sampling = Sampling(args.max_new_tokens)
    answers = [name for name in ANSWER if name in kept]
    if answers:
        sampling = model.fit(prompt, sampling)

    def stages() -> Iterator[tuple[str, torch.Tensor]]:
        given = {f"waveform.{i}": wave for i, wave in enumerate(waves)}
        left = set(kept) - set(answers)
        for name, x in compute(run, given):
            if name in left:
                yield name, x
                left.remove(name)
            if not left:
                break
        if answers:
            ids, rows = greedy(model, prompt, sampling.max_new_tokens)
            answer = {"step_logits": rows, "generated": ids}
            yield from [(name, answer[name]) for name in answers]

    versions = {"torch": torch.__version__, "numpy": np.__version__}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "prompt": text,
        "dtype": args.dtype,
        "time_markers": args.time_markers,
        "config": digest(Path(args.model, "config.json").read_bytes()),
        "sounds": [digest(wave.numpy().tobytes()) for wave in waves],
        "chunk_tokens": chunk_tokens(chunk_frames(run, *prompt.mels)).tolist(),
        "audio_ids": prompts.special_ids(model),
        "injected": len(run.merger_of_layer),
        "stop_ids": model.config.stop_ids,
        "max_new_tokens": sampling.max_new_tokens,
        "versions": {"python": platform.python_version(), **versions},
        "axes": {name: KINDS[kind(name)].axes for name in kept},
    }
    for key in metadata.keys() - PLAIN:
        metadata[key] = json.dumps(metadata[key])
    write(Path(args.out), metadata, stages(), len(kept))
    tokens = len(prompt.ids)
    print(f"{args.out}: {len(kept)} stages of a prompt of {tokens} tokens, in {args.dtype}")
    return 0


def opened(run: Run, wanted: str | None) -> frozenset[str]:
    """Returns the layers that --inside names, as the stages of their outputs."""
    known = {}
    for name in table(run):
        if kind(name) in ("encoder.layers", "decoder.layers"):
            known[name.replace(".layers", "")] = name
    layers = wanted.split(",") if wanted else []
    for layer in layers:
        require(layer in known, f"--inside: {layer} is none; expected of {', '.join(known)}")
    return frozenset(known[layer] for layer in layers)


def warn_of_blind_spots(frames: list[int]) -> None:
    """Says of clips of so many mel frames that some mistakes would change nothing in them."""
    if max(frames) <= 400:
        say("no clip is longer than 4 s, so mistakes about chunks change nothing")
    if all(count % 400 % STRIDE == 0 for count in frames):
        say("every clip is a multiple of 80 ms, so a tail that is not padded changes nothing")


def chosen(names: list[str], globs: list[str]) -> list[str]:
    """Returns the stages that --stages names, and what a reference can't do without."""
    for glob in globs:
        fits = any(fnmatchcase(name, glob) for name in names)
        require(fits, f"--stages: {glob} is none; expected of {', '.join(names)}")
    globs = [*globs, "waveform.*", "input_ids"]
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


# ---- the two files ----

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


@dataclass
class Reference:
    tensors: dict[str, torch.Tensor]
    metadata: dict


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors of a .safetensors, an .npz or a folder of .npy, and metadata."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        if path.is_dir():
            files = sorted(path.glob("*.npy"))
            arrays = {file.stem: np.load(file, allow_pickle=False) for file in files}
        else:
            require(path.suffix == ".npz", "expected a .safetensors, an .npz or a folder of .npy")
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        return {name: from_numpy(array) for name, array in arrays.items()}, {}
    # What a damaged file makes numpy and zipfile raise is of a dozen kinds.
    except Exception as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def from_numpy(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        # numpy knows of bfloat16 the size alone.
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind == "u":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def read_reference(path: Path) -> Reference:
    """Returns what dump wrote, its stages in their order."""
    tensors, metadata = read_tensors(path)
    expected = "expected that, and the port's behind it"
    known = metadata.get("format") == FORMAT
    require(known, f"{path} is not what `parity.py dump` writes; {expected}")
    version = metadata.get("version")
    message = f"{path} is of version {version}; expected {' or '.join(READ)}: dump it again"
    require(version in READ, message)
    try:
        for key in metadata.keys() - PLAIN:
            metadata[key] = json.loads(metadata[key])
        numbers = metadata["chunk_tokens"] + metadata["audio_ids"] + metadata.get("stop_ids", [])
        numbers += [metadata["injected"], metadata.get("max_new_tokens", 1)]
        good = all(type(x) is int for x in numbers) and 0 <= metadata["injected"] < 1000
        good = good and type(metadata["sounds"]) is list and len(metadata["audio_ids"]) == 3
        good = good and metadata["dtype"] in TOLERANCES
        good = good and metadata["time_markers"] in (None, False, True)
        good = good and {"prompt", "config"} <= metadata.keys()
        audio_id = metadata["audio_ids"][0]
        count = int((tensors["input_ids"] == audio_id).sum())
        chunks = metadata["chunk_tokens"]
        good = good and sum(chunks) == count and all(tokens > 0 for tokens in chunks)
        require(good, "a value of another kind than dump writes")
        for name in metadata["axes"]:
            axes = KINDS[kind(name)].axes.split(", ")
            require(tensors[name].ndim == len(axes), f"{name} has other axes than {axes}")
        return Reference({name: tensors[name] for name in metadata["axes"]}, metadata)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata is damaged ({error!r}): dump it again") from error


def read_port(path: Path, map_path: str | None) -> Port:
    """Returns a port's stages. map_path: the file of --names."""
    names = read_names(map_path)
    tensors = {}
    unknown = []
    for theirs, x in read_tensors(path)[0].items():
        name = our_name(theirs, names)
        if kind(name) not in KINDS:
            unknown.append(theirs)
            continue
        good = x.dtype in (INTEGERS if name in IDS else FLOATS) and x.numel() * x.ndim > 0
        expected = "integers" if name in IDS else "floats"
        require(good, f"{path}: {theirs} is {x.dtype} {[*x.shape]}; expected {expected}")
        require(name not in tensors, f"{path}: two of its tensors are {name}, by --names")
        tensors[name] = x.float() if x.dtype == torch.float64 else x
    found = f"none of its {len(unknown)} tensors ({', '.join(unknown[:3])}) has the name of a stage"
    require(tensors, f"{path}: {found}; expected some like encoder.layers.0, or --names")
    return Port(tensors, unknown)


# ---- what is compared ----


@dataclass
class Row:
    """A stage that is in both files."""

    name: str
    shape: list[int]
    expected: list[int]
    plain: Difference  # from the reference's stage
    rms: float  # of that, over the reference's
    cosine: float
    own: Difference | None  # its own error; None without a model

    @property
    def decides(self) -> Difference:
        return self.own or self.plain

    @property
    def ok(self) -> bool:
        return self.decides.ok


@dataclass
class Both:
    """The two files, what passes and, with a model, the run that the reference was dumped from."""

    reference: Reference
    port: Port
    tolerance: Tolerance
    run: Run | None = None
    begin: Walk | None = None  # the reference's stages
    walked: Walk | None = None  # the port's, with their own errors
    rows: list[Row] = ()


def open_both(args: argparse.Namespace) -> Both:
    require(args.rtol is None or args.rtol > 0, "--rtol: expected a number above 0")
    known = args.port_dtype is None or args.port_dtype in TOLERANCES
    require(known, f"--port-dtype is {args.port_dtype!r}; expected {', '.join(TOLERANCES)}")
    reference = read_reference(Path(args.reference))
    port = read_port(Path(args.port), args.names)
    shared = reference.tensors.keys() & port.tensors.keys()
    require(shared, "no stage is in both files; expected one at least")
    both = Both(reference, port, what_passes(reference, port, args))
    if args.model:
        metadata = reference.metadata
        same = digest(Path(args.model, "config.json").read_bytes()) == metadata["config"]
        found = f"{args.model}: its config.json is another than the reference's"
        require(same, f"{found}; expected the same checkpoint")
        model = MossAudio.from_pretrained(args.model, args.device, metadata["dtype"])
        clips = len(metadata["sounds"])
        both.run = Run(model, metadata["prompt"], metadata["time_markers"], clips)
        names = (*reference.tensors, *port.tensors)
        both.run.inside = frozenset(layer_of(name) for name in names if layer_of(name) != name)
        both.run.steps = any(name in port.tensors for name in ANSWER)
        both.run.max_new_tokens = metadata.get("max_new_tokens")
        if both.run.steps and "generated" not in reference.tensors:
            reference.tensors["generated"] = own_answer(both.run, reference)
        # The stages that the file lacks are computed.
        both.begin = start(both.run, reference.tensors)
        stages = {name: x for name, x in both.begin.own.items() if name not in HIDDEN}
        tensors = stages | reference.tensors
        if "generated" in tensors:
            tensors["generated"] = tensors.pop("generated")  # to the end
        both.reference = Reference(tensors, metadata)
    return both


def own_answer(run: Run, reference: Reference) -> torch.Tensor:
    """Returns the model's greedy ids, [n]."""
    waves = [x for name, x in reference.tensors.items() if kind(name) == "waveform"]
    prompt = run.model.prompt(run.text, waves, run.time_markers)
    most = run.max_new_tokens or 16
    return torch.tensor(list(run.model.generate(prompt, most, temperature=0)))


def what_passes(reference: Reference, port: Port, args: argparse.Namespace) -> Tolerance:
    """Returns the tolerance of the coarsest type in the run and in the port's file."""
    if args.rtol:
        return Tolerance(args.rtol, args.rtol, args.rtol)
    used = {args.port_dtype or reference.metadata["dtype"]}
    for name, x in port.tensors.items():
        if kind(name) != "mel":
            used.add(str(x.dtype).removeprefix("torch."))
    return [tolerance for dtype, tolerance in TOLERANCES.items() if dtype in used][-1]


def look(both: Both, port: Port) -> Both:
    """Compares a port's stages with the reference's."""
    walked = None
    if both.run:
        walked = walk(both.run, both.begin, port, both.tolerance)
    found = replace(both, port=port, walked=walked)
    found.rows = rows_of(found, walked)
    return found


def rows_of(both: Both, walked: Walk | None) -> list[Row]:
    """Returns the stages that are in both files, in order."""
    rows = []
    for name, ours in both.reference.tensors.items():
        if name not in both.port.tensors or name == "input_ids":
            continue
        shapes = [*both.port.tensors[name].shape], [*ours.shape]
        own = walked.errors[name] if walked else None
        if name == "generated":
            plain = own or judge_without_a_model(both)
            rows.append(Row(name, *shapes, plain, math.nan, math.nan, own))
            continue
        if name == "step_logits":
            ours = ours[: shared_steps(both)]
        x = both.port.fit(name, ours, both.reference.metadata["chunk_tokens"])
        if x is None:
            rows.append(Row(name, *shapes, ANOTHER_SHAPE, math.inf, math.nan, own))
        else:
            plain = measure(name, x, ours, both.tolerance)
            if name == "step_logits":
                ours = ours[: len(x)]
                plain = replace(plain, note=left_out(both, walked, *x.shape))
            rms, cosine = likeness(x, ours[-len(x) :])
            rows.append(Row(name, *shapes, plain, rms, cosine, own))
    return rows


def shared_steps(both: Both) -> int | None:
    """Returns how many steps port and reference have made after the same ids; None: all."""
    ours = both.reference.tensors.get("generated")
    theirs = both.port.tensors.get("generated")
    if ours is None or theirs is None:
        return None
    return 1 + common_count(ours.tolist(), theirs.flatten().tolist())


def left_out(both: Both, walked: Walk | None, steps: int, width: int) -> str:
    """Returns in words which of the port's step_logits [n, V] are not compared, if any."""
    if walked:
        steps = len(walked.own["step_logits"])
    if both.port.tensors["step_logits"].numel() <= steps * width:
        return ""
    goes_on = "the port's file has no ids for them" if walked else "--model goes on"
    return f"steps from {steps} on are not compared ({goes_on})"


def judge_without_a_model(both: Both) -> Difference:
    """Judges the port's ids by its own logits and, where the ids before are the same, by the
    reference's."""
    ours = both.reference.tensors
    widths = {x.shape[-1] for name, x in ours.items() if name in ("logits", "step_logits")}
    own = {}  # logits, [rows, V]
    for name in ("logits", "step_logits"):
        x = both.port.tensors.get(name)
        if x is not None and (not widths or x.shape[-1] in widths):
            own[name] = x.reshape(-1, x.shape[-1])
    rows = list(own.get("step_logits", own.get("logits", [])[-1:]))
    if "step_logits" in ours:
        rows += ours["step_logits"][len(rows) : shared_steps(both)]
    ids = both.port.tensors["generated"]
    metadata = both.reference.metadata
    ending = (metadata.get("stop_ids", ()), metadata.get("max_new_tokens"))
    found = measure_ids(ids, rows, both.tolerance, *ending, own.get("logits"))
    if len(rows) < ids.numel():
        unjudged = f"ids from step {len(rows)} on are not judged (--model judges them)"
        return replace(found, note="; ".join(filter(None, [found.note, unjudged])))
    return found


def likeness(x: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Returns the difference's root mean square, over the exact values', and the cosine."""
    x = x.double().flatten()
    exact = exact.to(x).flatten()
    rms = float((x - exact).norm()) / (float(exact.norm()) or 1.0)
    return rms, float(torch.cosine_similarity(x, exact, dim=0))


def with_rows(both: Both) -> Port:
    """Returns the port with DeepStack's rows added to its decoder layers' outputs, as if those had
    been recorded before."""
    port = both.port
    ours = both.reference.tensors
    metadata = both.reference.metadata
    tensors = dict(port.tensors)
    notes = dict(port.notes)
    for k in range(metadata["injected"]):
        layer = f"decoder.layers.{k}"
        name = f"deepstack.{k}"
        if layer not in tensors or layer not in ours or name not in ours:
            continue
        x = port.fit(layer, ours[layer], [])
        rows = port.fit(name, ours[name], []) if name in tensors else ours[name]
        if x is not None and rows is not None:
            tensors[layer] = x.float().clone()
            tensors[layer][ours["input_ids"] == metadata["audio_ids"][0]] += rows.float()
            notes[layer] = "recorded before the injection, now added: no mistake"
    return Port(tensors, port.unknown, notes)


def settle(both: Both) -> Both:
    """Compares, and finds out what decoder layers the port has recorded.

    If its layers are right once DeepStack's rows are added to them, they were recorded before that,
    as transformers' output_hidden_states is. But then what comes after the first of them has to be
    right, too, or the rows may never have been added."""
    found = look(both, both.port)
    names = [f"decoder.layers.{k}" for k in range(both.reference.metadata["injected"])]
    layers = [row for row in found.rows if row.name in names]
    if all(row.ok for row in layers):
        return found
    port = with_rows(both)
    name = layers[0].name
    right = found.walked.own[name] if found.walked else both.reference.tensors[name]
    x = port.fit(name, right, [])
    if x is None or not measure(name, x, right, both.tolerance).ok:
        return found
    other = look(both, port)
    decoder = ("decoder.layers", "final_norm", "logits")
    after = [row for row in other.rows if kind(row.name) in decoder]
    all_right = all(row.ok for row in after[: max(2, len(layers))])
    return other if all_right and len(after) > 1 else found


# ---- in words ----


def what_ids_are(reference: Reference) -> list[tuple[str, int]]:
    """Returns what each id of the reference's prompt is, and the number of its clip."""
    ids = reference.tensors["input_ids"].tolist()
    return prompts.what_ids_are(ids, reference.metadata["audio_ids"])


def prompt_difference(both: Both) -> tuple[int, str]:
    """Returns where two prompts that differ do so first, and in a sentence what that means."""
    ours = both.reference.tensors["input_ids"].tolist()
    theirs = both.port.tensors["input_ids"].flatten().tolist()
    return prompts.where_prompts_part(ours, theirs, both.reference.metadata["audio_ids"])


ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()


def which_chunk(reference: Reference, chunk: int) -> str:
    """Returns a chunk in words: its clip, if there are several, and which of the clip's it is."""
    clips = [clip for what, clip in what_ids_are(reference) if what == prompts.AUDIO_TOKEN]
    tokens = reference.metadata["chunk_tokens"]
    starts = np.cumsum([0, *tokens[:-1]])
    clip_of_chunk = [clips[start] for start in starts]
    clip = clip_of_chunk[chunk]
    number = clip_of_chunk[:chunk].count(clip)
    which = f"the {ORDINALS[number]} chunk" if number < len(ORDINALS) else f"chunk {number + 1}"
    return f"clip {clip}, its {which.removeprefix('the ')}" if clips[-1] > 1 else which


def since_when(name: str, since: int, reference: Reference) -> str:
    """Returns a stage's first differing row in words."""
    unit = KINDS[kind(name)].row
    said = f"from {unit} {since} on"
    clips = len(reference.metadata["sounds"])
    tokens = reference.metadata["chunk_tokens"]
    if unit == "token" and len(tokens) > 1:
        ends = np.cumsum(tokens)  # of the chunks
        where = "the first token of" if since in (0, *ends) else "in"
        chunk = int(np.searchsorted(ends, since, side="right"))
        said += f", {where} {which_chunk(reference, chunk)}"
    if unit == "chunk" and clips > 1:
        said += f", {which_chunk(reference, since)}"
    if unit in ("sample", "frame") and clips > 1:
        said += f", of clip {int(name.rpartition('.')[2]) + 1}"
    if unit == "position":
        what, clip = what_ids_are(reference)[since]
        said += f", {what}"
        if clips > 1 and clip:
            said += f" of clip {clip}"
    return said


def is_text_right(reference: Reference, rows: list[Row]) -> bool:
    """Tells whether, in a port with decoder stages alone, nothing differs before the sound."""
    ids = [what for what, _ in what_ids_are(reference)]
    first = next((row for row in rows if kind(row.name) != "waveform"), rows[0])
    if KINDS[kind(first.name)].row != "position" or prompts.AUDIO_TOKEN not in ids:
        return False
    since = first.decides.since
    whole = since is not None and first.shape == first.expected
    return whole and since >= ids.index(prompts.AUDIO_TOKEN)


def verdict(reference: Reference, rows: list[Row]) -> str:
    """Returns the first stage that differs and since when, and in further lines where to look."""
    wrong = [row for row in rows if not row.ok]
    if not wrong:
        return f"Equal: no difference in any of the {len(rows)} stages compared."
    row = wrong[0]
    of = KINDS[kind(row.name)]
    if is_another_sound(row):
        return f"{row.name} is another sound's: write the stages of the reference's own sound."
    if row.decides.where is None:
        said = f"{row.name} has another shape, {row.shape}, expected {row.expected} ({of.axes})"
        thirty_seconds = {375, 3000} & (set(row.shape) - set(row.expected))
        lines = [said + ("; 375 tokens, of 3000 frames, are 30 s." if thirty_seconds else ".")]
    elif row.name == "generated":
        lines = [f"generated is wrong at step {row.decides.since}: {row.decides.why}."]
    else:
        lines = [f"{row.name} differs {since_when(row.name, row.decides.since, reference)}."]
    lines.append(f"It is computed by {of.place}.")
    names = [name for name in reference.tensors if name != "input_ids"]
    i = rows.index(row)
    before = names.index(rows[i - 1].name) + 1 if i else 0
    between = listed(names[before : names.index(row.name)])
    if between:
        lines.append(f"Or it's what comes before it, which the port's file lacks: {between}.")
    if is_text_right(reference, rows):
        side = "suspect the encoder's side first, from the log-mel to DeepStack's rows"
        lines.append(f"All text rows before the first audio token are right: {side}.")
    if not row.own and any(other.plain.single_precision for other in rows):
        lines.append("It may come from mel in single precision alone: --model tells the two apart.")
    more = [other.name for other in wrong[1:]]
    if row.own and more:
        differ = "differs" if len(more) == 1 else "differ"
        lines.append(f"{len(more)} more {differ} by what they add themselves: {listed(more)}.")
    return "\n".join(lines)


# Stages that are computed from no tensor of the checkpoint.
WITHOUT_WEIGHTS = (*IDS, "waveform", "mel")
MISREAD = """The weights look misread: most stages are off by more than their own scale.
`parity.py weights FOLDER PORT.json` tells which tensors are not what is in the checkpoint.
"""


def weights_look_misread(rows: list[Row]) -> bool:
    """Tells whether three quarters of the stages with weights are off by more than their scale.

    Weights read in another type make all of them so, and from another place four fifths.
    """
    weighted = [row for row in rows if kind(row.name) not in WITHOUT_WEIGHTS]
    far = [row for row in weighted if row.plain.where is not None and row.plain.max_rel > 1]
    if len(weighted) < 3 or 4 * len(far) < 3 * len(weighted):
        return False
    # Of the known mistakes, sinusoids-interleaved comes to so many, too, but for the convolutions.
    return weighted[0].plain.max_rel > 0.1


def is_another_sound(row: Row) -> bool:
    """Tells whether a stage can only come from another sound than the reference's."""
    misshaped = row.decides.where is None
    if kind(row.name) == "waveform":
        return misshaped or row.cosine < 0.5
    # Of the known mistakes, one pads the sound to 30 s and one keeps the last frame.
    frames = row.expected[-1]
    return kind(row.name) == "mel" and misshaped and row.shape[-1] not in (3000, frames + 1)


def listed(names: Iterable[str]) -> str:
    """Returns names in words; of many of one kind, the first and the last."""
    groups = {}
    for name in names:
        groups.setdefault(kind(name), []).append(name)
    words = []
    for group in groups.values():
        words += group if len(group) < 3 else [f"{group[0]} to {group[-1]}"]
    return ", ".join(words)


def figure(x: float) -> str:
    return f"{x:.1e}" if x else "0"


def number(x: float) -> float | None:
    """JSON has no number that is not finite."""
    return x if math.isfinite(x) else None


# ---- compare ----


def compare(args: argparse.Namespace) -> int:
    both = open_both(args)
    ids = both.port.tensors.get("input_ids")
    ours = both.reference.tensors["input_ids"]
    first = since = None
    if ids is not None and not measure("input_ids", ids, ours, both.tolerance).ok:
        first = "input_ids"
        since, sentence = prompt_difference(both)
        sentence += "\nNothing else was compared."
    else:
        both = settle(both)
        sentence = verdict(both.reference, both.rows)
        wrong = [row for row in both.rows if not row.ok]
        if wrong:
            first = wrong[0].name
            since = wrong[0].decides.since
    misread = weights_look_misread(both.rows)
    nmse, cosine = logits_figures(both)
    if args.json:
        stages = [as_json(row) for row in both.rows]
        answer = {"equal": first is None, "first": first, "since": since, "stages": stages}
        answer["weights_look_misread"] = misread
        answer |= {"nmse": number(nmse), "worst_cosine": number(cosine)}
        print(json.dumps(answer))
    else:
        if misread:
            print(MISREAD)
        if both.rows:
            show(both)
        print(sentence)
        if first:
            print("`diagnose` tries which known mistake explains it.")
        if math.isfinite(nmse):
            print(f"logits: NMSE {figure(nmse)}, the worst token's cosine {cosine:.7f}")
    return int(first is not None)


def logits_figures(both: Both) -> tuple[float, float]:
    """Returns the logits' NMSE, the squared difference over the squared logits, and the cosine of
    the token where it is worst; NaN if they were not compared."""
    row = next((row for row in both.rows if row.name == "logits"), None)
    if row is None or row.plain.where is None:
        return math.nan, math.nan
    exact = both.reference.tensors["logits"]
    x = both.port.fit("logits", exact, []).double()
    exact = exact[-len(x) :].to(x)
    return row.rms**2, float(torch.cosine_similarity(x, exact, dim=1).min())


def as_json(row: Row) -> dict:
    plain = row.plain
    return {
        "name": row.name,
        "ok": row.ok,
        "max_abs": number(plain.max_abs),
        "max_rel": number(plain.max_rel),
        "rms": number(row.rms),
        "cosine": number(row.cosine),
        "row": plain.where[0] if plain.where else None,
        "own": number(row.own.max_rel) if row.own else None,
    }


def show(both: Both) -> None:
    """Prints the rows as a table, how the port's file was read, and what is not in it."""
    width = max(17, *(len(row.name) for row in both.rows))
    form = "{:" + str(width) + "} {:14} {:>8} {:>8} {:>8} {:>10} {:>12} {:>8}  {}"
    heads = ["stage", "shape", "max_abs", "max_rel", "rms", "cosine", "row,column", "own", ""]
    print(form.format(*heads).rstrip())
    for row in both.rows:
        plain = row.plain
        if plain.where is None:
            numbers = ["expected", "x".join(map(str, row.expected)), "", "", ""]
        elif row.name == "generated":
            numbers = ["", figure(plain.max_rel), "", "", ""]
        else:
            numbers = [figure(plain.max_abs), figure(plain.max_rel), figure(row.rms)]
            numbers += [f"{row.cosine:.7f}", ",".join(map(str, plain.where))]
        own = figure(row.own.max_rel) if row.own else ""
        ok = "DIFFERS"
        if row.ok:
            ok = "ok" if plain.ok else "ok by itself"
        print(form.format(row.name, "x".join(map(str, row.shape)), *numbers, own, ok))
    passes = f"\nWhat passes, over the stage's largest value: {both.tolerance.most:.1e}"
    if both.run:
        passes += f"; of own errors, where the port has all inputs, {both.tolerance.alone:.1e}"
    print(f"{passes}.")
    show_notes(both)
    reference = both.reference.tensors
    port = both.port.tensors
    if "generated" in reference and "generated" in port:
        ours = reference["generated"].tolist()
        theirs = port["generated"].flatten().tolist()
        same = common_count(ours, theirs)
        print(f"generated: of {len(ours)} ids the first {same} are the same.")
    if "input_ids" not in port:
        print("The port's prompt ids are taken to be the reference's.")
    lacking = listed(name for name in reference if name not in port)
    if lacking:
        print(f"Not compared, not in the port's file: {lacking}.")
    unknown = listed([name for name in port if name not in reference] + both.port.unknown)
    if unknown:
        print(f"Not compared, not in the reference: {unknown}.")


def show_notes(both: Both) -> None:
    """Prints how the port's file was read."""
    groups = {}
    notes = [*both.port.notes.items(), *[(row.name, row.plain.note) for row in both.rows]]
    for name, note in notes:
        if note:
            groups.setdefault(note, []).append(name)
    for note, names in groups.items():
        print(f"{listed(names)}: {note}.")


# ---- diagnose ----


def diagnose(args: argparse.Namespace) -> int:
    both = settle(open_both(args))
    found = Search(both.run, both.port, both.walked, both.tolerance)
    if failing(found.best) or len(found.best.mistakes) > 1:
        # Or it is fewer mistakes, with layers recorded before the injection.
        other = look(both, with_rows(both))
        nearer = Search(other.run, other.port, other.walked, other.tolerance)
        if rank(nearer.best) < rank(found.best):
            both = other
            found = nearer
    wrong = failing(both.walked)
    groups = [list(dict.fromkeys(wrong.id for wrong in group)) for group in found.alike]
    if args.json:
        answer = {
            "equal": not wrong,
            "mistakes": [ids[0] for ids in groups if len(ids) == 1],
            "ties": [ids for ids in groups if len(ids) > 1],
            "before": number(largest(both.walked)),
            "after": number(largest(found.best)),
        }
        print(json.dumps(answer))
        return int(bool(wrong))
    show_notes(both)
    if "input_ids" in wrong:
        print(prompt_difference(both)[1])
    else:
        print(verdict(both.reference, both.rows))
    if wrong:
        print()
        report(both, found, groups)
    return int(bool(wrong))


def rank(walked: Walk) -> tuple[int, int]:
    return len(failing(walked)), len(walked.mistakes)


def report(both: Both, found: Search, groups: list[list[str]]) -> None:
    """Prints which mistakes explain a port's numbers and how well, and what could tell more."""
    stages = table(both.run)
    missing = [name for name in stages if name not in both.port.tensors and name not in HIDDEN]
    left = failing(found.best)
    if groups:
        explain = "explains" if len(groups) == 1 else "explain"
        part = " a part of" if left else ""
        before = how_far(both.walked)
        after = how_far(found.best)
        shown = f"the largest difference falls from {before} to {after}"
        if before == after:
            shown = f"{len(left)} of {len(failing(both.walked))} stages that differ are left"
        names = " and ".join(" or ".join(ids) for ids in groups)
        print(f"{names} {explain}{part} it: {shown}.")
    else:
        known = {wrong.id for wrong in MISTAKES}
        print(f"None of the {len(known)} known mistakes explains it.")
    for ids, mistakes in zip(groups, found.alike):
        if len(ids) > 1:
            telling = [name for name in missing if any(w.touches(both.run, name) for w in mistakes)]
            could = f"; {listed(telling)} could" if telling else ""
            print(f"The port's stages can't tell these apart{could}.")
        for wrong in mistakes:
            said = f"{wrong.id}: {wrong.sentence}"
            print(textwrap.fill(said, 110, initial_indent="  ", subsequent_indent="    "))
    if left:
        first = next(name for name in both.reference.tensors if name in left)
        lacking = listed(x for x in stages[first].inputs if x in missing)
        if lacking:
            print(f"To come nearer, let the port write what {first} is computed from: {lacking}.")
    if left and groups:
        print(f"What is left: {verdict(both.reference, rows_of(both, found.best))}")


def how_far(walked: Walk) -> str:
    if math.isfinite(largest(walked)):
        return figure(largest(walked))
    wrong = failing(walked)
    if wrong == {"generated"}:
        return "another end"
    return "another prompt" if "input_ids" in wrong else "another shape"


# ---- command line ----

DEVICE = "auto (CUDA if there is one, else MPS, else the CPU), cuda, mps or cpu"
NAMES = '{"port\'s name": "our name"}, {i} standing for a number in both'
JSON = "print JSON alone"


def add_question(add: Callable, prompt: str | None) -> None:
    """Adds the options of what a model is asked. prompt: the default; None leaves it to dump."""
    add("audio", nargs="*", metavar="AUDIO", help="sound files, the clips of one prompt")
    add("--model", default=TINY, metavar="FOLDER", help="checkpoint folder (that in tiny/)")
    add("--prompt", default=prompt, metavar="TEXT", help=f"what to ask ({QUESTION})")


def add_no_time_markers(add: Callable) -> None:
    markers = "no seconds in the prompt"
    add("--no-time-markers", dest="time_markers", action="store_const", const=False, help=markers)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return end("parity", lambda: run_command(argv))


def run_command(argv: list[str] | None) -> int:
    parser = Parser("parity.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, prog="parity.py")

    def command(name: str, run: Callable, purpose: str) -> Callable:
        """Adds a command; returns the function that adds its options."""
        added = commands.add_parser(name, help=purpose)
        added.set_defaults(run=run)
        return added.add_argument

    add = command("dump", dump, "write every stage of a greedy run")
    add_question(add, prompt=None)
    add("-o", "--out", required=True, metavar="FILE", help="the reference, a .safetensors")
    dtypes = "of weights and arithmetic: float32 (the default), float16 or bfloat16"
    add("--dtype", default="float32", metavar="T", help=dtypes)
    add("--device", default="auto", metavar="D", help=DEVICE)
    count = "how many ids to generate, greedily (%(default)s)"
    add("--max-new-tokens", type=int, default=16, metavar="N", help=count)
    add_no_time_markers(add)
    layers = "inside these layers, too (norm, q, k, v, attention, MLP): encoder.0,decoder.3"
    add("--inside", metavar="LAYER,...", help=layers)
    globs = "only these, besides the sound and the prompt's ids: encoder.*,logits"
    add("--stages", metavar="GLOB,...", help=globs)

    for run, purpose in (
        (compare, "say where a port first differs"),
        (diagnose, "say which known mistake explains it"),
    ):
        add = command(run.__name__, run, purpose)
        add("reference", metavar="REFERENCE", help="what dump wrote")
        files = "the port's stages: a .safetensors, an .npz, or a folder of .npy"
        add("port", metavar="PORT", help=files)
        own = "checkpoint folder, for stages' own errors"
        add("--model", required=run is diagnose, metavar="FOLDER", help=own)
        add("--device", default="auto", metavar="D", help=DEVICE)
        dtypes = "what the port computes in (as the reference): float32, float16 or bfloat16"
        add("--port-dtype", metavar="T", help=dtypes)
        passes = "what passes, over a stage's largest value (depends on the dtype)"
        add("--rtol", type=float, metavar="X", help=passes)
        add("--names", metavar="MAP.json", help=NAMES)
        add("--json", action="store_true", help=JSON)

    add = command("weights", weights.run, "say whether a port has read the weights right")
    add("folder", metavar="FOLDER", help="checkpoint folder")
    add("port", nargs="?", metavar="PORT.json", help="a port's sums, as --json prints them")
    add("--names", metavar="MAP.json", help=NAMES)
    add("--json", action="store_true", help=JSON)

    add = command("ids", prompts.show_ids, "print a prompt's ids, without loading weights")
    add_question(add, QUESTION)
    add_no_time_markers(add)
    add("--json", action="store_true", help=JSON)

    add = command("server", server.run, "say whether a server answers as the model does")
    add("url", metavar="URL", help="http://localhost:8000, with or without /v1")
    add_question(add, QUESTION)
    add("--name", metavar="MODEL", help="which of the server's models (the first)")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="(%(default)s)")
    dtypes = "what it computes in: float32 (the default), float16 or bfloat16"
    add("--server-dtype", default="float32", metavar="T", help=dtypes)
    add("--device", default="auto", metavar="D", help=DEVICE)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
