"""parity.py server, asked of a small server that answers with the model, right or wrong, and of
vLLM itself.

The test of vLLM needs the environment variable VLLM_PYTHON: the python of another environment,
which can import vllm (tools/README.md says how to make one)."""

import base64
import contextlib
import io
import itertools
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

import server
from conftest import FOLDER, HERE, golden_case, write_clip
from encoder import HOP, load_audio, log_mel, mel_spectrum
from moss_min import TINY, MossAudio, Prompt
from test_parity import VARIANT, load, run
from test_tiny import DESCRIBE, SHIPPED

BELL = TINY / "bell.wav"
CARDS = TINY / "cards.wav"


@pytest.fixture(autouse=True)
def one_model_for_all_tests(monkeypatch):
    monkeypatch.setattr(MossAudio, "from_pretrained", load)


# ---- a server ----

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# What a server may do to the prompt's text, in which \0 stands for a clip.
EDITS = {
    "no-system-prompt": (SYSTEM, ""),
    "last-line-end-lost": ("assistant\n", "assistant"),
    "no-line-for-the-answer": ("<|im_start|>assistant\n", ""),
    "empty-thought": ("assistant\n", "assistant\n<think>\n\n</think>\n\n"),
    "no-line-end-after-clips": ("\0\n", "\0"),
    "line-end-between-clips": ("\0\0", "\0\n\0"),
    "double-space": ("this audio", "this  audio"),
}


