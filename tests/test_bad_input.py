"""Bad input, kind by kind: a ValueError of one sentence, which the command line prints."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moss_min
from conftest import FOLDER, JFK, edit_json, golden_case, golden_model, golden_prompt, refusal
from moss_min import MossAudio, load_tokenizer, read_config
from sample import Sampling

INDEX = "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PLACEHOLDER = "<|audio_bos|><|AUDIO|><|audio_eos|>"


def said_of(folder) -> str:
    """Why a checkpoint folder is refused, without its path."""
    return refusal(MossAudio.from_pretrained, folder, device="cpu").replace(str(folder), "")


# ---- folders and their JSON files ----


@pytest.mark.parametrize(
    "name, word", [("absent", "no folder"), ("a file", "no folder"), ("empty", "config.json")]
)
def test_what_is_not_a_checkpoint_folder_is_refused(name, word, tmp_path):
    (tmp_path / "a file").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert word in said_of(tmp_path / name)


def test_a_folder_with_pickles_only_is_refused(checkpoint):
    for path in checkpoint.glob("model*"):
        path.rename(checkpoint / "pytorch_model.bin")
    assert "model.safetensors" in said_of(checkpoint)


BAD_JSON = {
    "empty": b"",
    "in latin-1": '{"model_type": "é"}'.encode("latin-1"),
    "nested without end": b"[" * 100_000,
    "a number of 5000 digits": b'{"vocab_size": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_a_file_that_holds_no_json_object_is_named(content, checkpoint):
    names = "config.json processor_config.json generation_config.json tokenizer_config.json"
    for name in [*names.split(), INDEX]:
        good = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content)
        assert name in said_of(checkpoint)
        (checkpoint / name).write_bytes(good)


COUNTS = """
    adapter_hidden_size audio_config.d_model audio_config.output_dim audio_config.encoder_layers
    audio_config.encoder_attention_heads audio_config.encoder_ffn_dim
    audio_config.downsample_hidden_size language_config.vocab_size language_config.hidden_size
    language_config.intermediate_size language_config.num_hidden_layers
    language_config.num_attention_heads language_config.num_key_value_heads
    language_config.head_dim language_config.max_position_embeddings
""".split()
MAY_BE_ABSENT = "audio_config.num_mel_bins audio_config.n_window audio_config.conv_chunksize"
RATES = "audio_config.layer_norm_eps language_config.rope_theta language_config.rms_norm_eps"
TAPS = "audio_config.deepstack_encoder_layer_indexes"


def read_with(folder, name: str, key: str, value) -> str:
    """Why a folder's configuration is refused with this value in a file, which is then undone."""
    path = folder / name
    good = path.read_text()
    edit_json(path, **{key: value})
    said = refusal(read_config, folder)
    path.write_text(good)
    # "heads" and "key_value_heads" are one kind.
    assert key.rpartition(".")[2].replace("num_attention_heads", "heads") in said, (value, said)
    return said


def test_a_missing_key_is_named_with_where_and_what_was_expected(checkpoint):
    for key in ["model_type", "audio_config", "language_config", TAPS, *COUNTS, *RATES.split()]:
        read_with(checkpoint, "config.json", key, ...)
    said = read_with(checkpoint, "config.json", "language_config.head_dim", ...)
    assert "config.json: language_config.head_dim is missing; expected a" in said
    said = read_with(checkpoint, "processor_config.json", "audio_token_id", None)
    assert "processor_config.json: audio_token_id is missing; expected a" in said


COUNT = [0, -1, 2.5, "3", True, None, [3], math.nan, 2**40, 10**30]
RATE = [0, -1e-6, "1e-6", True, None, math.nan, math.inf, 10**30, 10**400]


@pytest.mark.parametrize("key", [*COUNTS, *MAY_BE_ABSENT.split(), *RATES.split()])
def test_what_is_no_positive_number_of_its_kind_is_refused(key, checkpoint):
    for value in RATE if key in RATES else COUNT:
        read_with(checkpoint, "config.json", key, value)


# What would change the arithmetic with another value.
FIXED = """
    model_type tie_word_embeddings language_config.tie_word_embeddings language_config.hidden_act
    language_config.rope_scaling language_config.rope_parameters language_config.attention_bias
    language_config.use_sliding_window language_config.layer_types audio_config.num_mel_bins
    audio_config.activation_function audio_config.downsample_rate
""".split()
FIXED_MEL = (
    "mel_sr mel_dim mel_n_fft mel_hop_length mel_dtype use_whisper_feature_extractor".split()
)


