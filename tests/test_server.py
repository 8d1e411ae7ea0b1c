"""parity.py server, asked of a small server that answers with the model, right or wrong, and of
vLLM itself.

The test of vLLM needs the environment variable VLLM_PYTHON: the python of another environment,
which can import vllm (tools/README.md says how to make one)."""

import base64
import contextlib
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import parity
import server
from conftest import FOLDER, HERE, golden_case, slow, write_clip
from encoder import HOP, load_audio, log_mel, mel_spectrum
from moss_min import CLIP, SYSTEM, TINY, USER, MossAudio, Prompt
from prompts import Source
from test_parity import VARIANT, load, run
from test_tiny import DESCRIBE, SHIPPED

BELL = TINY / "bell.wav"
CARDS = TINY / "cards.wav"


@pytest.fixture(autouse=True)
def one_model_for_all_tests(monkeypatch):
    monkeypatch.setattr(MossAudio, "from_pretrained", load)


# ---- a server ----

# What a server may do to the text of a prompt about two clips: what is replaced by what, and a word
# of the advice. Time markers are no part of the text.
LAST = "<|im_start|>assistant\n"
EDITS = {
    "the time markers are missing": ("", "", "enable_time_marker"),
    "the last line end is missing": (LAST, LAST.strip(), "jinja drops"),
    "the system prompt is missing": (SYSTEM, "", "--chat-template"),
    "<|im_start|>assistant is missing": (LAST, "", "add_generation_prompt"),
    "an empty thought is appended": (LAST, LAST + "<think>\n\n</think>\n\n", "--chat-template"),
    "no line end follows the clips": (CLIP + "\n", CLIP, "--chat-template"),
    "a line end stands between clips": (CLIP + CLIP, f"{CLIP}\n{CLIP}", "--chat-template"),
    "no clip is there": (CLIP + CLIP + "\n", "", "as it is"),
    "there are two spaces": ("this audio", "this  audio", None),
}


