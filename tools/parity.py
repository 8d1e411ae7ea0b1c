"""Finds the first wrong number in a port of MOSS-Audio and, if it's a known mistake that made it, says which.

    python tools/parity.py dump [AUDIO ...] -o reference.safetensors [--model FOLDER] [--prompt TEXT] [--dtype T] ...
    python tools/parity.py compare reference.safetensors PORT [--model FOLDER] [--port-dtype T] [--rtol X] ...
    python tools/parity.py diagnose reference.safetensors PORT --model FOLDER ...

dump writes every stage of one greedy run. PORT is a port's stages of the same run, all or some: a .safetensors, an
.npz, or a folder of .npy. compare says where it first differs; diagnose repeats the run with known mistakes made (see
mistakes.py) until the port's numbers come out. Both exit with 0 if the two are equal, 1 if they differ, and 2, with a
line on stderr, if the input can't be used.

A stage's own error is its difference from what the reference makes of the port's stages before it (of its own, where
the port's file has none). So one wrong stage doesn't make all after it look wrong, a second mistake is found behind the
first, and rounding that came in earlier is held against no one. Shapes: A audio tokens, N prompt tokens, D width."""

import argparse, hashlib, json, math, os, platform, re, struct, sys, textwrap, zipfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from encoder import load_audio, require
from mistakes import (
    HIDDEN,
    MISTAKES,
    Mistake,
    Run,
    chunk_frames,
    chunk_tokens,
    compute,
    is_audio,
    table,
    touches,
)
from moss_min import SAMPLE, TINY, MossAudio

KINDS = {  # a stage without its number -> its axes, what a row of it is, where it is computed
    "waveform": ("samples", "sample", "load_audio in encoder.py"),
    "mel": ("mel bands, frames", "frame", "log_mel in encoder.py"),
    "encoder.conv": (
        "chunks, channels, mel bands, frames",
        "chunk",
        "AudioEncoder.stem in encoder.py",
    ),
    "encoder.stem": ("audio tokens, encoder width", "token", "AudioEncoder.stem in encoder.py"),
    "encoder.layers": ("audio tokens, encoder width", "token", "EncoderLayer in encoder.py"),
    "encoder": (
        "audio tokens, output width",
        "token",
        "the end of AudioEncoder.forward in encoder.py",
    ),
    "adapter": ("audio tokens, decoder width", "token", "GatedMLP in adapter.py"),
    "deepstack": (
        "audio tokens, decoder width",
        "token",
        "AudioEncoder.tap in encoder.py, GatedMLP in adapter.py",
    ),
    "input_ids": ("prompt tokens", "position", "MossAudio.prompt_ids in moss_min.py"),
    "inputs_embeds": ("prompt tokens, decoder width", "position", "splice in adapter.py"),
    "decoder.layers": (
        "prompt tokens, decoder width",
        "position",
        "DecoderLayer and inject in qwen3.py",
    ),
    "final_norm": ("prompt tokens, decoder width", "position", "Qwen3.norm in qwen3.py"),
    "logits": ("prompt tokens, vocabulary", "position", "MossAudio.lm_head in moss_min.py"),
    "generated": ("new tokens", "position", "generate in sample.py"),
}
IDS = "input_ids", "generated"
# What passes, over a stage's largest value. Of right runs (upstream's in tests/golden and those of tests/port.py on
# its sounds, in each type against references in all three) the largest difference was 1.1e-6 in float32, 2.9e-3 in
# float16, 2.1e-2 in bfloat16. An own error that is of one stage alone, since the port's file has all that it's computed
# from, came to 5e-7, 1.5e-3 and 1.1e-2; with sums as wide as the 8B's, added one by one in float32, to 2e-6. Mel is
# computed in float32 whatever the run's type; in a bfloat16 run it's as well rounded later, which is half a step.
Tolerance = namedtuple("Tolerance", "most alone mel")
TOLERANCES = {
    "float32": Tolerance(1e-5, 5e-6, 1e-5),
    "float16": Tolerance(5e-3, 2.5e-3, 1e-5),
    "bfloat16": Tolerance(4e-2, 2e-2, 4e-3),
}  # from fine to coarse


def kind(name: str) -> str:
    """A stage's name without its number: encoder.layers.3 is one of encoder.layers."""
    return re.sub(r"\.?\d+$", "", name)


# ---- dump ----
FORMAT, VERSION = "moss-min parity", "1"
PLAIN = "format", "version", "prompt", "dtype", "config"  # what in the metadata is no JSON
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32"}  # safetensors' names