class Fake(HTTPServer):
    """An OpenAI-style server that answers with the model and makes mistakes, by name."""

    def __init__(self, folder: Path, wrong: tuple[str, ...]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = load(folder, "cpu", "bfloat16" if "bfloat16" in wrong else "float32")
        self.wrong = wrong

    def clip(self, wave: torch.Tensor) -> list[int]:
        """A clip's ids, with the seconds in digits after every 25 audio tokens."""
        config = self.model.config.adapter
        window = 2 * self.model.config.encoder.n_window
        frames = len(wave) // HOP
        count = sum(-(-min(window, frames - at) // 8) for at in range(0, frames, window))
        ids = [config.audio_start_id]
        for number in range(1, count + 1):
            ids.append(config.audio_token_id)
            if number % 25 == 0 and "no-time-markers" not in self.wrong:
                ids += [15 + int(digit) for digit in str(number // 25 * 2)]
        return [*ids, config.audio_end_id]

    def hear(self, data: bytes) -> torch.Tensor:
        """A file's sound, at another rate by linear interpolation."""
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        wave = samples.mean(1)
        if rate != 16_000:
            times = np.arange(len(wave) * 16_000 // rate) * rate / 16_000
            wave = np.interp(times, np.arange(len(wave)), wave).astype(np.float32)
        if "padded" in self.wrong:
            wave = np.pad(wave, (0, 480_000 - len(wave)))
        lengths = {"cut": 480_000, "tail-lost": len(wave) - 8_000}
        for name in lengths.keys() & set(self.wrong):
            wave = wave[: lengths[name]]
        return torch.from_numpy(wave)

    def complete(self, body: dict) -> dict:
        *sounds, question = body["messages"][0]["content"]
        waves = [self.hear(base64.b64decode(one["input_audio"]["data"])) for one in sounds]
        if "no-clip" in self.wrong:
            waves = []
        text = SYSTEM + "<|im_start|>user\n" + "\0" * len(waves) + ("\n" if waves else "")
        text += question["text"] + "<|im_end|>\n<|im_start|>assistant\n"
        for name in EDITS.keys() & set(self.wrong):
            text = text.replace(*EDITS[name])
        ids = []
        for part, wave in itertools.zip_longest(text.split("\0"), waves):
            ids += self.model.tokenizer.encode(part, add_special_tokens=False).ids
            ids += [] if wave is None else self.clip(wave)
        mels = [log_mel(wave) for wave in waves]
        if "mel-float32" in self.wrong:
            mels = [torch.from_numpy(mel_spectrum(wave.numpy())) for wave in waves]
        prompt = Prompt(torch.tensor(ids), mels)
        count = 5 if "cuts-the-answer" in self.wrong else body["max_tokens"]
        answer = list(self.model.generate(prompt, count, temperature=0))
        if "another-token" in self.wrong:
            answer[3] += 1
        if "ends-early" in self.wrong:
            answer = answer[:4]
        for _ in range(3 * ("misses-the-stop" in self.wrong)):
            whole = torch.cat([prompt.ids, torch.tensor(answer)])
            answer.append(int(self.model(prompt._replace(ids=whole))[-1].argmax()))
        whole = torch.cat([prompt.ids, torch.tensor(answer)])
        rows = self.model(prompt._replace(ids=whole))[len(ids) - 1 :].log_softmax(-1)
        return self.completion(ids, answer, rows, "return_token_ids" in body)

    def completion(self, ids: list[int], answer: list[int], rows, with_ids: bool) -> dict:
        content = []
        for i, row in zip(answer, rows):
            entries = []
            for one in (i, *row.topk(5).indices.tolist()):
                name = self.model.tokenizer.decode([one], skip_special_tokens=False)
                entries.append({"token": name, "logprob": float(row[one])})
            content.append(entries[0] | {"top_logprobs": entries[1:]})
        cut = answer[-1] not in self.model.config.stop_ids and "ends-early" not in self.wrong
        choice = {"message": {"content": self.model.tokenizer.decode(answer)}}
        choice |= {"logprobs": {"content": content}, "finish_reason": "length" if cut else "stop"}
        reply = {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}
        if with_ids:
            choice["token_ids"] = answer
            reply["prompt_token_ids"] = ids
        return reply


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(200, {"data": [{"id": "moss"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "knows-no-ids" in self.server.wrong and "return_token_ids" in body:
            self.send(400, {"error": {"message": "unknown option"}})
        elif "fails" in self.server.wrong:
            self.send(500, {"error": {"message": "out of cards"}})
        elif "says-nothing" in self.server.wrong:
            self.send(200, {"choices": []})
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
    fake = Fake(folder, wrong)
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{fake.server_port}"
    finally:
        fake.shutdown()
        thread.join()
        fake.server_close()


def asked(url: str, *argv, folder: Path = TINY) -> str:
    """What parity.py server says of a server, its lines joined."""
    got = run("server", url, *argv, "--model", folder)
    lines = got.out.splitlines()
    assert got.err == "" and got.status == (lines[-1] != "Equal.")
    return " ".join(got.out.split())


# ---- what is said of it ----


@pytest.mark.parametrize("name", ["golden", "variant", "tiny", "tiny, by text"])
def test_a_right_server_is_equal(name, tmp_path):
    folder = {"golden": FOLDER, "variant": VARIANT}.get(name, TINY)
    by_text = name.endswith("text")
    clip = write_clip(tmp_path / "clip.wav", golden_case("short").clips[0])
    with served(folder, *["knows-no-ids"] * by_text) as url:
        for files in ([clip], [clip, clip], []):
            said = asked(url, *files, "--max-new-tokens", 12, folder=folder)
            assert said.endswith("Equal.")
            assert said.startswith(
                "The server doesn't tell its" if by_text else "The prompt is the"
            )


# What the server does -> what is said of it, and words of the advice.
PROMPTS = {
    "no-time-markers": ("the time markers are missing", "enable_time_marker"),
    "no-system-prompt": ("the system prompt is missing", "--chat-template"),
    "last-line-end-lost": ("the last line end is missing", "jinja drops"),
    "no-line-for-the-answer": ("<|im_start|>assistant is missing", "add_generation_prompt"),
    "empty-thought": ("an empty thought is appended", "--chat-template"),
    "no-line-end-after-clips": ("no line end follows the clips", "--chat-template"),
    "line-end-between-clips": ("a line end stands between clips", "--chat-template"),
    "no-clip": ("no clip is there", "as it is"),
    "padded": ("the sound is padded to 30 s", "as it is"),
    "double-space": ('At position 190 is " ", expected " audio".', ""),
    "tail-lost": ("It has 152 audio tokens, expected 164", ""),
}


QUICK = ("no-time-markers", "last-line-end-lost", "tail-lost")
SLOW = [pytest.param(wrong, marks=pytest.mark.slow) for wrong in PROMPTS if wrong not in QUICK]


@pytest.mark.parametrize("wrong", [*QUICK, *SLOW])
def test_a_server_with_another_prompt_is_told_how_it_came_about(wrong):
    words, advice = PROMPTS[wrong]
    with served(TINY, wrong) as url:
        said = asked(url, BELL, CARDS)
    assert said.startswith("The prompt is another: ") and said.endswith("The prompt differs.")
    assert words in said and ("Advice: " in said) == (advice != "") and advice in said


def test_sound_that_a_server_cuts_to_30_s_is_told(tmp_path):
    clip = write_clip(tmp_path / "clip.wav", np.resize(load_audio(BELL).numpy(), 600_000))
    with served(TINY, "cut") as url:
        assert "the sound is cut to 30 s" in asked(url, clip, "--max-new-tokens", 2)


def test_a_server_that_tells_the_number_of_ids_alone_is_told_what_makes_as_many():
    with served(TINY, "knows-no-ids", "last-line-end-lost") as url:
        said = asked(url, BELL)
    words = "97 ids, expected 98. The server doesn't tell the ids. There are as many if the last"
    assert f"{words} line end is missing or no line end follows the clips " in said


def test_tokens_behind_a_part_of_a_character_are_said_to_be_left_out_without_ids():
    model = load(TINY, "cpu", "float32")
    tokens = [{"token": text, "logprob": -1.0, "top_logprobs": []} for text in ("A", "\ufffd", "A")]
    choice = {"message": {"content": ""}, "finish_reason": "stop"}
    choice["logprobs"] = {"content": tokens}
    data = {"choices": [choice], "usage": {"prompt_tokens": 9}}
    reply = server.read_reply(data, model, 9)
    assert reply.ids == [32]
    judged = server.judge(model, model.prompt("Hi"), reply, 1e-5)
    assert server.describe(model, reply, judged)[-1].startswith(
        "The last 2 tokens were not compared"
    )
    choice["logprobs"] = {"content": tokens[1:]}
    with pytest.raises(ValueError, match="no token's text is a whole one"):
        server.read_reply(data, model, 9)


# What the server does -> what is said.
ANSWERS = {
    "another-token": 'Token 3 of the answer is "if"; the model\'s choice is " \\"", whose logit is',
    "ends-early": "Token 4 of the answer is the end; the model's choice is ",
    "cuts-the-answer": "The server cut the answer after 5 tokens.",
    "misses-the-stop": "Token 24 of the answer comes behind a stop token",
    "mel-float32": "Advice: with a log-mel that is not rounded to bfloat16",
    "bfloat16": "if the server computes in it, say --server-dtype",
}


@pytest.mark.parametrize("wrong", ANSWERS)
def test_a_server_with_another_answer_is_told_how_it_differs(wrong):
    with served(TINY, wrong) as url:
        said = asked(url, BELL)
    assert said.startswith("The prompt is the model's: 98 ids. ") and ANSWERS[wrong] in said
    differs = (
        "log-probabilities differ" if wrong in ("mel-float32", "bfloat16") else "answer differs"
    )
    assert said.endswith(f"The {differs}.")


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
    with served(TINY) as url:
        assert "it resamples, or mixes channels, in another way" in asked(url, clip)


# What the server, or the command line, does -> words of the line on stderr.
REFUSED = {
    "fails": "status 500: out of cards",
    "says-nothing": "expected a chat completion with logprobs",
    "--server-dtype int8": "--server-dtype is 'int8'",
    "--max-new-tokens 0": "max_new_tokens is 0",
    "--prompt <|audio_bos|><|AUDIO|><|audio_eos|>": "expected text alone",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_server_that_cannot_be_asked_is_one_line_and_status_2(wrong):
    options = wrong.split() if wrong.startswith("-") else []
    with served(TINY, wrong) as url:
        got = run("server", f"{url}/v1/", "--model", TINY, *options)
    assert (got.status, got.out) == (2, "")
    assert REFUSED[wrong] in got.err and got.err.count("\n") == 1
    assert "can't be asked" in run("server", url, "--model", TINY).err  # it has ended


# ---- vLLM itself ----

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
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
    settings, _, arguments = command.partition(" python ")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(setting.split("=") for setting in settings.split())
    words = [VLLM_PYTHON, *shlex.split(arguments), "--port", str(port), *options]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(
            words,
            cwd=HERE.parent,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
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
@pytest.mark.skipif(not VLLM_PYTHON, reason="needs vLLM")
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
@pytest.mark.skipif(not VLLM_PYTHON, reason="needs vLLM")
def test_what_vllm_may_do_to_a_prompt_is_told(tmp_path):
    template = tmp_path / "naive.jinja"
    template.write_text(NAIVE)
    options = ["--mm-processor-kwargs", '{"enable_time_marker": false}']
    with vllm(tmp_path / "log", "--chat-template", str(template), *options) as url:
        said = asked(url, BELL)
    assert "the time markers are missing and the last line end is missing" in said
