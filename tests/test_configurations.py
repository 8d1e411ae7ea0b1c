"""Checkpoints of other configurations, shards and types than the golden one's."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from conftest import GOLDEN, assert_close, distance, edit_json, golden_case, golden_model
from encoder import log_mel
from moss_min import MossAudio, Prompt, load_tokenizer, read_config

MERGERS = "deepstack_audio_merger_list"
TAPS = "audio_config.deepstack_encoder_layer_indexes"
INJECTED = "deepstack_num_inject_layers"


def random_checkpoint(folder: Path, dtype=torch.bfloat16, shards=1, **values) -> Path:
    """A checkpoint folder of random weights: the golden one's files, these values in config.json.

    A tensor of the same name and shape has the same numbers in every such folder. lm_head.weight is
    in the last shard.
    """
    shutil.copytree(GOLDEN / "checkpoint", folder, ignore=shutil.ignore_patterns("model*"))
    edit_json(folder / "config.json", **values)
    with torch.device("meta"):
        shapes = MossAudio(read_config(folder), load_tokenizer(folder)).state_dict()
    weights = {}
    for name, like in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(like.shape, generator=generator)
        scale = like[0].numel() ** -0.5 if like.ndim > 1 else 0.25
        weights[name] = (noise * scale + name.endswith("norm.weight")).to(dtype)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = list(weights)[i * len(weights) // shards : (i + 1) * len(weights) // shards]
        save_file({name: weights[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def random_model(tmp_path):
    """Makes a model, in float32, of a random checkpoint with these values in config.json."""

    def make(**values) -> MossAudio:
        folder = random_checkpoint(tmp_path / str(len(list(tmp_path.iterdir()))), **values)
        return MossAudio.from_pretrained(folder, device="cpu")

    return make


@pytest.fixture(scope="module")
def mel() -> torch.Tensor:
    """9.4 s of sound: two chunks of 400 frames and a tail of 137."""
    return log_mel(golden_case("three_chunks").clips[0])


def three_chunks(model: MossAudio) -> Prompt:
    return model.prompt("Describe this audio.", golden_case("three_chunks").clips)


def logits(model: MossAudio) -> torch.Tensor:
    return model(three_chunks(model))


def with_weights(model: MossAudio, weights: dict[str, torch.Tensor]) -> MossAudio:
    """The model with other weights, by name."""
    model.load_state_dict(model.state_dict() | weights, assign=True)
    return model


# ---- taps ----


@pytest.mark.parametrize("used", [0, 1, 2])
def test_injecting_fewer_taps_is_injecting_zeros_for_the_last_ones(used, random_model):
    fewer = random_model(deepstack_num_inject_layers=used)
    whole = random_model()
    zeros = {f"{MERGERS}.{k}.down_proj.weight": torch.zeros(64, 80) for k in range(used, 3)}
    assert not torch.equal(logits(fewer), logits(whole))
    assert torch.equal(logits(fewer), logits(with_weights(whole, zeros)))


def test_having_no_taps_is_injecting_none(random_model):
    without = random_model(**{TAPS: []})
    assert torch.equal(logits(without), logits(random_model(deepstack_num_inject_layers=0)))


def test_taps_keep_the_order_in_which_they_are_listed(random_model):
    listed = random_model(**{TAPS: [4, 1, 3]})
    ascending = random_model(**{TAPS: [1, 3, 4]})
    mels = three_chunks(listed).mels
    output, after_4, after_1, after_3 = listed.hear(mels)
    expected = torch.stack([output, after_1, after_3, after_4])
    assert torch.equal(expected, torch.stack(ascending.hear(mels)))
    assert not torch.equal(logits(listed), logits(ascending))


# ---- chunks ----


@pytest.mark.parametrize(
    "n_window, tokens", [(200, 2 * 50 + 18), (100, 4 * 25 + 18), (50, 9 * 13 + 5)]
)
def test_audio_tokens_are_rounded_up_in_every_chunk(n_window, tokens, random_model):
    model = random_model(**{"audio_config.n_window": n_window})
    prompt = three_chunks(model)
    assert prompt.mels[0].shape == (128, 937)
    assert (prompt.ids == 303).sum() == len(model.audio_encoder(prompt.mels)[0]) == tokens


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_nothing_crosses_a_chunk(changed, mel):
    other = mel.clone()
    other[:, 400 * changed : 400 * (changed + 1)] += 0.5
    rows = slice(50 * changed, 50 * (changed + 1))
    for before, after in zip(golden_model().hear([mel]), golden_model().hear([other])):
        same = (before == after).all(dim=1)
        assert not same[rows].any() and same[: rows.start].all() and same[rows.stop :].all()


def test_a_clip_is_padded_with_zeros_to_the_longest_chunk_of_all_clips(mel):
    encoder = golden_model().audio_encoder
    tail = mel[:, -137:]
    longer = mel[:, :140]
    together = encoder([tail, longer])[0][:18]
    assert_close(together, encoder([F.pad(tail, (0, 3))])[0])  # of 18 tokens too
    # Upstream's arithmetic: the padding is felt.
    assert distance(encoder([tail])[0], together) > 1e-3


# ---- shards and types ----

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_weight_loads_as_the_number_in_its_shard_rounded_once(
    shards, stored, dtype, tmp_path
):
    folder = random_checkpoint(tmp_path / "checkpoint", DTYPES[stored], shards)
    files = list(folder.glob("*.safetensors"))
    numbers = {name: tensor for file in files for name, tensor in load_file(file).items()}
    loaded = MossAudio.from_pretrained(folder, "cpu", dtype).state_dict()
    assert len(files) == shards and loaded.keys() == numbers.keys()
    assert all(torch.equal(loaded[name], numbers[name].to(DTYPES[dtype])) for name in numbers)
    assert {tensor.dtype for tensor in loaded.values()} == {DTYPES[dtype]}
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_a_change_is_given_what_is_stored_and_rounded_once(tmp_path):
    folder = random_checkpoint(tmp_path / "checkpoint")
    given = {}

    def change(name, tensor):
        given[name] = tensor
        return tensor.float() + 2**-12 if name == "lm_head.weight" else tensor

    loaded = MossAudio.from_pretrained(folder, "cpu", torch.float16, change=change).state_dict()
    stored = load_file(folder / "model.safetensors")
    assert given.keys() == stored.keys()
    assert all(torch.equal(given[name], stored[name]) for name in stored)
    changed = stored["lm_head.weight"].float() + 2**-12
    assert torch.equal(loaded["lm_head.weight"], changed.half())
    assert not torch.equal(changed.bfloat16().half(), changed.half())
    assert torch.equal(
        loaded["audio_encoder.conv1.bias"], stored["audio_encoder.conv1.bias"].half()
    )


def test_dtype_auto_is_that_of_lm_head_but_float32_on_a_cpu(tmp_path):
    folder = random_checkpoint(tmp_path / "checkpoint", shards=2)
    last = folder / "model-00002-of-00002.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(last).items()}, last)
    model = MossAudio.from_pretrained(folder)
    expected = torch.float32 if model.lm_head.weight.device.type == "cpu" else torch.float16
    assert {tensor.dtype for tensor in model.parameters()} == {expected}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="MKLDNN tells what a CPU has")
@pytest.mark.parametrize(
    "dtype, supported, told",
    [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)],
)
def test_bfloat16_without_instructions_for_it_is_told_of(dtype, supported, told, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    lines = []
    MossAudio.from_pretrained(GOLDEN / "checkpoint", "cpu", dtype, lines.append)
    assert sum("float32 is many times faster" in line for line in lines) == told


def test_loading_onto_a_cpu_leaves_the_switches_of_cuda_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    MossAudio.from_pretrained(GOLDEN / "checkpoint", "cpu", "float32")
    assert torch.backends.cudnn.allow_tf32


# ---- what a folder may lack ----


@pytest.mark.parametrize(
    "key, default, another",
    [("audio_config.n_window", 200, 100), ("audio_config.conv_chunksize", 64, 3), (INJECTED, 3, 2)],
)
def test_a_key_that_early_releases_lack_has_its_default(key, default, another, checkpoint):
    configs = []
    for value in (..., default, another):
        edit_json(checkpoint / "config.json", **{key: value})
        configs.append(read_config(checkpoint))
    assert configs[0] == configs[1] != configs[2]


def test_without_processor_config_the_audio_ids_are_the_released_ones(checkpoint):
    (checkpoint / "processor_config.json").unlink()
    edit_json(checkpoint / "config.json", **{"language_config.vocab_size": 151_671})
    adapter = read_config(checkpoint).adapter
    ids = (adapter.audio_token_id, adapter.audio_start_id, adapter.audio_end_id)
    assert ids == (151_654, 151_669, 151_670)
    assert adapter.enable_time_marker


def test_keys_in_other_places_than_their_own_are_ignored(checkpoint):
    config = read_config(checkpoint)
    strays = dict.fromkeys(["hidden_size", "output_dim", "rope_theta", "d_model", "n_window"], 7)
    edit_json(checkpoint / "config.json", **strays, audio_token_id=7, enable_time_marker=False)
    edit_json(checkpoint / "config.json", **{"language_config.output_dim": 7})
    edit_json(checkpoint / "processor_config.json", **strays, adapter_hidden_size=7, eos_token_id=7)
    assert read_config(checkpoint) == config
