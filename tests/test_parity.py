"""tools/parity.py: what dump writes, and that compare and diagnose find what port.py, the porter, does wrong."""

import contextlib
import functools
import io
import json
import struct
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import encoder
import port
from conftest import GOLDEN, HERE, golden_case, golden_model

sys.path.insert(0, str(HERE.parent / "tools"))
import mistakes  # noqa: E402
import parity  # noqa: E402

CHECKPOINT = str(GOLDEN / "checkpoint")
TEXT = "Describe this audio."
SAMPLES = 83_000  # 518 frames: a full chunk and a tail of 118, which is not a multiple of 8, so that its padding shows
OTHER_EPSILON = "layer-norm-eps=1e-3"
WORKSHOP = tempfile.TemporaryDirectory()  # for what is made once
FOLDER = Path(WORKSHOP.name)


def run(*argv) -> SimpleNamespace:
    """The command line: status, stdout and stderr; answer is what --json printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = parity.main([str(arg) for arg in argv])
    answer = (
        json.loads(out.getvalue(), parse_constant=pytest.fail)
        if "--json" in argv and status < 2
        else None
    )
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), answer=answer)


@functools.cache
def sound() -> torch.Tensor:
    return load_file(GOLDEN / "ports" / "waveform.safetensors")["waveform.0"]


def dumped(path: Path, waves, *options) -> Path:
    """A reference for sounds at 16 kHz, by the command line."""
    files = [path.with_suffix(f".{i}.wav") for i in range(len(waves))]
    for file, wave in zip(files, waves):
        soundfile.write(file, wave.numpy(), 16_000, subtype="FLOAT")
    made = run("dump", *files, "-o", path, *options)
    assert made.status == 0, made.err
    return path


@functools.cache
def reference(dtype: str = "float32") -> Path:
    options = "--model", CHECKPOINT, "--dtype", dtype
    return dumped(FOLDER / f"reference.{dtype}.safetensors", [sound()[:SAMPLES]], *options)


@functools.cache
def ported(*wrong: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The porter's stages of the reference's run."""
    ids = load_file(reference())["input_ids"].tolist()
    around = ids[: ids.index(306)], ids[ids.index(307) + 1 :]
    return port.run(GOLDEN / "checkpoint", sound()[:SAMPLES], *around, wrong, dtype)


SUBSETS = {
    "all": lambda name: True,
    "decoder": lambda name: name.startswith("decoder.") or name in ("final_norm", "logits"),
    "logits": lambda name: name == "logits",
}


def saved(stages: dict, subset: str = "all", name: str = "port") -> Path:
    path = FOLDER / f"{name}.safetensors"
    save_file({key: x.contiguous() for key, x in stages.items() if SUBSETS[subset](key)}, path)
    return path


def compared(stages: dict, *options, model: bool = True) -> dict:
    more = ("--model", CHECKPOINT) if model else ()
    got = run("compare", reference(), saved(stages), *more, *options, "--json")
    assert got.err == "" and got.status == (not got.answer["equal"])
    return got.answer


def said(stages: dict, *options) -> str:
    """What compare prints without a model."""
    return run("compare", reference(), saved(stages), *options).out


def diagnosed(stages: dict, *options, subset: str = "all") -> dict:
    got = run(
        "diagnose", reference(), saved(stages, subset), "--model", CHECKPOINT, *options, "--json"
    )
    assert got.err == "" and got.status == (not got.answer["equal"])
    return got.answer


def changed(name: str, change) -> dict:
    """The right port's stages, but for one, which is `change` of itself."""
    return ported() | {name: change(ported()[name])}


# ---- dump ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["short", "three_chunks", "two_audios", "text_only", "no_markers", "variant"]
)
def test_the_walks_logits_are_the_models_to_the_bit(name, dtype):
    case = golden_case(name)
    model = golden_model(case.checkpoint, dtype)
    of = mistakes.Run(model, case.text, case.time_markers, len(case.clips))
    stages = dict(
        mistakes.compute(of, {f"waveform.{i}": wave for i, wave in enumerate(case.clips)})
    )
    with torch.no_grad():
        assert torch.equal(
            stages["logits"], model(model.prompt(case.text, case.clips, case.time_markers))
        )