@pytest.mark.parametrize("value", [7, "other", {"rope_type": "yarn"}], ids=str)
def test_what_would_change_the_arithmetic_is_refused(value, checkpoint):
    for key in FIXED:
        read_with(checkpoint, "config.json", key, value)
    for key in FIXED_MEL:
        read_with(checkpoint, "processor_config.json", f"mel_config.{key}", value)


REFUSED = {
    "config.json": {
        "audio_config": [None, [], "x"],
        "language_config": [None, [], 5],
        "tie_word_embeddings": [True, None],
        "language_config.layer_types": [["sliding_attention"], [["full_attention"]], 5],
        # There are 6 layers.
        TAPS: [[1, 3, 6], [-1], [1.5], ["1"], [True], [[1]], "1, 3", 3, {}, [2**40]],
        "deepstack_num_inject_layers": [-1, 2.5, "3", True],
        "audio_config.d_model": [46, 51],  # there are 4 heads
        "language_config.num_attention_heads": [3],  # there are 2 key heads
        "language_config.head_dim": [23],  # RoPE pairs its halves
    },
    "processor_config.json": {
        "audio_token_id": [-1, "303", 303.0, True, None],
        "enable_time_marker": [1, "yes", None],
        "mel_config": [None, [], "x"],
    },
    "generation_config.json": {
        "eos_token_id": [None, "302", ["302"], [302, None], 302.0, True, -1, [-1], {}]
    },
}
REFUSED_KEYS = [(name, key) for name, keys in REFUSED.items() for key in keys]


@pytest.mark.parametrize("name, key", REFUSED_KEYS)
def test_a_value_that_is_wrong_is_refused(name, key, checkpoint):
    for value in REFUSED[name][key]:
        read_with(checkpoint, name, key, value)


def test_an_encoder_too_narrow_for_its_positions_is_refused(checkpoint):
    # Their rates divide by half the width less 1.
    edit_json(checkpoint / "config.json", **{"audio_config.encoder_attention_heads": 2})
    read_with(checkpoint, "config.json", "audio_config.d_model", 2)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("processor_config.json", "audio_token_id", 320),
        ("processor_config.json", "audio_start_id", 320),
        ("processor_config.json", "audio_end_id", 320),
        ("generation_config.json", "eos_token_id", [302, 320]),
        ("tokenizer_config.json", "added_tokens_decoder.320", {"content": "<|more|>"}),
    ],
)
def test_an_id_past_the_vocabulary_is_refused(name, key, value, checkpoint):
    edit_json(checkpoint / name, **{key: value})
    assert "320" in said_of(checkpoint)


HELLO = golden_case("text_only")  # "Hello there", greedily, 24 tokens
ANSWER = HELLO.tensors["generated"].tolist()


def answer(folder, max_new_tokens=24) -> list[int]:
    model = MossAudio.from_pretrained(folder, device="cpu")
    return list(model.generate(model.prompt(HELLO.text), max_new_tokens, temperature=0))


def test_a_whole_number_serves_as_a_rate(checkpoint):
    edit_json(checkpoint / "config.json", **{"language_config.rope_theta": 1_000_000})
    assert read_config(checkpoint) == read_config(FOLDER)


@pytest.mark.parametrize("missing", ["file", "key"])
def test_without_one_in_generation_config_language_config_has_the_eos_id(missing, checkpoint):
    edit_json(checkpoint / "config.json", **{"language_config.eos_token_id": 7})
    edit_json(checkpoint / "generation_config.json", eos_token_id=...)
    if missing == "file":
        (checkpoint / "generation_config.json").unlink()
    assert read_config(checkpoint).stop_ids == (7,)


# ---- weights ----


def rewrite(folder, **changed: torch.Tensor | None) -> None:
    """Puts the tensors, of which None takes one away, into one file without an index."""
    tensors = load_file(folder / SHARDS[0]) | load_file(folder / SHARDS[1]) | changed
    for path in folder.glob("model*"):
        path.unlink()
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


