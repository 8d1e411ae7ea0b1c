"""parity.py weights: sums of every tensor, and what a port has made of them; and parity.py ids."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

import parity
import stages
import weights
from conftest import GOLDEN, JFK, golden_case, write_clip
from moss_min import TINY, MossAudio
from test_parity import CHECKPOINT, MISTAKES, SAMPLES, SOUND, VARIANT, ported, reference, run, saved

BIASES = "audio_encoder.conv1.bias"
MATRIX = "lm_head.weight"
CONVOLUTION = "audio_encoder.conv2.weight"
ALL = pytest.mark.parametrize(
    "folder", [CHECKPOINT, VARIANT, TINY], ids=["golden", "variant", "tiny"]
)
with_weights = MossAudio.from_pretrained


def stored(name: str) -> torch.Tensor:
    """A tensor of the golden checkpoint, in bfloat16."""
    index = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())
    with safe_open(CHECKPOINT / index["weight_map"][name], "pt") as file:
        return file.get_tensor(name)


def summed(x: torch.Tensor, shape=None) -> dict:
    """A tensor's entry as a port would write it, by numpy."""
    flat = x.double().numpy().ravel()
    entry = {"shape": [*(shape or x.shape)], "values": flat.sum(), "magnitudes": abs(flat).sum()}
    return entry | {"by_index": (flat * np.arange(len(flat))).sum()}


def told(tmp_path, entries: dict, *options):
    """What parity.py weights says of a port with these entries."""
    path = tmp_path / "port.json"
    path.write_text(json.dumps(entries))
    return run("weights", CHECKPOINT, path, *options)


def test_the_sums_are_of_values_of_magnitudes_and_of_values_times_their_index():
    assert weights.sums(torch.tensor([[1.0, -2.0], [3.0, 4.0]])) == ([2, 2], 6.0, 10.0, 16.0)