def write(
    path: Path, metadata: dict[str, str], stages: Iterator[tuple[str, torch.Tensor]], count: int
) -> None:
    """Writes up to `count` stages in safetensors, each as it comes: the header's length in eight bytes, the header in
    JSON, raw data. Room for the header is left before the data, and its rest filled with spaces."""
    entries, end = {"__metadata__": metadata}, 0
    room = (len(json.dumps(metadata)) + 256 * count) // 8 * 8
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.seek(8 + room)
            for name, x in stages:
                x = x.int() if name in IDS else x.bfloat16() if kind(name) == "mel" else x.float()
                begin, end = end, end + x.numel() * x.element_size()
                entries[name] = {
                    "dtype": STORED[x.dtype],
                    "shape": [*x.shape],
                    "data_offsets": [begin, end],
                }
                file.write(
                    (x.view(torch.int16) if x.dtype == torch.bfloat16 else x)
                    .contiguous()
                    .cpu()
                    .numpy()
                )
            file.seek(0)
            file.write(struct.pack("<Q", room) + json.dumps(entries).encode().ljust(room))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def dump(args: argparse.Namespace) -> int:
    audio = args.audio or [str(SAMPLE)] * (args.prompt is None)
    text = "Describe this audio." if args.prompt is None else args.prompt
    waves = [load_audio(name) for name in audio]
    model = MossAudio.from_pretrained(args.model, args.device, args.dtype)
    prompt, run = (
        model.prompt(text, waves, args.time_markers),
        Run(model, text, args.time_markers, len(waves)),
    )
    names = [*(name for name in table(run) if name not in HIDDEN), "generated"]
    globs = args.stages.split(",") if args.stages else ["*"]
    unknown = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]
    require(not unknown, f"--stages: {', '.join(unknown)} is none; expected of {', '.join(names)}")
    globs += ["waveform.*", "input_ids"]
    kept = [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]

    def stages():
        left = set(kept) - {"generated"}
        for name, x in compute(run, {f"waveform.{i}": wave for i, wave in enumerate(waves)}):
            if name in left:
                yield name, x
            if not (left := left - {name}):
                break
        if "generated" in kept:
            yield (
                "generated",
                torch.tensor([*model.generate(prompt, args.max_new_tokens, temperature=0)]),
            )

    config = model.config.adapter
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "prompt": text,
        "dtype": args.dtype,
        "time_markers": args.time_markers,
        "config": digest(Path(args.model, "config.json").read_bytes()),
        "sounds": [digest(wave.numpy().tobytes()) for wave in waves],
        "chunk_tokens": chunk_tokens(chunk_frames(run, *prompt.mels)).tolist(),
        "audio_ids": [config.audio_token_id, config.audio_start_id, config.audio_end_id],
        "injected": len(run.injected),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "axes": {name: KINDS[kind(name)][0] for name in kept},
    }
    metadata = {
        key: value if key in PLAIN else json.dumps(value) for key, value in metadata.items()
    }
    write(Path(args.out), metadata, stages(), len(kept))
    print(
        f"{args.out}: {len(kept)} stages of a prompt of {len(prompt.ids)} tokens, in {args.dtype}"
    )
    return 0


# ---- the two files ----
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
INTEGERS = torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8
Reference = namedtuple("Reference", "tensors metadata")


def from_numpy(array: np.ndarray) -> torch.Tensor:
    if (
        array.dtype.kind == "V" and array.dtype.itemsize == 2
    ):  # bfloat16, of which numpy has the size alone
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(
        array.astype(np.int64 if array.dtype.kind == "u" else array.dtype.newbyteorder("="))
    )


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a .safetensors, an .npz or a folder of .npy, and the metadata of the first."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        if path.is_dir():
            arrays = {
                file.stem: np.load(file, allow_pickle=False) for file in sorted(path.glob("*.npy"))
            }
        else:
            require(path.suffix == ".npz", "expected a .safetensors, an .npz or a folder of .npy")
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        return {name: from_numpy(array) for name, array in arrays.items()}, {}
    except (OSError, EOFError, TypeError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def read_reference(path: Path) -> Reference:
    tensors, metadata = read_tensors(path)
    known = metadata.get("format") == FORMAT
    require(
        known,
        f"{path} is not what `parity.py dump` writes; expected that, and the port's behind it",
    )
    version = metadata.get("version")
    require(
        version == VERSION, f"{path} is of version {version}; expected {VERSION}: dump it again"
    )
    try:
        metadata = {
            key: value if key in PLAIN else json.loads(value) for key, value in metadata.items()
        }
        return Reference(
            {name: tensors[name] for name in metadata["axes"]}, metadata
        )  # in their order
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata is damaged ({error!r}): dump it again") from error


def our_name(theirs: str, names: dict[str, str]) -> str:
    """A port's name as ours, by the first entry of --names that it fits; {i} stands for a number."""
    for pattern, ours in names.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)", 1), theirs)
        if match:
            return ours.replace("{i}", "".join(match.groups()))
    return theirs


def read_port(path: Path, names: str | None):
    try:
        patterns = json.loads(Path(names).read_bytes()) if names else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{names} can't be read: {error}") from error
    good = isinstance(patterns, dict) and all(isinstance(ours, str) for ours in patterns.values())
    require(good, f'{names}: expected an object, {{"port\'s name": "our name"}}')
    tensors, unknown = {}, []
    for theirs, x in read_tensors(path)[0].items():
        name = our_name(theirs, patterns)
        if kind(name) not in KINDS:
            unknown.append(theirs)
            continue
        wanted, expected = (INTEGERS, "integers") if name in IDS else (FLOATS, "floats")
        require(
            x.dtype in wanted and x.numel(),
            f"{path}: {theirs} is {x.dtype} {[*x.shape]}; expected {expected}",
        )
        require(name not in tensors, f"{path}: two of its tensors are {name}, by --names")
        tensors[name] = x.float() if x.dtype == torch.float64 else x
    require(
        tensors,
        f"{path}: none of its {len(unknown)} tensors ({', '.join(unknown[:3])}) has the name of a stage; "
        "expected some like encoder.layers.0, or --names",
    )
    return Port(tensors, unknown, {})


