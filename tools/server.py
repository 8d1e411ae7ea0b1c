"""Whether a server answers as the model does.

    python tools/parity.py server URL [AUDIO ...] --model FOLDER [--prompt TEXT]

Asks an OpenAI-style endpoint one question, greedily, and holds its prompt, its tokens and their
log-probabilities against the model's. What differs is tried against what servers are known to do.
Exit status 0: the server is right; 1: it differs; 2: it can't be asked.
"""

import argparse
import base64
import functools
import http.client
import io
import itertools
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diagnose import TOLERANCES
from encoder import HOP, SAMPLE_RATE, load_audio, log_mel, mel_spectrum, require
from moss_min import MossAudio, Prompt
from prompts import Source, chat, find_causes

# ---- asking ----


class Refused(ValueError):
    """A server's answer with a status of 400 or more."""


def fetch(url: str, body: dict | None = None) -> dict:
    """Returns the JSON object that a server answers. Raises ValueError, or Refused."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read(4000).decode(errors="replace")
        message = re.search(r'"message": *"((?:[^"\\]|\\.)*)"', said)
        said = message[1] if message else said
        raise Refused(f"{url} answers with status {error.code}: {said}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{url} can't be asked ({error}); expected http://HOST:PORT") from error
    require(isinstance(answer, dict), f"{url} answers {answer!r:.60}; expected a JSON object")
    return answer


def ask(base: str, name: str, prompt: str, files: list[tuple[bytes, str]], count: int) -> dict:
    """Asks about sound files, each with its format, and returns a chat completion."""
    content = []
    for data, form in files:
        sound = {"data": base64.b64encode(data).decode(), "format": form}
        content.append({"type": "input_audio", "input_audio": sound})
    content.append({"type": "text", "text": prompt})
    body = {"model": name, "messages": [{"role": "user", "content": content}], "temperature": 0}
    body |= {"max_tokens": count, "logprobs": True, "top_logprobs": 5}
    try:
        return fetch(f"{base}/chat/completions", body | {"return_token_ids": True})
    except Refused:
        # That option is vLLM's own, and some servers refuse what they don't know.
        return fetch(f"{base}/chat/completions", body)


def as_wav(wave: Tensor) -> bytes:
    """Returns float32 [samples] as a WAV file at 16 kHz, no bit lost."""
    file = io.BytesIO()
    soundfile.write(file, wave.numpy(), SAMPLE_RATE, subtype="FLOAT", format="WAV")
    return file.getvalue()


class Reply(NamedTuple):
    """What a server says of one question."""

    text: str
    ended: bool  # by itself
    cut: bool  # before it ended, and before it had as many tokens as it may
    prompt_ids: list[int] | None  # None if the server doesn't tell them
    prompt_count: int
    ids: list[int]  # the answer's tokens
    logprobs: list[dict[int, float]]  # for each token, of it and of some others, by id
    untold: int  # how many tokens follow whose ids can't be told


@functools.cache
def ids_by_text(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the id of every token but those that are a part of a character: they look alike."""
    texts = {}
    for i in tokenizer.get_vocab().values():
        text = tokenizer.decode([i], skip_special_tokens=False)
        if "\ufffd" not in text:
            texts[text] = i
    return texts


def read_reply(data: dict, model: MossAudio, count: int) -> Reply:
    """Reads a chat completion of up to `count` tokens. If the server gives no ids, tokens are
    looked up by their text, and the answer is taken to end before one that isn't found."""
    by_text = ids_by_text(model.tokenizer)
    try:
        choice = data["choices"][0]
        tokens = choice["logprobs"]["content"]
        ids = choice.get("token_ids")
        if ids is None:
            named = itertools.takewhile(by_text.__contains__, [token["token"] for token in tokens])
            ids = [by_text[name] for name in named]
        rows = []
        for i, token in zip(ids, tokens):
            row = {}
            for one in token["top_logprobs"]:
                if one["token"] in by_text:
                    row[by_text[one["token"]]] = float(one["logprob"])
            row[i] = float(token["logprob"])
            rows.append(row)
        prompt_count = data["usage"]["prompt_tokens"]
        untold = len(tokens) - len(rows)
        stopped = choice["finish_reason"] == "stop"
        text = choice["message"]["content"] or ""
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = f"the server answers {data!r:.120} ({error!r})"
        raise ValueError(f"{said}; expected a chat completion with logprobs") from error
    V = model.config.decoder.vocab_size
    prompt_ids = data.get("prompt_token_ids")
    for given in (ids, prompt_ids or []):
        known = all(type(i) is int and 0 <= i < V for i in given)
        require(known, f"the server's ids are {given!r:.60}; expected whole numbers below {V}")
    require(ids, "the server gives no ids, and no token's text is a whole one; expected either")
    ended = stopped and not untold
    cut = not stopped and len(tokens) < count
    return Reply(text, ended, cut, prompt_ids, prompt_count, ids, rows, untold)