def test_every_tensor_of_all_shards_is_printed_and_read_back_as_equal(tmp_path, capsys):
    table = run("weights", CHECKPOINT).out.splitlines()
    assert parity.main(["weights", str(CHECKPOINT), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == len(table) - 1 == 170
    for name in (BIASES, MATRIX, CONVOLUTION):
        by_numpy = summed(stored(name))
        assert entries[name]["shape"] == by_numpy["shape"]
        for key in ("values", "magnitudes", "by_index"):
            assert entries[name][key] == pytest.approx(by_numpy[key], rel=1e-9)
        (line,) = [line for line in table if line.startswith(f"{name} ")]
        for figure, key in zip(line.split()[2:], ("values", "magnitudes", "by_index")):
            assert float(figure) == pytest.approx(by_numpy[key], rel=1e-9)
    answer = told(tmp_path, entries, "--json").answer
    assert answer == {"equal": True, "compared": 170, "differ": {}, "missing": [], "unknown": []}


# What is said of a tensor <- what a port has made of it.
READ = {
    "bfloat16 was read as float16": (MATRIX, lambda x: summed(x.view(torch.float16))),
    "it is transposed": (MATRIX, lambda x: summed(x.T.contiguous(), x.shape)),
    "its values are the right ones in another order": (BIASES, lambda x: summed(x.flip(0))),
    "it has the shape [64, 320], expected [320, 64]": (MATRIX, lambda x: summed(x, x.T.shape)),
    "its sums are off by 1.0e-03 of the magnitudes": (
        CONVOLUTION,
        lambda x: summed(x.float() * 1.001),
    ),
}


@pytest.mark.parametrize("words", READ)
def test_a_tensor_that_was_misread_is_named_with_what_was_made_of_it(words, tmp_path):
    name, change = READ[words]
    entries = {BIASES: summed(stored(BIASES)), MATRIX: summed(stored(MATRIX))}
    got = told(tmp_path, entries | {name: change(stored(name))})
    assert got.status == 1
    assert f"{name} differs: {words}" in got.out
    assert re.search(r"^1 of the [23] tensors compared differ\.$", got.out, re.M)
    assert "are not in the port's file: audio_adapter.down_proj.weight, " in got.out


def test_weights_that_a_port_holds_in_float16_are_equal(tmp_path):
    assert told(tmp_path, {MATRIX: summed(stored(MATRIX).half())}).status == 0


def test_a_ports_names_of_tensors_are_mapped(tmp_path):
    names = tmp_path / "map.json"
    names.write_text('{"enc.{i}.fc1": "audio_encoder.layers.{i}.fc1.weight"}')
    entries = {"enc.2.fc1": summed(stored("audio_encoder.layers.2.fc1.weight"))}
    entries["mask"] = summed(torch.ones(3))
    answer = told(tmp_path, entries, "--names", names, "--json").answer
    assert answer["equal"] and answer["compared"] == 1 and answer["unknown"] == ["mask"]


BAD = {
    "[]": "expected an object",
    "{": "can't be read",
    '{"lm_head.weight": 3}': "expected an object of shape, values, magnitudes, by_index",
    '{"x": {"shape": [1], "values": 0, "magnitudes": 0, "by_index": 0}}': "none of its 1 tensors",
}


@pytest.mark.parametrize("text", BAD)
def test_sums_that_cannot_be_used_are_refused(text, tmp_path, refused):
    path = tmp_path / "port.json"
    path.write_text(text)
    assert BAD[text] in refused(parity.main, "weights", CHECKPOINT, path)


# ---- compare ----


@ALL
def test_compare_says_before_all_else_that_weights_look_misread(folder):
    model = with_weights(folder, "cpu", "float32", change=lambda name, x: x.view(torch.float16))
    of = stages.Run(model, "Describe this audio.", None, 1)
    port = dict(stages.compute(of, {"waveform.0": SOUND[:SAMPLES]}))
    for name in stages.HIDDEN:
        del port[name]
    files = [reference(checkpoint=folder), saved(port)]
    for options in ([], ["--model", folder]):
        got = run("compare", *files, *options)
        assert got.status == 1
        assert got.out.startswith(
            "The weights look misread: most stages are off by more than their"
        )
        assert run("compare", *files, *options, "--json").answer["weights_look_misread"]


@pytest.mark.slow
@ALL
def test_no_known_mistake_but_that_one_looks_like_misread_weights(folder):
    looks = set()
    for mistake in MISTAKES:
        port = saved(ported(mistake, checkpoint=folder))
        answer = run("compare", reference(checkpoint=folder), port, "--json").answer
        if answer["weights_look_misread"]:
            looks.add(mistake)
    assert looks <= {"weights-as-float16"}


# ---- ids ----


@pytest.mark.parametrize("name", ["short", "two_audios", "no_markers", "text_only", "variant"])
def test_the_ids_of_a_prompt_are_upstreams(name, tmp_path, capsys):
    case = golden_case(name)
    clips = [write_clip(tmp_path / f"{i}.wav", wave) for i, wave in enumerate(case.clips)]
    markers = ["--no-time-markers"] if case.time_markers is False else []
    question = ["--model", GOLDEN / case.checkpoint, "--prompt", case.text, *markers, "--json"]
    assert parity.main([str(word) for word in ("ids", *clips, *question)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ids"] == case.tensors["input_ids"].tolist()
    assert [token["id"] for token in answer["tokens"]] == answer["ids"]


def test_clips_and_markers_are_marked_and_no_weights_are_needed(checkpoint):
    for path in checkpoint.glob("model*"):
        path.unlink()
    out = run("ids", JFK, TINY / "bell.wav", "--model", checkpoint).out
    # 11 s and 5.6 s are 138 and 70 audio tokens.
    for line in (
        """      35     306  "<|audio_bos|>", a clip's start, clip 1""",
        "      36     303  audio tokens of clip 1, up to the next line",
        '     165      16  "1", a time marker, clip 1',
        '     166      15  "0", a time marker, clip 1',
        "     167     303  audio tokens of clip 1, up to the next line",
        """     180     307  "<|audio_eos|>", a clip's end, clip 1""",
        """     181     306  "<|audio_bos|>", a clip's start, clip 2""",
        '     255     198  "\\n"',
    ):
        assert f"\n{line}\n" in out, line
