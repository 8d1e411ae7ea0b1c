"""The faster ways give what the plain one gives: steps of many rows, steps of static shape, slices, rows on a CPU."""

import warnings
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    return [
        list(model.generate(prompt, seed=own, **options)) for prompt, own in zip(prompts, seeds)
    ]


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
    prompts.append(
        Prompt(torch.tensor(model.tokenizer.encode("<think>1", add_special_tokens=False).ids), [])
    )
    options = {"max_new_tokens": 40} | options
    answers = dict(model.generate_batch(prompts, **options))
    assert [answers[i] for i in range(len(prompts))] == one_by_one(model, prompts, **options)


def test_answers_of_a_batch_come_as_they_end():
    model, prompts = golden_model(), golden_prompts()
    lengths = [5, 2, 9, 1, 7]
    samplings = [Sampling(n, temperature=0) for n in lengths]
    ended = list(generate_batch(model, prompts, samplings))
    assert [i for i, _ in ended] == [3, 1, 0, 4, 2]
    assert all(
        ids == one_by_one(model, [prompts[i]], max_new_tokens=lengths[i], temperature=0)[0]
        for i, ids in ended
    )


def test_a_batch_draws_with_the_seeds_it_is_given():
    model, prompts = golden_model(), golden_prompts()[:3]
    answers = dict(model.generate_batch(prompts, 12, seed=[5, 9, 2**63]))
    assert answers == {
        i: list(model.generate(prompts[i], 12, seed=s)) for i, s in enumerate([5, 9, 2**63])
    }


def test_an_empty_batch_gives_nothing():
    assert list(golden_model().generate_batch([])) == []


def test_a_batch_refuses_what_generate_refuses_at_the_call():
    model, prompts = golden_model(), golden_prompts()
    with pytest.raises(ValueError, match="top_p is 2; expected"):
        model.generate_batch(prompts, top_p=2)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        model.generate_batch(prompts, seed=[1, 2])


