"""tools/bench.py: what it measures, counts and prints. No test depends on a speed."""

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path

import pytest
import torch

import bench
from conftest import GOLDEN, assert_close, golden_model, needs_proc
from encoder import log_mel
from moss_min import MossAudio, load_tokenizer, read_config

QUICK = ["--device", "cpu", "--seconds", "2", "--new-tokens", "4", "--repeats", "1"]
STAGES = ["loading", "log_mel", "encoding", "prefill", "decoding", "batch"]


def run(capsys, *options) -> tuple[str, str]:
    """stdout and stderr."""
    assert bench.main([str(option) for option in options]) == 0
    return capsys.readouterr()


def measured(capsys, *options) -> dict:
    return json.loads(run(capsys, *QUICK, *options, "--json")[0])


@pytest.fixture
def toy(monkeypatch, tmp_path) -> Path:
    """--shape toy, and a folder of its own for what the bench writes."""
    audio, decoder = bench.SHAPES["small"]
    audio = audio | {"d_model": 24, "output_dim": 24, "encoder_ffn_dim": 24}
    audio["downsample_hidden_size"] = 4
    decoder = decoder | {"hidden_size": 16, "intermediate_size": 40, "head_dim": 8}
    monkeypatch.setitem(bench.SHAPES, "toy", (audio, decoder))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# ---- shapes, sound, and what is counted ----


@pytest.mark.parametrize(
    ("shape", "parameters", "read_in_a_step"),  # billions
    [("4B", 5.225, 4.02), ("8B", 9.05, 7.57), ("small", 0.65, 0.345)],
)
def test_a_shape_has_the_size_of_its_model(shape, parameters, read_in_a_step, tmp_path):
    source = bench.write_config(shape, tmp_path / shape)
    with torch.device("meta"):
        model = MossAudio(read_config(source), load_tokenizer(source))
    count = sum(weight.numel() for weight in model.parameters())
    assert count / 1e9 == pytest.approx(parameters, rel=2e-3)
    step = sum(weight.numel() for weight in bench.step_weights(model))
    assert step / 1e9 == pytest.approx(read_in_a_step, rel=2e-3)
    assert model.config.adapter.audio_token_id == 151_654


def test_the_sound_is_noise_with_gaps_and_always_the_same():
    wave = bench.sound(25.5)
    assert wave.shape == (408_000,)
    assert torch.equal(wave[:160_000], bench.sound(10))
    seconds = wave[:400_000].view(25, 16_000)
    assert (seconds[:, :11_200].std(dim=1) > 0.09).all()
    assert (seconds[:, 11_200:] == 0).all()


def test_flops_are_two_for_each_product_of_a_matrix():
    model = golden_model()
    x = torch.zeros(7, model.lm_head.in_features)
    assert bench.flops_of(lambda: model.lm_head(x)) == 2 * 7 * model.lm_head.weight.numel()


@pytest.mark.slow
@needs_proc
def test_the_peak_is_the_most_that_was_held():
    cpu = torch.device("cpu")
    before = bench.peak_bytes(cpu)
    held = torch.ones(before, dtype=torch.uint8)
    assert bench.peak_bytes(cpu) > held.nbytes


# ---- what it prints ----


@pytest.mark.parametrize("options", [[], ["--shape", "toy", "--dtype", "bfloat16"]], ids=str)
def test_json_is_one_object_of_every_stage(options, toy, capsys):
    found = measured(capsys, *options)
    assert found["device"] == "cpu"
    assert found["dtype"] == ("bfloat16" if options else "float32")
    assert found["shape"] == ("toy" if options else "tiny")
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert list(found["stages"]) == STAGES
    for stage in found["stages"].values():
        assert stage["seconds"] > 0
        assert stage["share_of_limit"] > 0
    done = {name: stage["seconds"] * stage["rate"] for name, stage in found["stages"].items()}
    assert done["log_mel"] == pytest.approx(2)
    assert done["encoding"] == pytest.approx(25)  # 12.5 tokens a second
    assert done["prefill"] == pytest.approx(found["tokens"])
    assert done["decoding"] == pytest.approx(3)  # after the first of four tokens
    assert found["stages"]["batch"]["times_one_row"] > 0
    assert list(toy.glob("moss-bench-*")) == []  # nothing is left behind


def test_threads_are_set(capsys, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    measured(capsys, "--threads", 3)
    assert given == [3]


def test_without_json_it_is_a_table_with_progress_on_stderr(capsys):
    out, err = run(capsys, *QUICK)
    title, _, head, _, *rows, _, last = out.splitlines()
    assert title.startswith("tiny, float32, cpu, ")
    assert head == "| stage | time | rate | share of limit |"
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in STAGES]
    assert "Peak memory: " in last
    assert "decoding: 1 of 1" in err


def test_lengths_are_rows_of_a_table_or_of_json(capsys):
    options = ["--device", "cpu", "--new-tokens", "3", "--lengths", "1", "9.5"]
    out, _ = run(capsys, *options, "--json")
    short, long = json.loads(out)["lengths"]
    # 13 tokens of sound, and 119 with the markers 2, 4, 6 and 8.
    assert long["tokens"] - short["tokens"] == 110
    # Layers, keys and values, heads, head_dim, tokens, float32.
    assert long["weights_and_cache"] - short["weights_and_cache"] == 4 * 2 * 2 * 32 * 110 * 4
    out, _ = run(capsys, *options)
    assert [row.split(" | ")[0] for row in out.splitlines()[-2:]] == ["| 1 s", "| 9.5 s"]


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "5B"], "4B"),
        (["--shape", "small", "--model", "nowhere"], "not both"),
        (["--model", "nowhere"], "is no folder"),
        (["--seconds", "nan"], "expected 0.01"),
        (["--lengths", "10", "-1"], "expected 0.01"),
        (["--new-tokens", "1"], "expected at least 2"),
        (["--new-tokens", "41000"], "expected at most"),
        (["--peer", "--lengths"], "not both"),
        (["--peer"], "transformers is 5.0.0; expected 4.57.1"),
    ],
)
def test_bad_options_are_one_line_and_status_2(options, said, refused, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.0.0")
    assert said in refused(bench.main, *options)


# ---- transformers ----


@pytest.fixture
def transformers():
    module = pytest.importorskip("transformers")
    if module.__version__ != bench.PEER:
        pytest.skip(f"transformers is {module.__version__}, not {bench.PEER}")
    return module


def test_with_peer_every_stage_of_one_row_has_a_ratio(transformers, toy, capsys):
    found = measured(capsys, "--peer", "--shape", "toy")
    assert found["versions"]["transformers"] == "4.57.1"
    for name in STAGES[:-1]:
        assert found["stages"][name]["ratio_to_peer"] > 0


@torch.no_grad()
def test_the_peer_computes_what_the_model_does(transformers):
    model = MossAudio.from_pretrained(GOLDEN / "checkpoint", "cpu")
    wave = bench.sound(9.4)
    prompt = model.prompt("Transcribe.", [wave])
    for merger in model.deepstack_audio_merger_list:
        merger.down_proj.weight.zero_()  # transformers' decoder has no DeepStack
    options = argparse.Namespace(new_tokens=4)
    peer = bench.peer_stages(model, GOLDEN / "checkpoint", wave, prompt, options)
    assert (torch.from_numpy(peer["log_mel"]()[0]).bfloat16() == log_mel(wave)).all()
    for ours, theirs in zip(model.hear(prompt.mels), peer["encoding"](), strict=True):
        assert_close(ours, theirs)
    logits = model.prefill(prompt, model.new_cache(1, len(prompt.ids)))
    assert_close(logits, peer["prefill"]())