def test_a_dump_has_every_stage_in_order_with_its_axes():
    data = reference().read_bytes()
    (length,) = struct.unpack("<Q", data[:8])  # as a port in C++ reads it
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    axes = json.loads(metadata["axes"])
    assert list(header) == list(axes) == [*ported(), "generated"]
    assert (
        b'"encoder.stem": {"dtype": "F32", "shape": [65, 48], "data_offsets": [' in data
    )  # by which the README's ports
    assert header["encoder.conv1"]["shape"] == [2, 8, 64, 200]
    assert axes["encoder.conv1"] == "chunks, channels, mel bands, frames"
    assert header["logits"]["shape"] == [131, 320] and header["generated"]["shape"] == [16]
    others = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] != "F32"}
    assert others == {"mel.0": "BF16", "input_ids": "I32", "generated": "I32"}
    begin, end = (8 + length + offset for offset in header["input_ids"]["data_offsets"])
    assert struct.unpack("<131i", data[begin:end]) == tuple(ported()["input_ids"].tolist())
    assert (metadata["prompt"], metadata["dtype"], metadata["version"]) == (TEXT, "float32", "1")
    assert json.loads(metadata["chunk_tokens"]) == [50, 15]
    assert json.loads(metadata["sounds"]) == [parity.digest(sound()[:SAMPLES].numpy().tobytes())]


def test_a_bfloat16_runs_stages_are_stored_in_float32():
    stages = load_file(reference("bfloat16"))
    for name in ("encoder.layers.5", "decoder.layers.4", "logits"):
        assert stages[name].dtype == torch.float32 and torch.equal(
            stages[name], stages[name].bfloat16().float()
        )
    assert stages["mel.0"].dtype == torch.bfloat16


def test_generated_ids_are_upstreams(tmp_path):
    case = golden_case("short")
    path = dumped(
        tmp_path / "r.safetensors", case.clips, "--model", CHECKPOINT, "--max-new-tokens", 24
    )
    assert load_file(path)["generated"].tolist() == case.tensors["generated"].tolist()


def test_chosen_stages_come_with_the_sound_and_the_prompts_ids(tmp_path):
    options = "--model", CHECKPOINT, "--stages", "encoder.layers.[01],logits"
    path = dumped(tmp_path / "r.safetensors", [sound()[:SAMPLES]], *options)
    stages = load_file(path)
    assert stages.keys() == {
        "waveform.0",
        "encoder.layers.0",
        "encoder.layers.1",
        "input_ids",
        "logits",
    }
    assert torch.equal(stages["logits"], load_file(reference())["logits"])
    right = run("compare", path, saved(ported()), "--json")
    rows = [row["name"] for row in right.answer["stages"]]
    assert rows == ["waveform.0", "encoder.layers.0", "encoder.layers.1", "logits"]
    own = run(
        "compare",
        path,
        saved(changed("encoder", lambda x: x + 0.1)),
        "--model",
        CHECKPOINT,
        "--json",
    )
    assert own.answer["first"] == "encoder"  # the model makes up for what the reference lacks


def test_stages_go_to_the_file_as_they_come_and_appear_under_its_name_at_the_end(tmp_path):
    path, part = tmp_path / "r.safetensors", tmp_path / "r.safetensors.part"
    sizes = []

    def stages():
        for name in ("waveform.0", "adapter"):
            yield name, torch.zeros(1000, 1000)
            sizes.append(part.stat().st_size)
            assert not path.exists()

    parity.write(path, {}, stages(), 2)
    assert sizes[0] > 4_000_000 and sizes[1] - sizes[0] >= 4_000_000 and not part.exists()
    assert load_file(path)["adapter"].shape == (1000, 1000)


def test_a_dump_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "r.safetensors"
    path.write_text("before")

    def stages():
        yield "logits", torch.zeros(2, 2)
        raise OSError("no space left")

    with pytest.raises(OSError):
        parity.write(path, {}, stages(), 2)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


# ---- what is right ----

CASES = [
    "short",
    "three_chunks",
    "one_chunk",
    "two_audios",
    "text_only",
    "no_markers",
    "scripts",
    "long",
    "variant",
]


