"""One cached path for all: steps, slices, rows of different length, and the graph of a step."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moss_min
from conftest import GOLDEN, assert_close, golden_model, golden_prompt, needs_cuda
from moss_min import MossAudio, Prompt, Step
from qwen3 import KVCache, Linear

NAMES = ["short", "text_only", "two_audios"]  # prompts of different lengths
NEW = [7, 8, 9, 40]  # ids that follow a prompt


@functools.cache
def expected(name: str) -> torch.Tensor:
    """The logits of one pass over a prompt and the new ids, [N + 4, V]."""
    prompt = golden_prompt(name)
    return golden_model()(Prompt(torch.cat([prompt.ids, torch.tensor(NEW)]), prompt.mels))


def prefilled(name: str, more: int) -> KVCache:
    """A cache with a prompt in it, and places for so many tokens more."""
    prompt = golden_prompt(name)
    cache = golden_model().new_cache(1, len(prompt.ids) + more)
    golden_model().prefill(prompt, cache)
    return cache


# ---- a step ----


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True], ids=["the part in use", "the whole cache"])
def test_steps_over_the_cache_have_the_logits_of_one_pass(whole):
    cache = prefilled("short", more=30)
    start = len(golden_prompt("short").ids)
    for layer in (*cache.keys, *cache.values):
        layer[:, :, start:] = 50  # what lies behind the tokens so far must not matter
    for i, token in enumerate(NEW):
        in_use = cache.capacity if whole else start + i + 1
        position = torch.tensor([[start + i]])
        logits = golden_model().step(torch.tensor([[token]]), position, cache, in_use)
        assert logits.dtype == torch.float32
        assert_close(logits[0], expected("short")[start + i])


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True], ids=["the part in use", "the whole cache"])
def test_rows_of_different_length_in_one_cache_have_the_logits_that_each_has_alone(whole):
    alone = [prefilled(name, more=4) for name in NAMES]
    starts = torch.tensor([[len(golden_prompt(name).ids)] for name in NAMES])
    together = golden_model().new_cache(3, int(starts.max()) + 4)
    for layer in range(len(together.keys)):
        for row, cache in enumerate(alone):
            together.keys[layer][row, :, : cache.capacity] = cache.keys[layer][0]
            together.values[layer][row, :, : cache.capacity] = cache.values[layer][0]
    for i, token in enumerate(NEW):
        positions = starts + i
        in_use = together.capacity if whole else int(positions.max()) + 1
        logits = golden_model().step(torch.full([3, 1], token), positions, together, in_use)
        for row, name in enumerate(NAMES):
            assert_close(logits[row], expected(name)[starts[row] + i][0])


@torch.no_grad()
def test_steps_past_the_end_of_a_cache_make_it_grow_and_have_the_logits_of_one_pass():
    prompt = golden_prompt("short")
    start = len(prompt.ids)
    cache = prefilled("short", more=0)
    capacity = cache.capacity
    step = Step(golden_model(), cache, [start])
    ids = list(range(40, 60))
    whole = golden_model()(Prompt(torch.cat([prompt.ids, torch.tensor(ids)]), prompt.mels))
    for i, token in enumerate(ids):
        assert_close(step(token)[0], whole[start + i])
    assert start + 20 > capacity and cache.capacity == 2 * capacity


def test_a_new_cache_holds_zeros_whatever_the_memory_held_before():
    """Masked keys and values of a shorter row are read, and 0 times NaN is NaN."""
    for _ in range(3):
        spoilt = [torch.full([3, 2, 512, 24], torch.nan) for _ in range(8)]
        del spoilt  # and its memory is given out again
        cache = golden_model().new_cache(3, 512)
        assert not any(layer.any() for layer in (*cache.keys, *cache.values))


class OnOneDevice(TorchDispatchMode):
    """Fails where an operator reads or gives a tensor of another device than "meta"."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not torch.is_tensor(leaf) or leaf.is_meta, operator
        return result


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_makes_nothing_on_the_host_and_waits_for_no_value(batch):
    """The capture of a CUDA graph allows neither. "meta" stands for CUDA: it has no values."""
    with torch.device("meta"):
        model = MossAudio(golden_model().config, golden_model().tokenizer)
        ids = torch.zeros([batch, 1], dtype=torch.int64)
    cache = model.new_cache(batch, 40)
    for recording in (False, True):  # a first step fills what is kept, as before a capture
        with OnOneDevice() if recording else torch.no_grad():
            logits = model.step(ids, ids, cache, cache.capacity)
    assert logits.shape == (batch, 320)


@needs_cuda
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_captured_step_has_the_logits_of_the_plain_one(batch):
    model = MossAudio.from_pretrained(GOLDEN / "checkpoint", "cuda", "float32")
    captured = model.new_cache(batch, 100)
    plain = model.new_cache(batch, 100)
    step = Step(model, captured, [0] * batch)
    for position in range(40):
        ids = (torch.arange(batch, device="cuda")[:, None] + 7 * position) % 300
        positions = torch.full([batch, 1], position, device="cuda")
        expected = model.step(ids, positions, plain, position + 1)
        assert_close(step(*ids.flatten().tolist()), expected)


@needs_cuda
@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 4}], ids=str)
def test_with_and_without_a_cuda_graph_the_ids_are_the_same(options):
    model = MossAudio.from_pretrained(GOLDEN / "checkpoint", "cuda", "float32")
    for name in NAMES:
        plain = list(model.generate(golden_prompt(name), 32, cuda_graph=False, **options))
        assert list(model.generate(golden_prompt(name), 32, **options)) == plain


# ---- the prompt in slices ----


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_prompt_in_slices_has_the_logits_of_one_pass(size, name, monkeypatch):
    """Slices end within clips, time markers and text; DeepStack's rows go with their tokens."""
    monkeypatch.setattr(moss_min, "SLICE", size)
    prompt = golden_prompt(name)
    cache = golden_model().new_cache(1, len(prompt.ids))
    assert_close(golden_model().prefill(prompt, cache)[0], golden_model()(prompt)[-1])


def test_a_long_prompt_says_how_it_goes_and_a_short_one_nothing(monkeypatch):
    model = golden_model()
    prompt = golden_prompt("short")
    lines = []
    next(model.generate(prompt, 1, report=lines.append))
    assert lines == []
    n = len(prompt.ids)
    monkeypatch.setattr(moss_min, "SLICE", n // 2 + 1)
    next(model.generate(prompt, 1, report=lines.append))
    assert lines == [f"prompt: {n // 2 + 1} of {n} tokens", f"prompt: {n} of {n} tokens"]


# ---- few rows on a CPU ----


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("outputs", [1, 6, 48, 1000])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_rows_times_a_matrix_are_within_a_rounding_of_the_exact_product(
    rows, outputs, dtype, error
):
    torch.manual_seed(outputs)
    layer = Linear(320, outputs).to(dtype)
    x = torch.randn(rows, 320, dtype=dtype)
    exact = x.double() @ layer.weight.double().T
    size = x.double().abs() @ layer.weight.double().abs().T  # a sum's rounding is in proportion
    for given in (layer(x), layer(x[:, None])[:, 0], layer(x[None])[0]):
        assert given.shape == exact.shape and given.dtype == dtype
        assert ((given.double() - exact).abs() <= error * size).all()