class Port:
    """A port's stages by our names, as they are in its file, and notes of how they were read."""

    def __init__(self, tensors: dict[str, torch.Tensor], unknown: list[str], notes: dict[str, str]):
        self.tensors, self.unknown, self.notes, self.fitted, self.held = (
            tensors,
            unknown,
            notes,
            {},
            {},
        )

    def fit(self, name: str, ours: torch.Tensor, tokens: list[int]) -> torch.Tensor | None:
        """A stage in the shape of ours (of logits, maybe their last row), or None: nothing is cut to fit. If two of its
        layouts have that shape it's the nearer one. tokens: those of each chunk."""
        key = name, ours.shape
        if key not in self.fitted:
            found = list(layouts(name, self.tensors[name], ours, tokens)) or [(None, "")]
            if len(found) > 1:
                found.sort(
                    key=lambda layout: float(
                        (layout[0].to(ours) - ours).double().norm().nan_to_num(math.inf)
                    )
                )
            self.fitted[key], note = found[0]
            if note:
                self.notes[name] = note
        return self.fitted[key]

    def go_on(
        self, run: Run, name: str, ours: torch.Tensor, theirs: torch.Tensor | None
    ) -> torch.Tensor:
        """What later stages are computed from: the port's stage if it fits, as the model holds it, or else ours. A
        prompt's ids need no fit, but as many places for sound."""
        if name == "input_ids":
            ids = self.tensors[name].flatten()
            usable = ids.min() >= 0 and ids.max() < run.model.config.decoder.vocab_size
            theirs = (
                ids if usable and is_audio(run, ids).sum() == is_audio(run, ours).sum() else None
            )
        if theirs is None:
            return ours
        if (
            name,
            theirs.shape,
        ) not in self.held:  # the same object each time, so that a change can be told
            self.held[name, theirs.shape] = held(run, name, theirs)
        return self.held[name, theirs.shape]


def held(run: Run, name: str, x: torch.Tensor) -> torch.Tensor:
    """A stage out of a file as the model holds it."""
    weight = run.model.lm_head.weight
    if kind(name) in ("waveform", "mel"):
        return x.float()
    return x.long().to(weight.device) if name in IDS else x.to(weight)


def layouts(
    name: str, x: torch.Tensor, ours: torch.Tensor, tokens: list[int]
) -> Iterator[tuple[torch.Tensor, str]]:
    """A stage in every layout of it that has our shape, each with what was done in words."""
    orders = {
        2: [(1, 0)],
        3: [(0, 2, 1)],
        4: [(0, 3, 1, 2), (0, 1, 3, 2), (0, 3, 2, 1)],
    }  # 4: channels last, or turned
    views = [(x, [])]
    while views[-1][0].ndim > ours.ndim and len(views[-1][0]) == 1:
        views.append((views[-1][0][0], ["read without its leading axis"]))
    if name == "logits" and x.ndim == 1:
        views = [(x[None], [])]
    views += [
        (y.permute(order), [*said, "read transposed"])
        for y, said in views
        for order in orders.get(y.ndim, [])
    ]
    for y, said in views:
        if y.shape == ours.shape:
            yield y, ", ".join(said)
        elif name == "logits" and y.shape == ours[-1:].shape:
            yield y, ", ".join([*said, "of the last position alone"])
        elif (
            kind(name) in ("encoder.stem", "encoder.layers", "encoder")
            and y.ndim == 3
            and len(y) == len(tokens)
        ):
            if (
                y.shape[1] >= max(tokens)
                and y.shape[2] == ours.shape[1]
                and sum(tokens) == len(ours)
            ):
                real = torch.arange(y.shape[1]) < torch.tensor(tokens)[:, None]
                yield (
                    y[real],
                    ", ".join([*said, "read as [chunks, tokens, width], without the padding"]),
                )


# ---- one stage ----
Difference = namedtuple("Difference", "ok max_abs max_rel rms cosine where since note")
ANOTHER_SHAPE = Difference(False, math.inf, math.inf, math.inf, math.nan, None, None, "")


