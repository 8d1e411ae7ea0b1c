"""Bad input, kind by kind: a ValueError of one sentence in the process, one line of stderr on the command line."""

import json
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import encoder
import moss_min
from conftest import GOLDEN, JFK, draws_as_upstream, edit_json, golden_case, golden_model
from moss_min import MossAudio, load_tokenizer, main, read_config

FOLDER = GOLDEN / "checkpoint"
INDEX = "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PLACEHOLDER = "<|audio_bos|><|AUDIO|><|audio_eos|>"


def sentence(call, *args, **options) -> str:
    """The message of the ValueError that a call has to raise."""
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    assert (
        caught.type is ValueError
    )  # a library's UnicodeDecodeError, say, is one as well, but no sentence of ours
    return str(caught.value)


@pytest.fixture
def complaint(capfd):
    """What the command line says, in its one line, of arguments that it has to refuse."""

    def complaint(*argv) -> str:
        assert main(["--device", "cpu", *map(str, argv)]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert (
            err.startswith("moss_min: ")
            and err.endswith("\n")
            and err.count("\n") == 1
            and len(err) < 400
        )
        assert "Traceback" not in err and "usage" not in err
        return err

    return complaint


@pytest.fixture
def refused(complaint):
    """Checks that a folder is refused, in the process and on the command line, with these patterns outside of its path.

    The command line reports each shard that it loads, so its one line shows as well that none was.
    """

    def refused(folder, *patterns):
        in_process = sentence(MossAudio.from_pretrained, folder, device="cpu")
        for said in in_process, complaint("--model", folder, "--prompt", "Hello"):
            words = said.replace(str(folder), "")
            assert [pattern for pattern in patterns if not re.search(pattern, words)] == [], said

    return refused


# ---- folders and config.json ----


@pytest.mark.parametrize("name", ["absent", "a file", "empty"])
def test_what_is_not_a_checkpoint_folder_is_refused(name, tmp_path, refused):
    (tmp_path / "a file").write_text("{}")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / name, "config.json")


def test_a_folder_with_pickles_only_is_refused(checkpoint, refused):
    for path in checkpoint.glob("model*"):
        path.unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    refused(checkpoint, "model.safetensors")


def test_one_line_is_enough_for_a_long_name_with_line_ends(complaint, tmp_path):
    assert "a a a" in complaint("--model", tmp_path / ("a\n" * 2000), "--prompt", "Hello")


BAD_JSON = {
    "empty": b"",
    "cut off": b'{"model_type": "moss',
    "a list": b"[]",
    "null": b"null",
    "in latin-1": '{"model_type": "é"}'.encode("latin-1"),
    "nested without end": b"[" * 100_000,
    "a number of 5000 digits": b'{"vocab_size": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "processor_config.json",
        "generation_config.json",
        "tokenizer_config.json",
        INDEX,
    ],
)
def test_a_file_that_holds_no_json_object_is_named(name, content, checkpoint, refused):
    (checkpoint / name).write_bytes(content)
    refused(checkpoint, name)


WHOLE = """
    adapter_hidden_size audio_config.d_model audio_config.output_dim audio_config.encoder_layers
    audio_config.encoder_attention_heads audio_config.encoder_ffn_dim audio_config.downsample_hidden_size
    language_config.vocab_size language_config.hidden_size language_config.intermediate_size
    language_config.num_hidden_layers language_config.num_attention_heads language_config.num_key_value_heads
    language_config.head_dim language_config.max_position_embeddings
""".split()
MAY_BE_ABSENT = [
    "audio_config.num_mel_bins",
    "audio_config.n_window",
    "audio_config.conv_chunksize",
]
REAL = ["audio_config.layer_norm_eps", "language_config.rope_theta", "language_config.rms_norm_eps"]
BAD_REAL = "0 -1e-6 string true null NaN inf 10^30 10^400".split()
TAPS = "audio_config.deepstack_encoder_layer_indexes"


def last(key: str) -> str:
    return key.rpartition(".")[2]


