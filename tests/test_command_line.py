"""The command line: what it prints, where, and how it ends."""

import argparse
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import moss_min
import sample
from conftest import GOLDEN, JFK, draws_as_upstream, edit_json, golden_case, golden_model
from moss_min import add_options, generation_options, main
from sample import THOUGHT_IS_OVER

FOLDER = GOLDEN / "checkpoint"
ENDLESS = "Describe this audio."  # without a sound, greedily: no end in 3000 tokens


def arguments(*argv) -> list[str]:
    return ["--model", str(FOLDER), "--device", "cpu", *map(str, argv)]


@pytest.fixture
def said(capfd):
    """stdout and stderr of a command line that has to succeed."""

    def said(*argv) -> tuple[str, str]:
        assert main(arguments(*argv)) == 0
        return capfd.readouterr()

    return said


def write_clip(path: Path, wave) -> Path:
    """A clip as a 16-kHz file, no bit lost."""
    soundfile.write(path, np.asarray(wave), 16_000, subtype="FLOAT")
    return path


@pytest.fixture
def speech(tmp_path) -> Path:
    """jfk.wav four times, in one file."""
    samples, rate = soundfile.read(JFK, dtype="int16")
    soundfile.write(tmp_path / "speech.wav", np.tile(samples, 4), rate)
    return tmp_path / "speech.wav"


# ---- the answer ----


def test_the_answer_about_44_seconds_of_speech_is_upstreams(speech, said):
    case = golden_case("long")
    out, _ = said(speech, "--prompt", case.text, "--greedy", "--max-new-tokens", 16)
    assert out == case.answer + "\n"


def test_without_a_sound_the_prompt_is_a_question_of_text_alone(said):
    case = golden_case("text_only")
    out, _ = said("--prompt", case.text, "--greedy", "--max-new-tokens", 24)
    assert out == case.answer + "\n"


@draws_as_upstream
def test_sampling_options_and_seed_give_upstreams_draws_for_the_default_prompt(tmp_path, said):
    case = golden_case("sampled")  # its text is "Describe this audio."
    clip = write_clip(tmp_path / "clip.wav", case.clips[0])
    options = (
        "--temperature",
        0.8,
        "--top-p",
        0.9,
        "--top-k",
        20,
        "--seed",
        1234,
        "--max-new-tokens",
        32,
    )
    out, err = said(clip, *options)
    assert out == case.answer + "\n"
    assert (
        f"{len(case.tensors['input_ids'])} tokens" in err
    )  # a full stop more or less changes no draw here


def test_no_time_markers_leaves_them_out(tmp_path, said):
    case = golden_case("no_markers")
    clip = write_clip(tmp_path / "clip.wav", case.clips[0])
    out, _ = said(
        clip, "--prompt", case.text, "--greedy", "--max-new-tokens", 24, "--no-time-markers"
    )
    assert out == case.answer + "\n"


def test_without_an_option_time_markers_are_as_the_folder_says(tmp_path, checkpoint, said):
    edit_json(checkpoint / "processor_config.json", enable_time_marker=False)
    case = golden_case("no_markers")
    clip = write_clip(tmp_path / "clip.wav", case.clips[0])
    options = "--prompt", case.text, "--greedy", "--max-new-tokens", 24
    assert said(clip, *options, "--model", checkpoint)[0] == case.answer + "\n"


def test_several_sounds_are_clips_in_order_on_the_users_line(tmp_path, said):
    chirp = write_clip(tmp_path / "chirp.wav", golden_case("short").clips[0])
    whole_prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|><|audio_bos|><|AUDIO|><|audio_eos|>\nCompare.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    wanted, outs = [], []
    for clips in [JFK, chirp], [chirp, JFK]:
        wanted.append(
            golden_model().ask(clips, whole_prompt, temperature=0, max_new_tokens=8) + "\n"
        )
        outs.append(said(*clips, "--prompt", "Compare.", "--greedy", "--max-new-tokens", 8)[0])
    assert outs == wanted and wanted[0] != wanted[1]


def test_a_seed_repeats_an_answer_and_another_one_does_not(said):
    first, again, other = (
        said("--prompt", "Hi", "--max-new-tokens", 8, "--seed", seed)[0] for seed in (1, 1, 2)
    )
    assert first == again != other


