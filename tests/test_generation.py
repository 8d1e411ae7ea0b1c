"""From logits to text: the cache, sampling, stopping, the thinking budget, streaming."""

import random
import re
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import QWEN3_TOKENIZER, edit_json, golden_case, golden_model
from moss_min import MossAudio, Prompt, load_tokenizer
from qwen3 import KVCache
from sample import Sampling, choose, probabilities, split_thinking, stream_answer, stream_text
from test_golden import assert_close

EOS = 302
FORCED = (  # spec, section 8
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>.\n\n"
)


def golden_prompt(name: str) -> Prompt:
    case = golden_case(name)
    return golden_model(case.checkpoint).prompt(case.text, case.clips, case.time_markers)


# ---- the cache ----


@pytest.fixture(scope="module")
def greedy() -> tuple[Prompt, list[int], torch.Tensor]:
    """A prompt with audio, the 24 ids that follow it, and the logits that each was chosen from, [24, V]."""
    model, prompt, rows = golden_model(), golden_prompt("short"), []
    with model.lm_head.register_forward_hook(
        lambda head, args, logits: rows.append(logits.reshape(1, -1))
    ):
        ids = list(model.generate(prompt, 24, temperature=0))
    return prompt, ids, torch.cat(rows)


def test_every_cached_step_equals_recomputing_the_whole_sequence(greedy):
    prompt, ids, cached = greedy
    sequences = [
        torch.cat([prompt.ids, torch.tensor(ids[:step], dtype=torch.int64)]) for step in range(24)
    ]
    assert_close(
        cached,
        torch.stack([golden_model()(Prompt(sequence, prompt.mels))[-1] for sequence in sequences]),
    )


def test_log_probabilities_of_a_generation_are_those_of_one_pass_over_prompt_and_answer(greedy):
    prompt, ids, cached = greedy
    logits = golden_model()(Prompt(torch.cat([prompt.ids, torch.tensor(ids)]), prompt.mels))[
        len(prompt.ids) - 1 : -1
    ]
    answer = torch.tensor(ids)[:, None]
    assert_close(cached.log_softmax(-1).gather(1, answer), logits.log_softmax(-1).gather(1, answer))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_prefill_in_slices_equals_one_piece(size):
    decoder = golden_model().language_model
    x, deepstack = golden_model().embed(golden_prompt("two_audios"))
    positions = torch.arange(x.shape[1])[None]
    cache, hidden = KVCache(decoder.config, 1, x.shape[1], x.dtype, x.device), []
    for part in positions[0].split(size):
        hidden.append(
            decoder(
                x[:, part],
                positions[:, part],
                cache,
                deepstack=[rows[:, part] for rows in deepstack],
            )
        )
    assert_close(torch.cat(hidden, dim=1), decoder(x, positions, deepstack=deepstack))


def test_a_batch_padded_on_the_left_equals_its_prompts_one_by_one():
    decoder = golden_model().language_model
    prompts = [golden_model().embed(golden_prompt(name)) for name in ("short", "three_chunks")]
    after = decoder.embed_tokens(
        torch.tensor([[7], [8]])
    )  # [2, 1, D]: a cached step behind the prefill
    n = max(x.shape[1] for x, _ in prompts)
    start = torch.tensor([n - x.shape[1] for x, _ in prompts])[
        :, None
    ]  # [2, 1]: where a prompt begins

    def batch(rows):
        return torch.cat(
            [F.pad(x, (0, 0, n - x.shape[1], 0), value=9.0) for x in rows]
        )  # [2, n, D]

    x, deepstack = (
        batch(x for x, _ in prompts),
        [batch(rows) for rows in zip(*(rows for _, rows in prompts))],
    )
    index = torch.arange(n + 1)
    positions = (index - start).clamp(min=0)  # [2, n + 1]
    mask = (index <= index[:, None]) & (index >= start[..., None])  # [2, n + 1, n + 1]
    mask |= torch.eye(
        n + 1, dtype=torch.bool
    )  # padding sees itself: a row that sees nothing is NaN
    cache = KVCache(decoder.config, 2, n + 1, x.dtype, x.device)
    hidden = decoder(x, positions[:, :n], cache, mask[:, None, :n, :n], deepstack)
    hidden = torch.cat([hidden, decoder(after, positions[:, n:], cache, mask[:, None, n:])], dim=1)

    for i, (x, deepstack) in enumerate(prompts):
        x, deepstack = (
            torch.cat([x, after[i : i + 1]], dim=1),
            [F.pad(rows, (0, 0, 0, 1)) for rows in deepstack],
        )
        assert_close(
            hidden[i : i + 1, start[i] :],
            decoder(x, torch.arange(x.shape[1])[None], deepstack=deepstack),
        )


