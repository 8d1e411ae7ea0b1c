"""The command line: what it prints, where, and how it ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moss_min
from conftest import FOLDER, draws_as_upstream, edit_json, golden_case, golden_model, write_clip
from moss_min import MossAudio, end, main
from sample import THOUGHT_IS_OVER

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


@pytest.fixture
def speech(tmp_path) -> Path:
    """jfk.wav four times, in one file."""
    return write_clip(tmp_path / "speech.wav", golden_case("long").clips[0])


# ---- the answer ----


def test_a_dash_reads_a_sound_from_stdin(speech, said, monkeypatch):
    case = golden_case("long")
    monkeypatch.setattr("sys.stdin", speech.open())
    out, _ = said("-", "--prompt", case.text, "--greedy", "--max-new-tokens", 16)
    assert out == case.answer + "\n"


@draws_as_upstream
def test_sampling_options_and_seed_give_upstreams_draws_for_the_default_prompt(tmp_path, said):
    case = golden_case("sampled")  # its text is "Describe this audio."
    clip = write_clip(tmp_path / "clip.wav", case.clips[0])
    options = "--temperature 0.8 --top-p 0.9 --top-k 20 --seed 1234 --max-new-tokens 32".split()
    out, err = said(clip, *options)
    assert out == case.answer + "\n"
    # A full stop more or less changes no draw here.
    assert f"{len(case.tensors['input_ids'])} tokens" in err


def test_time_markers_are_left_out_by_the_option_or_the_folder(tmp_path, checkpoint, said):
    case = golden_case("no_markers")
    clip = write_clip(tmp_path / "clip.wav", case.clips[0])
    options = clip, "--prompt", case.text, "--greedy", "--max-new-tokens", 24
    assert said(*options, "--no-time-markers")[0] == case.answer + "\n"
    edit_json(checkpoint / "processor_config.json", enable_time_marker=False)
    assert said(*options, "--model", checkpoint)[0] == case.answer + "\n"


THINKING = (
    "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>Why?<|im_end|>\n"
    "<|im_start|>assistant\n<think>"
)


def test_a_thought_is_ended_when_its_budget_is_spent_and_can_be_hidden(speech, said):
    thought = golden_model().ask(speech, THINKING, temperature=0, max_new_tokens=3)
    options = "--thinking-budget", 3, "--greedy", "--max-new-tokens", 120
    out, _ = said(speech, "--prompt", THINKING, *options)
    assert out.startswith(thought + THOUGHT_IS_OVER)
    answer = out.partition("</think>.")[2].strip()
    hidden, _ = said(speech, "--prompt", THINKING, *options, "--hide-thinking")
    assert answer and hidden.strip() == answer


# ---- stderr ----


def test_stderr_tells_how_it_goes(speech, said):
    case = golden_case("long")
    out, err = said(speech, "--prompt", case.text, "--greedy", "--max-new-tokens", 16)
    n = len(case.tensors["input_ids"])
    assert out == case.answer + "\n"
    assert "speech.wav: 44.00 s" in err
    assert all(f"model-0000{i}-of-00002.safetensors" in err for i in (1, 2))
    assert f"\nprompt: {n} tokens\nencoding: 32 of 44 s\nencoding: 44 of 44 s\n" in err
    assert f"\nprompt: 512 of {n} tokens\nprompt: {n} of {n} tokens\n" in err
    assert re.search(r"16 new tokens.*first.* \d+\.\d\d s.* \d+\.\d a second", err)
    # torch alone is 0.2 GB.
    assert 0.1 < float(re.search(r"peak memory\D*(\d+\.\d+) GB", err)[1]) < 50


def test_quiet_says_nothing_but_that_an_answer_is_cut(speech, said):
    case = golden_case("stops")  # ends by itself after 35 tokens
    options = ["--prompt", case.text, "--temperature", 1.5, "--top-k", 0, "--seed", 11, "--quiet"]
    _, err = said(speech, "--greedy", "--max-new-tokens", 4, "--quiet")
    assert re.fullmatch("the answer is cut after 4 tokens.*\n", err)
    assert said(*options)[1] == ""


@pytest.mark.parametrize("argv, cuda_graph", [([], True), (["--no-cuda-graph"], False)])
def test_a_cuda_graph_is_asked_for_unless_it_is_switched_off(argv, cuda_graph, said, monkeypatch):
    given = []

    def spy(model, prompt, **options):
        given.append(options["cuda_graph"])
        return iter([33])

    monkeypatch.setattr(MossAudio, "generate", spy)
    assert said("--prompt", "Hi", *argv)[0] == "B\n"
    assert given == [cuda_graph]


# ---- wrong options ----


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--loud", "--prompt", "Hi"], ["--loud", "--help"]),
        (["--temp", "1", "--prompt", "Hi"], ["--temp"]),
        (["--gredy", "--prompt", "Hi"], ["nearest option is --greedy"]),
        (["--prompt", "Hi", "--greedy", "--temperature", "1"], ["--temperature"]),
        (["--prompt", "Hi", "--temperature", "hot"], ["hot"]),
        (["--prompt", "Hi", "--thinking-budget"], ["--thinking-budget"]),
        (["--prompt"], ["--prompt"]),
        # An adapter is to be merged first.
        (["--prompt", "Hi", "--lora", "adapter"], ["tools/train.py", "--merge"]),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(argv, words, complaint):
    line = complaint("--model", FOLDER, *argv)
    assert all(word in line for word in words) and "usage" not in line


# ---- how a program ends ----


@pytest.mark.parametrize("result, status", [(None, 0), (0, 0), (3, 3)])
def test_a_program_ends_with_what_its_work_returns(result, status):
    assert end("program", lambda: result) == status


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError])
def test_what_was_to_be_expected_is_one_line_and_2(error, capsys):
    def work():
        raise error("a\n b" + "c" * 1000)

    assert end("program", work) == 2
    assert capsys.readouterr().err == "program: a b" + "c" * 377 + "\n"


def test_memory_that_runs_out_is_one_line(capsys):
    assert end("program", lambda: torch.empty(2**60, dtype=torch.uint8)) == 2
    assert re.fullmatch(r"program: .*can't allocate memory.*\n", capsys.readouterr().err)


def test_any_other_error_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        end("program", lambda: 1 / 0)


# ---- as a process ----


def start(*argv, **options) -> subprocess.Popen:
    command = [sys.executable, moss_min.__file__, *arguments(*argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_folder_that_is_none_ends_the_process_with_2_and_one_line(tmp_path):
    process = start("--prompt", "Hi", "--model", tmp_path)
    out, err = process.communicate()
    assert process.returncode == 2 and out == b""
    assert re.fullmatch(rb"moss_min: .*config\.json.*\n", err)


@pytest.mark.slow
@pytest.mark.parametrize("encoding, hinted", [("ascii", True), ("gb18030", False)])
def test_what_stdout_can_not_encode_becomes_question_marks_with_a_hint(encoding, hinted):
    case = golden_case("text_only")
    options = "--prompt", case.text, "--greedy", "--max-new-tokens", 24, "--quiet"
    process = start(*options, env=os.environ | {"PYTHONIOENCODING": encoding})
    out, err = process.communicate()
    assert (process.returncode, out) == (0, case.answer.encode(encoding, "replace") + b"\n")
    assert (b"set PYTHONIOENCODING=utf-8" in err) == hinted


def test_an_answer_streams_and_a_closed_pipe_ends_it_quietly():
    process = start("--prompt", ENDLESS, "--greedy", "--max-new-tokens", 3000, "--quiet")
    assert process.stdout.read(1)  # long before the answer's end
    process.stdout.close()
    assert process.wait() == 0
    assert process.stderr.read() == b""


@pytest.mark.slow
def test_ctrl_c_ends_with_what_was_said_so_far():
    answer = golden_model().ask([], ENDLESS, temperature=0, max_new_tokens=24)
    text = answer.rstrip("\ufffd")  # half a character waits
    process = start("--prompt", ENDLESS, "--greedy", "--max-new-tokens", 100_000, "--quiet")
    first = process.stdout.read(len(text.encode()))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    out = (first + out).decode()
    assert out.startswith(text) and out.endswith("\n")
    assert err == b""


def test_ctrl_c_during_the_imports_ends_quietly(tmp_path):
    # With the real torch it would be a race.
    slow_torch = "import time\nprint('importing', flush=True)\ntime.sleep(60)"
    (tmp_path / "torch.py").write_text(slow_torch)
    process = start(env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode in (130, -signal.SIGINT) and (out, err) == (b"", b"")
