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
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import decoding
from diagnose import TOLERANCES
from encoder import HOP, SAMPLE_RATE, load_audio, log_mel, mel_spectrum, require
from moss_min import MossAudio, Prompt
from prompts import Source, chat, find_causes, special_ids, where_prompts_part

# ---- asking ----


class Refused(ValueError):
    """A server's answer with a status of 400 or more."""


def fetch(url: str, body: dict | None = None):
    """Returns the JSON value that a server answers. Raises ValueError, or Refused."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read(4000).decode(errors="replace")
        raise Refused(f"{url} answers with status {error.code}: {said}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{url} can't be asked ({error}); expected http://HOST:PORT") from error


def first_model(base: str) -> str:
    try:
        return fetch(f"{base}/models")["data"][0]["id"]
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{base}/models names no model; expected one, or --name") from error


def ask(base: str, name: str, prompt: str, files: list[tuple[bytes, str]], most: int) -> dict:
    """Asks about sound files, each with its format, for an answer of up to `most` tokens. Returns a
    chat completion."""
    content = []
    for data, form in files:
        sound = {"data": base64.b64encode(data).decode(), "format": form}
        content.append({"type": "input_audio", "input_audio": sound})
    content.append({"type": "text", "text": prompt})
    body = {"model": name, "messages": [{"role": "user", "content": content}], "temperature": 0}
    body |= {"max_tokens": most, "logprobs": True, "top_logprobs": 5}
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
    prompt_ids: list[int] | None  # None if the server doesn't tell them
    prompt_count: int
    ids: list[int]  # the answer's tokens
    logprobs: list[dict[int, float]]  # for each token, of it and of some others, by id
    untold: int  # how many tokens follow whose ids can't be told

    def has_prompt(self, ids: list[int]) -> bool:
        """Tells whether these may be the prompt's ids; of untold ones the number has to do."""
        if self.prompt_ids is None:
            return self.prompt_count == len(ids)
        return self.prompt_ids == ids


