"""What parity.py says of the steps after the prompt and of the ids, of what port.py does wrong."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import port
from conftest import assert_close, rewrite_dump, slow
from decoding import judge
from moss_min import TINY, Prompt
from test_parity import (
    CHECKPOINT,
    CHECKPOINTS,
    FOLDER,
    VARIANT,
    compared,
    diagnosed,
    load,
    one_model_for_all_tests,  # noqa: F401
    part_of,
    ported,
    reference,
    run,
    saved,
)

STEPS = ("step_logits", "generated")
MISTAKES = [*port.DECODING, "decode-last-place-overwritten=rope"]
# The porter's stages of the reference's run, with as many steps.
answered = functools.partial(ported, new_tokens=16)


def answer_of(stages: dict, *names: str) -> dict:
    return {name: stages[name] for name in names}


def found(stages: dict, folder: Path = CHECKPOINT) -> tuple:
    """What compare finds first and since when, which is the same with a model and without."""
    answer = compared(stages, of=reference(checkpoint=folder), model=folder)
    alone = compared(stages, of=reference(checkpoint=folder), model=None)
    assert (alone["first"], alone["since"]) == (answer["first"], answer["since"])
    return answer["first"], answer["since"]


def said(stages: dict, *options, folder: Path = CHECKPOINT) -> str:
    got = run("compare", reference(checkpoint=folder), saved(stages), *options)
    return " ".join(got.out.split())


# ---- dump ----


def test_each_row_of_a_dump_is_what_one_pass_over_prompt_and_answer_has_there():
    stages = load_file(reference())
    model = load(CHECKPOINT, "auto", "float32")
    ids = torch.cat([stages["input_ids"], stages["generated"][:-1]]).long()
    with torch.no_grad():
        whole = model(Prompt(ids, [stages["mel.0"].bfloat16()]))
    assert_close(stages["step_logits"], whole[len(stages["input_ids"]) - 1 :])
    assert torch.equal(stages["step_logits"].argmax(-1).int(), stages["generated"])


def test_a_dump_says_when_its_answer_ends():
    with safe_open(reference(), "pt") as file:
        metadata = file.metadata()
    assert (metadata["version"], metadata["stop_ids"]) == ("2", "[302]")
    assert metadata["max_new_tokens"] == "16"


# ---- what is right ----


@pytest.mark.parametrize("folder", CHECKPOINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_right_ports_answer_is_equal_with_a_model_and_without(dtype, folder):
    stages = answered(checkpoint=CHECKPOINTS[folder], dtype=dtype)
    assert found(stages, CHECKPOINTS[folder]) == (None, None)


def test_steps_beyond_the_dumps_are_compared_with_a_model():
    stages = answered(new_tokens=24)
    assert found(stages) == (None, None)
    stages = stages | {"step_logits": stages["step_logits"].clone()}
    stages["step_logits"][20] += 0.1
    answer = compared(stages)
    assert (answer["first"], answer["since"]) == ("step_logits", 20)
    assert compared(stages, model=None)["equal"]
    assert "steps from 16 on are not compared (--model goes on)" in said(stages)
    assert "not compared" not in said(answered())


def test_a_wrong_prompt_is_not_held_against_its_steps():
    # The steps have no DeepStack rows: they are right for the keys that they find.
    wrong = compared(answered("no-deepstack"))["wrong"]
    assert wrong[0] == "decoder.layers.0"
    assert not set(wrong) & set(STEPS)


@pytest.mark.parametrize("subset", ["all", "logits"])
@pytest.mark.parametrize("mistake", ["no-deepstack", "rope-theta-10000", "qk-norm-after-rope"])
def test_a_mistake_of_the_prompt_is_found_beside_its_steps(mistake, subset):
    stages = answered(mistake)
    answer = diagnosed(part_of(stages, subset) | answer_of(stages, *STEPS))
    assert (answer["mistakes"], answer["ties"]) == ([mistake], [])
    assert answer["after"] < 3e-6


# ---- mistakes of decoding ----


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("folder", ["golden", *slow("variant", "tiny")])
def test_a_mistake_of_decoding_is_found_from_the_second_row_on(folder, mistake):
    stages = answered(mistake, checkpoint=CHECKPOINTS[folder])
    assert found(stages, CHECKPOINTS[folder]) == ("step_logits", 1)
    rows = answer_of(stages, "step_logits", "generated")
    answer = diagnosed(rows, reference(checkpoint=CHECKPOINTS[folder]), CHECKPOINTS[folder])
    assert (answer["mistakes"], answer["ties"]) == ([mistake.partition("=")[0]], [])
    assert answer["after"] < 3e-6 < 1e-3 < answer["before"]


@pytest.mark.parametrize("mistake", [*MISTAKES[:2], *slow(*MISTAKES[2:])])
def test_a_mistake_of_decoding_is_named_from_ids_that_differ(mistake):
    ids = answer_of(answered(mistake, checkpoint=VARIANT, new_tokens=40), "generated")
    of = reference(checkpoint=VARIANT)
    assert not torch.equal(
        ids["generated"], answered(checkpoint=VARIANT, new_tokens=40)["generated"]
    )
    assert compared(ids, of=of, model=VARIANT)["first"] == "generated"
    answer = diagnosed(ids, of, VARIANT)
    named = [*answer["mistakes"], *sum(answer["ties"], [])]
    assert mistake.partition("=")[0] in named


def test_two_mistakes_of_prompt_and_steps_are_found_together():
    answer = diagnosed(answered("taps-reversed", "decode-rope-too-far"))
    assert answer["mistakes"] == ["taps-reversed", "decode-rope-too-far"]
    assert answer["after"] < 3e-6


# ---- ids ----


def test_a_first_id_of_another_row_is_wrong_and_the_row_is_named():
    stages = answered("first-id-of-another-row")
    assert found(stages) == ("generated", 0)
    assert "is the likeliest after position 129 of the prompt" in said(stages)
    answer = diagnosed(stages)
    assert (answer["equal"], answer["mistakes"], answer["ties"]) == (False, [], [])
    # The rows after it are right for the port's own ids, which a model follows.
    assert compared(stages)["wrong"] == ["generated"]
    assert "steps from 1 on are not compared" in said(stages)


def test_ids_after_a_stop_id_are_wrong():
    right = answered(checkpoint=TINY, new_tokens=100)["generated"]
    assert len(right) < 100
    stages = answered("stop-id-missed", checkpoint=TINY, new_tokens=len(right) + 12)
    assert found(stages, TINY) == ("generated", len(right))
    assert "which is a stop id" in said(stages, folder=TINY)
    assert found(answer_of(stages, "generated"), TINY) == ("generated", len(right))


def test_an_answer_that_ends_too_early_is_wrong():
    stages = answered()
    cut = {"generated": stages["generated"][:12]}
    assert found(cut) == ("generated", 12)
    assert "ends after 12 ids without a stop id; expected one of 302, or 16 ids" in said(cut)


@pytest.mark.parametrize("other", [5, 1000, -1])
def test_one_other_id_is_wrong_also_where_nothing_else_is_written(other):
    ids = answered()["generated"].clone()
    ids[7] = other
    assert found({"generated": ids}) == ("generated", 7)


@pytest.mark.slow
def test_two_mistakes_are_not_looked_for_in_ids_alone():
    both = answered(
        "decode-first-place-lost", "decode-without-itself", checkpoint=VARIANT, new_tokens=40
    )
    answer = diagnosed(answer_of(both, "generated"), reference(checkpoint=VARIANT), VARIANT)
    assert (answer["equal"], answer["mistakes"], answer["ties"]) == (False, [], [])


def test_an_id_is_judged_by_its_row_and_a_near_tie_is_none():
    rows = torch.tensor([[4.0, -8.0, 3.0], [4.0, -8.0, 3.99], [1.0, 2.0, 0.0]])
    close = judge([0, 2, 1], rows, 0.01, [1], 3)
    assert (close.since, close.near_ties) == (None, [1])
    assert close.gap == pytest.approx(0.01 / 8)
    # 4 - 3 is an eighth of 8.
    wrong = judge([2, 2, 1], rows, 0.12, [1], 3)
    assert (wrong.since, wrong.gap, wrong.near_ties) == (0, 0.125, [1])
    assert judge([2, 2, 1], rows, 0.13, [1], 3).since is None
    assert judge([0, 0], rows, 0.01, [1], 3).since == 2
    assert judge([0, 0], rows, 0.01, [], None).since is None
    assert judge([0, 0, 1, 1], rows, 0.01, [1], 9).since == 3
    # A stop id that is the wrong one is worse than that it does not stop.
    early = judge([0, 1, 1], rows, 0.01, [1], 9)
    assert (early.since, early.why) == (
        1,
        "1, expected 0, whose logit is larger by 1.5e+00 of its row's largest",
    )
    beyond = judge([9], rows, 0.01, [1], 9)
    assert (beyond.since, beyond.why) == (0, "9, expected 0")


def almost_chosen(gap: float) -> tuple[Path, dict]:
    """A reference whose row 3 has its second id so far below the first, of the row's largest, and a
    port that takes it."""
    stages = load_file(reference())
    ids = stages["generated"].clone()
    row = stages["step_logits"][3]
    ids[3] = row.topk(2).indices[1]
    row[ids[3]] = row.max() - gap * row.abs().max()
    of = rewrite_dump(reference(), FOLDER / "rewritten.safetensors", stages)
    return of, {"generated": ids, "step_logits": stages["step_logits"]}


def test_a_near_tie_is_said_and_judging_goes_on():
    of, stages = almost_chosen(1.8e-5)
    assert compared(stages, of=of, model=None)["equal"]
    out = run("compare", of, saved(answer_of(stages, "generated"))).out
    assert "generated: near ties, where rounding may choose another id, at steps 3: no" in out
    assert "ids from step 4 on are not judged (--model judges them)" in out
    assert "Equal" in out
    stages["generated"][9] = 5
    answer = compared(stages, of=of, model=None)
    assert (answer["first"], answer["since"]) == ("generated", 9)


def test_an_id_below_the_likeliest_by_more_than_twice_what_passes_is_wrong():
    of, stages = almost_chosen(2.2e-5)
    answer = compared(stages, of=of, model=None)
    assert (answer["first"], answer["since"]) == ("generated", 3)


def test_a_dump_of_the_first_version_is_read():
    stages = load_file(reference())
    del stages["step_logits"]
    with safe_open(reference(), "pt") as file:
        axes = file.metadata()["axes"].replace('"step_logits": "new tokens, vocabulary", ', "")
    metadata = {"version": "1", "axes": axes, "stop_ids": None, "max_new_tokens": None}
    old = rewrite_dump(reference(), FOLDER / "old.safetensors", stages, **metadata)
    assert compared(answered(), of=old)["equal"]
    assert compared(answered("decode-rope-too-far"), of=old)["first"] == "step_logits"
    out = run("compare", old, saved(answer_of(answered(), "generated"))).out
    assert "of 16 ids the first 16 are the same" in out
    assert "ids from step 0 on are not judged (--model judges them)" in out


def test_rows_without_ids_are_compared_along_the_dumps():
    rows = answer_of(answered(new_tokens=24), "step_logits")
    assert found(rows) == (None, None)
    out = said(rows, "--model", CHECKPOINT)
    assert "from 16 on are not compared (the port's file has no ids for them)" in out