def single_precision(x: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether a log-mel was computed in float32 and then rounded to bfloat16, but is right: a few values are a step
    off (or, near 0, where a step is smaller than float32's errors, by some)."""
    step = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 8).clamp(min=1e-5)
    off = (x - exact).abs()
    return bool(
        torch.equal(x, x.bfloat16().float())
        and (off <= step).all()
        and (off > 0).float().mean() < 5e-3
    )


def measure(
    name: str, x: torch.Tensor, exact: torch.Tensor, tolerance: Tolerance, alone=False
) -> Difference:
    """A port's stage against what it should be. Rows are along the first axis; of mel they are the frames."""
    rtol = tolerance.mel if kind(name) == "mel" else tolerance.alone if alone else tolerance.most
    if name in IDS:
        same = torch.equal(x.long().flatten(), exact.long().cpu())
        return Difference(True, 0.0, 0.0, 0.0, 1.0, None, None, "") if same else ANOTHER_SHAPE
    above, note = len(exact) - len(x), ""  # rows that the port leaves out, of logits
    x, exact = x.float(), exact[above:].to(x.device).float()
    if kind(name) == "mel":
        x, exact = x.T, exact.T
        if not torch.equal(x, x.bfloat16().float()):
            note = "not rounded to bfloat16"
        elif 0 < (count := int((x != exact).sum())) and single_precision(x, exact):
            note = f"{count} values a bfloat16 step off, as where it's computed in single precision: no mistake"
    off = (x - exact).abs().nan_to_num(math.inf, math.inf).reshape(len(x), -1)
    largest, scale = float(off.max()), float(exact.abs().max()) or 1.0
    bad = off.amax(1) > rtol * scale
    ok = not bad.any() or note.endswith("no mistake")
    dot, squares, rest = (
        float(y.sum(dtype=torch.float64)) for y in (x * exact, exact.square(), (x - exact).square())
    )
    norms = math.sqrt(squares * float(x.square().sum(dtype=torch.float64)))
    rms, cosine = math.sqrt(rest / (squares or 1.0)), dot / (norms or 1.0)
    where = [int(i) for i in np.unravel_index(int(off.argmax()), x.shape)]
    where[0] += above
    since = None if ok else above + int(bad.int().argmax())
    return Difference(ok, largest, largest / scale, rms, cosine, where, since, note)


# ---- a stage's own error ----
Walk = namedtuple(
    "Walk", "mistakes own values errors"
)  # own: what the reference makes, with some mistakes, of the
# port's stages before each; values: what it goes on from, the port's stages or own; errors: the port's stages to own


def start(run: Run, reference: Reference) -> Walk:
    """The reference's stages; those that its file lacks are computed."""
    own = dict(compute(run, {name: held(run, name, x) for name, x in reference.tensors.items()}))
    return Walk((), own, own, {})


@torch.no_grad()
def walk(
    run: Run, before: Walk, port: Port, tolerance: Tolerance, *mistakes: Mistake
) -> Walk | None:
    """Goes on from another walk by making more mistakes; what they don't change is not computed again. None if a stage
    agreed before and does not any more: what spoils a right stage is not the port's mistake."""
    own, values, errors = dict(before.own), dict(before.values), dict(before.errors)
    ports = {
        "input_ids",
        *(name for name in own if kind(name) == "waveform"),
    }  # what brings in no rounding of ours
    with ExitStack() as stack:
        for wrong in sorted(
            (*before.mistakes, *mistakes), key=MISTAKES.index
        ):  # some go on from those above them
            stack.enter_context(wrong.make(run))
        for name, stage in table(run).items():
            changed = any(values[x] is not before.values[x] for x in stage.inputs)
            if changed or any(touches(wrong, run, name) for wrong in mistakes):
                x, last = stage.compute(*(values[x] for x in stage.inputs)), before.own[name]
                own[name] = last if x.shape == last.shape and torch.equal(x, last) else x
            values[name], alone = own[name], ports.issuperset(stage.inputs)
            if name in port.tensors:
                tokens = chunk_tokens(values["frames"]).tolist() if "frames" in values else []
                theirs = port.fit(name, own[name], tokens)
                values[name] = port.go_on(run, name, own[name], theirs)
                if own[name] is not before.own[name] or name not in errors:
                    error = (
                        ANOTHER_SHAPE
                        if theirs is None
                        else measure(name, theirs, own[name], tolerance, alone)
                    )
                    if name in errors and errors[name].ok and not error.ok:
                        return None
                    errors[name] = error
            if values[name] is not own[name] or name in HIDDEN and alone:
                ports.add(name)
    return Walk((*before.mistakes, *mistakes), own, values, errors)


# ---- compare ----
Row = namedtuple("Row", "name shape expected plain own")  # Differences; own is None without a model


def decides(row: Row) -> Difference:
    return row.own or row.plain


def what_passes(reference: Reference, port: Port, args: argparse.Namespace) -> Tolerance:
    """By the coarser of the run's type and the file's."""
    used = {
        str(x.dtype).removeprefix("torch.")
        for name, x in port.tensors.items()
        if kind(name) != "mel"
    }
    coarsest = [
        name
        for name in TOLERANCES
        if name in used | {args.port_dtype or reference.metadata["dtype"]}
    ][-1]
    return Tolerance(*[args.rtol] * 3) if args.rtol else TOLERANCES[coarsest]


def rows_of(
    reference: Reference, port: Port, tolerance: Tolerance, walked: Walk | None
) -> list[Row]:
    """The stages that are in both files, in order."""
    rows = []
    for name, ours in reference.tensors.items():
        if name in port.tensors and name not in IDS:
            x = port.fit(name, ours, reference.metadata["chunk_tokens"])
            plain = ANOTHER_SHAPE if x is None else measure(name, x, ours, tolerance)
            shapes = [*port.tensors[name].shape], [*ours.shape]
            rows.append(Row(name, *shapes, plain, walked and walked.errors[name]))
    return rows


def with_rows(reference: Reference, port: Port) -> Port:
    """The port, with DeepStack's rows added to its decoder layers' outputs, as if those had been recorded before."""
    ours, metadata = reference.tensors, reference.metadata
    tensors, notes = dict(port.tensors), dict(port.notes)
    for k in range(metadata["injected"]):
        layer, name = f"decoder.layers.{k}", f"deepstack.{k}"
        if layer in tensors and {layer, name} <= ours.keys():
            x = port.fit(layer, ours[layer], [])
            rows = port.fit(name, ours[name], []) if name in tensors else ours[name]
            if x is not None and rows is not None:
                tensors[layer], notes[layer] = (
                    x.float().clone(),
                    "recorded before the injection, now added: no mistake",
                )
                tensors[layer][ours["input_ids"] == metadata["audio_ids"][0]] += rows.float()
    return Port(tensors, port.unknown, notes)


Found = namedtuple("Found", "port rows walked")


def look(
    reference: Reference, port: Port, tolerance: Tolerance, run: Run | None, begin: Walk | None
) -> Found:
    walked = walk(run, begin, port, tolerance) if run else None
    return Found(port, rows_of(reference, port, tolerance, walked), walked)


def settle(
    reference: Reference, port: Port, tolerance: Tolerance, run: Run | None, begin: Walk | None
) -> Found:
    """What a port's stages are against the reference's. If its decoder layers are right once DeepStack's rows are added
    to them, they were recorded before that, as transformers' output_hidden_states is. But then what comes after the
    first of them has to be right, too, or they may never have been added."""
    found = look(reference, port, tolerance, run, begin)
    layers = [f"decoder.layers.{k}" for k in range(reference.metadata["injected"])]
    layers = [layer for layer in layers if layer in port.tensors]
    if any(row.name in layers and not decides(row).ok for row in found.rows):
        other, right = (
            with_rows(reference, port),
            found.walked.own if found.walked else reference.tensors,
        )
        x = other.fit(layers[0], right[layers[0]], [])
        if x is not None and measure(layers[0], x, right[layers[0]], tolerance).ok:
            other = look(reference, other, tolerance, run, begin)
            after = [
                row
                for row in other.rows
                if kind(row.name) in ("decoder.layers", "final_norm", "logits")
            ]
            if len(after) > 1 and all(decides(row).ok for row in after[: max(2, len(layers))]):
                return other
    return found


def what_ids_are(ids: list[int], audio_ids: list[int]) -> list[str]:
    """What each of a prompt's ids is, in words."""
    (audio, begin, end), words, inside = audio_ids, [], False
    for i in ids:
        inside = i == begin or inside and i != end
        words.append(
            "an audio token"
            if i == audio
            else "a clip's start"
            if i == begin
            else "a clip's end"
            if i == end
            else "a time marker"
            if inside
            else "text"
        )
    return words


def prompt_difference(reference: Reference, port: Port) -> tuple[int, str]:
    """Where two prompts that differ do so first, and in a sentence what that means."""
    ours, theirs = (
        reference.tensors["input_ids"].tolist(),
        port.tensors["input_ids"].flatten().tolist(),
    )
    audio = reference.metadata["audio_ids"][0]
    words, expected, count = (
        what_ids_are(ours, reference.metadata["audio_ids"]),
        ours.count(audio),
        theirs.count(audio),
    )
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs))
    )
    there, here = (str((*ids, "nothing")[at]) for ids in (theirs, ours))
    if expected and not count:
        means = (
            f"there is no audio token, {audio}: the placeholder was read as text, or has another id"
        )
    elif count != expected:
        means = (
            f"there are {count} audio tokens, expected {expected}: the log-mel is of another length"
        )
        means += " (375 are 30 s: the sound was padded)" if count == 375 else ""
    elif theirs == [i for i, word in zip(ours, words) if word != "a time marker"]:
        means = "the time markers are missing, the seconds in digits after every 25 audio tokens"
    elif words[at : at + 1] == ["a time marker"]:
        means = "the time markers are others, the seconds in digits after every 25 audio tokens"
    else:
        means = "the text is another, or was cut otherwise (the stretches around a clip are tokenized each on its own)"
    what = f", {words[at]}" if at < len(ours) else ""
    return at, (
        f"The prompts differ from position {at} on ({there}, expected {here}{what}; {len(theirs)} ids in all, "
        f"expected {len(ours)}): {means}."
    )


ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
)