SPOILT = {
    "cut off in its tensors": lambda shard: shard[:-1],
    "with a header of exabytes": lambda shard: b"\xff" * 7 + b"\x0f" + shard[8:],
    "a pickle": lambda shard: pickle.dumps({"lm_head.weight": 0}),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_shard_is_named(spoil, checkpoint):
    for name in SHARDS:
        good = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(spoil(good))
        assert name in said_of(checkpoint)
        (checkpoint / name).write_bytes(good)


OUTSIDE = ["../outside.safetensors", "{parent}/outside.safetensors", f"../checkpoint/{SHARDS[1]}"]
NO_SHARDS = ["absent.safetensors", "config.json", 5, None, "", ".", "a\0b", [5], {}]


@pytest.mark.parametrize("name", [*OUTSIDE, *NO_SHARDS], ids=ascii)
def test_an_index_that_names_no_shard_in_the_folder_is_refused(name, checkpoint):
    lm_head = load_file(checkpoint / SHARDS[1])["lm_head.weight"]
    save_file({"lm_head.weight": lm_head}, checkpoint.parent / "outside.safetensors")
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    weight_map["lm_head.weight"] = name
    if name in OUTSIDE:
        weight_map["lm_head.weight"] = name.format(parent=checkpoint.parent)
    edit_json(checkpoint / INDEX, weight_map=weight_map)
    said = said_of(checkpoint)
    assert name not in OUTSIDE or INDEX in said
    assert name not in NO_SHARDS[:2] or name in said


@pytest.mark.parametrize("weight_map", [..., None, [], "x"], ids=str)
def test_an_index_without_a_weight_map_is_refused(weight_map, checkpoint):
    edit_json(checkpoint / INDEX, weight_map=weight_map)
    assert "weight_map" in said_of(checkpoint)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("language_model.norm.weight", None),
        ("extra.weight", torch.zeros(1)),
        ("audio_encoder.layers.0.fc1.bias", torch.zeros(7)),
        ("lm_head.weight", torch.zeros(320, 64, dtype=torch.int8)),
        ("lm_head.weight", torch.zeros(320, 64, dtype=torch.float64)),
    ],
    ids=["missing", "unexpected", "misshaped", "int8", "float64"],
)
def test_a_tensor_that_does_not_fit_is_named(name, tensor, checkpoint):
    rewrite(checkpoint, **{name: tensor})
    assert name in said_of(checkpoint)


def test_an_index_goes_before_a_lone_file(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"")
    assert answer(checkpoint) == ANSWER


def test_inv_timescales_of_a_reexport_are_ignored(checkpoint):
    rewrite(checkpoint, **{"audio_encoder.embed_positions.inv_timescales": torch.ones(3)})
    assert answer(checkpoint) == ANSWER


def test_shards_may_be_links_to_elsewhere_as_in_a_hub_cache(checkpoint):
    for name in SHARDS:
        (checkpoint / name).rename(checkpoint.parent / name)
        (checkpoint / name).symlink_to(checkpoint.parent / name)
    assert MossAudio.from_pretrained(checkpoint, device="cpu").lm_head.weight.shape == (320, 64)


# ---- tokenizer ----

