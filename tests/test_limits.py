"""Where numbers, sizes, ids and streams end: what is refused before it can do harm."""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

import batch
import moss_min
from conftest import FOLDER, JFK, edit_json, golden_model, refusal
from encoder import load_audio
from moss_min import MossAudio, load_tokenizer, read_config, say

# ---- sound ----


def test_samples_up_to_ten_thousand_times_full_scale_are_sound_and_no_others():
    loud = np.full(1000, -1e4, np.float32)
    assert load_audio(loud).min() == -1e4
    loud[7] = np.nextafter(np.float32(-1e4), np.float32(-2e4))
    assert "NaN, infinite or beyond 10,000" in refusal(load_audio, loud)
    loud[7] = 1e37  # whose square overflows
    assert "NaN, infinite or beyond 10,000" in refusal(load_audio, loud)


def wav_at(rate: int, samples: int) -> io.BytesIO:
    """A WAV file whose header says any rate."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(samples, np.int16), 16_000, format="WAV")
    data = bytearray(file.getvalue())
    data[24:28] = struct.pack("<I", rate)
    return io.BytesIO(bytes(data))


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_a_rate_outside_1_to_768_khz_is_refused(rate):
    assert f"{rate} Hz; expected from 1,000 to 768,000" in refusal(load_audio, wav_at(rate, 9000))


def test_the_lowest_and_the_highest_rate_are_read():
    assert len(load_audio(wav_at(1000, 100))) == 1600
    assert len(load_audio(wav_at(768_000, 48_000))) == 1000


def test_an_hour_of_samples_is_read_and_no_sample_more():
    hour = torch.zeros(1).expand(3600 * 16_000 + 1)  # takes no memory
    assert len(load_audio(hour[1:])) == 3600 * 16_000
    assert "to an hour" in refusal(load_audio, hour)


def test_a_header_that_lies_about_the_length_takes_no_memory(tmp_path):
    data = bytearray(wav_at(48_000, 48_000).getvalue())
    data[40:44] = struct.pack("<I", 2**31)  # bytes of samples
    assert len(load_audio(io.BytesIO(bytes(data)))) == 16_000


def test_a_sounds_name_tells_nothing_of_its_format(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # without ffmpeg
    shutil.copyfile(JFK, tmp_path / "x.raw")
    assert torch.equal(load_audio(tmp_path / "x.raw"), load_audio(JFK))


def test_a_sound_comes_through_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["cp", JFK, tmp_path / "pipe"])
    assert torch.equal(load_audio(tmp_path / "pipe"), load_audio(JFK))
    assert writer.wait() == 0


# ---- numbers ----


@pytest.fixture
def with_nan(checkpoint):
    """A model whose embedding of one token, "Z", is NaN."""
    model = MossAudio.from_pretrained(checkpoint, "cpu")
    (token,) = model.tokenizer.encode("Z").ids
    model.language_model.embed_tokens.weight[token] = torch.nan
    return model


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_end_an_answer_with_a_sentence(temperature, with_nan):
    prompt = with_nan.prompt("Z")
    said = refusal(list, with_nan.generate(prompt, 9, temperature, seed=1))
    assert "the logits are not finite: look at the weights" in said


def test_a_line_with_such_logits_is_an_error_of_a_batch_and_the_others_go_on(
    with_nan, tmp_path, monkeypatch
):
    monkeypatch.setattr(batch.MossAudio, "from_pretrained", lambda *_: with_nan)
    lines = [{"prompt": text} for text in ("Hello", "a Z", "there", " " * 10_000_000)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--manifest", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    argv = [*files, "--model", FOLDER, "--greedy", "--max-new-tokens", "3"]
    assert batch.main([str(word) for word in argv]) == 0
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [sorted(answer) for answer in answers] == [
        ["cut", "id", "text"],
        ["error", "id"],
        ["cut", "id", "text"],
        ["error", "id"],
    ]
    assert "not finite" in answers[1]["error"] and "characters" in answers[3]["error"]


# ---- sizes, ids, kinds of files ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("audio_config.encoder_layers", 2**20),
        ("language_config.num_hidden_layers", 513),
        ("audio_config.deepstack_encoder_layer_indexes", [0] * 513),
    ],
)
def test_more_than_512_layers_are_refused_before_any_is_made(key, value, checkpoint, monkeypatch):
    edit_json(checkpoint / "config.json", **{key: value})
    monkeypatch.setattr(moss_min.MossAudio, "__init__", None)
    said = refusal(MossAudio.from_pretrained, checkpoint, "cpu")
    assert f"{value if type(value) is int else 513} layers or taps; expected at most 512" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("audio_start_id", 303),
        ("audio_end_id", 306),
        ("audio_token_id", 15),
        ("audio_token_id", 24),
    ],
)
def test_an_audio_id_that_is_anothers_or_a_digits_is_refused_by_name(key, value, checkpoint):
    edit_json(checkpoint / "processor_config.json", **{key: value})
    assert key in refusal(read_config, checkpoint)


@pytest.mark.parametrize("value", [14, 25])
def test_an_audio_id_beside_the_digits_is_taken(value, checkpoint):
    edit_json(checkpoint / "processor_config.json", audio_token_id=value)
    assert read_config(checkpoint).adapter.audio_token_id == value


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "more.safetensors"])
def test_a_pipe_in_a_checkpoint_folder_is_refused(name, checkpoint):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    assert f"['{name}'] are pipes or devices" in refusal(MossAudio.from_pretrained, checkpoint)


# ---- tokenizer and prompt ----

OTHER_TOKENIZERS = {
    "another kind": lambda data: data["model"].update(type="WordLevel"),
    "dropout": lambda data: data["model"].update(dropout=0.5),
    "another pattern": lambda data: pattern(data).update(Regex="(a*)*b"),
    "lower case": lambda data: data.update(normalizer={"type": "Lowercase"}),
    # At which tokenizers panics.
    "a prefix": lambda data: data["model"].update(continuing_subword_prefix="##"),
    "no byte-level pieces": lambda data: data.update(pre_tokenizer=None),
    "no Z": lambda data: data["model"]["vocab"].pop("Z"),
    "no end of a turn": lambda data: (
        data["model"]["vocab"].pop("<|im_end|>"),
        data.update(added_tokens=data["added_tokens"][:2]),
    ),
}


def pattern(data: dict) -> dict:
    return data["pre_tokenizer"]["pretokenizers"][0]["pattern"]


@pytest.mark.parametrize("change", OTHER_TOKENIZERS.values(), ids=OTHER_TOKENIZERS)
def test_a_tokenizer_that_is_not_qwens_byte_level_bpe_is_refused(change, checkpoint):
    path = checkpoint / "tokenizer.json"
    load_tokenizer(checkpoint).save(str(path))
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    assert "tokenizer" in refusal(MossAudio.from_pretrained, checkpoint, "cpu")


def test_a_prompt_is_no_longer_than_all_positions_of_the_longest_token(monkeypatch):
    monkeypatch.setattr(golden_model(), "tokenizer", None)  # it would take minutes
    said = refusal(golden_model().prompt_ids, " " * (128 * 40_960 + 1))
    assert "the prompt has 5242881 characters; expected at most 40960 tokens" in said


# ---- streams ----


def test_what_is_said_has_no_control_characters(capsys):
    say("a\x1b[31m\rb\u202ec d\ud800é\n")
    assert capsys.readouterr().err == "a\\x1b[31m\\rb\\u202ec d\\ud800é\\n\n"


def run(command: str, *argv) -> subprocess.CompletedProcess:
    """Runs the program by a shell, which does as the command says with its streams."""
    words = [sys.executable, moss_min.__file__, "--device", "cpu", "--model", FOLDER, *argv]
    shell = ["bash", "-c", command, "bash", *map(str, words)]
    return subprocess.run(shell, capture_output=True, text=True)


HELLO = ["--prompt", "Hello there", "--greedy", "--max-new-tokens", "5"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ['"$@" 2>&-', '"$@" 2> >(true)'], ids=["closed", "broken"])
def test_without_a_reader_of_stderr_the_answer_is_the_same(command):
    answer = golden_model().ask([], "Hello there", max_new_tokens=5, temperature=0)
    ended = run(command, *HELLO)
    assert (ended.returncode, ended.stdout) == (0, answer + "\n")
    ended = run(command, "--prompt", "Hello", "--model", "nowhere")
    assert (ended.returncode, ended.stdout) == (2, "")


@pytest.mark.slow
def test_quiet_silences_what_libraries_print_and_no_error(tmp_path):
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 160_000), 16_000)
    path.write_bytes(path.read_bytes()[:9000])  # mpg123 complains of a file that is cut
    options = [path, *HELLO[:3], "--max-new-tokens", "1"]
    assert "Xing stream size" in run('"$@"', *options).stderr
    quiet = run('"$@"', *options, "--quiet")
    assert quiet.returncode == 0 and re.fullmatch("the answer is cut.*\n", quiet.stderr)
    ended = run('"$@"', tmp_path, *HELLO, "--quiet")
    assert ended.returncode == 2 and re.fullmatch("moss_min: .*directory.*\n", ended.stderr)
