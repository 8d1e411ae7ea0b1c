"""The faster ways give what the plain one gives: steps of many rows, steps of static shape, slices, rows on a CPU."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import sample
from conftest import GOLDEN, edit_json, golden_case, golden_model
from moss_min import MossAudio, Prompt
from qwen3 import KVCache, Linear
from sample import Sampling, Step, generate_batch, prefill
from test_golden import assert_close


def golden_prompts() -> list[Prompt]:
    """Prompts of different lengths, with sound and without."""
    model = golden_model()
    cases = [golden_case(name) for name in ("short", "text_only", "two_audios")]
    prompts = [model.prompt(case.text, case.clips, case.time_markers) for case in cases]
    return prompts + [model.prompt("Count to ten."), prompts[0]]


def one_by_one(model, prompts, **options) -> list[list[int]]:
    seed = options.pop("seed", None)
    seeds = [None if seed is None else seed + i for i in range(len(prompts))]
    return [list(model.generate(prompt, seed=own, **options)) for prompt, own in zip(prompts, seeds)]


# ---- many rows ----


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 7},
        {"seed": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
        {"temperature": 0, "thinking_budget": 0},
        {"temperature": 0, "max_new_tokens": 1},
    ],
    ids=str,
)
def test_a_batch_gives_each_prompt_the_ids_that_it_has_alone(options):
    model, prompts = golden_model(), golden_prompts()
    prompts.append(Prompt(torch.tensor(model.tokenizer.encode("<think>1", add_special_tokens=False).ids), []))
    options = {"max_new_tokens": 40} | options
    answers = dict(model.generate_batch(prompts, **options))
    assert [answers[i] for i in range(len(prompts))] == one_by_one(model, prompts, **options)


def test_answers_of_a_batch_come_as_they_end():
    model, prompts = golden_model(), golden_prompts()
    lengths = [5, 2, 9, 1, 7]
    samplings = [Sampling(n, temperature=0) for n in lengths]
    ended = list(generate_batch(model, prompts, samplings))
    assert [i for i, _ in ended] == [3, 1, 0, 4, 2]
    assert all(ids == one_by_one(model, [prompts[i]], max_new_tokens=lengths[i], temperature=0)[0] for i, ids in ended)


def test_a_batch_draws_with_the_seeds_it_is_given():
    model, prompts = golden_model(), golden_prompts()[:3]
    answers = dict(model.generate_batch(prompts, 12, seed=[5, 9, 2**63]))
    assert answers == {i: list(model.generate(prompts[i], 12, seed=s)) for i, s in enumerate([5, 9, 2**63])}


def test_an_empty_batch_gives_nothing():
    assert list(golden_model().generate_batch([])) == []


def test_a_batch_refuses_what_generate_refuses_at_the_call():
    model, prompts = golden_model(), golden_prompts()
    with pytest.raises(ValueError, match="top_p is 2; expected"):
        model.generate_batch(prompts, top_p=2)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        model.generate_batch(prompts, seed=[1, 2])


def test_a_row_of_a_batch_ends_at_the_models_last_position(checkpoint):
    prompts = golden_prompts()
    edit_json(checkpoint / "config.json", **{"language_config.max_position_embeddings": len(prompts[2].ids) + 3})
    model = MossAudio.from_pretrained(checkpoint, "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = dict(model.generate_batch(prompts[1:3], 20, temperature=0))
    assert len(answers[1]) == 3 and len(answers[0]) == 20
    assert ["cut from 20 to 3" in str(warning.message) for warning in caught] == [True]


def test_a_row_does_not_see_what_memory_held_before_its_cache():
    """A shorter row's masked keys and values are read, and 0 times NaN is NaN."""
    model, prompts = golden_model(), golden_prompts()
    config, size = model.config.decoder, len(prompts[2].ids) + 4
    shape = (config.num_hidden_layers, 3, config.num_key_value_heads, size, config.head_dim)
    for _ in range(3):
        spoilt = [torch.full(shape, torch.nan) for _ in range(4)]
        del spoilt  # and its memory is given out again
        cache = KVCache(config, 3, size, torch.float32, torch.device("cpu"))
        assert not cache.keys.any() and not cache.values.any()