# ---- the answer ----


class Judgement(NamedTuple):
    """What the model says of an answer, along the answer's own tokens."""

    first: int | None  # the first token that the model would not have chosen
    best: int  # the model's choice there
    margin: float  # by which its logit is larger
    off: int | None  # the first token with a log-probability that is off by more than what passes
    largest: float  # the largest difference of a log-probability
    passes: float  # what passes there
    mean: float

    @property
    def right(self) -> bool:
        return self.first is None and self.off is None


@torch.no_grad()
def judge(model: MossAudio, prompt: Prompt, reply: Reply, tolerance: float) -> Judgement:
    """Holds a reply against the logits of one pass over the prompt and the reply's tokens."""
    whole = torch.cat([prompt.ids, torch.tensor(reply.ids, dtype=torch.int64)])
    rows = model(prompt._replace(ids=whole))[len(prompt.ids) - 1 :].cpu()  # [tokens + 1, V]
    passes = 2 * tolerance * rows.abs().amax(dim=1)  # [tokens + 1]
    stops = set(model.config.stop_ids)
    chosen = list(reply.ids)
    if reply.ended and stops.isdisjoint(chosen):
        # The server doesn't show the token that ended the answer.
        chosen += model.config.stop_ids[:1]
    first = None
    best = 0
    margin = 0.0
    for k, i in enumerate(chosen):
        best = int(rows[k].argmax())
        margin = float(rows[k, best] - rows[k, i])
        # A smaller margin is a near tie, which rounding decides.
        if margin > passes[k] or not stops.isdisjoint(chosen[:k]):
            first = k
            break
    differences = [0.0]
    off = None
    for k, logprobs in enumerate(reply.logprobs):
        exact = rows[k].log_softmax(dim=0)
        differences.append(max(abs(float(exact[i]) - x) for i, x in logprobs.items()))
        if off is None and not differences[-1] <= passes[k]:
            off = k
    largest = max(differences)
    worst = max(0, differences.index(largest) - 1)
    mean = sum(differences) / max(1, len(reply.logprobs))
    return Judgement(first, best, margin, off, largest, float(passes[worst]), mean)


def describe(model: MossAudio, reply: Reply, judged: Judgement) -> list[str]:
    """Returns in lines how far an answer is the model's."""
    k = judged.first
    if k is None:
        line = f"Each of the answer's {len(reply.ids)} tokens is the model's choice."
    elif not set(model.config.stop_ids).isdisjoint(reply.ids[:k]):
        line = f"Token {k} of the answer comes behind a stop token, which the server missed."
    else:
        found = f"is {in_words(model, reply.ids[k])}" if k < len(reply.ids) else "is the end"
        line = f"Token {k} of the answer {found}; the model's choice is "
        line += f"{in_words(model, judged.best)}, whose logit is larger by {judged.margin:.2g}."
    ok = "that passes" if judged.off is None else f"they differ from token {judged.off} on"
    off = f"The log-probabilities are off by {judged.largest:.1e} at most, {judged.mean:.1e} on "
    lines = [line, f"{off}average; {judged.passes:.1e} passes there: {ok}."]
    if reply.untold:
        lines.append(f"The last {reply.untold} tokens were not compared: the server gives no ids.")
    if reply.cut:
        lines.append(f"The server cut the answer after {len(reply.logprobs)} tokens.")
    return lines


def in_words(model: MossAudio, i: int) -> str:
    return json.dumps(model.tokenizer.decode([i], skip_special_tokens=False), ensure_ascii=False)


# ---- what explains a difference ----


class Question(NamedTuple):
    """What is asked, of the server and of the model."""

    model: MossAudio
    source: Source
    waves: list[Tensor]
    prompt: Prompt
    tolerance: float


def explain_prompt(asked: Question, reply: Reply) -> tuple[list[str], list[str]]:
    """Returns in lines how a server's prompt is another than the model's, and advice."""
    ours = asked.prompt.ids.tolist()
    theirs = reply.prompt_ids
    count = reply.prompt_count if theirs is None else len(theirs)
    lines = [f"The prompt is another: {count} ids, expected {len(ours)}."]
    if theirs is None:
        groups = find_causes(asked.model, asked.source, lambda ids: len(ids) == count, 2)
        many = "There are as many if" if groups else "Nothing that is known makes as many."
        lines.append(f"The server doesn't tell the ids. {many}")
    else:
        groups = find_causes(asked.model, asked.source, lambda ids: ids == theirs, 3)[:1]
        if not groups:
            lines.append(where_prompts_part(asked, ours, theirs))
    advice = []
    for number, causes in enumerate(groups):
        lines.append(("  or " if number else "  ") + " and ".join(cause.what for cause in causes))
        advice += [cause.advice for cause in causes]
    return lines, list(dict.fromkeys(advice))