class Fake(HTTPServer):
    """An OpenAI-style server that answers with the model and makes mistakes, by name."""

    def __init__(self, folder: Path, wrong: tuple[str, ...]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = load(folder, "cpu", "bfloat16" if "bfloat16" in wrong else "float32")
        self.wrong = wrong

    def hear(self, data: bytes) -> torch.Tensor:
        wave = load_audio(io.BytesIO(data)).numpy()
        if "resamples without a filter" in self.wrong:
            samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
            wave = samples[:: rate // 16_000, 0]
        if "the sound is padded to 30 s" in self.wrong:
            wave = np.pad(wave, (0, max(0, 480_000 - len(wave))))
        if "the sound is cut to 30 s" in self.wrong:
            wave = wave[:480_000]
        if "half a second is lost" in self.wrong:
            wave = wave[:-8_000]
        return torch.from_numpy(wave.copy())

    def prompt(self, waves: list[torch.Tensor], question: str) -> Prompt:
        clips = CLIP * len(waves) + "\n" if waves else ""
        text = SYSTEM + USER.format(clips + question)
        for name in EDITS.keys() & set(self.wrong):
            old, new, _ = EDITS[name]
            text = text.replace(old, new)
        waves = waves[: text.count(CLIP)]
        markers = "the time markers are missing" not in self.wrong
        ids = Source(text, [len(wave) // HOP for wave in waves], markers).ids(self.model)
        mels = [log_mel(wave) for wave in waves]
        if "does not round the log-mel" in self.wrong:
            mels = [torch.from_numpy(mel_spectrum(wave.numpy())) for wave in waves]
        return Prompt(torch.tensor(ids), mels)

    def logits(self, prompt: Prompt, answer: list[int]) -> torch.Tensor:
        """The logits after the prompt, and after each id of an answer."""
        whole = torch.cat([prompt.ids, torch.tensor(answer)])
        return self.model(prompt._replace(ids=whole))[len(prompt.ids) - 1 :]

    def complete(self, body: dict) -> dict:
        *sounds, question = body["messages"][0]["content"]
        waves = [self.hear(base64.b64decode(one["input_audio"]["data"])) for one in sounds]
        prompt = self.prompt(waves, question["text"])
        count = 5 if "cuts the answer" in self.wrong else body["max_tokens"]
        answer = list(self.model.generate(prompt, count, temperature=0))
        if "takes another token" in self.wrong:
            answer[3] += 1
        if "ends early" in self.wrong:
            answer = answer[:4]
        if "misses the stop token" in self.wrong:
            answer.append(int(self.logits(prompt, answer)[-1].argmax()))
        content = []
        for i, row in zip(answer, self.logits(prompt, answer).log_softmax(-1)):
            entries = []
            for one in (i, *row.topk(5).indices.tolist()):
                name = self.model.tokenizer.decode([one], skip_special_tokens=False)
                entries.append({"token": name, "logprob": float(row[one])})
            content.append(entries[0] | {"top_logprobs": entries[1:]})
        ended = answer[-1] in self.model.config.stop_ids or "ends early" in self.wrong
        choice = {"message": {"content": self.model.tokenizer.decode(answer)}}
        choice |= {"logprobs": {"content": content}, "finish_reason": "stop" if ended else "length"}
        reply = {"choices": [choice], "usage": {"prompt_tokens": len(prompt.ids)}}
        if "return_token_ids" in body:
            choice["token_ids"] = answer
            reply["prompt_token_ids"] = prompt.ids.tolist()
        return reply


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(200, {"data": [{"id": "moss"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        knows_no_ids = "knows no ids" in self.server.wrong
        if "fails" in self.server.wrong or (knows_no_ids and "return_token_ids" in body):
            self.send(400, {"error": "out of cards"})
        else:
            self.send(200, self.server.complete(body))

    def send(self, status: int, answer: dict):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder: Path, *wrong: str):
    """Runs a server in a thread; yields its address."""
    with Fake(folder, wrong) as fake:
        thread = threading.Thread(target=fake.serve_forever, args=[0.01])
        thread.start()
        try:
            yield f"http://127.0.0.1:{fake.server_port}"
        finally:
            fake.shutdown()
            thread.join()


def asked(url: str, *argv, folder: Path = TINY) -> str:
    """What parity.py server says of a server, its lines joined."""
    got = run("server", url, *argv, "--model", folder)
    said = " ".join(got.out.split())
    assert got.err == "" and got.status == (not said.endswith("Equal."))
    return said


# ---- what is said of it ----


@pytest.mark.parametrize("folder", [FOLDER, VARIANT, TINY], ids=["golden", "variant", "tiny"])
def test_a_right_server_is_equal(folder, tmp_path):
    clip = write_clip(tmp_path / "clip.wav", golden_case("short").clips[0])
    with served(folder) as url:
        for clips in ([clip], [clip, clip], []):
            said = asked(url, *clips, "--max-new-tokens", 12, folder=folder)
            assert said.startswith("The prompt is the model's: ") and said.endswith("Equal.")


def test_a_right_server_that_knows_no_ids_is_equal():
    with served(TINY, "knows no ids") as url:
        said = asked(url, BELL)
    assert said.startswith("The prompt is the model's, as far as its length tells: 98 ids. ")
    assert said.endswith("Equal.")


TWO = "the time markers are missing and the last line end is missing"
SINGLE = [cause for cause, (*_, advice) in EDITS.items() if advice]


@pytest.mark.parametrize("causes", [TWO, *slow(*SINGLE)])
def test_what_made_another_prompt_is_told_with_advice(causes):
    with served(TINY, *causes.split(" and ")) as url:
        said = asked(url, BELL, CARDS)
    assert said.startswith("The prompt is another: ") and said.endswith("The prompt differs.")
    assert f" It is so if {causes}. " in said
    for cause in causes.split(" and "):
        *_, advice = EDITS[cause]
        assert advice in said.partition(" Advice: ")[2]


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["the sound is padded to 30 s", "the sound is cut to 30 s"])
def test_sound_that_a_server_brings_to_30_s_is_told(cause, tmp_path):
    clip = write_clip(tmp_path / "clip.wav", np.resize(load_audio(BELL).numpy(), 600_000))
    with served(TINY, cause) as url:
        assert f" It is so if {cause}. " in asked(url, BELL, clip, "--max-new-tokens", 2)


OTHERS = {
    "there are two spaces": 'from position 190 on (" ", expected " audio", text; ',
    "half a second is lost": "there are 152 audio tokens, expected 164: the sound is another",
}


@pytest.mark.parametrize("wrong", OTHERS)
def test_where_another_prompt_differs_is_told_if_nothing_known_made_it(wrong):
    with served(TINY, wrong) as url:
        said = asked(url, BELL, CARDS)
    assert "Nothing that servers are known to do makes it so." in said and OTHERS[wrong] in said


def test_of_another_number_of_ids_everything_that_makes_as_many_is_told():
    with served(TINY, "knows no ids", "the last line end is missing") as url:
        said = asked(url, BELL)
    causes = ("the last line end is missing", "no line end follows the clips")
    words = " ".join(f"It is so if {cause}." for cause in causes)
    assert said.startswith(f"The prompt is another: 97 ids, expected 98. {words} ")


def test_tokens_behind_a_part_of_a_character_are_left_out_without_ids():
    tokens = [{"token": text, "logprob": -1.0, "top_logprobs": []} for text in ("A", "\ufffd", "A")]
    choice = {"message": {"content": ""}, "finish_reason": "stop"}
    data = {"choices": [choice], "usage": {"prompt_tokens": 9}}
    model = load(TINY, "cpu", "float32")
    choice["logprobs"] = {"content": tokens}
    reply = server.read_reply(data, model)
    assert (reply.ids, reply.untold, reply.ended) == ([32], 2, False)
    choice["logprobs"] = {"content": tokens[1:]}
    with pytest.raises(ValueError, match="no token's text is a whole one"):
        server.read_reply(data, model)
    with pytest.raises(ValueError, match="expected a chat completion with logprobs"):
        server.read_reply(data | {"choices": []}, model)


# What the server does -> what is said of it, and in the last sentence.
ANSWERS = {
    "takes another token": ('wrong at token 3: "if", expected " \\"", whose logit is', "answer"),
    "ends early": ('wrong at token 4: "<|im_end|>", expected', "answer"),
    "cuts the answer": ("wrong at token 5: it ends after 5 ids without a stop id", "answer"),
    "misses the stop token": ('it goes on after "<|im_end|>", which is a stop id', "answer"),
    "does not round the log-mel": ("Advice: with a log-mel that is not", "log-probabilities"),
    "bfloat16": ("if the server computes in it, say --server-dtype", "log-probabilities"),
}


@pytest.mark.parametrize("wrong", ANSWERS)
def test_a_server_with_another_answer_is_told_how_it_differs(wrong):
    words, what = ANSWERS[wrong]
    with served(TINY, wrong) as url:
        said = asked(url, BELL)
    assert said.startswith("The prompt is the model's: 98 ids. ") and words in said
    assert ("Each of the answer's" in said) == (what == "log-probabilities")
    assert said.endswith(f"The {what} {'differs' if what == 'answer' else 'differ'}.")


def test_log_probabilities_are_off_by_what_two_models_tell():
    with served(TINY, "bfloat16") as url:
        said = asked(url, BELL, "--server-dtype", "bfloat16")
    prompt = load(TINY, "cpu", "float32").prompt(DESCRIBE, BELL)
    (ids,) = [one.ids for one in SHIPPED if (one.sounds, one.prompt) == ([BELL], DESCRIBE)]
    whole = prompt._replace(ids=torch.cat([prompt.ids, torch.tensor(ids)]))
    exact, near = [
        load(TINY, "cpu", dtype)(whole)[len(prompt.ids) - 1 : -1].log_softmax(-1)
        for dtype in ("float32", "bfloat16")
    ]
    off = (exact - near).gather(1, near.topk(5).indices).abs().amax(1)
    assert f"off by {off.max():.1e} at most, {off.mean():.1e} on average" in said
    assert said.endswith("Equal.")


def test_a_server_that_resamples_in_another_way_is_told_so(tmp_path):
    samples, rate = soundfile.read(BELL)
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, np.stack([np.repeat(samples, 2)] * 2, axis=1), 2 * rate)
    with served(TINY, "resamples without a filter") as url:
        assert "it resamples, or mixes channels, in another way" in asked(url, clip)


# What the server, or the command line, does -> words of the line on stderr.
REFUSED = {
    "fails": 'status 400: {"error": "out of cards"}',
    "--server-dtype int8": "--server-dtype is 'int8'",
    "--max-new-tokens 0": "max_new_tokens is 0",
    "--prompt <|audio_bos|><|AUDIO|><|audio_eos|>": "expected text alone",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_server_that_cannot_be_asked_is_refused(wrong, refused):
    options = wrong.split() if wrong.startswith("-") else []
    with served(TINY, wrong) as url:
        line = refused(parity.main, "server", f"{url}/v1/", "--model", TINY, *options)
    assert REFUSED[wrong] in line
    # It has ended.
    assert "can't be asked" in refused(parity.main, "server", url, "--model", TINY)


# ---- vLLM itself ----

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(not VLLM_PYTHON, reason="needs vLLM")
NAIVE = """<|im_start|>system
You are a helpful assistant.<|im_end|>
{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == "text" %}{{ part.text }}{% else %}<|audio_bos|>\
<|AUDIO|><|audio_eos|>
{% endif %}{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


@contextlib.contextmanager
def vllm(log: Path, *options: str):
    """Starts vLLM by the documents' command, with more options; yields its address."""
    page = (HERE.parent / "tools" / "README.md").read_text("utf-8").replace("\\\n", "")
    command = next(line for line in page.splitlines() if "python -m vllm" in line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = command.replace(" python ", f" {VLLM_PYTHON} ")
    line = f"{command} --port {port} {shlex.join(options)}"
    with log.open("w") as file:
        process = subprocess.Popen(
            line, shell=True, cwd=HERE.parent, stdout=file, stderr=file, start_new_session=True
        )
    try:
        for _ in range(900):
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.mark.slow
@needs_vllm
def test_vllm_serves_the_shipped_checkpoint_and_gives_the_shipped_ids(tmp_path):
    with vllm(tmp_path / "log") as url:
        for shipped in SHIPPED:
            options = ["--prompt", shipped.prompt, "--max-new-tokens", len(shipped.ids)]
            said = asked(url, *shipped.sounds, *options)
            chosen = f"Each of the answer's {len(shipped.ids)} tokens is the model's choice."
            assert said.startswith("The prompt is the model's") and chosen in said
            # vLLM 0.32.0 leaves out the rounding of the log-mel.
            assert said.endswith("Equal.") or server.UNROUNDED in said
        assert "The prompt is the model's" in asked(url, BELL, CARDS)
        assert asked(url).endswith("Equal.")


@pytest.mark.slow
@needs_vllm
def test_what_vllm_may_do_to_a_prompt_is_told(tmp_path):
    template = tmp_path / "naive.jinja"
    template.write_text(NAIVE)
    options = ["--mm-processor-kwargs", '{"enable_time_marker": false}']
    with vllm(tmp_path / "log", "--chat-template", str(template), *options) as url:
        said = asked(url, BELL)
    assert "It is so if the time markers are missing and the last line end is missing." in said