@pytest.mark.parametrize("seed", [True, 1.5, "7"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_batch_refuses_a_seed_that_is_no_whole_number_at_the_call(seed, listed):
    with pytest.raises(ValueError) as caught:
        golden_model().generate_batch(golden_prompts()[:2], seed=[3, seed] if listed else seed)
    assert str(caught.value) == f"seed is {seed!r}; expected None or a whole number of 64 bits"


def test_a_row_of_a_batch_ends_at_the_models_last_position(checkpoint):
    prompts = golden_prompts()
    edit_json(
        checkpoint / "config.json",
        **{"language_config.max_position_embeddings": len(prompts[2].ids) + 3},
    )
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


class Recorder(TorchDispatchMode):
    """Keeps each call of an operator: the operator, its arguments and what it gave."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def read_from_outside(calls: list) -> set[int]:
    """The ids of the tensors that the operators read and that none of them gave."""
    given = {id(tensor) for *_, result in calls for tensor in tensors(result)}
    return {
        id(tensor) for _, args, kwargs, _ in calls for tensor in tensors((args, kwargs))
    } - given


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_makes_nothing_on_the_host_and_waits_for_no_value(batch):
    """A capture allows neither. "meta" stands for CUDA: it has no values, so .item() and its like raise there. The call
    before the capture fills what is kept."""
    config, meta = golden_model().config, torch.device("meta")
    with meta:
        model = MossAudio(config, golden_model().tokenizer)
    step = Step(model, KVCache(config.decoder, batch, 40, torch.float32, meta), graph=False)
    step.logits()
    recorders = Recorder(), Recorder()
    for recorder in recorders:
        with recorder:
            assert step.logits().shape == (batch, config.decoder.vocab_size)
    calls = recorders[0].calls
    assert {tensor.device for _, *call in calls for tensor in tensors(call)} == {meta}
    indices = [
        tensor
        for operator, args, *_ in calls
        if "index" in str(operator)
        for tensor in tensors(args[1:2])
    ]
    assert indices and all(
        index.dtype == torch.int64 for index in indices
    )  # of a mask, CUDA reads the size back
    assert read_from_outside(calls) == read_from_outside(
        recorders[1].calls
    )  # else torch.tensor made one anew


class Graph:
    """torch.cuda.CUDAGraph as far as a CPU can show it: operators again, with the numbers, shapes and memory that they
    had when they were captured."""

    def replay(self):
        self.replays += 1
        for operator, args, kwargs, result in self.calls:
            for kept, new in zip(tensors(result), tensors(operator(*args, **kwargs))):
                if kept.data_ptr() != new.data_ptr():  # else a view, or written in place
                    kept.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are captured from here on, each with its device, its stream and how often it was replayed."""
    graphs, devices = [], []

    @contextmanager
    def device(device):
        devices.append(device)
        yield
        devices.pop()

    @contextmanager
    def capture(graph, stream):
        with Recorder() as recorder:
            yield
        graph.calls, graph.replays, graph.device, graph.stream = (
            recorder.calls,
            0,
            devices[-1],
            stream,
        )
        graphs.append(graph)

    fakes = {
        "CUDAGraph": Graph,
        "graph": capture,
        "device": device,
        "Stream": lambda on: SimpleNamespace(device=on),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    sample.capture_stream.cache_clear()
    yield graphs
    sample.capture_stream.cache_clear()


class HeadOnCUDA(nn.Module):
    """An lm_head whose weight says that it is on CUDA."""

    def __init__(self, head: Linear):
        super().__init__()
        self.head = head
        self.weight = SimpleNamespace(
            is_cuda=True, device=head.weight.device, dtype=head.weight.dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


@pytest.fixture
def on_cuda(graphs) -> MossAudio:
    """The golden model, as if on CUDA, and without stop ids."""
    model = MossAudio.from_pretrained(GOLDEN / "checkpoint", "cpu")
    model.lm_head, model.config = HeadOnCUDA(model.lm_head), model.config._replace(stop_ids=())
    return model


@pytest.fixture
def chosen_from(monkeypatch) -> dict[int, list[torch.Tensor]]:
    """The logits that ids are chosen from, copied; by their row's seed."""
    rows, choose = defaultdict(list), sample.choose

    def spy(logits, sampling, generator):
        rows[generator.initial_seed()].append(logits.clone())
        return choose(logits, sampling, generator)

    monkeypatch.setattr(sample, "choose", spy)
    return rows


def test_a_captured_step_gives_the_plain_steps_logits_from_one_capture(
    on_cuda, graphs, chosen_from
):
    for i, prompt in enumerate(golden_prompts()[:3]):
        plain = list(on_cuda.generate(prompt, 24, temperature=0, seed=0, cuda_graph=False))
        assert len(graphs) == i
        with mock.patch.object(Step, "logits", autospec=True, side_effect=Step.logits) as logits:
            assert list(on_cuda.generate(prompt, 24, temperature=0, seed=1)) == plain
        assert logits.call_count == 2  # to warm up, and in the capture
        assert len(graphs) == i + 1 and graphs[i].replays == 23
    assert_close(torch.cat(chosen_from[1]), torch.cat(chosen_from[0]))


def test_a_captured_step_of_rows_that_differ_in_length_gives_the_plain_steps_logits(
    on_cuda, graphs, chosen_from
):
    prompts = golden_prompts()[:3]
    plain = [
        list(on_cuda.generate(p, 24, temperature=0, seed=i, cuda_graph=False))
        for i, p in enumerate(prompts)
    ]
    with mock.patch.object(Step, "logits", autospec=True, side_effect=Step.logits) as logits:
        assert dict(on_cuda.generate_batch(prompts, 24, temperature=0, seed=10)) == dict(
            enumerate(plain)
        )
    assert logits.call_count == 2 and [graph.replays for graph in graphs] == [23]
    for i in range(3):
        assert_close(torch.cat(chosen_from[10 + i]), torch.cat(chosen_from[i]))


def test_a_batch_captures_anew_only_where_a_row_has_left_it(on_cuda, graphs):
    prompts, lengths = golden_prompts()[:3], [4, 12, 7]
    answers = dict(generate_batch(on_cuda, prompts, [Sampling(n, temperature=0) for n in lengths]))
    for i, n in enumerate(lengths):
        assert answers[i] == list(on_cuda.generate(prompts[i], n, temperature=0, cuda_graph=False))
    assert [graph.replays for graph in graphs] == [3, 3, 5]


def test_without_cuda_graph_a_batch_captures_nothing(on_cuda, graphs):
    assert len(dict(on_cuda.generate_batch(golden_prompts()[:2], 3, cuda_graph=False))) == 2
    assert graphs == []


def test_captures_are_on_the_caches_device_and_share_a_stream_of_it(on_cuda, graphs):
    for prompt in golden_prompts()[:2]:
        list(on_cuda.generate(prompt, 3))
    device = torch.device("cpu")
    assert (
        [graph.device for graph in graphs]
        == [graph.stream.device for graph in graphs]
        == [device, device]
    )
    assert graphs[0].stream is graphs[1].stream


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("size", [64, 1024])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 4}], ids=str)
def test_on_cuda_captured_steps_alone_and_in_a_batch_give_the_plain_steps_ids(
    size, options, monkeypatch
):
    monkeypatch.setattr(sample, "SLICE", size)
    model, prompts = (
        MossAudio.from_pretrained(GOLDEN / "checkpoint", "cuda", "float32"),
        golden_prompts(),
    )
    plain = one_by_one(model, prompts, max_new_tokens=32, cuda_graph=False, **options)
    assert one_by_one(model, prompts, max_new_tokens=32, **options) == plain
    assert dict(model.generate_batch(prompts, 32, **options)) == dict(enumerate(plain))


# ---- the prompt in slices ----


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_prompt_in_slices_has_the_logits_of_one_piece(size, monkeypatch):
    """Slices end within clips, time markers and text; DeepStack rows go with their tokens."""
    monkeypatch.setattr(sample, "SLICE", size)
    model = golden_model()
    for prompt in golden_prompts()[:3]:
        cache = KVCache(
            model.config.decoder, 1, len(prompt.ids), torch.float32, torch.device("cpu")
        )
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


def test_a_long_clips_encoding_says_how_it_goes_before_its_prompt_does(monkeypatch):
    monkeypatch.setattr(sample, "SLICE", 400)
    model, case, lines = (
        golden_model(),
        golden_case("long"),
        [],
    )  # 44 s are 11 chunks, the last 3 a batch of their own
    prompt = model.prompt(case.text, case.clips)
    n = len(prompt.ids)
    assert 400 < n <= 800
    told = [
        "encoding: 32 of 44 s",
        "encoding: 44 of 44 s",
        f"prompt: 400 of {n} tokens",
        f"prompt: {n} of {n} tokens",
    ]
    next(model.generate(prompt, 1, report=lines.append))
    assert lines == told
    list(model.generate_batch([prompt, prompt], 1, report=lines.append))
    assert lines == 3 * told


# ---- one row on a CPU ----


@pytest.mark.parametrize("outputs", [1, 6, 48, 1000, 151_936 // 64])
@pytest.mark.parametrize(
    "dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)]
)
def test_a_row_times_a_matrix_is_within_one_rounding_of_the_exact_product(outputs, dtype, error):
    torch.manual_seed(outputs)
    layer = Linear(320, outputs).to(dtype)
    x = torch.randn(1, 1, 320, dtype=dtype)
    exact = x.double() @ layer.weight.double().T
    size = (
        x.double().abs() @ layer.weight.double().abs().T
    )  # what a sum's rounding is in proportion to
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