def test_generation_computes_the_logits_of_one_row_for_each_id():
    model, rows = golden_model(), []
    with model.lm_head.register_forward_hook(
        lambda head, args, logits: rows.append(logits.numel() // 320)
    ):
        assert len(list(model.generate(golden_prompt("short"), 9, temperature=0))) == 9
    assert rows == [1] * 9


# ---- choosing ----

LOGITS = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 3}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),  # the fourth is as likely as the third
        ({"top_k": 9}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        (
            {"temperature": 0.5, "top_p": 0.7},
            [1, 0, 0, 0],
        ),  # temperature first: 16 / 22 reach 0.7 alone
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # top-k first: 2 / 3 reach 0.6 alone
    ],
)
def test_probabilities_are_the_worked_ones(options, expected):
    got = probabilities(LOGITS[None], Sampling(**{"top_k": 0} | options))
    assert torch.allclose(got, torch.tensor([expected], dtype=torch.float32), atol=1e-6)


def filtered(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The probabilities of one row, in float64: from the likeliest token down."""
    p = np.exp(logits / temperature)
    p[p < np.sort(p)[-top_k if top_k else 0]] = 0
    order = np.argsort(-p)
    p[order[p[order].cumsum() - p[order] >= top_p * p.sum()]] = 0  # those before it reach top_p
    return p / p.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 20])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2, 1e-9])
def test_probabilities_of_random_logits_are_those_of_a_filter_from_the_top_down(
    temperature, top_k, top_p
):
    logits = 3 * torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    got = probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p)).numpy()
    expected = np.stack(
        [filtered(row, temperature, top_k, top_p) for row in logits.double().numpy()]
    )
    assert np.array_equal(got > 0, expected > 0)
    assert np.allclose(
        got, expected, rtol=1e-5, atol=0
    )  # a float32 exponent of up to 40 is good to 40 * 2**-24


def test_temperature_0_takes_the_largest_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    logits, before = torch.randn(1, 320, generator=generator), generator.get_state()
    assert int(choose(logits, Sampling(temperature=0, top_k=3, top_p=0.5), generator)) == np.argmax(
        logits.numpy()
    )
    assert torch.equal(generator.get_state(), before)


def test_a_seed_repeats_and_another_differs():
    model, prompt = golden_model(), golden_prompt("short")
    first, again, other = (list(model.generate(prompt, 16, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_no_seed_is_different_each_time_whatever_torchs_own_generator_is_at():
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        answers.append(list(golden_model().generate(golden_prompt("short"), 16)))
    assert answers[0] != answers[1]


# ---- stopping ----


@pytest.mark.parametrize("n", [1, 2, 7])
def test_max_new_tokens_is_exact(n, greedy):
    prompt, ids, _ = greedy
    assert list(golden_model().generate(prompt, n, temperature=0)) == ids[:n]


@pytest.mark.parametrize("places, length", [([5, 3], 4), ([5], 6)])
def test_any_id_of_a_list_of_eos_ids_ends_a_generation_and_is_its_last(
    places, length, greedy, checkpoint
):
    prompt, ids, _ = greedy
    assert all(ids.index(ids[place]) == place for place in places)
    edit_json(
        checkpoint / "generation_config.json", eos_token_id=[EOS, *(ids[place] for place in places)]
    )
    model = MossAudio.from_pretrained(checkpoint, device="cpu")
    assert list(model.generate(prompt, 24, temperature=0)) == ids[:length]


# ---- thinking budget ----


def encode(text: str) -> list[int]:
    return golden_model().tokenizer.encode(text, add_special_tokens=False).ids


def dictated(prompt: str, text: str, budget: int | None, max_new_tokens: int = 1024) -> list[int]:
    """What a model generates whose wish is to write a text: each choice uses up a token of it."""
    wishes = iter([*encode(text), EOS])
    with mock.patch("sample.choose", lambda *_: next(wishes)):
        prompt = Prompt(torch.tensor(encode("?" + prompt)), [])
        return list(
            golden_model().generate(prompt, max_new_tokens, temperature=0, thinking_budget=budget)
        )


@pytest.mark.parametrize(
    "prompt, wish, budget, expected",  # a digit is a token
    [
        ("", "<think>123456", 3, "<think>123" + FORCED + "456"),
        ("", "<think>123456", 0, "<think>" + FORCED + "123456"),
        ("", "<think>123456", None, "<think>123456"),
        ("", "<think>123456", 6, "<think>123456" + FORCED),
        ("", "<think>123456", 7, "<think>123456"),
        ("<think>", "123456", 3, "123" + FORCED + "456"),
        ("<think>12", "3456", 3, "3" + FORCED + "456"),
        ("<think>1234", "56", 3, FORCED + "56"),
        ("<think>12<think>", "3456", 3, "345" + FORCED + "6"),  # from the last one on
        ("<think>1</think>", "23456", 3, "23456"),
        ("<think>1</think>2<think>3", "456", 3, "45" + FORCED + "6"),
        ("", "1<think>23<think>4567", 3, "1<think>23<think>456" + FORCED + "7"),
        ("", "<think>12</think>3456", 3, "<think>12</think>3456"),
        ("", "<think>12</think>3<think>4567", 3, "<think>12</think>3<think>456" + FORCED + "7"),
        (
            "",
            "<think>1<think>234<think>567",
            2,
            "<think>1<think>23" + FORCED + "4<think>567",
        ),  # once
        ("", "123456", 3, "123456"),
    ],
)
def test_a_thought_out_of_budget_is_brought_to_its_end(prompt, wish, budget, expected):
    assert dictated(prompt, wish, budget) == [*encode(expected), EOS]


def test_forced_tokens_count_as_new_tokens():
    assert dictated("<think>", "123456", 3, max_new_tokens=20) == encode("123" + FORCED)[:20]


def test_forced_tokens_draw_nothing():
    def draws(budget, max_new_tokens):
        def level(head, args, logits):
            return logits.new_zeros(logits.shape).index_fill(
                -1, torch.arange(256, 320), -torch.inf
            )  # bytes alone

        with golden_model().lm_head.register_forward_hook(level):
            prompt = Prompt(torch.tensor(encode("<think>")), [])
            return list(
                golden_model().generate(
                    prompt, max_new_tokens, top_k=0, seed=3, thinking_budget=budget
                )
            )

    free, forced = draws(None, 20), encode(FORCED)
    assert draws(5, 20 + len(forced)) == free[:5] + forced + free[5:]


# ---- text as it streams ----

TEXTS = [
    "naïve café — Привет, 你好 😀 ½ عربية\r\n\t don't",
    "हिन्दी தமிழ் ไทย 한국어 日本語 ქართული",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇦 🫠🜁",
    "ᚠᛇᚻ 𐍈 𝔘𝔫𝔦 e\u0301 \u200d \ufeff \x00",
    "<think>\nщо?\n</think>\n\n好。<|im_end|>",
]


@pytest.fixture(scope="module", params=["golden", "Qwen3"])
def tokenizer(request):
    return (
        golden_model().tokenizer if request.param == "golden" else load_tokenizer(QWEN3_TOKENIZER)
    )


@pytest.mark.parametrize("text", TEXTS)
def test_text_streams_in_whole_characters_and_joined_is_the_text(text, tokenizer):
    ids = tokenizer.encode(text).ids
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) > 4 and not any("\ufffd" in piece for piece in pieces)


def test_text_that_is_cut_off_anywhere_ends_as_decode_does(tokenizer):
    cuts = [
        ids[:n] for ids in (tokenizer.encode(text).ids for text in TEXTS) for n in range(len(ids))
    ]
    assert any(
        tokenizer.decode(cut).endswith("\ufffd") for cut in cuts
    )  # in the middle of a character
    for cut in cuts:
        assert "".join(stream_text(tokenizer, cut)) == tokenizer.decode(cut)


def test_random_ids_stream_as_they_decode(tokenizer):
    rng, padded = random.Random(0), tokenizer.get_vocab_size() + 12  # the last decode to nothing
    for _ in range(200):
        ids = [
            rng.choice([rng.randrange(256), rng.randrange(padded)]) for _ in range(40)
        ]  # 0 to 255 are single bytes
        assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_with_the_last_of_its_bytes():
    ids, fed = encode("é你😀!"), []
    pieces = stream_text(golden_model().tokenizer, (fed.append(i) or i for i in ids))
    assert [(piece, len(fed)) for piece in pieces if piece] == [
        ("é", 2),
        ("你", 5),
        ("😀", 9),
        ("!", 10),
    ]


def test_specials_and_ids_past_the_vocabulary_stream_as_nothing():
    assert "".join(stream_text(golden_model().tokenizer, [33, 301, 319, EOS, 34, 308])) == "BC"


# ---- thinking and answer ----

SPLIT = [  # text, thinking, answer (the table, and what is written before a thought)
    ("<think>\na b\n</think>\n\nYes.", "a b", "Yes."),
    ("<think>\n\n</think>\n\nYes.", "", "Yes."),
    ("Yes.", "", "Yes."),
    ("<think>\na b", "a b", ""),
    ("a b\n</think>\n\nYes.", "a b", "Yes."),
    ("<think>\na\n\n" + FORCED + "Yes.", "a\n\n" + FORCED.partition("\n<")[0], "Yes."),
    ("Well.\n<think>a</think>\n.5 or so. \n", "a", "Well.\n\n.5 or so."),
    ("<think>a</think>.5, or so.", "a", ".5, or so."),
]


@pytest.mark.parametrize("text, thinking, answer", SPLIT)
def test_a_text_is_split_into_thinking_and_answer(text, thinking, answer):
    assert split_thinking(text) == (thinking, answer)


THOUGHTS = [row for row in SPLIT if row[0].startswith(("<think>", "a b"))]
STREAMS = [(text, False, answer) for text, _, answer in SPLIT if not text.startswith("a b")]
STREAMS += [(text.removeprefix("<think>"), True, answer) for text, _, answer in THOUGHTS]


@pytest.mark.parametrize("text, opened, answer", STREAMS)
def test_a_streamed_answer_is_the_answer_wherever_the_pieces_end(text, opened, answer):
    characters = re.findall("</?think>|.", text, re.DOTALL)  # a tag is one token
    for n in range(len(characters) + 1):
        assert (
            "".join(stream_answer(["".join(characters[:n]), "".join(characters[n:])], opened))
            == answer
        )
    assert "".join(stream_answer(characters, opened)) == answer


def test_an_answer_streams_as_soon_as_it_is_sure():
    pieces = ["<think>", "a", "</think>", "\n\n", "Yes", ", ", "it", " is.", " "]
    assert [piece for piece in stream_answer(pieces, opened=False) if piece] == [
        "Yes",
        ",",
        " it",
        " is.",
    ]