def since_when(name: str, since: int, reference: Reference) -> str:
    """A stage's first differing row in words."""
    unit, tokens = KINDS[kind(name)][1], reference.metadata["chunk_tokens"]
    said = f"from {unit} {since} on"
    if unit == "token" and len(tokens) > 1:
        chunk = int(np.searchsorted(np.cumsum(tokens), since, side="right"))
        which = f"the {ORDINALS[chunk]} chunk" if chunk < len(ORDINALS) else f"chunk {chunk + 1}"
        said += f", {'the first token of' if since == sum(tokens[:chunk]) else 'in'} {which}"
    if unit == "position":
        words = what_ids_are(
            reference.tensors["input_ids"].tolist(), reference.metadata["audio_ids"]
        )
        said += f", {words[since]}" if since < len(words) else ""
    return said


def verdict(reference: Reference, rows: list[Row]) -> str:
    """The first stage that differs and since when; and in further lines where to look."""
    wrong = [row for row in rows if not decides(row).ok]
    if not wrong:
        return f"Equal: no difference in any of the {len(rows)} stages compared."
    row, difference = wrong[0], decides(wrong[0])
    axes, _, place = KINDS[kind(row.name)]
    if difference.where is None:
        said = [
            f"{row.name} has another shape, {row.shape}, expected {row.expected} ({axes})"
            + (
                "; 375 tokens, of 3000 frames, are 30 s."
                if {375, 3000} & {*row.shape} - {*row.expected}
                else "."
            )
        ]
    else:
        said = [f"{row.name} differs {since_when(row.name, difference.since, reference)}."]
    said += [f"It is computed by {place}."]
    names, i = [name for name in reference.tensors if name not in IDS], rows.index(row)
    between = names[names.index(rows[i - 1].name) + 1 if i else 0 : names.index(row.name)]
    if between:
        said += [f"Or it's what comes before it, which the port's file lacks: {listed(between)}."]
    if not row.own and any("no mistake" in row.plain.note for row in rows):
        said += [
            "It may be no more than what mel in single precision does to it: --model tells the two apart."
        ]
    if row.own and wrong[1:]:
        names = [row.name for row in wrong[1:]]
        said += [
            f"{len(names)} more differ{'s' * (len(names) == 1)} by what they add themselves: {listed(names)}."
        ]
    return "\n".join(said)