@pytest.mark.parametrize(
    "key", ["model_type", "audio_config", "language_config", TAPS, *WHOLE, *REAL]
)
def test_a_missing_key_is_named(key, checkpoint, refused):
    edit_json(checkpoint / "config.json", **{key: ...})
    refused(checkpoint, last(key))


def test_the_sentence_says_where_what_and_what_was_expected(checkpoint):
    edit_json(checkpoint / "config.json", **{"language_config.head_dim": ...})
    said = sentence(MossAudio.from_pretrained, checkpoint)
    assert all(
        words in said
        for words in ("config.json", "language_config.head_dim is missing", "expected a")
    )


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True, None, [3], math.nan], ids=str)
@pytest.mark.parametrize("key", [*WHOLE, *MAY_BE_ABSENT])
def test_a_count_that_is_no_positive_whole_number_is_refused(key, value, checkpoint, refused):
    edit_json(checkpoint / "config.json", **{key: value})
    refused(checkpoint, last(key))


@pytest.mark.parametrize(
    "value", [0, -1e-6, "1e-6", True, None, math.nan, math.inf, 10**30, 10**400], ids=BAD_REAL
)
@pytest.mark.parametrize("key", REAL)
def test_a_rate_that_is_no_positive_number_is_refused(key, value, checkpoint, refused):
    edit_json(checkpoint / "config.json", **{key: value})
    refused(checkpoint, last(key))


HUGE = [(key, value) for key in [*WHOLE, *MAY_BE_ABSENT] for value in (2**40, 10**30)]
HUGE += [("audio_config.encoder_layers", 2**30), ("language_config.num_hidden_layers", 2**30)]


@pytest.mark.parametrize("key, value", HUGE)
def test_a_huge_count_is_refused_with_the_configuration(key, value, checkpoint):
    edit_json(checkpoint / "config.json", **{key: value})
    assert last(key) in sentence(
        read_config, checkpoint
    )  # alone: building layers would take all memory


@pytest.mark.parametrize("key", ["downsample_hidden_size", "d_model", "encoder_ffn_dim"])
def test_a_width_of_two_billion_is_refused(key, checkpoint, refused):
    edit_json(
        checkpoint / "config.json", **{f"audio_config.{key}": 2**31 - 8}
    )  # its square, in bytes, is past 2^63
    refused(checkpoint)


REFUSED = {  # file -> key -> values that are wrong, or would change the arithmetic
    "config": {
        "model_type": ["qwen3", "MOSS_AUDIO", None, 5],
        "audio_config": [None, [], "x"],
        "language_config": [None, [], 5],
        "tie_word_embeddings": [True, None, "no"],
        "language_config.tie_word_embeddings": [True],
        "language_config.rope_scaling": [{"rope_type": "linear", "factor": 2.0}],
        "language_config.hidden_act": ["gelu", None],
        "language_config.attention_bias": [True],
        "language_config.use_sliding_window": [True],
        "language_config.layer_types": [
            ["full_attention", "sliding_attention"],
            [["full_attention"]],
            "x",
            5,
        ],
        "language_config.rope_parameters": [{"rope_type": "yarn"}],
        "audio_config.activation_function": ["gelu_new", "relu", None],
        "audio_config.num_mel_bins": [80],
        TAPS: [
            [1, 3, 6],
            [-1],
            [1.5],
            ["1"],
            [True],
            [[1]],
            "1, 3",
            3,
            {},
            [2**40],
        ],  # there are 6 layers
        "deepstack_num_inject_layers": [-1, 2.5, "3", True],
        "audio_config.d_model": [46, 51],  # there are 4 heads
        "language_config.head_dim": [23],  # RoPE pairs its halves
    },
    "processor_config": {
        "audio_token_id": [-1, "303", 303.0, True, None],
        "audio_start_id": [-1, None],
        "audio_end_id": [-1, None],
        "enable_time_marker": [1, "yes", None],
        "mel_config": [None, [], "x"],
        "mel_config.mel_sr": [8000],
        "mel_config.mel_dim": [80],
        "mel_config.mel_n_fft": [512],
        "mel_config.mel_hop_length": [320],
        "mel_config.mel_dtype": ["float32"],
    },
    "generation_config": {
        "eos_token_id": [None, "302", ["302"], [302, None], 302.0, True, -1, [-1], {}]
    },
}


