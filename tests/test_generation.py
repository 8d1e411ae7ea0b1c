"""From logits to text: sampling, stopping, the budget of a thought, streaming."""

import random
import re

import numpy as np
import pytest
import torch

from conftest import QWEN3_TOKENIZER, edit_json, golden_case, golden_model, golden_prompt
from moss_min import MossAudio, load_tokenizer
from sample import (
    Picker,
    Sampling,
    generate,
    probabilities,
    split_thinking,
    stream_answer,
    stream_text,
)

EOS = 302


def encode(text: str) -> list[int]:
    return golden_model().tokenizer.encode(text, add_special_tokens=False).ids


FORCED = (  # what the Qwen3 report ends a thought with
    "Considering the limited time by the user, I have to give the solution based on the thinking"
    " directly now.\n</think>.\n\n"
)


def picker(sampling: Sampling, prompt: str = "") -> Picker:
    return Picker(sampling, golden_model().tokenizer, encode(prompt), torch.device("cpu"))


def one_hot(token: int) -> torch.Tensor:
    return torch.eye(320)[None, token]


def test_a_generation_computes_the_logits_of_its_choices_alone():
    model = golden_model()
    rows = []

    def keep(head, args, logits):
        rows.extend(logits.reshape(-1, 320))

    with model.lm_head.register_forward_hook(keep):
        ids = list(model.generate(golden_prompt("short"), 24, temperature=0))
    assert len(rows) == len(ids) == 24


def test_a_generation_steps_each_id_but_the_last():
    stepped = []

    def step(token):
        stepped.append(token)
        return one_hot(token + 1)

    ids = list(generate(lambda: one_hot(7), step, picker(Sampling(4, temperature=0)), (EOS,)))
    assert ids == [7, 8, 9, 10] and stepped == [7, 8, 9]


# ---- choosing ----

LOGITS = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log()
ORDER = [1, 2, 0, 3]  # in which the filters get them


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
        # Temperature goes first (16 / 22 reach 0.7 alone), then top-k (2 / 3 reach 0.6 alone).
        ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
    ],
)
def test_probabilities_are_the_worked_ones(options, expected):
    got = probabilities(LOGITS[None, ORDER], Sampling(**{"top_k": 0} | options))
    expected = torch.tensor([expected], dtype=torch.float32)[:, ORDER]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_temperature_0_takes_the_largest_and_draws_nothing():
    greedy = picker(Sampling(temperature=0, top_k=3, top_p=0.5))
    before = greedy.generator.get_state()
    logits = torch.randn(1, 320, generator=torch.Generator().manual_seed(0))
    assert greedy.next(logits) == np.argmax(logits.numpy())
    assert torch.equal(greedy.generator.get_state(), before)


def test_no_seed_is_different_each_time_whatever_torchs_own_generator_is_at():
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        answers.append(list(golden_model().generate(golden_prompt("short"), 16)))
    assert answers[0] != answers[1]


# ---- stopping ----


@pytest.mark.parametrize("places, length", [([5, 3], 4), ([5], 6)])
def test_any_of_the_eos_ids_ends_a_generation_and_is_its_last(places, length, checkpoint):
    ids = golden_case("short").tensors["generated"].tolist()
    assert all(ids.index(ids[place]) == place for place in places)
    eos = [EOS, *(ids[place] for place in places)]
    edit_json(checkpoint / "generation_config.json", eos_token_id=eos)
    model = MossAudio.from_pretrained(checkpoint, device="cpu")
    assert list(model.generate(golden_prompt("short"), 24, temperature=0)) == ids[:length]


# ---- the budget of a thought ----