def listed(names) -> str:
    """Names in words; of many of one kind, the first and the last."""
    groups = {}
    for name in names:
        groups.setdefault(kind(name), []).append(name)
    return ", ".join(
        ", ".join(group) if len(group) < 3 else f"{group[0]} to {group[-1]}"
        for group in groups.values()
    )


def figure(x: float) -> str:
    return f"{x:.1e}" if x else "0"


def show_notes(port: Port, rows: list[Row]) -> None:
    notes = {}
    for name, note in [
        *port.notes.items(),
        *((row.name, row.plain.note) for row in rows if row.plain.note),
    ]:
        notes.setdefault(note, []).append(name)
    for note, names in notes.items():
        print(f"{listed(names)}: {note}.")


def show(reference: Reference, port: Port, rows: list[Row], tolerance: Tolerance) -> None:
    """The rows as a table, and beneath it how the port's file was read and what is not in it."""
    form = "{:17} {:14} {:>8} {:>8} {:>8} {:>10} {:>12} {:>8}  {}"
    print(
        form.format(
            "stage", "shape", "max_abs", "max_rel", "rms", "cosine", "row,column", "own", ""
        ).rstrip()
    )
    for name, shape, expected, plain, own in rows:
        numbers = [figure(x) for x in plain[1:4]] + [
            f"{plain.cosine:.7f}",
            ",".join(map(str, plain.where or [])),
        ]
        if plain.where is None:
            numbers = ["expected", "x".join(map(str, expected)), "", "", ""]
        ok = "DIFFERS" if not (own or plain).ok else "ok" if plain.ok else "ok by itself"
        print(
            form.format(
                name, "x".join(map(str, shape)), *numbers, figure(own.max_rel) if own else "", ok
            )
        )
    alone = (
        f", of an own error that is one stage's alone {tolerance.alone:.1e}" if rows[0].own else ""
    )
    print(f"\nWhat passes, over the stage's largest value: {tolerance.most:.1e}{alone}.")
    show_notes(port, rows)
    ours, theirs = reference.tensors.get("generated"), port.tensors.get("generated")
    if ours is not None and theirs is not None:
        pairs = list(zip(ours.tolist(), theirs.flatten().tolist()))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        print(f"generated: of {len(ours)} ids the first {same} are the same. This decides nothing.")
    if "input_ids" not in port.tensors:
        print("The port's prompt ids are taken to be the reference's.")
    lacking = [name for name in reference.tensors if name not in port.tensors]
    unknown = [name for name in port.tensors if name not in reference.tensors] + port.unknown
    for names, where in ((lacking, "port's file"), (unknown, "reference")):
        if names:
            print(f"Not compared, not in the {where}: {listed(names)}.")


def number(x: float) -> float | None:
    return x if math.isfinite(x) else None  # JSON has no others


def open_both(
    args: argparse.Namespace,
) -> tuple[Reference, Port, Tolerance, Run | None, Walk | None]:
    """The two files, what passes, and with a model the run and its stages, in which the reference lacks none."""
    require(args.rtol is None or args.rtol > 0, "--rtol: expected a number above 0")
    dtypes = ", ".join(TOLERANCES)
    require(
        args.port_dtype in (None, *TOLERANCES),
        f"--port-dtype is {args.port_dtype!r}; expected {dtypes}",
    )
    reference, port = read_reference(Path(args.reference)), read_port(Path(args.port), args.names)
    require(
        reference.tensors.keys() & port.tensors.keys(),
        "no stage is in both files; expected one at least",
    )
    if not args.model:
        return reference, port, what_passes(reference, port, args), None, None
    metadata = reference.metadata
    same = digest(Path(args.model, "config.json").read_bytes()) == metadata["config"]
    require(
        same,
        f"{args.model}: its config.json is another than the reference's; expected the same checkpoint",
    )
    model = MossAudio.from_pretrained(args.model, args.device, metadata["dtype"])
    run = Run(model, metadata["prompt"], metadata["time_markers"], len(metadata["sounds"]))
    begin = start(run, reference)
    tensors = {
        name: reference.tensors.get(name, x) for name, x in begin.own.items() if name not in HIDDEN
    }
    tensors |= {name: x for name, x in reference.tensors.items() if name not in tensors}
    return Reference(tensors, metadata), port, what_passes(reference, port, args), run, begin