def ids_by_text(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the id of every token but those that are a part of a character: they look alike."""
    texts = {}
    for i in tokenizer.get_vocab().values():
        text = tokenizer.decode([i], skip_special_tokens=False)
        if "\ufffd" not in text:
            texts[text] = i
    return texts


def read_reply(data: dict, model: MossAudio) -> Reply:
    """Reads a chat completion. If the server gives no ids, tokens are looked up by their text, and
    the answer is taken to end before one that isn't found."""
    by_text = ids_by_text(model.tokenizer)
    try:
        choice = data["choices"][0]
        tokens = choice["logprobs"]["content"]
        ids = choice.get("token_ids")
        if ids is None:
            ids = [by_text.get(token["token"]) for token in tokens] + [None]
            ids = ids[: ids.index(None)]
        logprobs = []
        for i, token in zip(ids, tokens):
            row = {i: float(token["logprob"])}
            for other in token["top_logprobs"]:
                if other["token"] in by_text:
                    row.setdefault(by_text[other["token"]], float(other["logprob"]))
            logprobs.append(row)
        untold = len(tokens[len(ids) :])
        ended = choice["finish_reason"] == "stop" and not untold
        text = choice["message"]["content"] or ""
        prompt_ids = data.get("prompt_token_ids")
        prompt_count = data["usage"]["prompt_tokens"]
        every = [*ids, *(prompt_ids or [])]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = f"the server answers {data!r:.120} ({error!r})"
        raise ValueError(f"{said}; expected a chat completion with logprobs") from error
    V = model.config.decoder.vocab_size
    wrong = [i for i in every if not (type(i) is int and 0 <= i < V)]
    require(not wrong, f"the server gives the ids {wrong!r:.60}; expected whole numbers below {V}")
    message = "the server gives no ids, and no token's text is a whole one; expected either"
    require(logprobs, message)
    return Reply(text, ended, prompt_ids, prompt_count, ids, logprobs, untold)


# ---- the answer ----


class Question(NamedTuple):
    """What the model is asked, and a server."""

    model: MossAudio
    waves: list[Tensor]
    prompt: Prompt
    most: int  # tokens of an answer
    tolerance: float  # of the server's logits


class Judgement(NamedTuple):
    """What the model says of an answer, along the answer's own tokens."""

    since: int | None  # the first token that is wrong; None: all are right
    why: str  # what is wrong with it
    off: int | None  # the first token with a log-probability that is off by more than what passes
    largest: float  # the largest difference of a log-probability
    passes: float  # what passes there
    mean: float

    @property
    def right(self) -> bool:
        return self.since is None and self.off is None


@torch.no_grad()
def judge(asked: Question, reply: Reply) -> Judgement:
    """Judges a reply by the logits of one pass over the prompt and the reply's tokens."""
    prompt = asked.prompt
    stop_ids = asked.model.config.stop_ids
    whole = torch.cat([prompt.ids, torch.tensor(reply.ids)])
    rows = asked.model(prompt._replace(ids=whole))[len(prompt.ids) - 1 :].cpu()  # [tokens + 1, V]
    ids = reply.ids
    if reply.ended and not set(ids) & set(stop_ids):
        # The server doesn't show the token that ended the answer.
        ids = [*ids, *stop_ids[:1]]
    most = None if reply.untold else asked.most
    show = functools.partial(in_words, asked.model)
    found = decoding.judge(ids, rows, 2 * asked.tolerance, stop_ids, most, show=show)
    passes = 2 * asked.tolerance * rows.abs().amax(dim=1)  # [tokens + 1]
    differences = []
    for exact, given in zip(rows.log_softmax(dim=1), reply.logprobs):
        differences.append(max(abs(float(exact[i]) - x) for i, x in given.items()))
    # NaN passes nothing.
    off = next((k for k, x in enumerate(differences) if not x <= passes[k]), None)
    largest = max(differences)
    there = float(passes[differences.index(largest)])
    mean = sum(differences) / len(differences)
    return Judgement(found.since, found.why, off, largest, there, mean)


def describe(reply: Reply, judged: Judgement) -> list[str]:
    """Returns in lines how far an answer is the model's."""
    line = f"Each of the answer's {len(reply.ids)} tokens is the model's choice."
    if judged.since is not None:
        line = f"The answer is wrong at token {judged.since}: {judged.why}."
    ok = "that passes" if judged.off is None else f"they differ from token {judged.off} on"
    off = f"The log-probabilities are off by {judged.largest:.1e} at most, {judged.mean:.1e} on "
    lines = [line, f"{off}average; {judged.passes:.1e} passes there: {ok}."]
    if reply.untold:
        lines.append(f"The last {reply.untold} tokens were not compared: the server gives no ids.")
    return lines


def in_words(model: MossAudio, i: int) -> str:
    return json.dumps(model.tokenizer.decode([i], skip_special_tokens=False), ensure_ascii=False)


# ---- what explains a difference ----


def explain_prompt(model: MossAudio, source: Source, reply: Reply) -> tuple[list[str], list[str]]:
    """Returns in lines what makes a server's prompt of the model's, and advice."""
    lines = []
    advice = []
    for causes in find_causes(model, source, reply.has_prompt):
        lines.append(f"It is so if {' and '.join(cause.what for cause in causes)}.")
        advice += [cause.advice for cause in causes]
    if not lines:
        lines.append("Nothing that servers are known to do makes it so.")
        if reply.prompt_ids is not None:
            ids = (source.ids(model), reply.prompt_ids)
            show = functools.partial(in_words, model)
            lines.append(where_prompts_part(*ids, special_ids(model), show)[1])
    return lines, list(dict.fromkeys(advice))


UNROUNDED = (
    "with a log-mel that is not rounded to bfloat16 the model answers as the server does, which "
    "seems to leave that out in float32; in bfloat16 it makes no difference"
)
RESAMPLED = (
    "asked about the same sound in one channel at 16 kHz, the server is right: it resamples, or "
    "mixes channels, in another way; send it such files"
)
SIXTEEN_BITS = "that is as near as bfloat16 comes; if the server computes in it, say --server-dtype"


def explain_answer(asked: Question, reply: Reply, again: Reply) -> list[str]:
    """Returns what is known to make an answer to the right prompt differ so. again: the reply to
    the same sound in files of one channel at 16 kHz."""
    mels = [torch.from_numpy(mel_spectrum(wave.numpy())) for wave in asked.waves]
    unrounded = asked._replace(prompt=asked.prompt._replace(mels=mels))
    coarse = asked._replace(tolerance=TOLERANCES["bfloat16"].most)
    if judge(unrounded, reply).right:
        return [UNROUNDED]
    if judge(asked, again).right:
        return [RESAMPLED]
    if judge(unrounded, again).right:
        return [RESAMPLED, UNROUNDED]
    if judge(coarse, reply).right:
        return [SIXTEEN_BITS]
    return []


# ---- the command ----


def run(args: argparse.Namespace) -> int:
    known = args.server_dtype in TOLERANCES
    require(known, f"--server-dtype is {args.server_dtype!r}; expected {', '.join(TOLERANCES)}")
    waves = [load_audio(name) for name in args.audio]
    source = chat(args.prompt, [len(wave) // HOP for wave in waves])
    model = MossAudio.from_pretrained(args.model, args.device, "float32")
    prompt = Prompt(torch.tensor(source.ids(model)), [log_mel(wave) for wave in waves])
    most = args.max_new_tokens
    asked = Question(model, waves, prompt, most, TOLERANCES[args.server_dtype].most)
    answer = list(model.generate(prompt, most, temperature=0))
    base = args.url.rstrip("/").removesuffix("/v1") + "/v1"
    name = args.name or first_model(base)

    def reply_to(files: list[tuple[bytes, str]]) -> Reply:
        return read_reply(ask(base, name, args.prompt, files, most), model)

    reply = reply_to([(Path(path).read_bytes(), Path(path).suffix[1:]) for path in args.audio])
    judged = judge(asked, reply)
    count = len(prompt.ids)
    same = reply.has_prompt(prompt.ids.tolist())
    far = ", as far as its length tells" if reply.prompt_ids is None else ""
    lines = [f"The prompt is the model's{far}: {count} ids."]
    advice = []
    if not same:
        lines, advice = explain_prompt(model, source, reply)
        lines.insert(0, f"The prompt is another: {reply.prompt_count} ids, expected {count}.")
    elif not judged.right:
        again = reply_to([(as_wav(wave), "wav") for wave in waves])
        advice = explain_answer(asked, reply, again)
    print("\n".join([*lines, *describe(reply, judged)]))
    for sentence in advice:
        print(f"Advice: {sentence}.")
    print(f"The server answers: {reply.text}")
    print(f"The model answers:  {model.tokenizer.decode(answer)}")
    if not same:
        print("The prompt differs.")
    elif judged.since is not None:
        print("The answer differs.")
    elif judged.off is not None:
        print("The log-probabilities differ.")
    else:
        print("Equal.")
    return int(not (same and judged.right))