# ---- the step that a CUDA graph captures ----


@torch.no_grad()
def test_a_step_of_static_shape_gives_the_plain_steps_logits():
    """All that can be seen of the captured step without CUDA: nothing but its input tensor changes from step to step,
    attention is over the whole cache, and what is in the cache after the tokens so far does not matter."""
    model, prompt = golden_model(), golden_prompts()[0]
    ids, start = list(model.generate(prompt, 24, temperature=0)), len(prompt.ids)
    cache = KVCache(model.config.decoder, 1, start + 30, torch.float32, torch.device("cpu"))
    cache.keys.fill_(50), cache.values.fill_(50)
    logits = prefill(model, prompt, cache, None)
    step = Step(model, cache, graph=False)
    assert cache.keys.shape[3] - 1 == cache.length  # over the whole cache
    inputs = step.inputs
    alone = torch.cat([prompt.ids, torch.tensor(ids)])
    expected = model(Prompt(alone, prompt.mels))[start - 1 :]
    for i, token in enumerate(ids):
        assert_close(logits[0], expected[i])
        assert int(logits.argmax()) == token
        inputs.copy_(torch.tensor([[token], [start + i]]))
        logits = step.logits()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_captured_step_gives_the_plain_steps_ids(dtype):
    model = MossAudio.from_pretrained(GOLDEN / "checkpoint", "cuda", dtype)
    for prompt in golden_prompts():
        for options in ({"temperature": 0}, {"seed": 4}):
            plain = list(model.generate(prompt, 32, cuda_graph=False, **options))
            assert list(model.generate(prompt, 32, **options)) == plain


# ---- the prompt in slices ----


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_prompt_in_slices_has_the_logits_of_one_piece(size, monkeypatch):
    """Slices end within clips, time markers and text; DeepStack rows go with their tokens."""
    monkeypatch.setattr(sample, "SLICE", size)
    model = golden_model()
    for prompt in golden_prompts()[:3]:
        cache = KVCache(model.config.decoder, 1, len(prompt.ids), torch.float32, torch.device("cpu"))
        with torch.no_grad():
            assert_close(prefill(model, prompt, cache, None)[0], model(prompt)[-1])


def test_a_long_prompt_says_how_it_goes_and_a_short_one_nothing(monkeypatch):
    model, lines = golden_model(), []
    prompt = golden_prompts()[0]
    next(model.generate(prompt, 1, report=lines.append))
    assert lines == []
    monkeypatch.setattr(sample, "SLICE", len(prompt.ids) // 2 + 1)
    next(model.generate(prompt, 1, report=lines.append))
    n = len(prompt.ids)
    assert lines == [f"prompt: {n // 2 + 1} of {n} tokens", f"prompt: {n} of {n} tokens"]


# ---- one row on a CPU ----


@pytest.mark.parametrize("outputs", [1, 6, 48, 1000, 151_936 // 64])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_a_row_times_a_matrix_is_within_one_rounding_of_the_exact_product(outputs, dtype, error):
    torch.manual_seed(outputs)
    layer = Linear(320, outputs).to(dtype)
    x = torch.randn(1, 1, 320, dtype=dtype)
    exact = x.double() @ layer.weight.double().T
    size = x.double().abs() @ layer.weight.double().abs().T  # what a sum's rounding is in proportion to
    for row in (x, x[0], x[0, 0]):
        given = layer(row)
        assert given.shape == (*row.shape[:-1], outputs) and given.dtype == dtype
        assert ((given.double() - exact.view_as(given)).abs() <= error * size.view_as(given)).all()


def test_a_row_times_a_matrix_has_the_gradients_of_torch():
    torch.manual_seed(0)
    layer, x = Linear(32, 48), torch.randn(1, 32, requires_grad=True)
    ours = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    theirs = torch.autograd.grad(F.linear(x, layer.weight).square().sum(), [x, layer.weight])
    for a, b in zip(ours, theirs):
        assert_close(a, b)
