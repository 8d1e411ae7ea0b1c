"""Generation: a prompt to token ids, one at a time, and ids to text as it streams."""

import functools, re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from tokenizers import Tokenizer
from qwen3 import KVCache

THOUGHT_IS_OVER = (  # what ends a thought that is out of budget (Qwen3 Technical Report, arXiv 2505.09388)
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>.\n\n"
)
LIMITS = {  # argument -> its type, whether a value is in range (NaN never is), what was expected
    "max_new_tokens": (Integral, lambda n: n >= 1, "a whole number from 1 up"),
    "temperature": (
        Real,
        lambda t: t == 0 or 1e-6 <= t <= 1e6,
        "0 (greedy), or a number from 1e-6 to 1e6",
    ),
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


def thought_left(
    left: int | None, token: int, budget: int | None, tags: tuple[int, int]
) -> int | None:
    """How many tokens a thought may still take once `token` has come; None outside of one. tags: <think>, </think>."""
    fewer = left - 1 if left else left  # 0 and None stay
    return {tags[0]: budget, tags[1]: None}.get(token, fewer)


class Writer:
    """What one answer's next id depends on beside the logits: its draws, and a thought that is out of budget."""

    def __init__(self, model, prompt, sampling: Sampling):
        self.tokenizer, self.sampling, self.budget = (
            model.tokenizer,
            sampling,
            sampling.thinking_budget,
        )
        self.tags = self.tokenizer.token_to_id("<think>"), self.tokenizer.token_to_id("</think>")
        self.generator, self.left, self.forced = (
            torch.Generator(model.lm_head.weight.device),
            None,
            [],
        )
        self.generator.seed() if sampling.seed is None else self.generator.manual_seed(
            int(sampling.seed)
        )
        for token in prompt.ids.tolist():
            self.left = thought_left(self.left, token, self.budget, self.tags)

    def next(self, logits: torch.Tensor) -> int:
        """The next id from logits [1, V] in float32, or, where a thought is over, the next that ends it."""
        if self.left == 0:  # once: from here on there is no budget
            self.forced = self.tokenizer.encode(THOUGHT_IS_OVER, add_special_tokens=False).ids
            self.budget, self.left = None, None
        token = self.forced.pop(0) if self.forced else choose(logits, self.sampling, self.generator)
        self.left = thought_left(self.left, token, self.budget, self.tags)
        return token


SLICE = 1024  # prompt tokens in the decoder at once: what it holds of them stays small, however long the sound


def prefill(model, prompt, cache: KVCache, report) -> torch.Tensor:
    """A moss_min.Prompt through a moss_min.MossAudio into an empty cache, slice by slice; each sees those before it
    and has its own DeepStack rows. Returns the logits of the last position, float32 [1, V]."""
    device, total, heard = model.lm_head.weight.device, len(prompt.ids), 0
    output, taps = model.audio_encoder(prompt.mels, report) if prompt.mels else (None, [])
    sound = [] if output is None else [output, *taps]  # [A, E] each
    for ids in prompt.ids.split(SLICE):
        count = int((ids == model.config.adapter.audio_token_id).sum())
        rows = [part[heard : heard + count] for part in sound if count]
        ids, positions = (
            ids[None].to(device),
            cache.length + torch.arange(len(ids), device=device)[None],
        )
        x, deepstack = model.embed_ids(ids, rows[0], rows[1:]) if rows else model.embed_ids(ids)
        x, heard = (
            model.language_model(x, positions, cache, deepstack=deepstack)[:, -1],
            heard + count,
        )
        if report and total > SLICE:
            report(f"prompt: {cache.length} of {total} tokens")
    return model.lm_head(x).float()


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A device's own for all captures: torch's default is the first device's, and a new one each keeps a workspace."""
    return torch.cuda.Stream(device)


class Step:
    """A step of rows that differ in length, or of one on CUDA: captured as a graph, which replays in one what would
    be 30 to 60 launches a layer. A graph keeps shapes and numbers, so what changes is in tensors, and attention is
    over the whole cache, under a mask."""

    def __init__(self, model, cache: KVCache, graph: bool):
        _, batch, _, capacity, _ = cache.keys.shape
        self.model, self.cache, self.graph = model, cache, None
        self.inputs = torch.tensor(
            [[0] * batch, [capacity - 1] * batch], device=cache.keys.device
        )  # tokens, places
        cache.length, cache.places = (
            capacity - 1,
            (torch.arange(batch, device=cache.keys.device), self.inputs[1]),
        )
        if graph:
            with torch.cuda.device(cache.keys.device):
                self.logits()  # libraries make their plans before the capture
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=capture_stream(cache.keys.device)):
                    self.captured = self.logits()

    def logits(self) -> torch.Tensor:
        """The inputs' logits, float32 [B, V]; their keys and values are in the cache."""
        decoder, (tokens, places) = (
            self.model.language_model,
            self.inputs[:, :, None],
        )  # [B, 1] each
        return self.model.lm_head(
            decoder(decoder.embed_tokens(tokens), places, self.cache)[:, -1]
        ).float()

    def __call__(self, tokens: list[int], places: list[int]) -> torch.Tensor:
        """The logits of tokens [B], row i's at position places[i] of the cache, float32 [B, V]; the next call may
        overwrite them."""
        self.inputs.copy_(torch.tensor([tokens, places]))
        if self.graph:
            self.graph.replay()
            return self.captured
        self.cache.length = max(places)
        return self.logits()