def compare(args: argparse.Namespace) -> int:
    reference, port, tolerance, run, begin = open_both(args)
    first = since = None
    rows = []
    theirs = port.tensors.get("input_ids")
    if (
        theirs is not None
        and not measure("input_ids", theirs, reference.tensors["input_ids"], tolerance).ok
    ):
        first = "input_ids"
        since, sentence = prompt_difference(reference, port)
        sentence += "\nNothing else was compared."
    else:
        port, rows, _ = settle(reference, port, tolerance, run, begin)
        sentence = verdict(reference, rows)
        for row in rows[::-1]:
            if not decides(row).ok:
                first, since = row.name, decides(row).since
    if args.json:
        stages = [
            {
                "name": row.name,
                "ok": decides(row).ok,
                "max_abs": number(row.plain.max_abs),
                "max_rel": number(row.plain.max_rel),
                "rms": number(row.plain.rms),
                "cosine": number(row.plain.cosine),
                "row": row.plain.where and row.plain.where[0],
                "own": row.own and number(row.own.max_rel),
            }
            for row in rows
        ]
        print(
            json.dumps({"equal": first is None, "first": first, "since": since, "stages": stages})
        )
        return int(first is not None)
    if rows:
        show(reference, port, rows, tolerance)
    print(sentence + "\n`diagnose` tries which known mistake explains it." * (first is not None))
    return int(first is not None)


# ---- diagnose ----
def failing(walked: Walk) -> set[str]:
    return {name for name, error in walked.errors.items() if not error.ok}


def distance(walked: Walk, port: Port) -> float:
    """How far off the failing stages are, together: by how many powers of ten beyond 1e-9, and more by far for a wrong
    shape."""
    sizes = {
        name: abs(port.tensors[name].numel() - walked.own[name].numel()) for name in failing(walked)
    }
    return sum(
        18 + math.log10(1 + size)
        if walked.errors[name].where is None
        else 9 + math.log10(min(walked.errors[name].max_rel, 1e9))
        for name, size in sizes.items()
    )


def can_help(run: Run, walked: Walk, wrong: Mistake) -> bool:
    """Whether a mistake reaches a failing stage. It does not where only stages that the port has lie in between."""
    reached = set()
    for name, stage in table(run).items():
        if touches(wrong, run, name) or any(
            x in reached and walked.values[x] is walked.own[x] for x in stage.inputs
        ):
            reached.add(name)
    return not reached.isdisjoint(failing(walked))


def search(
    run: Run, port: Port, base: Walk, tolerance: Tolerance
) -> tuple[Walk, list[list[Mistake]]]:
    """The walk with the mistakes that explain the port's numbers best; for each of them, it and what does as well."""
    left = {}  # sets of mistakes -> the stages that fail with them

    def attempt(walked, wrong):
        more = can_help(run, walked, wrong) and walk(run, walked, port, tolerance, wrong)
        left[frozenset((*walked.mistakes, wrong))] = (
            failing(more) if more else {"one that was right"}
        )
        return more

    def beside(walked):
        return [
            wrong for wrong in MISTAKES if wrong.id not in {made.id for made in walked.mistakes}
        ]

    best = base
    while (
        failing(best) and len(best.mistakes) < 3
    ):  # every mistake, then every other beside the best, and once more
        walks = filter(None, (attempt(best, wrong) for wrong in beside(best)))
        nearest = min(walks, key=lambda walked: distance(walked, port), default=best)
        if distance(nearest, port) >= distance(best, port):
            break
        best = nearest

    def without(wrong):
        return walk(
            run, base, port, tolerance, *(other for other in best.mistakes if other is not wrong)
        )

    for wrong in best.mistakes:
        fewer = without(wrong)
        if fewer and failing(fewer) <= failing(best):  # it came near and yet explains nothing
            best = fewer
    alike = []
    for wrong in sorted(best.mistakes, key=MISTAKES.index):
        fewer, group = without(wrong), [wrong]
        for other in beside(fewer) if fewer else []:
            made = frozenset((*fewer.mistakes, other))
            if made not in left:
                attempt(fewer, other)
            if left[made] <= failing(best) and other is not wrong:
                group.append(other)
        alike.append(sorted(group, key=MISTAKES.index))
    return best, alike


def largest(walked: Walk) -> float:
    return max(
        (error.max_rel for error in walked.errors.values() if not (error.ok and error.note)),
        default=0.0,
    )


