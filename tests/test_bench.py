"""tools/bench.py: what it counts, against torch's counter and numbers worked out by hand; what it prints. No speeds."""

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import GOLDEN, HERE, golden_model
from encoder import log_mel
from moss_min import MossAudio, load_tokenizer, read_config

sys.path.insert(0, str(HERE.parent / "tools"))
import bench  # noqa: E402

QUICK = "--device", "cpu", "--seconds", "2", "--new-tokens", "4", "--repeats", "1"
TOY = (  # a shape of 5 million parameters, most of them the two embeddings of the released audio ids
    {
        "d_model": 16,
        "output_dim": 24,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 20,
    }
    | {"downsample_hidden_size": 4, "deepstack_encoder_layer_indexes": [2, 0]},
    {"vocab_size": 151_936, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    28,
)


def meta_model(shape: str, folder: Path) -> MossAudio:
    source = bench.write_config(shape, folder / shape)
    with torch.device("meta"):
        return MossAudio(read_config(source), load_tokenizer(source)).bfloat16()


def run(capsys, *options) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    status = bench.main([*map(str, options)])
    return status, *capsys.readouterr()


def measured(capsys, *options) -> dict:
    status, out, _ = run(capsys, *QUICK, *options, "--json")
    assert status == 0
    return json.loads(out)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """--shape toy, and a folder of its own for what the bench writes."""
    monkeypatch.setitem(bench.SHAPES, "toy", TOY)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# ---- shapes and sound ----


@pytest.mark.parametrize(
    ("shape", "parameters", "step"),
    [  # billions; of the released ones, 10.45 GB and 8.04 GB a step in bfloat16 are upstream's for 4B
        ("4B", 5.225, 4.02),
        ("8B", 9.05, 7.57),
        ("small", 0.65, 0.345),
    ],
)
def test_a_shape_has_as_many_parameters_as_the_model_of_that_name(
    shape, parameters, step, tmp_path
):
    model = meta_model(shape, tmp_path)
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(
        parameters, rel=2e-3
    )
    assert bench.weight_bytes(model) / 2e9 == pytest.approx(step, rel=2e-3)


@pytest.mark.parametrize("shape", ["4B", "8B"])
def test_a_released_shape_has_the_released_tensors_and_ids(shape, tmp_path):
    model = meta_model(shape, tmp_path)
    assert len(model.state_dict()) == 901
    adapter = model.config.adapter
    assert (adapter.audio_token_id, adapter.audio_start_id, adapter.audio_end_id) == (
        151_654,
        151_669,
        151_670,
    )
    assert adapter.enable_time_marker and model.config.encoder.deepstack_encoder_layer_indexes == (
        8,
        16,
        24,
    )


def test_random_weights_are_normal_of_deviation_0_02_and_1_in_norms(toy):
    model = bench.random_model(
        bench.write_config("toy", toy / "toy"), torch.device("cpu"), torch.bfloat16
    )
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.float().std() == pytest.approx(0.02, rel=0.01)
    for norm in (model.language_model.norm, model.language_model.layers[1].self_attn.q_norm):
        assert (norm.weight == 1).all()


def test_the_sound_is_noise_with_gaps_and_always_the_same():
    wave = bench.sound(25.5)
    assert wave.shape == (408_000,) and wave.dtype == torch.float32
    assert torch.equal(wave, bench.sound(25.5)) and torch.equal(wave[:160_000], bench.sound(10))
    seconds = wave[:400_000].view(25, 16_000)
    assert (seconds[:, :11_200].std(dim=1) > 0.09).all() and (seconds[:, 11_200:] == 0).all()


# ---- FLOPs and bytes ----


def counted(work) -> int:
    """FLOPs of matrices and convolutions by torch's own counter; it does not know a CPU's attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "scaled_dot" not in str(op)
    )


@pytest.mark.parametrize(("seconds", "chunks", "tokens"), [(9.37, 3, 50), (1.23, 1, 16)])
def test_an_encoding_has_the_flops_that_torch_counts_and_those_of_attention(
    seconds, chunks, tokens
):
    # a token's scores with all of its chunk, padded to 50 tokens (or 16), and their sums: 2 FLOPs each, at width 48
    model, wave = golden_model(), bench.sound(seconds)
    attention = chunks * 6 * (2 + 2) * tokens * tokens * 48
    flops = counted(lambda: model.audio_encoder([log_mel(wave)]))
    assert bench.encoding_flops(model.config, len(wave) // 160) == flops + attention


def test_a_prefill_has_the_flops_that_torch_counts_and_those_of_attention():
    model = golden_model()
    prompt = model.prompt("Transcribe.", [bench.sound(6)])
    sounds, audio, tokens = model.audio_encoder(prompt.mels), 75, len(prompt.ids)

    def prefill():
        x, deepstack = model.embed_ids(prompt.ids[None], *sounds)
        hidden = model.language_model(x, torch.arange(tokens)[None], deepstack=deepstack)
        model.lm_head(hidden[:, -1:])

    c = model.config.decoder
    width = c.num_attention_heads * c.head_dim
    seen = sum(
        range(1, tokens + 1)
    )  # each token's scores with itself and those before it, and their sums
    attention = c.num_hidden_layers * (2 + 2) * seen * width
    assert bench.prefill_flops(model.config, audio, tokens) == counted(prefill) + attention


def test_flops_of_the_smallest_model_worked_out_by_hand():
    encoder = {
        "downsample_hidden_size": 2,
        "d_model": 4,
        "output_dim": 3,
        "encoder_layers": 1,
        "encoder_ffn_dim": 8,
    }
    decoder = {
        "hidden_size": 4,
        "intermediate_size": 5,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = SimpleNamespace(
        encoder=SimpleNamespace(**encoder, n_window=200, deepstack_encoder_layer_indexes=(0,)),
        adapter=SimpleNamespace(adapter_hidden_size=6, output_dim=3, hidden_size=4),
        decoder=SimpleNamespace(**decoder, num_key_value_heads=1, head_dim=3, vocab_size=7),
    )
    # 8 frames: the convolutions give [2, 64, 4], [2, 32, 2], [2, 16, 1], of 9 products for each channel that goes in;
    # stem_proj 32 x 4; q, k, v, out 4 x 4 each; fc1 and fc2 4 x 8 each; a score and its sum 4 each; two out_proj 4 x 3
    stem = 2 * 64 * 4 * 9 + 2 * 32 * 2 * 18 + 2 * 16 * 1 * 18 + 32 * 4
    assert (
        bench.encoding_flops(config, 8) == 2 * (stem + 4 * 16 + 2 * 32 + 4 + 4 + 2 * 12) == 15_552
    )
    assert bench.encoding_flops(config, 500) == 2 * bench.encoding_flops(
        config, 400
    )  # two chunks, one mostly padding
    # two tokens, one of sound: adapter and merger (3 x 6 twice, 6 x 4), q and o 4 x 6, k and v 4 x 3, MLP 3 of 4 x 5;
    # three pairs of a query and a key, each a score of 6 and a sum of 6; lm_head 4 x 7 once
    assert (
        bench.prefill_flops(config, 1, 2) == 2 * (2 * 60 + 2 * (48 + 24 + 60) + 3 * 12 + 28) == 896
    )
    # a frame of log-mel: 2.5 x 400 x log2(400) for the FFT, 128 filters of 201 bins
    assert bench.mel_flops(10) == pytest.approx(10 * (2.5 * 400 * 8.643856 + 2 * 25_728))


def test_bytes_of_a_step_are_those_of_matrices_and_cache_worked_out_by_hand():
    model = MossAudio.from_pretrained(bench.TINY, "cpu", "bfloat16")
    # four layers of width 160: q and o to 6 x 32, k and v to 2 x 32, three matrices of the MLP to 224; 600 ids
    assert bench.weight_bytes(model) == 2 * (4 * 160 * (2 * 192 + 2 * 64 + 3 * 224) + 160 * 600)
    assert bench.cache_bytes(model, 10) == 2 * (
        4 * 2 * 2 * 32 * 10
    )  # layers, keys and values, heads, head_dim, tokens


# ---- clocks ----


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_an_answer_is_timed_as_its_encoder_what_else_is_before_the_first_token_and_its_median_step(
    cuda_graph, monkeypatch
):
    clock, given = [100.0], []

    def advance(seconds):
        clock[0] += seconds

    class Encoder(torch.nn.Module):
        def forward(self, mels):
            advance(4)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.audio_encoder, self.lm_head = Encoder(), torch.nn.Linear(1, 1)
            self.config = SimpleNamespace(decoder=SimpleNamespace(max_position_embeddings=10))

        def generate(self, prompt, new_tokens, **options):
            given.append((new_tokens, options["temperature"], options["cuda_graph"]))
            advance(3)  # a cache is made
            self.audio_encoder(prompt.mels)
            for seconds in (5, 40, 2, 1, 2):  # the first step captures a graph
                advance(seconds)
                yield 0

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    args = argparse.Namespace(new_tokens=5, cuda_graph=cuda_graph)
    prompt = SimpleNamespace(ids=[0] * 5, mels=[])
    assert bench.answer_seconds(Model(), prompt, args) == [4, 3 + 5, 2]
    assert given == [(5, 0, cuda_graph)]
    with pytest.raises(ValueError, match="--new-tokens is 5; expected at most 4"):
        bench.answer_seconds(Model(), SimpleNamespace(ids=[0] * 6, mels=[]), args)


@pytest.mark.skipif(
    not bench.MARK.exists(), reason="the high-water mark can be reset on Linux alone"
)
def test_the_peak_is_the_most_that_was_held_since_the_reset():
    cpu = torch.device("cpu")
    bench.reset_peak(cpu)
    held = torch.ones(100_000_000, dtype=torch.uint8)
    before = bench.peak_since(cpu)
    del held
    bench.reset_peak(cpu)
    assert bench.peak_since(cpu) < before - 90_000_000
    torch.ones(100_000_000, dtype=torch.uint8)
    assert bench.peak_since(cpu) > before - 10_000_000


# ---- what it prints ----


@pytest.mark.parametrize("options", [(), ("--shape", "toy")], ids=["tiny", "toy"])
def test_json_is_one_object_of_every_stage(options, toy, capsys):
    found = measured(capsys, *options)
    assert list(found) == [
        "device",
        "dtype",
        "shape",
        "versions",
        "threads",
        "peak_bytes",
        "stages",
    ]
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["shape"] == ("toy" if options else "tiny")
    assert (
        found["versions"]["torch"] == torch.__version__
        and found["threads"] == torch.get_num_threads()
    )
    assert found["peak_bytes"] > 50_000_000  # torch alone
    assert list(found["stages"]) == ["loading", "log_mel", "encoding", "prefill", "decoding"]
    for stage in found["stages"].values():
        assert list(stage) == ["seconds", "rate", "unit", "share_of_limit"]
        assert stage["seconds"] > 0 and stage["rate"] > 0
        assert (
            0 < stage["share_of_limit"] < 4
        )  # above 1 only where the machine was busy while the limit was measured
    amounts = {name: stage["seconds"] * stage["rate"] for name, stage in found["stages"].items()}
    assert amounts["log_mel"] == pytest.approx(2) and amounts["encoding"] == pytest.approx(
        25
    )  # 12.5 tokens a second
    assert amounts["decoding"] == pytest.approx(3)  # steps after the first of four tokens
    assert list(toy.glob("moss-bench-*")) == []  # nothing is left behind


def test_bfloat16_is_measured_in_bfloat16(toy, capsys):
    assert measured(capsys, "--shape", "toy", "--dtype", "bfloat16")["dtype"] == "bfloat16"


def test_threads_are_set_and_told(capsys):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert measured(capsys, "--threads", 1)["threads"] == 1
    finally:
        torch.set_num_threads(threads)


def test_without_room_on_the_disk_loading_is_left_out_and_a_line_says_so(toy, monkeypatch, capsys):
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    status, out, err = run(capsys, *QUICK, "--shape", "toy", "--json")
    stages = json.loads(out)["stages"]
    assert status == 0 and stages["loading"] is None and stages["decoding"]["rate"] > 0
    assert "loading is not measured" in err and "0.0 GB free" in err
    status, out, _ = run(capsys, *QUICK, "--shape", "toy")
    assert status == 0 and "| loading" not in out and "| decoding" in out


def test_without_json_it_is_a_table_with_progress_on_stderr(capsys):
    status, out, err = run(capsys, *QUICK, "--model", bench.TINY)
    title, _, head, rule, *rows = out.splitlines()
    assert (
        status == 0
        and title.startswith("tiny, float32, cpu (")
        and f"torch {torch.__version__}" in title
    )
    assert head == "| stage | time | rate | share of limit |" and rule.count("---") == 4
    names = [row.split(" | ")[0] for row in rows if row.startswith("|")]
    assert names == ["| loading", "| log_mel", "| encoding", "| prefill", "| decoding"]
    assert "% of sum |" in out and "one-row product" in out and "Peak memory: " in out
    assert "answering 1 of 1" in err


def test_lengths_are_rows_of_a_table_or_of_json(capsys):
    options = "--device", "cpu", "--new-tokens", "3", "--lengths", "1", "9.5"
    status, out, _ = run(capsys, *options, "--json")
    found = json.loads(out)
    assert status == 0 and "stages" not in found and found["shape"] == "tiny"
    short, long = found["lengths"]
    # 13 tokens of sound and 119, with the markers 2, 4, 6, 8: 110 more
    assert (short["length"], long["length"]) == (1, 9.5) and long["tokens"] - short[
        "tokens"
    ] == 119 + 4 - 13
    for row in (short, long):
        assert all(
            row[name] > 0 for name in ("log_mel", "encoding", "prefill", "step", "peak_bytes")
        )
    cache = long["weights_and_cache"] - short["weights_and_cache"]
    assert cache == 4 * (
        4 * 2 * 2 * 32 * 110
    )  # layers, keys and values, heads, head_dim, more tokens, in float32
    status, out, _ = run(capsys, *options)
    assert status == 0 and [row.split(" | ")[0] for row in out.splitlines()[-2:]] == [
        "| 1 s",
        "| 9.5 s",
    ]


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "5B"], "4B"),
        (["--shape", "small", "--model", "tiny"], "not allowed with"),
        (["--model", "nowhere"], "config.json"),
        (["--seconds", "0"], "expected 0.01"),
        (["--seconds", "nan"], "expected 0.01"),
        (["--lengths", "10", "-1"], "expected 0.01"),
        (["--lengths", "3600"], "expected at most 40960"),
        (["--new-tokens", "1"], "expected at least 2"),
        (["--new-tokens", "41000"], "expected at most"),
        (["--repeats", "0"], "expected at least 1"),
        (["--threads", "0"], "expected at least 1"),
        (["--peer", "--lengths"], "not both"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "int8"], "bfloat16"),
        (["--shape", "toy", "--dtype", "int8"], "bfloat16"),
        (["--frobnicate"], "unrecognized"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line_and_status_2(options, said, toy, capsys):
    status, out, err = run(capsys, *options)
    *progress, last = err.splitlines()
    assert status == 2 and out == "" and last.startswith("bench: ") and said in last
    assert all(len(line) < 80 and "Error" not in line for line in progress)


@pytest.mark.parametrize("found", [None, "5.0.0"])
def test_peer_without_its_transformers_is_one_line_and_status_2(found, monkeypatch, capsys):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, out, err = run(capsys, *QUICK, "--peer")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert f"transformers is {found or 'not installed'}; expected 4.57.1" in err


# ---- transformers ----


@pytest.fixture
def transformers():
    module = pytest.importorskip("transformers")
    if module.__version__ != bench.PEER:
        pytest.skip(f"transformers is {module.__version__}, not {bench.PEER}")
    return module


@pytest.mark.parametrize("options", [(), ("--shape", "toy")], ids=["tiny", "toy"])
def test_with_peer_every_stage_has_a_ratio(options, transformers, toy, capsys):
    found = measured(capsys, "--peer", *options)
    assert found["versions"]["transformers"] == "4.57.1"
    assert all(stage["ratio_to_peer"] > 0 for stage in found["stages"].values())
    assert list(toy.glob("moss-bench-*")) == []
    status, out, _ = run(capsys, *QUICK, "--peer", *options)
    assert (
        status == 0 and "| time over transformers' |" in out and "with transformers' parts" in out
    )


@torch.no_grad()
def test_the_peer_computes_what_the_model_does_on_the_same_tensors(transformers):
    model, wave = golden_model(), bench.sound(9.4)
    prompt, peer = model.prompt("Transcribe.", [wave]), bench.Peer(model)
    assert torch.equal(peer.log_mel(wave), prompt.mels[0])
    output, taps = model.audio_encoder(prompt.mels)
    expected, expected_taps = peer.encoder(prompt.mels)
    for ours, theirs in zip([output, *taps], [expected, *expected_taps], strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=3e-6 * float(theirs.abs().max())
        )  # as test_oracle.py
    x, _ = model.embed_ids(prompt.ids[None], output, taps)
    logits = model.lm_head(
        model.language_model(x, torch.arange(x.shape[1])[None])[:, -1:]
    )  # without DeepStack
    theirs = peer.prefill(prompt, output, taps)
    torch.testing.assert_close(logits, theirs, rtol=0, atol=3e-6 * float(theirs.abs().max()))
    ours = {weight.data_ptr() for weight in model.parameters()}
    weights = [*peer.encoder.parameters(), *peer.decoder.parameters()]
    assert all(weight.data_ptr() in ours for weight in weights) and len(weights) > 100


def test_the_peer_is_timed_over_as_many_steps(transformers, monkeypatch):
    model, clocks = golden_model(), []

    class Clock(bench.Clock):
        def __init__(self):
            super().__init__()
            clocks.append(self)

    monkeypatch.setattr(bench, "Clock", Clock)
    prompt, peer = model.prompt("Transcribe.", [bench.sound(2)]), bench.Peer(model)
    assert peer.step_seconds(prompt, *model.audio_encoder(prompt.mels)[:1], 6) > 0
    assert len(clocks[0].times) == 1 + 6  # the prompt, and tokens that no stop id ends


def test_the_peer_loads_the_same_weights(transformers, tmp_path):
    model, folder = golden_model(), bench.write_peer(GOLDEN / "checkpoint", tmp_path / "peer")
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = {f"model.{name}": weight for name, weight in model.language_model.state_dict().items()}
    ours |= {"lm_head.weight": model.lm_head.weight}
    assert theirs.keys() == ours.keys() and all(
        torch.equal(theirs[name], ours[name]) for name in ours
    )