@torch.no_grad()
def generate(model, prompt, sampling: Sampling, cuda_graph=True, report=None) -> Iterator[int]:
    """The ids that a moss_min.MossAudio generates after a moss_min.Prompt, up to and with the first stop id: the prompt
    at once (prefill), then token by token."""
    decoder, weight, step = model.language_model, model.lm_head.weight, None
    start, writer = len(prompt.ids), Writer(model, prompt, sampling)
    end = start + sampling.max_new_tokens
    cache = KVCache(
        decoder.config, 1, end - 1, weight.dtype, weight.device
    )  # the last token is not fed back
    logits = prefill(model, prompt, cache, report)
    for position in range(start, end):
        token = writer.next(logits)
        yield token
        if token in model.config.stop_ids or position == end - 1:
            return
        if cuda_graph and weight.is_cuda:
            step = step or Step(model, cache, graph=True)
            logits = step([token], [position])
        else:
            x = decoder.embed_tokens(torch.tensor([[token]], device=weight.device))  # [1, 1, D]
            x = decoder(x, torch.tensor([[position]], device=weight.device), cache)
            logits = model.lm_head(x[:, -1]).float()


@torch.no_grad()
def generate_batch(
    model, prompts: list, samplings: list[Sampling], cuda_graph=True, report=None
) -> Iterator[tuple[int, list[int]]]:
    """generate for several prompts: (number, ids) of each as it ends. Each is prefilled alone, so that its numbers do
    not depend on its neighbours; only their steps go together, and a row that has ended leaves."""
    weight, step = model.lm_head.weight, None
    ends = [
        len(prompt.ids) + sampling.max_new_tokens for prompt, sampling in zip(prompts, samplings)
    ]
    cache = KVCache(
        model.config.decoder, len(prompts), max(ends, default=1) - 1, weight.dtype, weight.device
    )
    logits = [prefill(model, prompt, cache.row(i), report) for i, prompt in enumerate(prompts)]
    rows = [
        (i, Writer(model, prompt, sampling), [])
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings))
    ]
    while rows:
        for row in reversed(
            range(len(rows))
        ):  # from the last, which may take the place of one that ends
            i, writer, ids = rows[row]
            ids.append(writer.next(logits[row]))
            if ids[-1] in model.config.stop_ids or len(prompts[i].ids) + len(ids) == ends[i]:
                yield i, ids
                cache.drop(row)
                rows[row], step = rows[-1], None
                rows.pop()
        if rows:
            tokens, places = zip(
                *((ids[-1], len(prompts[i].ids) + len(ids) - 1) for i, _, ids in rows)
            )
            step = step or Step(model, cache, graph=cuda_graph and weight.is_cuda)
            logits = step(tokens, places)[:, None]  # [B, 1, V]


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
