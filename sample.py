"""Generation: a prompt to token ids, one at a time, and ids to text as it streams."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from qwen3 import KVCache

THOUGHT_IS_OVER = (  # the text that ends a thought which is out of budget (Qwen3 Technical Report, arXiv 2505.09388)
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now.\n</think>.\n\n"
)


def whole(low, high=math.inf):
    """The check that a value is a whole number from low to high."""
    return lambda value: isinstance(value, numbers.Integral) and low <= value <= high


def real(low, high):
    """The check that a value is a number from low to high; NaN is not."""
    return lambda value: isinstance(value, numbers.Real) and low <= value <= high


CHECKS = {  # argument -> is it good, what was expected
    "max_new_tokens": (whole(1), "a whole number from 1 up"),
    "temperature": (lambda t: real(0, 0)(t) or real(1e-6, 1e6)(t), "0 (greedy) or a number from 1e-6 to 1e6"),
    "top_p": (real(math.ulp(0), 1), "a number above 0 and up to 1 (no filter)"),
    "top_k": (whole(0), "a whole number, 0 for no filter"),
    "seed": (lambda seed: seed is None or whole(-(2**63), 2**64 - 1)(seed), "None or a whole number of 64 bits"),
    "thinking_budget": (lambda n: n is None or whole(0)(n), "None or a whole number from 0 up"),
}


@dataclass(frozen=True)
class Sampling:
    """How to generate. Raises ValueError for an argument out of range."""

    max_new_tokens: int = 1024
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # keeps the likeliest tokens that together reach this probability
    top_k: int = 50  # keeps this many of the likeliest tokens, and those as likely as the last of them
    seed: int | None = None  # None: different each time
    thinking_budget: int | None = None  # tokens of thought after which it is brought to its end

    def __post_init__(self):
        for name, (good, expected) in CHECKS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not good(value):
                raise ValueError(f"{name} is {value!r}; expected {expected}")


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [..., V] to the probabilities to draw from: temperature, then top-k, then top-p, then softmax."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        drop[..., -1] = False  # the likeliest stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits.softmax(-1)


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The next id of logits [1, V], int64 [1]: the largest, or one draw."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator)[0]


class ThinkingBudget:
    """Counts the tokens since the last <think>, and has the ids that end a thought that is too long, once."""

    def __init__(self, budget: int | None, tokenizer: Tokenizer):
        self.budget, self.left = budget, None  # left: None outside of a thought, and when its end has been forced
        self.opening, self.closing = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")
        self.ending = [] if budget is None else tokenizer.encode(THOUGHT_IS_OVER, add_special_tokens=False).ids

    def see(self, token: int) -> None:
        """Takes account of the next token of prompt or answer."""
        if token == self.opening:
            self.left = self.budget
        elif token == self.closing:
            self.left = None
        elif self.left:
            self.left -= 1

    def spent(self) -> list[int]:
        """The ids to force now: none, or the whole ending."""
        if self.left != 0:
            return []
        self.budget = self.left = None
        return self.ending


@torch.no_grad()
def generate(model, prompt, sampling: Sampling) -> Iterator[int]:
    """The ids that follow a prompt (moss_min.Prompt), up to and with the first stop id, or max_new_tokens of them.

    The prompt goes through `model` (moss_min.MossAudio) once; then each token is a step of its own against the cache. Logits
    are made for the last position alone, and for none whose token is forced.
    """
    decoder, device = model.language_model, model.lm_head.weight.device
    generator = torch.Generator(device)
    generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
    thinking, forced = ThinkingBudget(sampling.thinking_budget, model.tokenizer), []
    for token in prompt.ids.tolist():
        thinking.see(token)
    embeds, deepstack = model.embed(prompt)  # [1, N, D]
    N = embeds.shape[1]
    cache = KVCache(decoder.config, 1, N + sampling.max_new_tokens - 1, embeds.dtype, device)  # the last is not fed back
    hidden = decoder(embeds, torch.arange(N, device=device)[None], cache, deepstack=deepstack)[:, -1]  # [1, D]
    for position in range(N, N + sampling.max_new_tokens):
        forced = forced or list(thinking.spent())
        token = forced.pop(0) if forced else int(choose(model.lm_head(hidden).float(), sampling, generator))
        yield token
        if token in model.config.stop_ids or position == N + sampling.max_new_tokens - 1:
            return
        thinking.see(token)
        embeds = decoder.embed_tokens(torch.tensor([[token]], device=device))  # [1, 1, D]
        hidden = decoder(embeds, torch.tensor([[position]], device=device), cache)[:, -1]


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Ids to text as they come, in whole characters: joined, the pieces are tokenizer.decode(ids).

    A character's bytes may be spread over tokens; until the last of them decoding ends in U+FFFD, and nothing is given out.
    """
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if text and not text.endswith("\ufffd"):
            yield text
            waiting = []
    if text := tokenizer.decode(waiting):
        yield text


def split_thinking(text: str) -> tuple[str, str]:
    """Generated text to (thinking, answer), also where a thought was opened in the prompt, cut off, or brought to its end."""
    head, closed, answer = text.partition("</think>")
    before, opened, thinking = head.partition("<think>")
    if not opened and not closed:
        return "", text.strip()
    if not opened:
        before, thinking = "", head
    answer = re.sub(r"^\.(?=\n|\Z)", "", answer)  # THOUGHT_IS_OVER has a full stop there
    return thinking.strip(), (before + answer).strip()


def stream_answer(pieces: Iterable[str], opened: bool) -> Iterator[str]:
    """Of text as it streams, what split_thinking calls the answer. opened: the prompt ends within a thought."""
    text, shown = "<think>" if opened else "", 0
    for piece in pieces:
        text += piece
        answer = split_thinking(text)[1]
        if len(answer) > shown:
            yield answer[shown:]
            shown = len(answer)