@functools.cache
def golden_reference(name: str) -> Path:
    case = golden_case(name)
    options = [
        "--model",
        GOLDEN / case.checkpoint,
        "--prompt",
        case.text,
        "--max-new-tokens",
        case.max_new_tokens,
    ]
    options += ["--no-time-markers"] * (case.time_markers is False)
    return dumped(FOLDER / f"{name}.safetensors", case.clips, *options)


@pytest.mark.parametrize(
    "name", [*CASES, "short.bfloat16", "three_chunks.bfloat16", "long.bfloat16"]
)
def test_upstream_is_equal(name):
    case = golden_case(name)
    path = golden_reference(name.removesuffix(".bfloat16"))
    upstream = saved(case.tensors, name="upstream")
    for model in ((), ("--model", GOLDEN / case.checkpoint)):
        answer = run("compare", path, upstream, *model, "--json").answer
        assert answer["equal"] and answer["first"] is None and answer["since"] is None
        assert [row["name"] for row in answer["stages"] if not row["ok"]] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of", ["float32", "bfloat16", "float16"])
def test_the_right_port_is_equal_in_every_type_to_a_reference_in_every_type(of, dtype):
    port_file = saved(ported(dtype=dtype))
    for model in ((), ("--model", CHECKPOINT)):
        assert run("compare", reference(of), port_file, *model, "--json").answer["equal"]
    diagnosis = run("diagnose", reference(of), port_file, "--model", CHECKPOINT, "--json")
    assert diagnosis.status == 0 and diagnosis.answer["mistakes"] == diagnosis.answer["ties"] == []


def test_mel_in_single_precision_is_no_mistake_and_told_from_an_epsilon_of_1e_6():
    single, epsilon = ported("mel-single-precision"), ported("layer-norm-eps")
    logits = ported()["logits"]
    effects = [float((stages["logits"] - logits).abs().max()) for stages in (single, epsilon)]
    assert 0.2 < effects[0] / effects[1] < 5  # of one size
    assert compared(single)["equal"] and diagnosed(single)["mistakes"] == []
    assert diagnosed(epsilon)["mistakes"] == ["layer-norm-eps"]
    assert (
        diagnosed(single, subset="logits")["mistakes"] == []
    )  # too little to tell: nothing, not the wrong thing
    off = int(
        (single["mel.0"] != ported()["mel.0"]).sum()
    )  # 18 on most processors; another sums in another order
    assert f" {off} values a bfloat16 step off" in said(
        single
    ) and "--model tells the two apart" in said(single)


# ---- how a port's file is read ----


def chunks_of(x: torch.Tensor) -> torch.Tensor:
    """A full chunk and a tail with what is not to be looked at behind it: [2, 52, width]."""
    return torch.stack(
        [
            torch.cat([part, torch.full((52 - len(part), x.shape[1]), 7.0)])
            for part in x.split([50, 15])
        ]
    )


LAYOUTS = {
    "transposed": ("adapter", lambda x: x.T),
    "without its leading axis": ("decoder.layers.3", lambda x: x[None]),
    "without its leading axis, read transposed": ("mel.0", lambda x: x.T[None]),
    "[chunks, tokens, width]": ("encoder.layers.2", chunks_of),
    "read transposed, read as [chunks, tokens, width]": ("encoder.stem", lambda x: chunks_of(x).mT),
    "read transposed:": ("encoder.conv2", lambda x: x.permute(0, 2, 3, 1)),  # channels last
    "of the last position alone": ("logits", lambda x: x[-1:]),
    "without its leading axis, of the last position": ("logits", lambda x: x[None, -1:]),
}