def diagnose(args: argparse.Namespace) -> int:
    reference, port, tolerance, run, begin = open_both(args)
    port, rows, base = settle(reference, port, tolerance, run, begin)
    best, alike = search(run, port, base, tolerance)
    if (
        failing(best) or len(best.mistakes) > 1
    ):  # or is it fewer, with layers recorded before the injection?
        other = look(reference, with_rows(reference, port), tolerance, run, begin)
        nearer, others = search(run, other.port, other.walked, tolerance)
        if (len(failing(nearer)), len(nearer.mistakes)) < (len(failing(best)), len(best.mistakes)):
            (port, rows, base), best, alike = other, nearer, others
    ids = [[*dict.fromkeys(wrong.id for wrong in group)] for group in alike]
    if args.json:
        found, ties = (
            [group[0] for group in ids if len(group) == 1],
            [group for group in ids if len(group) > 1],
        )
        answer = {"equal": not failing(base), "mistakes": found, "ties": ties}
        print(
            json.dumps(answer | {"before": number(largest(base)), "after": number(largest(best))})
        )
        return int(bool(failing(base)))
    wrong_ids = "input_ids" in failing(base)
    show_notes(port, rows)
    print(prompt_difference(reference, port)[1] if wrong_ids else verdict(reference, rows))
    if failing(base):
        print()
        report(run, port, base, best, alike)
    if failing(best) and alike:
        print(f"What is left: {verdict(reference, rows_of(reference, port, tolerance, best))}")
    return int(bool(failing(base)))


def report(run: Run, port: Port, base: Walk, best: Walk, alike: list[list[Mistake]]) -> None:
    """Prints which mistakes explain a port's numbers and how well, and what could tell more."""
    missing = [name for name in table(run) if name not in {*port.tensors, *HIDDEN}]

    def far(walked):
        other = "another prompt" if "input_ids" in failing(walked) else "another shape"
        return figure(largest(walked)) if largest(walked) < math.inf else other

    groups = [[*dict.fromkeys(wrong.id for wrong in group)] for group in alike]
    if groups:
        names = " and ".join(" or ".join(group) for group in groups)
        how = ("explain" if len(groups) > 1 else "explains") + " a part of" * bool(failing(best))
        print(f"{names} {how} it: the largest difference falls from {far(base)} to {far(best)}.")
    else:
        print(f"None of the {len({wrong.id for wrong in MISTAKES})} known mistakes explains it.")
    for group, mistakes in zip(groups, alike):
        if len(group) > 1:
            telling = [
                name for name in missing if any(touches(wrong, run, name) for wrong in mistakes)
            ]
            print(
                "The port's stages can't tell these apart"
                + (f"; {listed(telling)} could." if telling else ".")
            )
        for wrong in mistakes:
            print(
                textwrap.fill(
                    f"{wrong.id}: {wrong.sentence}",
                    110,
                    initial_indent="  ",
                    subsequent_indent="    ",
                )
            )
    if failing(best):
        first = next(name for name in table(run) if name in failing(best))
        lacking = [x for x in table(run)[first].inputs if x in missing]
        if lacking:
            print(
                f"To come nearer, let the port write {listed(lacking)} as well, which {first} is computed from."
            )


# ---- command line ----
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("parity.py", allow_abbrev=False)
    parts, parsers = parser.add_subparsers(dest="command", required=True), [parser]

    def command(run, help):
        parsers.append(part := parts.add_parser(run.__name__, help=help, allow_abbrev=False))
        part.set_defaults(run=run)
        return part.add_argument

    add = command(dump, "write every stage of a greedy run")
    add("audio", nargs="*", metavar="AUDIO", help="sound files, the clips of one prompt")
    add("-o", "--out", required=True, metavar="FILE", help="the reference, a .safetensors")
    add(
        "--model", default=TINY, metavar="FOLDER", help="checkpoint folder (the small one in tiny/)"
    )
    add("--prompt", metavar="TEXT", help="what to ask; with AUDIO: Describe this audio.")
    add(
        "--dtype",
        default="float32",
        metavar="T",
        help="of weights and arithmetic: %(default)s, float16, bfloat16",
    )
    add(
        "--device",
        default="auto",
        metavar="D",
        help="auto (the first that is there of), cuda, mps, cpu",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=16,
        metavar="N",
        help="ids to generate, greedily (%(default)s)",
    )
    add(
        "--no-time-markers",
        dest="time_markers",
        action="store_false",
        default=None,
        help="no seconds in the prompt",
    )
    add(
        "--stages",
        metavar="GLOB,...",
        help="only these, besides the sound and the prompt's ids: encoder.*,logits",
    )
    for run, help in (
        (compare, "say where a port first differs"),
        (diagnose, "say which known mistake explains it"),
    ):
        add = command(run, help)
        add("reference", metavar="REFERENCE", help="what dump wrote")
        add(
            "port",
            metavar="PORT",
            help="the port's stages: a .safetensors, an .npz, or a folder of .npy",
        )
        add(
            "--model",
            required=run is diagnose,
            metavar="FOLDER",
            help="checkpoint folder, for stages' own errors",
        )
        add(
            "--device",
            default="auto",
            metavar="D",
            help="auto (the first that is there of), cuda, mps, cpu",
        )
        add(
            "--port-dtype",
            metavar="T",
            help="what the port computes in (the reference's): float32, float16, bfloat16",
        )
        add(
            "--rtol",
            type=float,
            metavar="X",
            help="what passes, over a stage's largest value (by the dtype)",
        )
        add(
            "--names",
            metavar="MAP.json",
            help='{"port\'s name": "our name"}, {i} standing for a number in both',
        )
        add("--json", action="store_true", help="print JSON alone")
    for each in parsers:
        each.error = lambda message: require(False, message)  # its own prints the usage
    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"parity.py: {' '.join(str(error).split()):.380}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