@pytest.mark.parametrize(
    "name, key, value",
    [
        (name, key, value)
        for name, table in REFUSED.items()
        for key, values in table.items()
        for value in values
    ],
    ids=str,
)
def test_a_value_that_is_wrong_or_would_change_the_arithmetic_is_refused(
    name, key, value, checkpoint, refused
):
    edit_json(checkpoint / f"{name}.json", **{key: value})
    refused(checkpoint, last(key))


@pytest.mark.parametrize(
    "sizes, pattern",
    [
        ({"language_config.num_attention_heads": 3}, "key_value_heads"),  # of which there are 2
        (
            {"audio_config.d_model": 2, "audio_config.encoder_attention_heads": 2},
            "d_model",
        ),  # its half less 1 divides
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sizes, pattern, checkpoint, refused):
    edit_json(checkpoint / "config.json", **sizes)
    refused(checkpoint, pattern)


@pytest.mark.parametrize(
    "key", ["audio_token_id", "audio_start_id", "audio_end_id", "eos_token_id"]
)
def test_an_id_past_the_vocabulary_is_refused(key, checkpoint, refused):
    name = "generation_config.json" if key == "eos_token_id" else "processor_config.json"
    edit_json(checkpoint / name, **{key: 320})
    refused(checkpoint, "vocab_size|320")


def test_keys_in_other_places_than_their_own_are_ignored(checkpoint):
    strays = dict.fromkeys(["hidden_size", "output_dim", "rope_theta", "d_model"], 7)
    edit_json(checkpoint / "config.json", **strays, audio_token_id=7, enable_time_marker=False)
    edit_json(checkpoint / "processor_config.json", **strays, adapter_hidden_size=7, eos_token_id=7)
    assert read_config(checkpoint) == read_config(FOLDER)


def test_without_processor_config_the_released_ids_are_taken_which_this_vocabulary_lacks(
    checkpoint, refused
):
    (checkpoint / "processor_config.json").unlink()
    refused(checkpoint, "vocab_size|320")


HELLO = golden_case("text_only")  # "Hello there", greedily, 24 tokens
ANSWER = HELLO.tensors["generated"].tolist()


def answer(model, max_new_tokens=24) -> list[int]:
    return list(model.generate(model.prompt(HELLO.text), max_new_tokens, temperature=0))


def test_a_whole_number_serves_as_a_rate(checkpoint):
    edit_json(checkpoint / "config.json", **{"language_config.rope_theta": 1_000_000})
    assert answer(MossAudio.from_pretrained(checkpoint, device="cpu")) == ANSWER


@pytest.mark.parametrize("eos", [[302, ANSWER[4]], [ANSWER[4]]])
def test_generation_stops_at_any_id_of_a_list_in_generation_config(eos, checkpoint):
    edit_json(checkpoint / "generation_config.json", eos_token_id=eos)
    assert answer(MossAudio.from_pretrained(checkpoint, device="cpu")) == ANSWER[:5]


@pytest.mark.parametrize("missing", ["file", "key"])
def test_without_one_in_generation_config_language_config_has_the_eos_id(missing, checkpoint):
    edit_json(checkpoint / "config.json", **{"language_config.eos_token_id": ANSWER[4]})
    edit_json(checkpoint / "generation_config.json", eos_token_id=...)
    if missing == "file":
        (checkpoint / "generation_config.json").unlink()
    assert answer(MossAudio.from_pretrained(checkpoint, device="cpu")) == ANSWER[:5]


# ---- weights ----


def point_to(folder, name) -> None:
    """Has the index look for lm_head.weight in another file."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {"lm_head.weight": name})


def rewrite(folder, change) -> None:
    """Puts the tensors into one file without an index, after change(tensors)."""
    tensors = {key: tensor for shard in SHARDS for key, tensor in load_file(folder / shard).items()}
    for path in folder.glob("model*"):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


SPOILT = {
    "of no bytes": lambda shard: b"",
    "cut off in its tensors": lambda shard: shard[:-1],
    "cut off in its header": lambda shard: shard[:100],
    "cut off in its header's length": lambda shard: shard[:4],
    "with more at its end": lambda shard: shard + b"0",
    "with a header of garbage": lambda shard: shard[:8] + b"?" * 100 + shard[108:],
    "with a header of exabytes": lambda shard: b"\xff" * 7 + b"\x0f" + shard[8:],
    "a pickle": lambda shard: pickle.dumps({"lm_head.weight": 0}),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("name", SHARDS)
def test_a_spoilt_shard_is_named(name, spoil, checkpoint, refused):
    (checkpoint / name).write_bytes(spoil((checkpoint / name).read_bytes()))
    refused(checkpoint, name)


@pytest.mark.parametrize(
    "name", ["absent.safetensors", "config.json", 5, None, "", ".", "a\0b", [5], {}], ids=str
)
def test_an_index_that_names_no_shard_is_refused(name, checkpoint, refused):
    point_to(checkpoint, name)
    refused(checkpoint, name if name in ("absent.safetensors", "config.json") else "")


NOT_IN_THE_FOLDER = [
    "../outside.safetensors",
    "{parent}/outside.safetensors",
    f"../checkpoint/{SHARDS[1]}",
]


@pytest.mark.parametrize("name", NOT_IN_THE_FOLDER)
def test_a_shard_that_is_named_by_a_path_is_not_read(name, checkpoint, refused):
    lm_head = load_file(checkpoint / SHARDS[1])["lm_head.weight"]
    save_file({"lm_head.weight": lm_head}, checkpoint.parent / "outside.safetensors")
    point_to(checkpoint, name.format(parent=checkpoint.parent))
    refused(checkpoint, INDEX)


@pytest.mark.parametrize("weight_map", [..., None, [], "x"], ids=str)
def test_an_index_without_a_weight_map_is_refused(weight_map, checkpoint, refused):
    edit_json(checkpoint / INDEX, weight_map=weight_map)
    refused(checkpoint, "weight_map")


def test_missing_unexpected_and_misshaped_tensors_are_named_in_one_message(checkpoint, refused):
    def change(tensors):
        del tensors["language_model.norm.weight"], tensors["lm_head.weight"]
        tensors |= {f"extra.{i}.weight": torch.zeros(1) for i in range(3)}
        for i in range(4):
            tensors[f"audio_encoder.layers.{i}.fc1.bias"] = torch.zeros(7)

    rewrite(checkpoint, change)
    refused(checkpoint, "2 missing", "language_model.norm.weight", "3 unexpected", "extra.0.weight")
    refused(checkpoint, "4 .*shape", "audio_encoder.layers.0.fc1.bias", "7")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64, torch.float8_e4m3fn])
def test_a_tensor_of_a_type_that_no_release_has_is_named(dtype, checkpoint, refused):
    rewrite(
        checkpoint,
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(dtype)}),
    )
    refused(checkpoint, "lm_head.weight")


def test_an_index_goes_before_a_lone_file(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"")
    assert answer(MossAudio.from_pretrained(checkpoint, device="cpu")) == ANSWER


def test_inv_timescales_of_a_reexport_are_ignored(checkpoint):
    rewrite(
        checkpoint,
        lambda tensors: tensors.update(
            {"audio_encoder.embed_positions.inv_timescales": torch.ones(3)}
        ),
    )
    assert answer(MossAudio.from_pretrained(checkpoint, device="cpu")) == ANSWER


def test_shards_may_be_links_to_elsewhere_as_in_a_hub_cache(checkpoint):
    for name in SHARDS:
        (checkpoint / name).rename(checkpoint.parent / name)
        (checkpoint / name).symlink_to(checkpoint.parent / name)
    assert MossAudio.from_pretrained(checkpoint, device="cpu").lm_head.weight.shape == (320, 64)


# ---- tokenizer ----


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_missing_tokenizer_file_is_named(name, checkpoint, refused):
    (checkpoint / name).unlink()
    refused(checkpoint, name)


DAMAGED = {
    "vocab.json": [
        b"",
        b"{}",
        b"[]",
        b'{"!": "0"}',
        b'{"!": -1}',
        b'{"a": 0',
        "{'é': 0}".encode("latin-1"),
    ],
    "merges.txt": [
        b"",
        b"#version: 0.2\nabc\n",
        b"#version: 0.2\nno such\n",
        "é ü".encode("latin-1"),
    ],
    "tokenizer_config.json": [
        b"{}",
        b'{"added_tokens_decoder": null}',
        b'{"added_tokens_decoder": {"300": {}}}',
        b'{"added_tokens_decoder": {"300": {"content": 5}}}',
        b'{"added_tokens_decoder": {"300": {"content": "a", "special": "yes"}}}',
        b'{"added_tokens_decoder": {"x": {"content": "a"}}}',
        b'{"added_tokens_decoder": {"-1": {"content": "a"}}}',
    ],
    "tokenizer.json": [b"", b"{}", b"[1", "é".encode("latin-1")],
}


@pytest.mark.parametrize(
    "name, content", [(name, content) for name in DAMAGED for content in DAMAGED[name]], ids=str
)
def test_a_damaged_tokenizer_file_is_refused(name, content, checkpoint, refused):
    (checkpoint / name).write_bytes(content)
    refused(checkpoint, "tokenizer")


def test_a_tokenizer_with_ids_past_the_vocabulary_is_refused(checkpoint, refused):
    added = json.loads((checkpoint / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    edit_json(
        checkpoint / "tokenizer_config.json",
        added_tokens_decoder=added | {"320": {"content": "<|more|>"}},
    )
    refused(checkpoint, "320")


def test_a_folder_saved_again_with_tokenizer_json_alone_gives_the_same_ids(checkpoint):
    load_tokenizer(checkpoint).save(str(checkpoint / "tokenizer.json"))
    for name in "vocab.json", "merges.txt", "tokenizer_config.json":
        (checkpoint / name).unlink()
    case, model = golden_case("scripts"), MossAudio.from_pretrained(checkpoint, device="cpu")
    assert model.prompt(case.text).ids.tolist() == case.tensors["input_ids"].tolist()


# ---- sound ----


def write_sound(path, samples, rate=16_000) -> None:
    soundfile.write(path, np.asarray(samples, np.float32), rate, format="WAV", subtype="FLOAT")


SOUNDS = {
    "absent": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "no bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("RIFF, so to speak"),
    "cut off in its header": lambda path: path.write_bytes(JFK.read_bytes()[:30]),
    "no samples": lambda path: write_sound(path, []),
    "under a hop": lambda path: write_sound(path, [0.1] * 159),
    "under a hop once resampled": lambda path: write_sound(path, [0.1] * 400, 44_100),
    "not finite": lambda path: write_sound(path, [0.1] * 500 + [math.nan] * 500),
}


@pytest.mark.parametrize("suffix", ["wav", "m4a"])
@pytest.mark.parametrize("make", SOUNDS.values(), ids=SOUNDS)
def test_a_file_that_is_no_sound_is_named(make, suffix, tmp_path, complaint):
    path = tmp_path / f"clip.{suffix}"
    make(path)
    assert path.name in sentence(golden_model().prompt, "Hello", [path])
    assert path.name in complaint(path, "--model", FOLDER)


ARRAYS = [
    np.zeros(0, np.float32),
    np.zeros(159, np.float32),
    np.zeros((1, 500), np.float32),
    np.zeros(500, np.int16),
    np.full(500, np.inf),
    torch.full([500], math.nan),
    torch.zeros(500, dtype=torch.int64),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}-{len(array)}")
def test_an_array_that_is_no_sound_is_refused(array):
    assert re.search("sample|float", sentence(golden_model().prompt, "Hello", [array]))


# ---- prompts ----


@pytest.mark.parametrize(
    "text, clips, word",
    [
        (PLACEHOLDER, 0, "placeholder"),
        (PLACEHOLDER, 2, "placeholder"),
        (PLACEHOLDER * 2, 1, "placeholder"),
        *[
            (piece, clips, piece)
            for piece in ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
            for clips in (0, 1)
        ],
        (PLACEHOLDER + "<|AUDIO|>", 1, "<|AUDIO|>"),
        ("<|audio_bos|><|audio_eos|>", 1, "<|audio_bos|>"),
        ("<|vision_pad|>", 0, "token"),
        (PLACEHOLDER + "<|vision_pad|>", 1, "token"),
    ],
)
def test_what_would_be_taken_for_sound_and_is_none_is_refused(text, clips, word, complaint):
    assert word in sentence(golden_model().prompt, text, [JFK] * clips)
    assert word in complaint(*[JFK] * clips, "--model", FOLDER, "--prompt", text, "--quiet")


def test_a_prompt_that_is_no_unicode_is_refused(complaint):
    text = "caf\udce9"  # what Python makes of a latin-1 byte in argv
    assert "prompt" in sentence(golden_model().prompt, text)
    assert "prompt" in complaint("--model", FOLDER, "--prompt", text, "--quiet")


def test_a_placeholder_may_have_several_audio_pieces():
    several = "<|audio_bos|><|AUDIO|><|AUDIO|><|AUDIO|><|audio_eos|>"
    one, three = (
        golden_model().prompt(text, [JFK]).ids.tolist() for text in (PLACEHOLDER, several)
    )
    assert one == three


def with_positions(checkpoint, count: int) -> MossAudio:
    edit_json(checkpoint / "config.json", **{"language_config.max_position_embeddings": count})
    return MossAudio.from_pretrained(checkpoint, device="cpu")


TOKENS = len(HELLO.tensors["input_ids"])  # 54


def test_a_prompt_of_as_many_tokens_as_positions_fits_for_study_but_not_to_generate(
    checkpoint, complaint
):
    model = with_positions(checkpoint, TOKENS)
    prompt = model.prompt(HELLO.text)
    assert model(prompt).shape == (TOKENS, 320)
    line = complaint("--model", checkpoint, "--prompt", HELLO.text, "--quiet")
    for said in sentence(model.generate, prompt), line:
        assert re.search(r"\b54\b.*\b5[34]\b", said)


def test_one_position_more_leaves_room_for_one_new_token(checkpoint):
    model = with_positions(checkpoint, TOKENS + 1)
    assert answer(model, max_new_tokens=1) == ANSWER[:1]


def test_max_new_tokens_is_cut_to_what_fits_with_a_warning(checkpoint):
    model = with_positions(checkpoint, TOKENS + 10)
    with pytest.warns(UserWarning, match=r"\b24\b.*\b10\b"):
        assert answer(model, max_new_tokens=24) == ANSWER[:10]


def test_max_new_tokens_that_just_fits_is_not_warned_of(checkpoint):
    model = with_positions(checkpoint, TOKENS + 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(model, max_new_tokens=10) == ANSWER[:10]


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers_before_a_mel_is_made(
    checkpoint, complaint, monkeypatch
):
    case = golden_case("short")
    tokens = len(case.tensors["input_ids"])
    write_sound(checkpoint / "clip.wav", case.clips[0])
    model = with_positions(checkpoint, tokens - 1)
    monkeypatch.setattr(moss_min, "log_mel", None)
    line = complaint(
        checkpoint / "clip.wav", "--prompt", case.text, "--model", checkpoint, "--quiet"
    )
    for said in sentence(model.prompt, case.text, case.clips), line:
        assert re.search(rf"\b{tokens}\b.*\b{tokens - 1}\b", said)


# ---- sampling arguments, device and dtype ----


REFUSED_SAMPLING = {
    "temperature": [-1, -1e-9, 1e-40, math.nan, math.inf, -math.inf, "1", None, True, 1j, [1.0]],
    "top_p": [0, 0.0, 1.1, -1, math.nan, math.inf, "1", None, True],
    "top_k": [-1, 2.5, math.nan, math.inf, "50", None, True],
    "seed": [2**70, -(2**70), 1.5, "1", True, math.nan],
    "max_new_tokens": [0, -1, 2.5, math.inf, "24", None, True],
    "thinking_budget": [-1, 2.5, math.nan, "3", True],
}
SAMPLING_CASES = [(name, value) for name, values in REFUSED_SAMPLING.items() for value in values]


@pytest.mark.parametrize("name, value", SAMPLING_CASES)
def test_a_sampling_argument_out_of_range_is_refused_when_generate_is_called(name, value):
    prompt = golden_model().prompt("Hello")
    said = sentence(golden_model().generate, prompt, **{name: value})
    assert name in said and str(value) in said and "expected" in said


@pytest.mark.parametrize(
    "name, value", [case for case in SAMPLING_CASES if type(case[1]) in (int, float)]
)
def test_a_sampling_option_out_of_range_is_refused(name, value, complaint):
    option = "--" + name.replace("_", "-")
    said = complaint("--model", FOLDER, "--prompt", "Hello", "--quiet", f"{option}={value}")
    assert name in said or option in said


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", 0),
        ("temperature", 1e-3),
        ("top_p", 1e-300),
        ("top_p", 1),
        ("top_k", 0),
        ("top_k", 2**70),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 2**64 - 1),
        ("thinking_budget", 0),
        ("max_new_tokens", 1),
    ],
)
def test_a_sampling_argument_at_the_edge_of_its_range_is_accepted(name, value):
    model = golden_model()
    assert list(model.generate(model.prompt("Hello"), **{"max_new_tokens": 1, name: value}))


@draws_as_upstream
def test_numpy_numbers_are_numbers():
    model, case = golden_model(), golden_case("sampled")
    given = {
        "max_new_tokens": np.int64(32),
        "temperature": np.float64(0.8),
        "top_p": np.float64(0.9),
    }
    given |= {"top_k": np.int32(20), "seed": np.int64(1234), "thinking_budget": np.uint8(200)}
    ids = list(model.generate(model.prompt(case.text, case.clips), **given))
    assert ids == case.tensors["generated"].tolist()


DEVICES = ["banana", "", "meta", "cuda:99"]
DEVICES += ["cuda"] * (not torch.cuda.is_available()) + ["mps"] * (
    not torch.backends.mps.is_available()
)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_not_there_is_refused(device, complaint):
    assert repr(device) in sentence(MossAudio.from_pretrained, FOLDER, device=device)
    assert repr(device) in complaint("--model", FOLDER, "--prompt", "Hello", "--device", device)


@pytest.mark.parametrize("dtype", ["int8", "float64", "", "torch.float32"])
def test_a_dtype_that_is_not_supported_is_refused(dtype, complaint):
    assert "bfloat16" in sentence(MossAudio.from_pretrained, FOLDER, device="cpu", dtype=dtype)
    assert "bfloat16" in complaint("--model", FOLDER, "--prompt", "Hello", "--dtype", dtype)


def test_what_is_no_sound_is_named_without_where_it_lies_in_memory(tmp_path, monkeypatch):
    """An address would differ from run to run."""
    monkeypatch.setattr("shutil.which", lambda program: None)
    path = tmp_path / "text.wav"
    path.write_text("RIFF, so to speak")
    with pytest.raises(
        ValueError, match=r"text\.wav: [^<]+\. For other formats an ffmpeg on the PATH is needed$"
    ):
        encoder.load_audio(path)
