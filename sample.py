"""Generation: a prompt to token ids, one at a time, and ids to text as it streams."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from tokenizers import Tokenizer
from qwen3 import KVCache

THOUGHT_IS_OVER = (  # what ends a thought that is out of budget (Qwen3 Technical Report, arXiv 2505.09388)
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>.\n\n")
LIMITS = {  # argument -> its type, whether a value is in range (NaN never is), what was expected
    "max_new_tokens": (Integral, lambda n: n >= 1, "a whole number from 1 up"),
    "temperature": (Real, lambda t: t == 0 or 1e-6 <= t <= 1e6, "0 (greedy), or a number from 1e-6 to 1e6"),
    "top_p": (Real, lambda p: 0 < p <= 1, "a number above 0 and up to 1"),
    "top_k": (Integral, lambda k: k >= 0, "a whole number from 0 up"),
    "seed": (Integral, lambda seed: -(2**63) <= seed < 2**64, "None or a whole number of 64 bits"),
    "thinking_budget": (Integral, lambda n: n >= 0, "None or a whole number from 0 up"),
}

@dataclass(frozen=True)
class Sampling:
    """How to generate. Raises ValueError for a value out of range."""
    max_new_tokens: int = 1024
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # keep the likeliest tokens that reach this probability together; 1: all
    top_k: int = 50  # keep this many of the likeliest, and ties with the last of them; 0: all
    seed: int | None = None  # None: different each time
    thinking_budget: int | None = None  # tokens a thought may take; None: any number

    def __post_init__(self):
        for name, (kind, in_range, expected) in LIMITS.items():
            value, optional = getattr(self, name), getattr(Sampling, name) is None
            good = isinstance(value, kind) and not isinstance(value, bool) and in_range(value)
            if not (good or optional and value is None):
                raise ValueError(f"{name} is {value!r:.60}; expected {expected}")

def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [..., V] to the probabilities to draw from: temperature, top-k, top-p, softmax, in this order."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        drop[..., -1] = False  # the likeliest always stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits.softmax(-1)

def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next id from logits [1, V] in float32: the likeliest, or one draw."""
    if sampling.temperature == 0:
        return int(logits.argmax(-1))
    return int(torch.multinomial(probabilities(logits, sampling), 1, generator=generator))

def thought_left(left: int | None, token: int, budget: int | None, tags: tuple[int, int]) -> int | None:
    """How many tokens a thought may still take once `token` has come; None outside of one. tags: <think>, </think>."""
    fewer = left - 1 if left else left  # 0 and None stay
    return {tags[0]: budget, tags[1]: None}.get(token, fewer)

@torch.no_grad()
def generate(model, prompt, sampling: Sampling) -> Iterator[int]:
    """The ids that a moss_min.MossAudio generates after a moss_min.Prompt, up to and with the first stop id: the prompt
    at once (prefill), then token by token. Logits are of the last position only, of none where a token is forced."""
    decoder, device = model.language_model, model.lm_head.weight.device
    generator = torch.Generator(device)
    generator.seed() if sampling.seed is None else generator.manual_seed(int(sampling.seed))
    tags = model.tokenizer.token_to_id("<think>"), model.tokenizer.token_to_id("</think>")
    budget, left, forced = sampling.thinking_budget, None, []
    for token in prompt.ids.tolist():
        left = thought_left(left, token, budget, tags)
    x, deepstack = model.embed(prompt)  # [1, N, D]
    start, end = x.shape[1], x.shape[1] + sampling.max_new_tokens
    cache = KVCache(decoder.config, 1, end - 1, x.dtype, device)  # the last token is not fed back
    x, deepstack = decoder(x, torch.arange(start, device=device)[None], cache, deepstack=deepstack), None  # frees rows
    for position in range(start, end):
        if left == 0:  # once: from here on there is no budget
            forced, budget, left = model.tokenizer.encode(THOUGHT_IS_OVER, add_special_tokens=False).ids, None, None
        token = forced.pop(0) if forced else choose(model.lm_head(x[:, -1]).float(), sampling, generator)
        yield token
        if token in model.config.stop_ids or position == end - 1:
            return
        left = thought_left(left, token, budget, tags)
        x = decoder.embed_tokens(torch.tensor([[token]], device=device))  # [1, 1, D]
        x = decoder(x, torch.tensor([[position]], device=device), cache)

def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Ids to text as they come, in whole characters; the pieces joined are tokenizer.decode(ids)."""
    waiting = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):  # as it does until the last byte of a character has come
            yield text
            waiting = []
    yield tokenizer.decode(waiting)

def split_thinking(text: str) -> tuple[str, str]:
    """Generated text to (thinking, answer), also if the thought began in the prompt, was cut off or forced to end."""
    head, closed, answer = text.partition("</think>")
    before, opened, thinking = head.partition("<think>")
    if closed and not opened:
        before, thinking = "", head
    answer = re.sub(r"^\.(?=\n|\Z)", "", answer)  # the full stop of THOUGHT_IS_OVER
    return thinking.strip(), (before + answer).strip()

def stream_answer(pieces: Iterable[str], opened: bool) -> Iterator[str]:
    """Of text that streams, what split_thinking calls the answer. opened: the prompt ends within a thought."""
    text, shown = "<think>" if opened else "", 0
    for piece in pieces:
        text += piece
        answer = split_thinking(text)[1]
        yield answer[shown:]
        shown = len(answer)  # back to 0 where what was shown turns out to be a thought