@pytest.mark.parametrize("name, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_another_layout_is_recognised_used_and_said(name, layout):
    stages = changed(name, layout)
    assert compared(stages)["equal"] and compared(stages, model=False)["equal"]
    (wanted,) = [
        words for words, (stage, change) in LAYOUTS.items() if (stage, change) == (name, layout)
    ]
    assert wanted.removesuffix(":") in said(stages)
    wrong = stages | {name: stages[name] * 1.01}
    assert compared(wrong)["first"] == compared(wrong, model=False)["first"] == name


def test_logits_of_the_last_position_may_have_one_axis():
    assert compared(changed("logits", lambda x: x[-1]))["equal"]
    assert compared(changed("logits", lambda x: x[-1] + 1))["since"] == 130


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_ids_may_be_of_another_integer_type(dtype):
    assert compared(changed("input_ids", lambda x: x.to(dtype)[None]))["equal"]


def test_layers_recorded_before_the_injection_are_no_mistake():
    stages = ported("layers-before-injection")
    assert (
        compared(stages)["equal"]
        and compared(stages, model=False)["equal"]
        and diagnosed(stages)["equal"]
    )
    assert "decoder.layers.0 to decoder.layers.2: recorded before the injection" in said(stages)
    assert diagnosed(ported("layers-before-injection", "no-qk-norm"))["mistakes"] == ["no-qk-norm"]
    never = compared(ported("no-deepstack"))
    assert never["first"] == "decoder.layers.0"


@pytest.mark.parametrize(
    "cut", [lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x[:, None], lambda x: x.flatten()]
)
def test_another_shape_is_a_difference_and_never_cut_to_fit(cut):
    for model in (False, True):
        answer = compared(changed("adapter", cut), model=model)
        assert answer["first"] == "adapter" and answer["since"] is None
        (row,) = [row for row in answer["stages"] if row["name"] == "adapter"]
        assert not row["ok"] and row["max_rel"] is None
    assert "adapter has another shape" in said(changed("adapter", cut))


def numpy_of(x: torch.Tensor) -> np.ndarray:
    """As numpy stores bfloat16 where a library has taught it the type: two bytes each."""
    return x.view(torch.int16).numpy().view("V2") if x.dtype == torch.bfloat16 else x.numpy()


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_numpys_files_are_read_too(kind, tmp_path):
    stages = ported() | {
        "adapter": ported()["adapter"].half(),
        "input_ids": ported()["input_ids"].to(torch.int64),
    }
    arrays = {name: numpy_of(x) for name, x in stages.items()} | {
        "encoder": stages["encoder"].double().numpy()
    }
    if kind == "npz":
        np.savez(tmp_path / "port.npz", **arrays)
    else:
        (tmp_path / "port").mkdir()
        for name, array in arrays.items():
            np.save(tmp_path / "port" / f"{name}.npy", array)
    path = tmp_path / ("port.npz" if kind == "npz" else "port")
    answer = run("compare", reference(), path, "--model", CHECKPOINT, "--json").answer
    assert answer["equal"] and len(answer["stages"]) == 25


def test_a_ports_names_are_mapped(tmp_path):
    stages = {
        f"dec_{name.split('.')[2]}" if name.startswith("decoder.") else name: x
        for name, x in ported().items()
    }
    stages["l_out"] = stages.pop("logits")
    names = tmp_path / "map.json"
    names.write_text(json.dumps({"dec_{i}": "decoder.layers.{i}", "l_out": "logits"}))
    answer = compared(stages, "--names", names)
    assert answer["equal"] and len(answer["stages"]) == 25
    assert "Not compared, not in the reference: dec_0" in said(stages)


def test_what_is_not_compared_is_listed_and_missing_ids_are_assumed():
    few = {name: ported()[name] for name in ("encoder.layers.3", "logits")} | {
        "attention_mask": torch.ones(1, 131)
    }
    out = said(few)
    assert "The port's prompt ids are taken to be the reference's." in out
    assert "not in the port's file: waveform.0, mel.0, encoder.conv1 to encoder.conv3" in out
    assert "not in the reference: attention_mask" in out and "Equal" in out


def test_generated_ids_are_reported_and_decide_nothing():
    ids = load_file(reference())["generated"]
    other = ported() | {"generated": torch.cat([ids[:5], ids[5:] + 1])}
    assert compared(other)["equal"] and "of 16 ids the first 5 are the same" in said(other)


# ---- compare ----


def test_the_first_difference_is_said_with_its_chunk():
    answer = compared(ported("positions-not-restarted"), model=False)
    assert (answer["first"], answer["since"]) == ("encoder.stem", 50)
    assert "encoder.stem differs from token 50 on, the first token of the second chunk." in said(
        ported("positions-not-restarted")
    )


def test_each_row_has_its_figures():
    def spoil(x):
        x = x.clone()
        x[40, 3] += 0.5
        x[60, 7] -= 2
        return x

    answer = compared(changed("adapter", spoil))
    assert (answer["first"], answer["since"]) == ("adapter", 40)
    (row,) = [row for row in answer["stages"] if row["name"] == "adapter"]
    right = load_file(reference())["adapter"].double()
    assert row["row"] == 60 and row["max_abs"] == pytest.approx(2, abs=1e-5)
    assert row["max_rel"] == pytest.approx(2 / right.abs().max().item(), abs=1e-5)
    assert row["rms"] == pytest.approx(4.25**0.5 / right.norm().item(), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(
        spoil(right).flatten(), right.flatten(), dim=0
    ).item()
    assert row["cosine"] == pytest.approx(cosine, abs=1e-6) and row["own"] == pytest.approx(
        row["max_rel"], rel=1e-3
    )


def test_of_mel_a_row_is_a_frame():
    wrong = compared(changed("mel.0", lambda x: torch.cat([x[:, :300], x[:, 300:] + 1], dim=1)))
    assert (wrong["first"], wrong["since"]) == ("mel.0", 300)


def test_one_wrong_stage_makes_none_after_it_wrong_and_a_second_is_found_behind_it():
    answer = compared(ported("gelu-tanh-stem", "attention-scale"))
    wrong = [row["name"] for row in answer["stages"] if not row["ok"]]
    assert wrong == [
        *(f"encoder.conv{i}" for i in (1, 2, 3)),
        *(f"decoder.layers.{i}" for i in range(5)),
    ]
    plain = compared(ported("gelu-tanh-stem", "attention-scale"), model=False)
    assert len([row for row in plain["stages"] if not row["ok"]]) > 15


def test_own_errors_go_on_from_the_nearest_stages_that_the_port_has():
    stages = ported("gelu-tanh-stem", "no-qk-norm")
    few = {
        name: stages[name]
        for name in ("encoder.conv3", "encoder.layers.3", "decoder.layers.1", "logits")
    }
    wrong = [row["name"] for row in compared(few)["stages"] if not row["ok"]]
    assert wrong == ["encoder.conv3", "decoder.layers.1", "logits"]


def test_what_is_not_finite_differs_and_is_null_in_json():
    answer = compared(
        changed("encoder.layers.4", lambda x: x.index_fill(0, torch.tensor([20]), torch.nan))
    )
    (row,) = [row for row in answer["stages"] if row["name"] == "encoder.layers.4"]
    assert answer["first"] == "encoder.layers.4" and answer["since"] == 20 and not row["ok"]
    assert row["max_abs"] is row["max_rel"] is row["cosine"] is None


def test_rtol_and_the_ports_dtype_say_what_passes():
    near = changed("logits", lambda x: x + 1e-4 * x.abs().max())
    assert not compared(near)["equal"]
    for options in (["--rtol", "2e-4"], ["--port-dtype", "float16"], ["--port-dtype", "bfloat16"]):
        assert compared(near, *options)["equal"]
    assert not compared(near, "--rtol", "5e-5")["equal"]
    assert compared({name: x.half() if name == "final_norm" else x for name, x in near.items()})[
        "equal"
    ]  # by the file


def with_ids(change) -> dict:
    ids = change(ported()["input_ids"].tolist())
    return ported() | {"input_ids": torch.tensor(ids)}


PROMPTS = {
    "the time markers are missing": lambda ids: [
        i for at, i in enumerate(ids) if at not in (61, 87)
    ],
    "the time markers are others": lambda ids: [*ids[:61], 18, *ids[62:]],
    "there is no audio token, 303: the placeholder was read as text": lambda ids: [
        i for i in ids if i != 303
    ],
    "there are 64 audio tokens, expected 65": lambda ids: [*ids[:40], *ids[41:]],
    "the text is another, or was cut otherwise": lambda ids: [*ids[:3], 40, 41, *ids[3:]],
    "(nothing, expected": lambda ids: ids[:-1],
}


@pytest.mark.parametrize("means, change", PROMPTS.items(), ids=PROMPTS)
def test_another_prompt_is_the_answer_before_any_number(means, change):
    stages = with_ids(change) | {"encoder": ported()["encoder"] + 1}
    answer = compared(stages)
    ours, theirs = ported()["input_ids"].tolist(), stages["input_ids"].tolist()
    since = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(theirs))
    assert (answer["first"], answer["since"], answer["stages"]) == ("input_ids", since, [])
    assert means in said(stages) and f"The prompts differ from position {since} on" in said(stages)


def test_thirty_seconds_are_recognised():
    without_ids = {name: x for name, x in ported("mel-30s").items() if name.startswith("deepstack")}
    assert "[375, 64], expected [65, 64] (audio tokens, decoder width); 375 tokens" in said(
        without_ids
    )
    assert "there are 375 audio tokens, expected 65" in said(ported("mel-30s"))
    assert "375 are 30 s: the sound was padded" in said(ported("mel-30s"))


# ---- diagnose ----

MISTAKES = [*port.MISTAKES, OTHER_EPSILON]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake, subset):
    answer = diagnosed(ported(mistake), subset=subset)
    assert (
        answer["mistakes"] == [mistake.partition("=")[0]]
        and answer["ties"] == []
        and not answer["equal"]
    )
    assert answer["after"] < 3e-6 < (answer["before"] or 1)