THINKING = "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>Why?<|im_end|>\n<|im_start|>assistant\n<think>"
THINK = JFK, "--prompt", THINKING, "--thinking-budget", 3, "--greedy", "--max-new-tokens", 120


def test_a_thought_is_ended_when_its_budget_is_spent(said):
    thought = golden_model().ask(JFK, THINKING, temperature=0, max_new_tokens=3)
    assert said(*THINK)[0].startswith(thought + THOUGHT_IS_OVER)


def test_hide_thinking_prints_the_answer_alone(said):
    answer = said(*THINK)[0].partition("</think>.")[2].strip()
    assert answer and said(*THINK, "--hide-thinking")[0].strip() == answer


class Writes(io.RawIOBase):
    """A stdout that keeps what each write brings."""

    def __init__(self):
        self.chunks = []

    def writable(self):
        return True

    def write(self, data):
        self.chunks.append(bytes(data))
        return len(data)


def test_the_answer_streams_in_whole_characters(tmp_path, monkeypatch):
    case = golden_case("short")
    clip = write_clip(tmp_path / "clip.wav", case.clips[0])
    stdout = Writes()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BufferedWriter(stdout), encoding="utf-8")
    )
    assert main(arguments(clip, "--greedy", "--max-new-tokens", 24)) == 0
    texts = [chunk.decode() for chunk in stdout.chunks]  # half a character would not decode
    assert "".join(texts) == case.answer + "\n"
    assert len(texts) > 12  # of 24 tokens


# ---- stderr ----


def test_stderr_tells_how_it_goes(speech, said):
    case = golden_case("long")
    _, err = said(speech, "--prompt", case.text, "--greedy", "--max-new-tokens", 16)
    assert "speech.wav: 44.00 s" in err
    assert all(f"model-0000{i}-of-00002.safetensors" in err for i in (1, 2))
    assert f"{len(case.tensors['input_ids'])} tokens" in err
    assert re.search(r"16 new tokens.*first.* \d+\.\d\d s.* \d+\.\d a second", err)
    assert 0.1 < float(re.search(r"peak memory\D*(\d+\.\d+) GB", err)[1]) < 50  # torch alone is 0.2


def test_quiet_says_nothing_beside_the_answer(said):
    assert said(JFK, "--greedy", "--max-new-tokens", 4, "--quiet")[1] == ""


def test_stderr_tells_how_far_a_long_sound_is_unless_quiet(speech, said, monkeypatch):
    monkeypatch.setattr(sample, "SLICE", 400)
    _, err = said(speech, "--greedy", "--max-new-tokens", 1)
    n = re.search(r"^prompt: (\d+) tokens$", err, re.MULTILINE)[1]
    told = [
        "encoding: 32 of 44 s",
        "encoding: 44 of 44 s",
        f"prompt: 400 of {n} tokens",
        f"prompt: {n} of {n} tokens",
    ]
    assert re.findall(r"^\w+: \d+ of .*", err, re.MULTILINE) == told
    assert said(speech, "--greedy", "--max-new-tokens", 1, "--quiet")[1] == ""


# ---- options that change no answer ----


either_way = pytest.mark.parametrize("argv, cuda_graph", [([], True), (["--no-cuda-graph"], False)])


@either_way
def test_the_options_ask_for_a_cuda_graph_unless_it_is_switched_off(argv, cuda_graph):
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert generation_options(parser.parse_args(argv))["cuda_graph"] is cuda_graph


@either_way
def test_whether_a_cuda_graph_is_asked_for_reaches_the_generation(
    argv, cuda_graph, said, monkeypatch
):
    given = []

    def spy(model, prompt, sampling, cuda_graph, report):
        given.append(cuda_graph)
        return sample.generate(model, prompt, sampling, cuda_graph, report)

    monkeypatch.setattr(moss_min, "generate", spy)
    said("--prompt", "Hi", "--max-new-tokens", 1, *argv)
    assert given == [cuda_graph]


