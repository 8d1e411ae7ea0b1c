"""How far a port's stages are off, each by itself, and which known mistakes explain that.

A stage's own error is its difference from what the reference computes from the port's stages before
it, or from its own where the port's file has none. So one wrong stage does not make all later ones
look wrong, and a second mistake shows behind the first. parity.py reads the files and prints what
is found. Shapes: A audio tokens, N prompt tokens, D width.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from decoding import ANSWER, judge
from mistakes import MISTAKES, Mistake, made
from stages import HIDDEN, IDS, Run, chunk_tokens, compute, is_audio, kind, layer_of, table

# ---- one stage ----


@dataclass(frozen=True)
class Tolerance:
    """What passes, over a stage's largest value."""

    most: float
    alone: float  # own errors of stages whose inputs are all in the port's file
    mel: float


# Of right runs (upstream's in tests/golden and those of tests/port.py on its sounds, in each type
# against references in all three) the largest difference is 1.1e-6 in float32, 2.9e-3 in float16
# and 2.1e-2 in bfloat16; of the errors that one stage alone makes 5e-7, 1.5e-3 and 1.1e-2. With
# sums as wide as the 8B's, added one by one in float32, it is 2e-6. Log-mels are computed in
# float32 whatever the run's type; a bfloat16 run may round them later, which is half a step.
TOLERANCES = {  # from fine to coarse
    "float32": Tolerance(1e-5, 5e-6, 1e-5),
    "float16": Tolerance(5e-3, 2.5e-3, 1e-5),
    "bfloat16": Tolerance(4e-2, 2e-2, 4e-3),
}


@dataclass(frozen=True)
class Difference:
    """How far a stage is off what it should be."""

    ok: bool
    max_abs: float = 0.0
    max_rel: float = 0.0  # of the largest value
    where: list[int] | None = None  # the largest difference; None of another shape
    since: int | None = None  # the first row that is off by more than what passes
    note: str = ""
    single_precision: bool = False  # a log-mel that is right but for float32's rounding
    why: str = ""  # what is wrong with generated ids


ANOTHER_SHAPE = Difference(False, math.inf, math.inf)


def is_single_precision(x: torch.Tensor, exact: torch.Tensor) -> bool:
    """Tells whether a bfloat16 log-mel is right, but computed in float32: a few values are a step
    off (or, near 0, where a step is smaller than float32's errors, several)."""
    step = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 8).clamp(min=1e-5)
    off = (x - exact).abs()
    return bool((off <= step).all() and (off > 0).float().mean() < 5e-3)


def measure(
    name: str, x: torch.Tensor, exact: torch.Tensor, tolerance: Tolerance, alone: bool = False
) -> Difference:
    """Compares a port's stage with what it should be. A row of mel is a frame."""
    if name in IDS:
        same = torch.equal(x.long().flatten(), exact.long().cpu())
        return Difference(True) if same else ANOTHER_SHAPE
    if name == "step_logits":
        exact = exact[: len(x)]
    left_out = len(exact) - len(x)  # rows of logits that the port does not have
    x = x.float()
    exact = exact[left_out:].to(x.device).float()
    passes = tolerance.alone if alone else tolerance.most
    note = ""
    single = False
    if kind(name) == "mel":
        passes = tolerance.mel
        x = x.T  # [T, 128]
        exact = exact.T
        count = int((x != exact).sum())
        if not torch.equal(x, x.bfloat16().float()):
            note = "not rounded to bfloat16"
        elif count and is_single_precision(x, exact):
            single = True
            note = f"{count} values a bfloat16 step off, as in single precision: no mistake"
    off = (x - exact).abs().nan_to_num(math.inf, math.inf)
    largest = float(off.max())
    scale = float(exact.abs().max()) or 1.0
    bad = off.reshape(len(x), -1).amax(1) > passes * scale
    ok = single or not bad.any()
    where = [int(i) for i in np.unravel_index(int(off.argmax()), off.shape)]
    where[0] += left_out
    since = None if ok else left_out + int(bad.int().argmax())
    return Difference(ok, largest, largest / scale, where, since, note, single)