PORTS = sorted(path.stem for path in (GOLDEN / "ports").iterdir() if path.stem != "waveform")


@pytest.mark.parametrize("mistake", PORTS)
def test_a_mistake_that_upstream_made_is_found(mistake):
    path = FOLDER / "ports.safetensors"
    if not path.exists():
        dumped(path, [sound()], "--model", CHECKPOINT)
    got = run(
        "diagnose",
        path,
        GOLDEN / "ports" / f"{mistake}.safetensors",
        "--model",
        CHECKPOINT,
        "--json",
    )
    assert got.answer["mistakes"] == [mistake]


PAIRS = [
    ("mel-htk", "no-qk-norm"),
    ("full-clip-attention", "rope-interleaved"),
    ("query-scaled-before-bias", "deepstack-one-layer-late"),
    ("no-time-markers", "gelu-tanh-layers"),
    ("mel-30s", "no-time-markers"),
    ("no-qk-norm", "rope-interleaved"),
]


CHOSEN = [(pair, "all") for pair in PAIRS] + [(pair, "logits") for pair in PAIRS[:3]]


@pytest.mark.parametrize(
    "pair, subset", CHOSEN, ids=["+".join((*pair, subset)) for pair, subset in CHOSEN]
)
def test_two_mistakes_at_once_are_found(pair, subset):
    answer = diagnosed(ported(*pair), subset=subset)
    assert (
        sorted(answer["mistakes"]) == sorted(pair)
        and answer["ties"] == []
        and answer["after"] < 3e-6
    )