def where_prompts_part(asked: Question, ours: list[int], theirs: list[int]) -> str:
    config = asked.model.config.adapter
    at = len(os.path.commonprefix([ours, theirs]))
    found = in_words(asked.model, theirs[at]) if at < len(theirs) else "its end"
    expected = in_words(asked.model, ours[at]) if at < len(ours) else "its end"
    counts = [ids.count(config.audio_token_id) for ids in (theirs, ours)]
    said = f"  At position {at} is {found}, expected {expected}."
    if counts[0] != counts[1]:
        said += f" It has {counts[0]} audio tokens, expected {counts[1]}: the sound is another, or"
        said += " was cut, padded or resampled to another length."
    return said


UNROUNDED = (
    "with a log-mel that is not rounded to bfloat16 the model answers as the server does, which "
    "seems to leave that out in float32; in bfloat16 it makes no difference"
)
RESAMPLED = (
    "asked about the same sound in one channel at 16 kHz, the server is right: it resamples, or "
    "mixes channels, in another way; send it such files"
)
SIXTEEN_BITS = "that is as near as bfloat16 comes; if the server computes in it, say --server-dtype"


def explain_answer(asked: Question, reply: Reply, ask_again: Callable[[], Reply]) -> list[str]:
    """Returns what is known to make an answer to the right prompt differ so. ask_again: asks about
    the same sound in files of one channel at 16 kHz."""

    def right(prompt: Prompt, reply: Reply, tolerance: float = asked.tolerance) -> bool:
        return judge(asked.model, prompt, reply, tolerance).right

    mels = [torch.from_numpy(mel_spectrum(wave.numpy())) for wave in asked.waves]
    unrounded = asked.prompt._replace(mels=mels)
    if right(unrounded, reply):
        return [UNROUNDED]
    if asked.waves:
        other = ask_again()
        if right(asked.prompt, other):
            return [RESAMPLED]
        if right(unrounded, other):
            return [RESAMPLED, UNROUNDED]
    coarse = TOLERANCES["bfloat16"].most
    return [SIXTEEN_BITS] if right(asked.prompt, reply, coarse) else []


# ---- the command ----


def run(args: argparse.Namespace) -> int:
    known = args.server_dtype in TOLERANCES
    require(known, f"--server-dtype is {args.server_dtype!r}; expected {', '.join(TOLERANCES)}")
    waves = [load_audio(name) for name in args.audio]
    source = chat(args.prompt, [len(wave) // HOP for wave in waves])
    model = MossAudio.from_pretrained(args.model, args.device, "float32")
    prompt = Prompt(torch.tensor(source.ids(model)), [log_mel(wave) for wave in waves])
    asked = Question(model, source, waves, prompt, TOLERANCES[args.server_dtype].most)
    answer = list(model.generate(prompt, args.max_new_tokens, temperature=0))
    base = args.url.rstrip("/").removesuffix("/v1") + "/v1"
    name = args.name or first_model(base)

    count = args.max_new_tokens

    def reply_to(files: list[tuple[bytes, str]]) -> Reply:
        return read_reply(ask(base, name, args.prompt, files, count), model, count)

    def ask_again() -> Reply:
        return reply_to([(as_wav(wave), "wav") for wave in waves])

    reply = reply_to([(Path(path).read_bytes(), Path(path).suffix[1:]) for path in args.audio])
    judged = judge(model, prompt, reply, asked.tolerance)
    same = reply.prompt_ids == prompt.ids.tolist()
    if reply.prompt_ids is None:
        same = reply.prompt_count == len(prompt.ids)
    if same:
        lines = [f"The prompt is the model's: {len(prompt.ids)} ids."]
        if reply.prompt_ids is None:
            lines = [
                f"The server doesn't tell its prompt, but {reply.prompt_count} ids, as expected."
            ]
        advice = [] if judged.right else explain_answer(asked, reply, ask_again)
    else:
        lines, advice = explain_prompt(asked, reply)
    print("\n".join([*lines, *describe(model, reply, judged)]))
    for sentence in advice:
        print(f"Advice: {sentence}.")
    print(f"The server answers: {reply.text}")
    print(f"The model answers:  {model.tokenizer.decode(answer)}")
    if same and judged.right and not reply.cut:
        print("Equal.")
        return 0
    wrong = "log-probabilities differ"
    if judged.first is not None or reply.cut:
        wrong = "answer differs"
    print(f"The {wrong if same else 'prompt differs'}.")
    return 1


def first_model(base: str) -> str:
    try:
        return fetch(f"{base}/models")["data"][0]["id"]
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{base}/models names no model; expected one, or --name") from error
