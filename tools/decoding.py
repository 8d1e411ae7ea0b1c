"""A port's answer: the logits of every step, and whether the ids are the likeliest of them.

The logits are taken along the port's own ids, so that one wrong id does not make all later ones
look wrong. parity.py prints what is found. Shapes: N prompt tokens, n new tokens, V vocabulary.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moss_min import MossAudio, Prompt, Step
from sample import Picker, Sampling, generate

ANSWER = ("step_logits", "generated")  # the stages after the prompt's


def greedy(model: MossAudio, prompt: Prompt, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ids of a greedy answer, int64 [n], and the logits from which each was taken,
    float32 [n, V]. most: how many ids it may have, which the prompt has to leave room for."""
    rows = []
    cache = model.new_cache(1, len(prompt.ids) + most)
    step = Step(model, cache, [len(prompt.ids)])

    def kept(logits: torch.Tensor) -> torch.Tensor:
        # On CUDA, the next step writes its logits into the same memory.
        rows.append(logits.cpu())
        return logits

    sampling = Sampling(most, temperature=0)
    picker = Picker(sampling, model.tokenizer, prompt.ids.tolist(), model.lm_head.weight.device)
    ids = generate(
        lambda: kept(model.prefill(prompt, cache)),
        lambda token: kept(step(token)),
        picker,
        model.config.stop_ids,
    )
    return torch.tensor(list(ids)), torch.cat(rows)


@dataclass(frozen=True)
class Judgement:
    """What is found of a port's ids."""

    gap: float  # from an id's logit to its row's largest, over the row's largest magnitude
    near_ties: list[int]  # steps whose id has not the largest logit, but for rounding
    since: int | None = None  # the first step that is wrong or missing; None: all are right
    why: str = ""  # what is wrong with it


def common_count(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many ids are the same, from the first on."""
    return len(os.path.commonprefix([list(a), list(b)]))


def judge(
    ids: list[int],
    rows: Sequence[torch.Tensor],
    passes: float,
    stop_ids: Sequence[int],
    most: int | None,
    logits: torch.Tensor | None = None,
    show: Callable[[int], str] = str,
) -> Judgement:
    """Judges a port's ids, the first of them by the rows [V] that they were taken from.

    passes: the gap that rounding may make. stop_ids: none if they are not known. most: how many ids
    an answer without a stop id has; None if that is not known. logits: the port's own, of its
    prompt, [up to N, V]. show: how an id is written.
    """
    gaps = [gap_below_the_largest(token, row.float()) for token, row in zip(ids, rows)]
    near_ties = [k for k, gap in enumerate(gaps) if 0 < gap <= passes]
    too_low = next((k for k, gap in enumerate(gaps) if gap > passes), len(ids) + 1)
    stop = next((k for k, token in enumerate(ids) if token in stop_ids), len(ids))
    if stop + 1 < len(ids) and stop < too_low:
        why = f"it goes on after {show(ids[stop])}, which is a stop id"
        return Judgement(math.inf, near_ties, stop + 1, why)
    if too_low < len(ids):
        why = f"{show(ids[too_low])}, expected {show(int(rows[too_low].argmax()))}"
        if math.isfinite(gaps[too_low]):
            why += f", whose logit is larger by {gaps[too_low]:.1e} of its row's largest"
        if too_low == 0 and logits is not None and len(logits) > 1:
            others = (logits.argmax(-1) == ids[0]).nonzero().flatten().tolist()
            if others:
                why += f" ({ids[0]} is the likeliest after position {others[-1]} of the prompt)"
        return Judgement(max(gaps), near_ties, too_low, why)
    if stop_ids and stop == len(ids) and most is not None and len(ids) < most:
        expected = f"one of {', '.join(map(show, stop_ids))}, or {most} ids"
        why = f"it ends after {len(ids)} ids without a stop id; expected {expected}"
        return Judgement(math.inf, near_ties, len(ids), why)
    return Judgement(max(gaps, default=0.0), near_ties)


def gap_below_the_largest(token: int, row: torch.Tensor) -> float:
    """Returns how far an id's logit lies below its row's largest, over the largest magnitude."""
    if not 0 <= token < len(row) or not row.isfinite().all():
        return math.inf
    return float(row.max() - row[token]) / (float(row.abs().max()) or 1.0)