def picked(prompt: str, wish: str, budget: int | None, count=1024) -> list[int]:
    """The ids of a model whose likeliest next id is that of a wish until it comes, then EOS."""
    wishes = [*encode(wish), EOS]

    def step(token):
        if token == wishes[0]:
            del wishes[0]
        return one_hot(wishes[0])

    sampling = Sampling(count, temperature=0, thinking_budget=budget)
    return list(generate(lambda: one_hot(wishes[0]), step, picker(sampling, prompt), (EOS,)))


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
        # A thought that begins again has the whole budget.
        ("<think>12<think>", "3456", 3, "345" + FORCED + "6"),
        ("<think>1</think>", "23456", 3, "23456"),
        ("", "<think>12</think>3<think>4567", 3, "<think>12</think>3<think>456" + FORCED + "7"),
        # One thought is ended, and none after it.
        ("", "<think>1<think>234<think>567", 2, "<think>1<think>23" + FORCED + "4<think>567"),
    ],
)
def test_a_thought_out_of_budget_is_brought_to_its_end(prompt, wish, budget, expected):
    assert picked(prompt, wish, budget) == [*encode(expected), EOS]


def test_forced_tokens_count_as_new_tokens():
    assert picked("<think>", "123456", 3, count=20) == encode("123" + FORCED)[:20]


def test_forced_tokens_draw_nothing():
    level = torch.zeros(1, 320)

    def draws(budget, count):
        sampling = Sampling(count, top_k=0, seed=3, thinking_budget=budget)
        return list(generate(lambda: level, lambda token: level, picker(sampling, "<think>"), ()))

    free = draws(None, 20)
    forced = encode(FORCED)
    assert not set(free) & set(encode("<think></think>"))
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
    if request.param == "golden":
        return golden_model().tokenizer
    return load_tokenizer(QWEN3_TOKENIZER)


def test_text_cut_off_anywhere_streams_in_whole_characters_and_ends_as_decode_does(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        for n in range(len(ids) + 1):
            *pieces, last = stream_text(tokenizer, ids[:n])
            assert not any("\ufffd" in piece for piece in pieces)
            assert "".join(pieces) + last == tokenizer.decode(ids[:n])


def test_random_ids_stream_as_they_decode(tokenizer):
    rng = random.Random(0)
    padded = tokenizer.get_vocab_size() + 12  # the last decode to nothing
    for _ in range(200):
        # Ids 0 to 255 are single bytes.
        ids = [rng.randrange(rng.choice([256, padded])) for _ in range(40)]
        assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_with_the_last_of_its_bytes():
    fed = []

    def feed():
        for token in encode("é你😀!"):
            fed.append(token)
            yield token

    came = [(piece, len(fed)) for piece in stream_text(golden_model().tokenizer, feed()) if piece]
    assert came == [("é", 2), ("你", 5), ("😀", 9), ("!", 10)]


def test_specials_and_ids_past_the_vocabulary_stream_as_nothing():
    assert "".join(stream_text(golden_model().tokenizer, [33, 301, 319, EOS, 34, 308])) == "BC"


# ---- thinking and answer ----

SPLIT = [  # text, thinking, answer
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


STREAMS = [(text, False, answer) for text, _, answer in SPLIT if not text.startswith("a b")]
STREAMS += [("a b\n</think>\n\nYes.", True, "Yes."), ("\na b", True, "")]


@pytest.mark.parametrize("text, opened, answer", STREAMS)
def test_a_streamed_answer_is_the_answer_wherever_the_pieces_end(text, opened, answer):
    characters = re.findall("</?think>|.", text, re.DOTALL)  # a tag is one token
    for n in range(len(characters) + 1):
        halves = ["".join(characters[:n]), "".join(characters[n:])]
        assert "".join(stream_answer(halves, opened)) == answer
    assert "".join(stream_answer(characters, opened)) == answer


def test_an_answer_streams_as_soon_as_it_is_sure():
    pieces = ["<think>", "a", "</think>", "\n\n", "Yes", ", ", "it", " is.", " "]
    shown = [piece for piece in stream_answer(pieces, False) if piece]
    assert shown == ["Yes", ",", " it", " is."]
