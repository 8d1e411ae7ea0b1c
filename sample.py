"""Generation without a model: logits to ids, one at a time, and ids to text as it streams.
Shapes: V vocabulary."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from tokenizers import Tokenizer
from torch import Tensor

# What ends a thought that is out of budget (Qwen3 Technical Report, arXiv 2505.09388).
THOUGHT_IS_OVER = (
    "Considering the limited time by the user, I have to give the solution based on the thinking"
    " directly now.\n</think>.\n\n"
)


@dataclass(frozen=True)
class Sampling:
    """How to generate. Raises ValueError for a value out of range."""

    max_new_tokens: int | None = None  # None: as many as there is room for, but at most 4,096
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability; 1: all
    top_k: int = 50  # keep this many of the likeliest, and ties with the last of them; 0: all
    seed: int | None = None  # None: different each time
    thinking_budget: int | None = None  # tokens that a thought may take; None: any number

    def __post_init__(self):
        whole = "a whole number from 0 up"
        coldest = 0 if self.temperature == 0 else 1e-6
        self.check("max_new_tokens", Integral, 1, math.inf, "a whole number from 1")
        self.check("temperature", Real, coldest, 1e6, "0 (greedy), or a number from 1e-6 to 1e6")
        self.check("top_p", Real, math.nextafter(0, 1), 1, "a number above 0 and up to 1")
        self.check("top_k", Integral, 0, math.inf, whole)
        self.check("seed", Integral, -(2**63), 2**64 - 1, "a whole number of 64 bits")
        self.check("thinking_budget", Integral, 0, math.inf, whole)

    def check(self, name: str, kind: type, low: float, high: float, expected: str) -> None:
        """Raises ValueError unless a field has its default, which may be None, or is a number of
        that kind from low to high, which NaN isn't."""
        value = getattr(self, name)
        is_default = value is getattr(Sampling, name)
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not (is_default or (is_number and low <= value <= high)):
            raise ValueError(f"{name} is {value!r:.60}; expected {expected}")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns the probabilities [..., V] to draw from, of float32 logits [..., V]: temperature,
    top-k, top-p and softmax, in this order."""
    logits = logits / sampling.temperature
    if sampling.top_k > 0:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < kept[..., -1:], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        drop[..., -1] = False  # the likeliest always stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits.softmax(-1)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Returns the next id from float32 logits [1, V]: the likeliest, or one draw."""
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite: look at the weights (float16 overflows)")
    if sampling.temperature == 0:
        return int(logits.argmax(-1))
    return int(torch.multinomial(probabilities(logits, sampling), 1, generator=generator))


class Picker:
    """Picks the ids of one answer: its draws, and the end of a thought that is out of budget."""

    def __init__(self, sampling: Sampling, tokenizer: Tokenizer, prompt_ids: list[int], device):
        self.sampling = sampling
        self.generator = torch.Generator(device)
        self.generator.seed()  # different each time
        if sampling.seed is not None:
            self.generator.manual_seed(int(sampling.seed))
        self.begin_id = tokenizer.token_to_id("<think>")
        self.end_id = tokenizer.token_to_id("</think>")
        self.ending = tokenizer.encode(THOUGHT_IS_OVER, add_special_tokens=False).ids
        self.queue = []  # ids that are to come whatever the logits are
        self.budget = math.inf if sampling.thinking_budget is None else sampling.thinking_budget
        self.left = math.inf  # tokens that the thought may still take; outside of one, any number
        for token in prompt_ids:
            self.see(token)

    def see(self, token: int) -> None:
        self.left -= 1
        if token == self.begin_id:
            self.left = self.budget
        elif token == self.end_id:
            self.left = math.inf

    def next(self, logits: Tensor) -> int:
        """Returns the next id after float32 logits [1, V]."""
        if self.left <= 0:
            self.queue += self.ending
            # One thought is ended, and none after it.
            self.budget = math.inf
            self.left = math.inf
        if not self.queue:
            self.queue.append(choose(logits, self.sampling, self.generator))
        token = self.queue.pop(0)
        self.see(token)
        return token


@torch.no_grad()
def generate(
    prefill: Callable[[], Tensor], step: Callable[[int], Tensor], picker: Picker, stop_ids
) -> Iterator[int]:
    """Yields an answer's ids, up to and with the first stop id, at most max_new_tokens. prefill
    returns the logits after the prompt, step those after one more id, float32 [1, V] each."""
    token = picker.next(prefill())
    yield token
    for _ in range(1, picker.sampling.max_new_tokens):
        if token in stop_ids:
            return
        token = picker.next(step(token))
        yield token


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yields the text of ids as they come, in whole characters: together tokenizer.decode(ids)."""
    waiting = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):  # as it does until a character's last byte has come
            yield text
            waiting = []
    yield tokenizer.decode(waiting)


def split_thinking(text: str) -> tuple[str, str]:
    """Splits generated text into (thinking, answer). The thought may have begun in the prompt, been
    cut off, or been brought to its end."""
    head, closed, answer = text.partition("</think>")
    before, opened, thinking = head.partition("<think>")
    if closed and not opened:
        before = ""
        thinking = head
    answer = re.sub(r"^\.(?=\n|\Z)", "", answer)  # the full stop of THOUGHT_IS_OVER
    return thinking.strip(), (before + answer).strip()


def stream_answer(pieces: Iterable[str], in_thought: bool) -> Iterator[str]:
    """Yields what split_thinking calls the answer, of text that streams. in_thought: whether the
    prompt ends within a thought."""
    text = "<think>" if in_thought else ""
    shown = 0
    for piece in pieces:
        text += piece
        _, answer = split_thinking(text)
        yield answer[shown:]
        shown = len(answer)  # 0 again where what was shown turns out to be a thought