DAMAGED = {
    "vocab.json": [None, b"", b"{}", b"[]", b'{"!": "0"}', b'{"!": -1}', b'{"a": 0', b"\xe9"],
    "merges.txt": [None, b"", b"#version: 0.2\nabc\n", b"#version: 0.2\nno such\n", b"\xe9 \xfc"],
    "tokenizer_config.json": [
        None,
        b"{}",
        b'{"added_tokens_decoder": {"300": {"content": 5}}}',
        b'{"added_tokens_decoder": {"x": {"content": "a"}}}',
        b'{"added_tokens_decoder": {"-1": {"content": "a"}}}',
    ],
    "tokenizer.json": [b"", b"{}", b"[1", b"\xe9"],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_missing_tokenizer_file_is_refused(name, checkpoint):
    for content in DAMAGED[name]:
        (checkpoint / name).unlink(missing_ok=True)
        if content is not None:
            (checkpoint / name).write_bytes(content)
        assert "tokenizer" in said_of(checkpoint) and name in said_of(checkpoint), content


def test_a_folder_saved_again_with_tokenizer_json_alone_gives_the_same_ids(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.enable_truncation(3)  # a file may have been saved with either
    tokenizer.enable_padding(length=300)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    for name in "vocab.json", "merges.txt", "tokenizer_config.json":
        (checkpoint / name).unlink()
    case = golden_case("scripts")
    model = MossAudio.from_pretrained(checkpoint, device="cpu")
    assert model.prompt(case.text).ids.tolist() == case.tensors["input_ids"].tolist()


# ---- prompts ----


@pytest.mark.parametrize(
    "text, clips, word",
    [
        (PLACEHOLDER, 0, "placeholder"),
        (PLACEHOLDER * 2, 1, "placeholder"),
        ("<|audio_bos|>", 0, "<|audio_bos|>"),
        ("<|audio_eos|>", 1, "<|audio_eos|>"),
        (PLACEHOLDER + "<|AUDIO|>", 1, "<|AUDIO|>"),
        (PLACEHOLDER + "<|vision_pad|>", 1, "token"),
        # What Python makes of a latin-1 byte in argv.
        ("caf\udce9", 0, "prompt"),
    ],
)
def test_a_text_that_does_not_go_with_its_clips_is_refused(text, clips, word):
    assert word in refusal(golden_model().prompt, text, [JFK] * clips)


def with_positions(checkpoint, count: int) -> MossAudio:
    edit_json(checkpoint / "config.json", **{"language_config.max_position_embeddings": count})
    return MossAudio.from_pretrained(checkpoint, device="cpu")


TOKENS = len(HELLO.tensors["input_ids"])  # 54


def test_a_prompt_of_as_many_tokens_as_positions_fits_for_study_but_not_to_generate(checkpoint):
    model = with_positions(checkpoint, TOKENS)
    prompt = model.prompt(HELLO.text)
    assert model(prompt).shape == (TOKENS, 320)
    said = refusal(model.generate, prompt)
    assert "has 54 tokens; expected fewer than 54 positions" in said


def test_an_answer_ends_where_the_positions_do(checkpoint):
    with_positions(checkpoint, TOKENS + 10)
    assert answer(checkpoint, max_new_tokens=24) == answer(checkpoint, None) == ANSWER[:10]


@pytest.mark.slow
def test_an_answer_of_more_than_1024_tokens_is_not_cut_before_the_positions_end(checkpoint):
    model = with_positions(checkpoint, 1200)
    with pytest.warns(UserWarning, match=r"the answer is cut after 11\d\d tokens"):
        model.ask([], "Describe this audio.", temperature=0)  # no end in 3000 tokens


def test_without_max_new_tokens_there_are_at_most_4096():
    prompt = golden_prompt("text_only")
    assert golden_model().fit(prompt, Sampling()).max_new_tokens == 4096


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers_before_a_mel_is_made(
    checkpoint, monkeypatch
):
    case = golden_case("short")
    tokens = len(case.tensors["input_ids"])
    model = with_positions(checkpoint, tokens - 1)
    monkeypatch.setattr(moss_min, "log_mel", None)
    said = refusal(model.prompt, case.text, case.clips)
    assert f"has {tokens} tokens; expected at most {tokens - 1} positions" in said


# ---- sampling arguments, device and dtype ----

REFUSED_SAMPLING = {
    "temperature": [-1, -1e-9, 1e-40, math.nan, math.inf, -math.inf, "1", None, True, 1j, [1.0]],
    "top_p": [0, 0.0, 1.1, -1, math.nan, math.inf, "1", None, True],
    "top_k": [-1, 2.5, math.nan, math.inf, "50", None, True],
    "seed": [2**64, -(2**63) - 1, 1.5, "1", True, math.nan],
    "max_new_tokens": [0, -1, 2.5, math.inf, "24", True],
    "thinking_budget": [-1, 2.5, math.nan, "3", True],
}


@pytest.mark.parametrize("name", REFUSED_SAMPLING)
def test_a_sampling_argument_out_of_range_is_refused_when_it_is_given(name, complaint):
    prompt = golden_prompt("text_only")
    for value in REFUSED_SAMPLING[name]:
        said = refusal(golden_model().generate, prompt, **{name: value})
        assert name in said and str(value) in said and "expected" in said
    option = "--" + name.replace("_", "-")
    line = complaint("--prompt", "Hello", f"{option}={REFUSED_SAMPLING[name][0]}")
    assert name in line or option in line


EDGES = {
    "temperature": [0, 1e-3, np.float64(0.8)],
    "top_p": [1e-300, 1, np.float64(0.8)],
    "top_k": [0, 2**70, np.int32(5)],
    "seed": [-1, 2**63, 2**64 - 1, np.int64(5)],
    "thinking_budget": [0, np.uint8(5)],
}


@pytest.mark.parametrize("name", EDGES)
def test_an_argument_at_the_edge_of_its_range_or_of_numpy_is_accepted(name):
    for value in EDGES[name]:
        options = {"max_new_tokens": 1, name: value}
        assert len(list(golden_model().generate(golden_prompt("text_only"), **options))) == 1


NO_DEVICES = ["banana", "", "meta", "cuda:99"]
NO_DTYPES = ["float64", "", "torch.int8"]


@pytest.mark.parametrize(
    "option, value, word",
    [("device", name, repr(name)) for name in NO_DEVICES]
    + [("dtype", name, "bfloat16") for name in NO_DTYPES],
)
def test_a_device_or_a_dtype_that_is_not_there_is_refused(option, value, word, complaint):
    options = {"device": "cpu", option: value}
    assert word in refusal(MossAudio.from_pretrained, FOLDER, **options)
    assert word in complaint(f"--{option}", value)