def test_what_cannot_be_told_apart_is_a_tie_and_no_mistake():
    stages = {"decoder.layers.0": ported("no-deepstack")["decoder.layers.0"]}  # without rows, here
    answer = diagnosed(stages)
    assert answer["mistakes"] == [] and answer["ties"] == [
        ["no-deepstack", "deepstack-one-layer-late"]
    ]
    out = run("diagnose", reference(), saved(stages), "--model", CHECKPOINT).out
    assert "no-deepstack or deepstack-one-layer-late explains it" in out
    assert "can't tell these apart; decoder.layers.1 to decoder.layers.3 could" in out


def test_what_no_known_mistake_explains_is_said_with_where_to_look():
    stages = changed("decoder.layers.2", lambda x: x * 1.01)
    answer = diagnosed(stages)
    assert (
        answer["mistakes"] == answer["ties"] == [] and answer["before"] == answer["after"] > 0.005
    )
    out = run("diagnose", reference(), saved(stages), "--model", CHECKPOINT).out
    assert (
        "None of the 31 known mistakes explains it" in out
        and "DecoderLayer and inject in qwen3.py" in out
    )
    out = run("diagnose", reference(), saved(stages, "logits"), "--model", CHECKPOINT).out
    assert "Equal" in out
    few = {name: stages[name] for name in ("decoder.layers.0", "decoder.layers.2")}
    out = run("diagnose", reference(), saved(few), "--model", CHECKPOINT).out
    assert "let the port write decoder.layers.1, input_ids, deepstack.2 as well" in out


