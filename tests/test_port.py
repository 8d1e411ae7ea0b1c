"""The porter (port.py): right without a mistake, and as wrong as upstream with the same one.

That also checks the specification and, through test_golden.py, the modules: they share no code.
What its other mistakes change is in test_parity.py and test_decoding.py, which find each of them.
"""

import functools

import pytest
import torch
from safetensors.torch import load_file

import port
from conftest import GOLDEN, distance, golden_case, largest_error
from test_golden import stages_in

CASES = {path.stem for path in (GOLDEN / "cases").iterdir()} | {"variant"}
CASES = sorted(name for name in CASES if len(golden_case(name).clips) == 1)
FLOAT32 = [name for name in CASES if not name.endswith(".bfloat16")]
BFLOAT16 = [name for name in CASES if name.endswith(".bfloat16")]
WAVEFORM = load_file(GOLDEN / "ports" / "waveform.safetensors")["waveform.0"]
PORTS = sorted(path.stem for path in (GOLDEN / "ports").iterdir() if path.stem != "waveform")


def around_the_clip(ids: torch.Tensor, start=306, end=307) -> tuple[list[int], list[int]]:
    """The ids of a prompt's text before and after its clips."""
    ids = ids.tolist()
    return ids[: ids.index(start)], ids[len(ids) - ids[::-1].index(end) :]


@functools.cache
def ported(name: str, new_tokens: int = 0) -> dict[str, torch.Tensor]:
    """A golden case's stages; of the logits, the rows that golden keeps: all or the last."""
    case = golden_case(name)
    text = around_the_clip(case.tensors["input_ids"])
    markers = case.time_markers is not False
    options = {"dtype": getattr(torch, case.dtype), "time_markers": markers}
    folder = GOLDEN / case.checkpoint
    stages = port.run(folder, case.clips[0], *text, **options, new_tokens=new_tokens)
    stages["logits"] = stages["logits"][-len(case.tensors["logits"]) :]
    return stages


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# ---- without a mistake ----


@pytest.mark.parametrize("name", CASES)
def test_the_porters_ids_and_mel_are_upstreams(name):
    upstream = golden_case(name).tensors
    in_float32 = golden_case(name.removesuffix(".bfloat16")).tensors
    assert identical(ported(name)["input_ids"], upstream["input_ids"])
    assert identical(ported(name)["mel.0"], in_float32["mel.0"])


@pytest.mark.parametrize("name, key", stages_in(FLOAT32))
def test_the_porters_stage_is_upstreams(name, key):
    # golden/README.md's bound.
    assert largest_error(ported(name)[key], golden_case(name).tensors[key]) <= 3e-6


@pytest.mark.parametrize("name, key", stages_in(BFLOAT16))
def test_the_porters_bfloat16_stage_is_no_further_from_float32_than_upstreams(name, key):
    exact = golden_case(name.removesuffix(".bfloat16")).tensors[key]
    upstream = distance(golden_case(name).tensors[key], exact)
    assert distance(ported(name)[key], exact) <= 1.15 * upstream


@pytest.mark.parametrize("name", ["short", "three_chunks", "variant"])
def test_the_porters_greedy_ids_are_upstreams(name):
    case = golden_case(name)
    ids = ported(name, new_tokens=case.max_new_tokens)["generated"]
    assert identical(ids, case.tensors["generated"])


# ---- with one ----


@pytest.mark.parametrize("mistake", PORTS)
def test_the_porter_is_as_wrong_as_upstream_with_the_same_mistake(mistake):
    upstream = load_file(GOLDEN / "ports" / f"{mistake}.safetensors")
    text = around_the_clip(upstream["input_ids"])
    stages = port.run(GOLDEN / "checkpoint", WAVEFORM, *text, [mistake])
    stages["logits"] = stages["logits"][-1:]
    for key in ("input_ids", "mel.0"):
        assert identical(stages[key], upstream.pop(key))
    for key in upstream:
        assert largest_error(stages[key], upstream[key]) <= 1e-5


def test_a_tail_of_8_n_frames_need_not_be_padded():
    text = around_the_clip(load_file(GOLDEN / "ports" / "mel-htk.safetensors")["input_ids"])
    right = port.run(GOLDEN / "checkpoint", WAVEFORM, *text)
    stages = port.run(GOLDEN / "checkpoint", WAVEFORM, *text, ["tail-not-padded"])
    assert stages["mel.0"].shape[1] % 400 == 120
    assert largest_error(stages["encoder.stem"], right["encoder.stem"]) <= 1e-6


def test_a_mistake_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match="unknown mistake 'mel-hkt'; expected one of mel-30s, "):
        port.run(GOLDEN / "checkpoint", WAVEFORM, [], [], ["mel-hkt"])