# ---- wrong options ----


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--loud", "--prompt", "Hi"], "--loud"),
        (["--temp", "1", "--prompt", "Hi"], "--temp"),
        (["--prompt", "Hi", "--greedy", "--temperature", "1"], "--temperature"),
        (["--prompt", "Hi", "--temperature", "0", "--greedy"], "--greedy"),
        (["--prompt", "Hi", "--greedy=1"], "--greedy"),
        (["--prompt", "Hi", "--temperature", "hot"], "hot"),
        (["--prompt", "Hi", "--top-p", ""], "--top-p"),
        (["--prompt", "Hi", "--top-k", "2.5"], "2.5"),
        (["--prompt", "Hi", "--max-new-tokens", "ten"], "ten"),
        (["--prompt", "Hi", "--seed", "1e3"], "1e3"),
        (["--prompt", "Hi", "--thinking-budget"], "--thinking-budget"),
        (["--prompt"], "--prompt"),
        (["--prompt", "Hi", "--model"], "--model"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(argv, word, capfd):
    assert main(arguments(*argv)) == 2
    out, err = capfd.readouterr()
    assert out == "" and re.fullmatch(r"moss_min: .{1,380}\n", err)
    assert word in err and "usage" not in err


# ---- as a process ----


def start(*argv, **options) -> subprocess.Popen:
    command = [sys.executable, moss_min.__file__, *arguments(*argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_dash_reads_a_sound_from_a_pipe(speech):
    case = golden_case("long")
    process = start(
        "-",
        "--prompt",
        case.text,
        "--greedy",
        "--max-new-tokens",
        16,
        "--quiet",
        stdin=subprocess.PIPE,
    )
    out, err = process.communicate(speech.read_bytes())
    assert (process.returncode, out.decode(), err) == (0, case.answer + "\n", b"")


def test_a_folder_that_is_none_ends_the_process_with_2_and_one_line(tmp_path):
    process = start("--prompt", "Hi", "--model", tmp_path)
    out, err = process.communicate()
    assert process.returncode == 2 and out == b""
    assert re.fullmatch(rb"moss_min: .*config\.json.*\n", err)


def test_what_stdout_can_not_encode_becomes_question_marks():
    case = golden_case("text_only")
    options = "--prompt", case.text, "--greedy", "--max-new-tokens", 24, "--quiet"
    process = start(*options, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate()
    assert (process.returncode, out, err) == (
        0,
        case.answer.encode("ascii", "replace") + b"\n",
        b"",
    )


def test_a_closed_pipe_ends_the_process_quietly(tmp_path):
    process = start("--prompt", ENDLESS, "--greedy", "--max-new-tokens", 3000, "--quiet")
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait() == 0
    assert process.stderr.read() == b""


@pytest.fixture(scope="module")
def interrupted():
    """Ctrl-C once the first 24 tokens are on stdout: their text, and the process's status, stdout and stderr."""
    text = (
        golden_model().ask([], ENDLESS, temperature=0, max_new_tokens=24).rstrip("\ufffd")
    )  # half a character waits
    process = start("--prompt", ENDLESS, "--greedy", "--max-new-tokens", 100_000, "--quiet")
    first = process.stdout.read(len(text.encode()))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    return text, process.returncode, (first + out).decode(), err.decode()


def test_ctrl_c_ends_with_what_was_said_so_far(interrupted):
    text, status, out, err = interrupted
    assert status == 130
    assert out.startswith(text) and out.endswith("\n")
    assert "Traceback" not in err


def test_a_cut_of_max_new_tokens_is_one_line_on_stderr(interrupted):
    assert re.fullmatch(r"moss_min: .*max_new_tokens.* 100000 .*40960.*\n", interrupted[3])


def test_ctrl_c_during_the_imports_ends_quietly(tmp_path):
    slow_torch = "import time\nprint('importing', flush=True)\ntime.sleep(60)"  # the real one would make it a race
    (tmp_path / "torch.py").write_text(slow_torch)
    process = start(env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode in (130, -signal.SIGINT) and (out, err) == (b"", b"")


def test_memory_that_runs_out_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(
        moss_min.MossAudio, "generate", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8)
    )
    assert moss_min.main(["--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moss_min: ") and "can't allocate memory" in line