def test_a_known_mistake_is_found_beside_one_that_is_not_known():
    stages = ported("rope-theta-10000")
    answer = diagnosed(stages | {"encoder.layers.3": stages["encoder.layers.3"] * 1.01})
    assert answer["mistakes"] == ["rope-theta-10000"] and answer["after"] > 0.005


def test_the_answer_names_the_mistake_how_well_it_explains_and_what_is_right():
    got = run("diagnose", reference(), saved(ported("full-clip-attention")), "--model", CHECKPOINT)
    assert got.status == 1
    assert (
        "full-clip-attention explains it: the largest difference falls from another shape to "
        in got.out
    )
    assert (
        "Right: over chunks of 4 s" in " ".join(got.out.split())
        and "encoder.py, split_chunks" in got.out
    )


def test_what_a_mistake_does_not_change_is_not_computed_again(monkeypatch):
    calls = []
    forward = encoder.EncoderLayer.forward
    monkeypatch.setattr(
        encoder.EncoderLayer, "forward", lambda *args: calls.append(1) or forward(*args)
    )
    assert diagnosed(ported("rope-interleaved"))["mistakes"] == ["rope-interleaved"]
    assert len(calls) == 6  # one for each layer's own error, and none for any of the mistakes tried


def test_every_mistake_is_taken_away_again():
    model = golden_model()
    of = mistakes.Run(model, TEXT, None, 1)
    before = dict(mistakes.compute(of, {"waveform.0": sound()[:SAMPLES]}))
    for mistake in mistakes.MISTAKES:
        with mistake.make(of):
            pass
    after = dict(mistakes.compute(of, {"waveform.0": sound()[:SAMPLES]}))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [mistake.id for mistake in mistakes.MISTAKES if mistake.id not in port.MISTAKES] == []


SMALL = {"gelu-tanh-stem", "gelu-tanh-layers", "layer-norm-eps", OTHER_EPSILON}
DROWNS = {  # the mistakes that are smaller than a type's rounding, with all stages
    torch.float16: SMALL,
    torch.bfloat16: SMALL | {"mel-float32", "rope-bfloat16-angles"},
}


@pytest.mark.parametrize("dtype", DROWNS, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows_in_sixteen_bits_if_it_is_larger_than_their_rounding(mistake, dtype):
    assert compared(ported(mistake, dtype=dtype))["equal"] == (mistake in DROWNS[dtype])


@pytest.mark.parametrize(
    "mistake", ["taps-reversed", "no-qk-norm", "mel-zero-padded", "no-time-markers"]
)
def test_a_mistake_is_found_in_bfloat16(mistake):
    assert diagnosed(ported(mistake, dtype=torch.bfloat16))["mistakes"] == [mistake]


# ---- what can't be used ----


def damaged(path: Path) -> Path:
    path.write_bytes(saved(ported()).read_bytes()[:5000])
    return path


def refusals(tmp_path) -> dict:
    """What is wrong, in words of the answer -> the command line."""
    right, other = saved(ported()), tmp_path / "other.safetensors"
    (tmp_path / "map.json").write_text('{"adapter": 3}')
    (tmp_path / "both.json").write_text('{"encoder": "adapter"}')
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "text.bin").write_text("?")
    np.savez(tmp_path / "objects.npz", adapter=np.array([{}]))
    np.savez(tmp_path / "complex.npz", adapter=np.ones(3, complex))
    save_file(
        {"input_ids": torch.ones(131), "logits": torch.ones(1, 320)},
        tmp_path / "float_ids.safetensors",
    )
    save_file({"weight": torch.ones(1)}, other)
    save_file({"deepstack.7": torch.ones(1)}, tmp_path / "none.safetensors")
    compare, dump = (
        ["compare", reference()],
        ["dump", "-o", other, "--model", CHECKPOINT, "--prompt", "Hi"],
    )
    return {
        "is not what `parity.py dump` writes": ["compare", right, reference()],
        "can't be read: Error while deserializing": [
            *compare,
            damaged(tmp_path / "damaged.safetensors"),
        ],
        "No such file": [*compare, tmp_path / "missing.safetensors"],
        "expected a .safetensors, an .npz or a folder of .npy": [*compare, tmp_path / "text.bin"],
        "text.npz can't be read": [*compare, tmp_path / "text.npz"],
        "objects.npz can't be read": [*compare, tmp_path / "objects.npz"],
        "adapter is torch.complex128": [*compare, tmp_path / "complex.npz"],
        "input_ids is torch.float32 [131]; expected integers": [
            *compare,
            tmp_path / "float_ids.safetensors",
        ],
        "none of its 1 tensors (weight) has the name of a stage": [*compare, other],
        "no stage is in both files": [*compare, tmp_path / "none.safetensors"],
        'expected an object, {"port\'s name"': [*compare, right, "--names", tmp_path / "map.json"],
        "nothing.json can't be read": [*compare, right, "--names", tmp_path / "nothing.json"],
        "two of its tensors are adapter": [*compare, right, "--names", tmp_path / "both.json"],
        "its config.json is another": [
            *compare,
            right,
            "--model",
            GOLDEN / "variant" / "checkpoint",
        ],
        "--rtol: expected a number above 0": [*compare, right, "--rtol", "0"],
        "--port-dtype is 'int8'": [*compare, right, "--port-dtype", "int8"],
        "the following arguments are required: --model": ["diagnose", reference(), right],
        "dtype is 'half'": [*dump, "--dtype", "half"],
        "--stages: decoder.layer.* is none": [*dump, "--stages", "decoder.layer.*"],
        "max_new_tokens is 0": [*dump, "--max-new-tokens", "0"],
        "invalid choice: 'compere'": ["compere", reference(), right],
    }