def measure_ids(
    ids: torch.Tensor,
    rows: Sequence[torch.Tensor],
    tolerance: Tolerance,
    stop_ids: Sequence[int],
    most: int | None,
    logits: torch.Tensor | None,
) -> Difference:
    """Judges a port's generated ids, as a stage whose rows are steps; see judge."""
    passes = 2 * tolerance.most  # the row's largest may be too low, and the id's too high
    found = judge(ids.flatten().tolist(), rows, passes, stop_ids, most, logits)
    note = ""
    if found.near_ties:
        steps = ", ".join(map(str, found.near_ties))
        note = f"near ties, where rounding may choose another id, at steps {steps}: no mistake"
    right = found.since is None
    return Difference(
        right, found.gap, found.gap, [found.since or 0], found.since, note, why=found.why
    )


# ---- a port's stages ----

PADDED = ("encoder.stem", "encoder.layers", "encoder")
ORDERS = {  # axes -> other orders of them
    2: [(1, 0)],
    3: [(0, 2, 1)],
    4: [(0, 3, 1, 2), (0, 1, 3, 2), (0, 3, 2, 1)],
}


@dataclass
class Port:
    """A port's stages by our names, as they are in its file."""

    tensors: dict[str, torch.Tensor]
    unknown: list[str] = field(default_factory=list)  # names in the file that are no stage's
    notes: dict[str, str] = field(default_factory=dict)  # how stages were read
    fitted: dict = field(default_factory=dict)  # what fit has found
    held: dict = field(default_factory=dict)  # stages as the model holds them

    def fit(self, name: str, ours: torch.Tensor, tokens: list[int]) -> torch.Tensor | None:
        """Returns a stage in the shape of ours (of logits, maybe their last row), or None.

        Nothing is cut to fit. Of two layouts that have that shape it is the nearer one. tokens:
        those of each chunk."""

        def distance(layout: tuple[torch.Tensor, list[str]]) -> float:
            return float((layout[0].to(ours) - ours).double().norm().nan_to_num(math.inf))

        key = (name, ours.shape)
        if key not in self.fitted:
            found = list(layouts(name, self.tensors[name], ours, tokens))
            if len(found) > 1:
                found.sort(key=distance)
            self.fitted[key], said = found[0] if found else (None, [])
            if said:
                self.notes[name] = ", ".join(said)
        return self.fitted[key]

    def answer(self, run: Run, ours: torch.Tensor) -> torch.Tensor:
        """Returns the generated ids, [n], up to the first that the model does not have, if any; or
        ours, if the file has none."""
        if "generated" not in self.tensors:
            return ours
        if "generated" not in self.held:
            ids = self.tensors["generated"].flatten()
            most = run.model.config.decoder.vocab_size - 1
            known = ((ids >= 0) & (ids <= most)).tolist()
            # The last is never embedded, so that it may stand for the unknown one.
            count = (*known, False).index(False) + 1
            self.held["generated"] = as_held(run, "generated", ids[:count].clamp(0, most))
        return self.held["generated"]

    def value(
        self, run: Run, name: str, ours: torch.Tensor, theirs: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns what later stages are computed from: the port's stage if it fits, or else ours.
        Ids fit if they have as many places for sound."""
        if name == "input_ids":
            theirs = None
            ids = self.tensors[name].flatten()
            known = ids.min() >= 0 and ids.max() < run.model.config.decoder.vocab_size
            if known and is_audio(run, ids).sum() == is_audio(run, ours).sum():
                theirs = ids
        if theirs is None:
            return ours
        # The same object each time, so that a walk can tell what has changed.
        key = (name, theirs.shape)
        if key not in self.held:
            self.held[key] = as_held(run, name, theirs)
        return self.held[key]


def as_held(run: Run, name: str, x: torch.Tensor) -> torch.Tensor:
    """Returns a file's stage as the model holds it."""
    weight = run.model.lm_head.weight
    if kind(name) in ("waveform", "mel"):
        return x.float()
    if name in IDS:
        return x.long().to(weight.device)
    return x.to(weight)


def layouts(
    name: str, x: torch.Tensor, ours: torch.Tensor, tokens: list[int]
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Yields a stage in every layout of it that has our shape, and what was done in words."""
    if name in ("logits", "step_logits") and x.ndim == 1:
        x = x[None]
    views = [(x, [])]
    while x.ndim > ours.ndim and len(x) == 1:
        x = x[0]
        views.append((x, ["read without its leading axis"]))
    for y, said in list(views):
        for order in ORDERS.get(y.ndim, []):
            views.append((y.permute(order), [*said, "read transposed"]))
    for y, said in views:
        if y.shape == ours.shape:
            yield y, said
        elif name == "step_logits" and y.ndim == 2 and y.shape[1] == ours.shape[1]:
            yield y[: len(ours)], said
        elif name == "logits" and y.shape == ours[-1:].shape:
            yield y, [*said, "of the last position alone"]
        elif kind(layer_of(name)) in PADDED and y.ndim == 3 and len(y) == len(tokens):
            _, length, width = y.shape
            is_real = torch.arange(length) < torch.tensor(tokens)[:, None]  # [C, L]
            if max(tokens) <= length and (sum(tokens), width) == ours.shape:
                padding = "read as [chunks, tokens, width], without the padding"
                yield y[is_real], [*said, padding]


# ---- own errors ----


@dataclass(frozen=True)
class Walk:
    """A run through the stages that goes on from the port's wherever its file has them."""

    mistakes: tuple[Mistake, ...]
    own: dict[str, torch.Tensor]  # what the reference, with the mistakes, makes of the values
    values: dict[str, torch.Tensor]  # what it goes on from: the port's stages, or own
    errors: dict[str, Difference]  # the port's stages against own
    stale: bool = False  # whether step_logits is still another walk's


def start(run: Run, tensors: dict[str, torch.Tensor]) -> Walk:
    """Returns the reference's stages, given some of them."""
    own = dict(compute(run, {name: as_held(run, name, x) for name, x in tensors.items()}))
    return Walk((), own, own, {})


@torch.no_grad()
def walk(
    run: Run, before: Walk, port: Port, tolerance: Tolerance, *mistakes: Mistake
) -> Walk | None:
    """Goes on from another walk by making more mistakes; only what they change is computed again.

    Returns None if a stage that was right before is not any more: that is not the port's mistake.
    """
    made_now = (*before.mistakes, *mistakes)
    own = dict(before.own)
    values = dict(before.values)
    errors = dict(before.errors)
    # The stages whose value is the port's own, so that they bring in no rounding of ours.
    ports = {"input_ids", "generated"}
    ports |= {name for name in own if kind(name) == "waveform"}
    rounding = max((wrong.rounding for wrong in made_now), default=1)
    tolerance = Tolerance(tolerance.most * rounding, tolerance.alone * rounding, tolerance.mel)
    stale = False
    with made(run, made_now):
        for name, stage in table(run).items():
            changed = any(values[x] is not before.values[x] for x in stage.inputs)
            if name == "step_logits":
                stale = leaves_steps(mistakes, errors)
                if stale:
                    break
                changed = changed or before.stale
            if changed or any(wrong.touches(run, name) for wrong in mistakes):
                x = stage.compute(*[values[x] for x in stage.inputs])
                if not torch.equal(x, own[name]):
                    own[name] = x
            values[name] = own[name]
            if name == "generated":
                # It is judged below, by the logits along it.
                values[name] = port.answer(run, own[name])
                continue
            if name == "step_logits" and "generated" in port.tensors:
                error = measure_answer(run, port, own, tolerance)
                if is_new(error, errors.get("generated")):
                    return None
                errors["generated"] = error
            alone = ports.issuperset(stage.inputs)
            if name in HIDDEN and alone:
                ports.add(name)
            if name not in port.tensors:
                continue
            tokens = chunk_tokens(values["frames"]).tolist() if "frames" in values else []
            theirs = port.fit(name, own[name], tokens)
            values[name] = port.value(run, name, own[name], theirs)
            if values[name] is not own[name]:
                ports.add(name)
            if name in errors and own[name] is before.own[name]:
                continue
            error = ANOTHER_SHAPE
            if theirs is not None:
                error = measure(name, theirs, own[name], tolerance, alone)
            if is_new(error, errors.get(name)):
                return None
            errors[name] = error
    return Walk(made_now, own, values, errors, stale)


def is_new(error: Difference, before: Difference | None) -> bool:
    """Tells whether a stage fails that was right before."""
    return before is not None and before.ok and not error.ok


def leaves_steps(mistakes: Sequence[Mistake], errors: dict[str, Difference]) -> bool:
    """Tells whether step_logits is left as it was: mistakes of the prompt do nothing for steps that
    are right, and as long as the prompt is wrong, its steps would not show what else is."""
    if all(wrong.stages == ("step_logits",) for wrong in mistakes):
        return False
    wrong = {name for name, error in errors.items() if not error.ok}
    return not wrong.issubset(ANSWER) or wrong.isdisjoint(ANSWER)


def measure_answer(
    run: Run, port: Port, own: dict[str, torch.Tensor], tolerance: Tolerance
) -> Difference:
    """Judges the port's generated ids by the logits that a run has along them."""
    logits = port.fit("logits", own["logits"], []) if "logits" in port.tensors else None
    ids = port.tensors["generated"]
    ending = (run.model.config.stop_ids, run.max_new_tokens)
    return measure_ids(ids, own["step_logits"], tolerance, *ending, logits)


def failing(walked: Walk) -> set[str]:
    return {name for name, error in walked.errors.items() if not error.ok}


def largest(walked: Walk) -> float:
    """Returns the largest own error, but for what is known to be rounding."""
    errors = walked.errors.values()
    return max((e.max_rel for e in errors if not (e.ok and e.note)), default=0.0)


# ---- the mistakes that explain a port's numbers ----


class Search:
    """Looks for the mistakes with which a run's stages are the port's.

    best: the walk with them. alike: for each of them, it and what explains as much in its place.
    """

    def __init__(self, run: Run, port: Port, base: Walk, tolerance: Tolerance):
        self.run = run
        self.port = port
        self.base = base
        self.tolerance = tolerance
        self.left = {}  # mistakes -> the stages that fail with them; None: one that was right
        self.best = base
        # Every mistake, then every other beside the best of them, and once more.
        while failing(self.best) and len(self.best.mistakes) < 3:
            nearest = self.nearest()
            if self.distance(nearest) >= self.distance(self.best):
                break
            # A few ids alone would soon fit some mistakes together, or one in part.
            if failing(self.best) == failing(nearest) == {"generated"}:
                break
            self.best = nearest
        for wrong in self.best.mistakes:
            fewer = self.without(wrong)
            # It came near and yet explains nothing.
            if fewer and failing(fewer) <= failing(self.best):
                self.best = fewer
        made_in_order = sorted(self.best.mistakes, key=MISTAKES.index)
        self.alike = [self.in_place_of(wrong) for wrong in made_in_order]

    def nearest(self) -> Walk:
        """Returns the walk with one more mistake that comes nearest to the port."""
        walks = [self.attempt(self.best, wrong) for wrong in others(self.best)]
        walks = [walked for walked in walks if walked]
        return min(walks, key=self.distance, default=self.best)

    def attempt(self, walked: Walk, wrong: Mistake) -> Walk | None:
        more = None
        if self.can_help(walked, wrong):
            more = walk(self.run, walked, self.port, self.tolerance, wrong)
        self.left[frozenset((*walked.mistakes, wrong))] = failing(more) if more else None
        return more

    def can_help(self, walked: Walk, wrong: Mistake) -> bool:
        """Tells whether a mistake reaches a failing stage: it does not pass the port's stages."""
        reached = set()
        for name, stage in table(self.run).items():
            from_reached = [x for x in stage.inputs if x in reached]
            if wrong.touches(self.run, name) or any(
                walked.values[x] is walked.own[x] for x in from_reached
            ):
                reached.add(name)
        if "step_logits" in reached:
            reached.add("generated")
        return not reached.isdisjoint(failing(walked))

    def distance(self, walked: Walk) -> float:
        """Returns how far off the failing stages are together: by how many powers of ten beyond
        1e-9, and more by far for a wrong shape."""
        total = 0.0
        for name in failing(walked):
            error = walked.errors[name]
            if error.where is None:
                size = abs(self.port.tensors[name].numel() - walked.own[name].numel())
                total += 18 + math.log10(1 + size)
            else:
                total += 9 + math.log10(min(error.max_rel, 1e9))
        return total

    def without(self, wrong: Mistake) -> Walk | None:
        kept = [other for other in self.best.mistakes if other is not wrong]
        return walk(self.run, self.base, self.port, self.tolerance, *kept)

    def in_place_of(self, wrong: Mistake) -> list[Mistake]:
        """Returns a mistake of the best walk and those that explain as much in its place."""
        group = {wrong}
        fewer = self.without(wrong)
        for other in others(fewer) if fewer else []:
            mistakes = frozenset((*fewer.mistakes, other))
            if mistakes not in self.left:
                self.attempt(fewer, other)
            left = self.left[mistakes]
            if left is not None and left <= failing(self.best):
                group.add(other)
        return sorted(group, key=MISTAKES.index)


def others(walked: Walk) -> list[Mistake]:
    """Returns the known mistakes that a walk does not make."""
    ids = {wrong.id for wrong in walked.mistakes}
    return [wrong for wrong in MISTAKES if wrong.id not in ids]