def test_what_cannot_be_used_is_one_clear_line_and_status_2(tmp_path):
    for words, argv in refusals(tmp_path).items():
        got = run(*argv)
        assert got.status == 2 and got.out == "", words
        assert (
            words in got.err and got.err.startswith("parity.py: ") and got.err.count("\n") == 1
        ), got.err


def test_a_dump_of_another_version_or_without_its_metadata_is_refused(tmp_path):
    path = tmp_path / "old.safetensors"
    for version, words in (
        ("0", "is of version 0; expected 1"),
        ("1", "its metadata is damaged (KeyError('axes'))"),
    ):
        save_file(
            {"logits": torch.ones(1)}, path, {"format": "moss-min parity", "version": version}
        )
        got = run("compare", path, saved(ported()))
        assert got.status == 2 and words in got.err


def test_mel_is_held_to_float32_in_every_type_but_for_a_rounding_that_comes_later():
    stages = ported(dtype=torch.bfloat16)
    assert compared(stages | {"mel.0": ported("mel-float32")["mel.0"]})["equal"]
    assert compared(stages | {"mel.0": ported("mel-symmetric-window")["mel.0"]})["first"] == "mel.0"
    half = ported(dtype=torch.float16)
    assert compared(half | {"mel.0": ported("mel-float32")["mel.0"]})["first"] == "mel.0"


# ---- the checkpoint that ships ----


@pytest.mark.parametrize(
    "wrong", [None, "full-clip-attention", "taps-reversed", "no-time-markers", "rope-theta-10000"]
)
def test_on_the_shipped_checkpoint_a_mistake_is_found_too(wrong):
    made = FOLDER / "tiny.safetensors"
    assert run("dump", HERE.parent / "tiny" / "cards.wav", "-o", made).status == 0
    stages, config = load_file(made), golden_model("../../tiny").config.adapter
    ids = stages["input_ids"].tolist()
    around = ids[: ids.index(config.audio_start_id)], ids[ids.index(config.audio_end_id) + 1 :]
    theirs = port.run(HERE.parent / "tiny", stages["waveform.0"], *around, [wrong] if wrong else [])
    got = run("diagnose", made, saved(theirs), "--model", HERE.parent / "tiny", "--json")
    assert (got.err, got.answer["equal"], got.answer["mistakes"]) == (
        "",
        wrong is None,
        [wrong] if wrong else [],
    )
