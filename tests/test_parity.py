"""tools/parity.py: what dump writes, and that compare and diagnose find what port.py does wrong."""

import contextlib
import functools
import io
import json
import os
import re
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import soundfile
import torch
from safetensors.torch import load_file, save_file

import encoder
import mistakes
import parity
import port
import stages as stages_of_the_model
from conftest import GOLDEN, HERE, golden_case, golden_model
from encoder import log_mel
from moss_min import MossAudio

CHECKPOINT = GOLDEN / "checkpoint"
VARIANT = GOLDEN / "variant" / "checkpoint"
TINY = HERE.parent / "tiny"
TEXT = "Describe this audio."
# 518 frames: a full chunk and a tail of 118, which is no multiple of 8, so that its padding shows.
SAMPLES = 83_000
WORKSHOP = tempfile.TemporaryDirectory()  # for what is made once
FOLDER = Path(WORKSHOP.name)
load = functools.cache(MossAudio.from_pretrained)


@pytest.fixture(autouse=True)
def one_model_for_all_tests(monkeypatch):
    monkeypatch.setattr(parity.MossAudio, "from_pretrained", load)


def run(*argv) -> SimpleNamespace:
    """The command line: status, stdout and stderr; answer is what --json printed."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = parity.main([str(arg) for arg in argv])
    answer = None
    if "--json" in argv and status < 2:
        answer = json.loads(out.getvalue(), parse_constant=pytest.fail)
        assert status == (not answer["equal"])
        assert err.getvalue() == ""
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), answer=answer)


def dumped(path: Path, waves, *options) -> Path:
    """A reference for sounds at 16 kHz, by the command line."""
    files = [path.with_suffix(f".{i}.wav") for i in range(len(waves))]
    for file, wave in zip(files, waves):
        soundfile.write(file, wave.numpy(), 16_000, subtype="FLOAT")
    made = run("dump", *files, "-o", path, *options)
    assert made.status == 0, made.err
    return path


@functools.cache
def sound() -> torch.Tensor:
    return load_file(GOLDEN / "ports" / "waveform.safetensors")["waveform.0"]


@functools.cache
def reference(dtype: str = "float32", checkpoint: Path = CHECKPOINT) -> Path:
    path = FOLDER / f"reference.{checkpoint.parent.name}.{dtype}.safetensors"
    return dumped(path, [sound()[:SAMPLES]], "--model", checkpoint, "--dtype", dtype)


@functools.cache
def ported(*wrong: str, dtype=torch.float32, checkpoint: Path = CHECKPOINT) -> dict:
    """The porter's stages of the reference's run."""
    ids = load_file(reference(checkpoint=checkpoint))["input_ids"].tolist()
    config = load(checkpoint, "auto", "float32").config.adapter
    before = ids[: ids.index(config.audio_start_id)]
    after = ids[ids.index(config.audio_end_id) + 1 :]
    return port.run(checkpoint, sound()[:SAMPLES], before, after, wrong, dtype)


def part_of(stages: dict, subset: str) -> dict:
    if subset == "logits":
        return {"logits": stages["logits"]}
    if subset == "decoder":
        names = [name for name in stages if name.startswith("decoder.")]
        return {name: stages[name] for name in [*names, "final_norm", "logits"]}
    return stages


def saved(stages: dict, name: str = "port") -> Path:
    path = FOLDER / f"{name}.safetensors"
    save_file({key: x.contiguous() for key, x in stages.items()}, path)
    return path


def compared(stages: dict, *options, model: bool = True) -> dict:
    if model:
        options = ("--model", CHECKPOINT, *options)
    return run("compare", reference(), saved(stages), *options, "--json").answer


def said(stages: dict, *options) -> str:
    """What compare prints without a model."""
    return run("compare", reference(), saved(stages), *options).out


def diagnosed(stages: dict, checkpoint: Path = CHECKPOINT) -> dict:
    path = reference(checkpoint=checkpoint)
    return run("diagnose", path, saved(stages), "--model", checkpoint, "--json").answer


def explained(stages: dict) -> str:
    """What diagnose prints, with its lines joined."""
    got = run("diagnose", reference(), saved(stages), "--model", CHECKPOINT)
    return " ".join(got.out.split())


def changed(name: str, change) -> dict:
    """The right port's stages, but for one, which is `change` of itself."""
    return ported() | {name: change(ported()[name])}


def row_of(answer: dict, name: str) -> dict:
    (row,) = [row for row in answer["stages"] if row["name"] == name]
    return row


def wrong_in(answer: dict) -> list[str]:
    return [row["name"] for row in answer["stages"] if not row["ok"]]


# ---- the stages ----

WALKED = ["short", "three_chunks", "two_audios", "text_only", "no_markers", "variant"]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WALKED)
def test_the_stages_logits_are_the_models_to_the_bit(name, dtype):
    case = golden_case(name)
    model = golden_model(case.checkpoint, dtype)
    of = stages_of_the_model.Run(model, case.text, case.time_markers, len(case.clips))
    waves = {f"waveform.{i}": wave for i, wave in enumerate(case.clips)}
    stages = dict(stages_of_the_model.compute(of, waves))
    prompt = model.prompt(case.text, case.clips, case.time_markers)
    with torch.no_grad():
        assert torch.equal(stages["logits"], model(prompt))


@pytest.mark.parametrize("samples", [160, 1_000, 83_000])
def test_the_log_mel_whose_parts_can_be_replaced_is_the_encoders(samples):
    wave = sound()[:samples]
    ours = stages_of_the_model.log_mel(wave)
    assert torch.equal(ours, encoder.log_mel(wave).float())


# ---- dump ----


def test_a_dump_has_every_stage_in_order_with_its_axes():
    data = reference().read_bytes()
    (length,) = struct.unpack("<Q", data[:8])  # as a port in C++ reads it
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    axes = json.loads(metadata["axes"])
    assert list(header) == list(axes) == [*ported(), "generated"]
    # The documents' readers in C++ and Rust look for this.
    assert b'"encoder.stem": {"dtype": "F32", "shape": [65, 48], "data_offsets": [' in data
    assert axes["encoder.conv1"] == "chunks, channels, mel bands, frames"
    shapes = {name: entry["shape"] for name, entry in header.items()}
    assert shapes["encoder.conv1"] == [2, 8, 64, 200]
    assert shapes["logits"] == [131, 320]
    assert shapes["generated"] == [16]
    others = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] != "F32"}
    assert others == {"input_ids": "I32", "generated": "I32"}
    begin, end = (8 + length + offset for offset in header["input_ids"]["data_offsets"])
    assert struct.unpack("<131i", data[begin:end]) == tuple(ported()["input_ids"].tolist())
    assert (metadata["prompt"], metadata["dtype"], metadata["version"]) == (TEXT, "float32", "1")
    assert json.loads(metadata["chunk_tokens"]) == [50, 15]
    assert json.loads(metadata["sounds"]) == [parity.digest(sound()[:SAMPLES].numpy().tobytes())]


def test_a_bfloat16_runs_stages_are_stored_in_float32():
    stages = load_file(reference("bfloat16"))
    for name in ("encoder.layers.5", "decoder.layers.4", "logits"):
        assert stages[name].dtype == torch.float32
        assert torch.equal(stages[name], stages[name].bfloat16().float())


def test_numpy_opens_a_dump():
    stages = safetensors.numpy.load_file(reference())
    assert stages["mel.0"].dtype == np.float32
    assert torch.equal(torch.from_numpy(stages["mel.0"]), log_mel(sound()[:SAMPLES]).float())


@pytest.mark.parametrize("samples, said", [(48_000, "longer than 4 s"), (89_600, "not padded")])
def test_a_clip_in_which_mistakes_change_nothing_is_warned_of(tmp_path, samples, said):
    soundfile.write(tmp_path / "clip.wav", np.resize(sound().numpy(), samples), 16_000)
    made = run("dump", tmp_path / "clip.wav", "-o", tmp_path / "out.safetensors")
    assert made.status == 0
    assert said in made.err


def test_no_warning_without_a_sound_of_ones_own(tmp_path):
    made = run("dump", "-o", tmp_path / "out.safetensors", "--stages", "mel.*")
    assert (made.status, made.err) == (0, "")


@pytest.mark.parametrize("kept", [["waveform.0"], ["mel.0"], ["mel.0", "waveform.0", "logits"]])
def test_the_stages_of_another_sound_are_called_so(kept):
    wave = torch.randn(70_000, generator=torch.Generator().manual_seed(0)) / 10
    other = {"waveform.0": wave, "mel.0": log_mel(wave), "logits": ported()["logits"]}
    assert "is another sound's" in said({name: other[name] for name in kept})


def test_generated_ids_are_upstreams(tmp_path):
    case = golden_case("short")
    options = ["--model", CHECKPOINT, "--max-new-tokens", 24]
    path = dumped(tmp_path / "r.safetensors", case.clips, *options)
    assert load_file(path)["generated"].tolist() == case.tensors["generated"].tolist()


def test_chosen_stages_come_with_the_sound_and_the_prompts_ids(tmp_path):
    options = ["--model", CHECKPOINT, "--stages", "encoder.layers.[01],logits"]
    path = dumped(tmp_path / "r.safetensors", [sound()[:SAMPLES]], *options)
    stages = load_file(path)
    names = ["waveform.0", "encoder.layers.0", "encoder.layers.1", "logits"]
    assert stages.keys() == {*names, "input_ids"}
    assert torch.equal(stages["logits"], load_file(reference())["logits"])
    right = run("compare", path, saved(ported()), "--json").answer
    assert [row["name"] for row in right["stages"]] == names
    # A model makes up for what the reference lacks.
    other = saved(changed("encoder", lambda x: x + 0.1))
    answer = run("compare", path, other, "--model", CHECKPOINT, "--json").answer
    assert answer["first"] == "encoder"


def test_stages_go_to_the_file_one_by_one_and_it_appears_at_the_end(tmp_path):
    path = tmp_path / "r.safetensors"
    part = tmp_path / "r.safetensors.part"
    sizes = []

    def stages():
        for name in ("waveform.0", "adapter"):
            yield name, torch.zeros(1000, 1000)
            sizes.append(part.stat().st_size)
            assert not path.exists()

    parity.write(path, {}, stages(), 2)
    assert sizes[0] > 4_000_000
    assert sizes[1] - sizes[0] >= 4_000_000
    assert not part.exists()
    assert load_file(path)["adapter"].shape == (1000, 1000)


def test_a_dump_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "r.safetensors"
    path.write_text("before")

    def stages():
        yield "logits", torch.zeros(2, 2)
        raise OSError("no space left")

    with pytest.raises(OSError):
        parity.write(path, {}, stages(), 2)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


# ---- what is right ----

CASES = [*WALKED, "one_chunk", "scripts", pytest.param("long", marks=pytest.mark.slow)]


@functools.cache
def golden_reference(name: str) -> Path:
    case = golden_case(name)
    options = ["--model", GOLDEN / case.checkpoint, "--prompt", case.text]
    if case.time_markers is False:
        options.append("--no-time-markers")
    return dumped(FOLDER / f"{name}.safetensors", case.clips, *options)


@pytest.mark.parametrize("name", [*CASES, "short.bfloat16", "three_chunks.bfloat16"])
def test_upstream_is_equal(name):
    case = golden_case(name)
    path = golden_reference(name.removesuffix(".bfloat16"))
    upstream = saved(case.tensors, name="upstream")
    for model in ([], ["--model", GOLDEN / case.checkpoint]):
        answer = run("compare", path, upstream, *model, "--json").answer
        assert answer["equal"] and answer["first"] is None and answer["since"] is None
        assert wrong_in(answer) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of", ["float32", "bfloat16", "float16"])
def test_the_right_port_is_equal_in_every_type_to_a_reference_in_every_type(of, dtype):
    theirs = saved(ported(dtype=dtype))
    for model in ([], ["--model", CHECKPOINT]):
        assert run("compare", reference(of), theirs, *model, "--json").answer["equal"]
    answer = run("diagnose", reference(of), theirs, "--model", CHECKPOINT, "--json").answer
    assert answer["mistakes"] == answer["ties"] == []


def test_mel_in_single_precision_is_no_mistake_and_told_from_an_epsilon_of_1e_6():
    single = ported("mel-single-precision")
    epsilon = ported("layer-norm-eps")
    logits = ported()["logits"]
    effect = (single["logits"] - logits).abs().max() / (epsilon["logits"] - logits).abs().max()
    assert 0.2 < effect < 5  # of one size
    assert compared(single)["equal"]
    assert diagnosed(single)["mistakes"] == []
    assert diagnosed(epsilon)["mistakes"] == ["layer-norm-eps"]
    # Too little to tell: nothing, not the wrong thing.
    assert diagnosed(part_of(single, "logits"))["mistakes"] == []
    off = int((single["mel.0"] != ported()["mel.0"]).sum())
    assert f" {off} values a bfloat16 step off" in said(single)
    assert "--model tells the two apart" in said(single)


# ---- how a port's file is read ----


def chunks_of(x: torch.Tensor) -> torch.Tensor:
    """A full chunk and a tail with what is not to be looked at behind it: [2, 52, width]."""
    parts = []
    for part in x.split([50, 15]):
        parts.append(torch.cat([part, torch.full((52 - len(part), x.shape[1]), 7.0)]))
    return torch.stack(parts)


LAYOUTS = {
    "read transposed.": ("adapter", lambda x: x.T),
    "read without its leading axis.": ("decoder.layers.3", lambda x: x[None]),
    "without its leading axis, read transposed": ("mel.0", lambda x: x.T[None]),
    "[chunks, tokens, width], without the padding": ("encoder.layers.2", chunks_of),
    "transposed, read as [chunks, tokens, width]": ("encoder.stem", lambda x: chunks_of(x).mT),
    "encoder.conv2: read transposed": ("encoder.conv2", lambda x: x.permute(0, 2, 3, 1)),
    "of the last position alone": ("logits", lambda x: x[-1:]),
    "without its leading axis, of the last position": ("logits", lambda x: x[None, -1:]),
}


@pytest.mark.parametrize("words", LAYOUTS)
def test_another_layout_is_recognised_used_and_said(words):
    name, layout = LAYOUTS[words]
    stages = changed(name, layout)
    assert compared(stages)["equal"]
    assert compared(stages, model=False)["equal"]
    assert words in said(stages)
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
    assert compared(stages)["equal"]
    assert compared(stages, model=False)["equal"]
    assert diagnosed(stages)["equal"]
    assert "decoder.layers.0 to decoder.layers.2: recorded before the injection" in said(stages)
    assert diagnosed(ported("layers-before-injection", "no-qk-norm"))["mistakes"] == ["no-qk-norm"]
    assert compared(ported("no-deepstack"))["first"] == "decoder.layers.0"


CUTS = [lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x[:, None], lambda x: x.flatten()]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model", [False, True])
def test_another_shape_is_a_difference_and_never_cut_to_fit(cut, model):
    answer = compared(changed("adapter", cut), model=model)
    assert (answer["first"], answer["since"]) == ("adapter", None)
    row = row_of(answer, "adapter")
    assert not row["ok"]
    assert row["max_rel"] is None
    assert "adapter has another shape" in said(changed("adapter", cut))


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_numpys_files_are_read_too(kind, tmp_path):
    arrays = {}
    for name, x in ported().items():
        # As numpy stores bfloat16 where a library has taught it the type: two bytes each.
        bytes_alone = x.dtype == torch.bfloat16
        arrays[name] = x.view(torch.int16).numpy().view("V2") if bytes_alone else x.numpy()
    arrays["adapter"] = arrays["adapter"].astype(np.float16)
    arrays["encoder"] = arrays["encoder"].astype(">f8")
    arrays["input_ids"] = arrays["input_ids"].astype(np.uint32)
    path = tmp_path / "port.npz"
    np.savez(path, **arrays)
    if kind == "npy":
        path = tmp_path / "port"
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    answer = run("compare", reference(), path, "--model", CHECKPOINT, "--json").answer
    assert answer["equal"]
    assert len(answer["stages"]) == 25


def test_a_ports_names_are_mapped(tmp_path):
    stages = {}
    for name, x in ported().items():
        stages[name.replace("decoder.layers.", "dec_").replace("logits", "l_out")] = x
    names = tmp_path / "map.json"
    names.write_text(json.dumps({"dec_{i}": "decoder.layers.{i}", "l_out": "logits"}))
    answer = compared(stages, "--names", names)
    assert answer["equal"]
    assert len(answer["stages"]) == 25
    assert "Not compared, not in the reference: dec_0" in said(stages)


def test_what_is_not_compared_is_listed_and_missing_ids_are_assumed():
    few = {name: ported()[name] for name in ("encoder.layers.3", "logits")}
    few["attention_mask"] = torch.ones(1, 131)
    out = said(few)
    assert "The port's prompt ids are taken to be the reference's." in out
    assert "not in the port's file: waveform.0, mel.0, encoder.conv1 to encoder.conv3" in out
    assert "not in the reference: attention_mask" in out
    assert "Equal" in out


def test_generated_ids_are_reported_and_decide_nothing():
    ids = load_file(reference())["generated"]
    other = ported() | {"generated": torch.cat([ids[:5], ids[5:] + 1])}
    assert compared(other)["equal"]
    assert "of 16 ids the first 5 are the same" in said(other)


# ---- compare ----


def test_the_first_difference_is_said_with_its_chunk():
    stages = ported("positions-not-restarted")
    answer = compared(stages, model=False)
    assert (answer["first"], answer["since"]) == ("encoder.stem", 50)
    sentence = "encoder.stem differs from token 50 on, the first token of the second chunk."
    assert sentence in said(stages)


def test_each_row_has_its_figures():
    def spoil(x):
        x = x.clone()
        x[40, 3] += 0.5
        x[60, 7] -= 2
        return x

    answer = compared(changed("adapter", spoil))
    assert (answer["first"], answer["since"]) == ("adapter", 40)
    row = row_of(answer, "adapter")
    right = load_file(reference())["adapter"].double()
    cosine = torch.nn.functional.cosine_similarity(spoil(right).ravel(), right.ravel(), dim=0)
    assert row["row"] == 60
    assert row["max_abs"] == pytest.approx(2, abs=1e-5)
    assert row["max_rel"] == pytest.approx(2 / right.abs().max().item(), abs=1e-5)
    assert row["rms"] == pytest.approx(4.25**0.5 / right.norm().item(), rel=1e-4)
    assert row["cosine"] == pytest.approx(cosine.item(), abs=1e-6)
    assert row["own"] == pytest.approx(row["max_rel"], rel=1e-3)


def test_of_mel_a_row_is_a_frame():
    wrong = compared(changed("mel.0", lambda x: torch.cat([x[:, :300], x[:, 300:] + 1], dim=1)))
    assert (wrong["first"], wrong["since"]) == ("mel.0", 300)


def test_one_wrong_stage_makes_none_after_it_wrong_and_a_second_is_found_behind_it():
    stages = ported("gelu-tanh-stem", "attention-scale")
    layers = [f"decoder.layers.{i}" for i in range(5)]
    assert wrong_in(compared(stages)) == [
        "encoder.conv1",
        "encoder.conv2",
        "encoder.conv3",
        *layers,
    ]
    assert len(wrong_in(compared(stages, model=False))) > 15


def test_own_errors_go_on_from_the_nearest_stages_that_the_port_has():
    stages = ported("gelu-tanh-stem", "no-qk-norm")
    names = ["encoder.conv3", "encoder.layers.3", "decoder.layers.1", "logits"]
    few = {name: stages[name] for name in names}
    assert wrong_in(compared(few)) == ["encoder.conv3", "decoder.layers.1", "logits"]


def test_what_is_not_finite_differs_and_is_null_in_json():
    name = "encoder.layers.4"
    answer = compared(changed(name, lambda x: x.index_fill(0, torch.tensor([20]), torch.nan)))
    assert (answer["first"], answer["since"]) == (name, 20)
    row = row_of(answer, name)
    assert row["max_abs"] is row["max_rel"] is row["cosine"] is None


def test_rtol_and_the_ports_dtype_say_what_passes():
    near = changed("logits", lambda x: x + 1e-4 * x.abs().max())
    assert not compared(near)["equal"]
    for options in (["--rtol", "2e-4"], ["--port-dtype", "float16"], ["--port-dtype", "bfloat16"]):
        assert compared(near, *options)["equal"]
    assert not compared(near, "--rtol", "5e-5")["equal"]
    # The file's own type counts, too.
    assert compared(near | {"final_norm": near["final_norm"].half()})["equal"]


PROMPTS = {
    "the time markers are missing": lambda ids: ids[:61] + ids[62:87] + ids[88:],
    "the time markers are others": lambda ids: [*ids[:61], 18, *ids[62:]],
    "there is no audio token, 303": lambda ids: [i for i in ids if i != 303],
    "there are 64 audio tokens, expected 65": lambda ids: [*ids[:40], *ids[41:]],
    "the text is another": lambda ids: [*ids[:3], 40, 41, *ids[3:]],
    "(nothing, expected": lambda ids: ids[:-1],
}


@pytest.mark.parametrize("means", PROMPTS)
def test_another_prompt_is_the_answer_before_any_number(means):
    ours = ported()["input_ids"].tolist()
    theirs = PROMPTS[means](ours)
    stages = changed("encoder", lambda x: x + 1) | {"input_ids": torch.tensor(theirs)}
    since = len(os.path.commonprefix([ours, theirs]))
    answer = compared(stages)
    assert (answer["first"], answer["since"], answer["stages"]) == ("input_ids", since, [])
    assert means in said(stages)
    assert f"The prompts differ from position {since} on" in said(stages)


def test_thirty_seconds_are_recognised():
    stages = ported("mel-30s")
    merged = {name: x for name, x in stages.items() if name.startswith("deepstack")}
    shapes = "[375, 64], expected [65, 64] (audio tokens, decoder width); 375 tokens"
    assert shapes in said(merged)
    assert "there are 375 audio tokens, expected 65" in said(stages)
    assert "375 are 30 s: the sound was padded" in said(stages)


# ---- diagnose ----

MISTAKES = [*port.MISTAKES, "layer-norm-eps=1e-3"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake):
    answer = diagnosed(ported(mistake))
    assert answer["mistakes"] == [mistake.partition("=")[0]]
    assert answer["ties"] == []
    assert answer["after"] < 3e-6 < (answer["before"] or 1)


@pytest.mark.parametrize("mistake", ["layer-norm-eps", "rope-theta-10000"])
def test_a_mistake_is_found_in_logits_alone(mistake):
    answer = diagnosed(part_of(ported(mistake), "logits"))
    assert (answer["mistakes"], answer["ties"]) == ([mistake], [])


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("subset", ["decoder", "logits"])
def test_every_mistake_is_found_in_a_part_of_the_stages(subset, mistake):
    answer = diagnosed(part_of(ported(mistake), subset))
    assert (answer["mistakes"], answer["ties"]) == ([mistake.partition("=")[0]], [])


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_on_the_variant(mistake):
    answer = diagnosed(ported(mistake, checkpoint=VARIANT), VARIANT)
    assert answer["mistakes"] == [mistake.partition("=")[0]]


ON_TINY = ["full-clip-attention", "taps-reversed", "no-time-markers", "rope-theta-10000"]


@pytest.mark.parametrize("mistake", ON_TINY)
def test_a_mistake_is_found_on_the_shipped_checkpoint(mistake):
    assert diagnosed(ported(checkpoint=TINY), TINY)["equal"]
    assert diagnosed(ported(mistake, checkpoint=TINY), TINY)["mistakes"] == [mistake]


PORTS = sorted(path.stem for path in (GOLDEN / "ports").iterdir() if path.stem != "waveform")


@functools.cache
def reference_of_ports() -> Path:
    return dumped(FOLDER / "ports.safetensors", [sound()], "--model", CHECKPOINT)


@pytest.mark.parametrize("mistake", PORTS)
def test_a_mistake_that_upstream_made_is_found(mistake):
    theirs = GOLDEN / "ports" / f"{mistake}.safetensors"
    got = run("diagnose", reference_of_ports(), theirs, "--model", CHECKPOINT, "--json")
    assert got.answer["mistakes"] == [mistake]


slowly = pytest.mark.slow
PAIRS = [
    ("mel-htk", "no-qk-norm", "all"),
    ("no-time-markers", "gelu-tanh-layers", "all"),
    ("no-qk-norm", "rope-interleaved", "all"),
    pytest.param("full-clip-attention", "rope-interleaved", "all", marks=slowly),
    pytest.param("query-scaled-before-bias", "deepstack-one-layer-late", "all", marks=slowly),
    pytest.param("mel-30s", "no-time-markers", "all", marks=slowly),
    pytest.param("mel-htk", "no-qk-norm", "logits", marks=slowly),
    pytest.param("full-clip-attention", "rope-interleaved", "logits", marks=slowly),
]


@pytest.mark.slow
@pytest.mark.parametrize("first, second, subset", PAIRS)
def test_two_mistakes_at_once_are_found(first, second, subset):
    answer = diagnosed(part_of(ported(first, second), subset))
    assert sorted(answer["mistakes"]) == sorted([first, second])
    assert answer["ties"] == []
    assert answer["after"] < 3e-6


def test_what_cannot_be_told_apart_is_a_tie_and_no_mistake():
    # Layer 0 has no rows with either.
    stages = {"decoder.layers.0": ported("no-deepstack")["decoder.layers.0"]}
    answer = diagnosed(stages)
    assert answer["mistakes"] == []
    assert answer["ties"] == [["no-deepstack", "deepstack-one-layer-late"]]
    out = explained(stages)
    assert "no-deepstack or deepstack-one-layer-late explains it" in out
    assert "can't tell these apart; decoder.layers.1 to decoder.layers.3 could" in out


def test_what_no_known_mistake_explains_is_said_with_where_to_look():
    stages = changed("decoder.layers.2", lambda x: x * 1.01)
    answer = diagnosed(stages)
    assert answer["mistakes"] == answer["ties"] == []
    assert answer["before"] == answer["after"] > 0.005
    out = explained(stages)
    assert "None of the 31 known mistakes explains it" in out
    assert "DecoderLayer and Qwen3.forward in qwen3.py" in out
    assert "Equal" in explained(part_of(stages, "logits"))
    few = {name: stages[name] for name in ("decoder.layers.0", "decoder.layers.2")}
    lacking = "decoder.layers.1, input_ids, deepstack.2"
    assert f"let the port write what decoder.layers.2 is computed from: {lacking}" in explained(few)


def test_a_known_mistake_is_found_beside_one_that_is_not_known():
    stages = dict(ported("rope-theta-10000"))
    stages["encoder.layers.3"] = stages["encoder.layers.3"] * 1.01
    answer = diagnosed(stages)
    assert answer["mistakes"] == ["rope-theta-10000"]
    assert answer["after"] > 0.005


def test_the_answer_names_the_mistake_how_well_it_explains_and_what_is_right():
    out = explained(ported("full-clip-attention"))
    falls = "the largest difference falls from another shape to "
    assert f"full-clip-attention explains it: {falls}" in out
    assert "Right: over chunks of 4 s" in out
    assert "encoder.py, split_chunks" in out


def test_what_a_mistake_does_not_change_is_not_computed_again(monkeypatch):
    calls = []
    forward = encoder.EncoderLayer.forward

    def counted(*args):
        calls.append(1)
        return forward(*args)

    monkeypatch.setattr(encoder.EncoderLayer, "forward", counted)
    assert diagnosed(ported("rope-interleaved"))["mistakes"] == ["rope-interleaved"]
    # One for each layer's own error, and none for any of the mistakes tried.
    assert len(calls) == 6


def test_every_mistake_is_taken_away_again():
    of = stages_of_the_model.Run(golden_model(), TEXT, None, 1)
    given = {"waveform.0": sound()[:SAMPLES]}
    before = dict(stages_of_the_model.compute(of, given))
    for mistake in mistakes.MISTAKES:
        with mistakes.made(of, [mistake]):
            pass
    after = dict(stages_of_the_model.compute(of, given))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_table_has_the_porters_mistakes_and_names_places_that_exist():
    assert {mistake.id for mistake in mistakes.MISTAKES} == set(port.MISTAKES)
    for mistake in mistakes.MISTAKES:
        place = re.search(r"Right: .*\((\w+\.py), ([\w., ]+)\)\.$", mistake.sentence)
        module = (HERE.parent / place[1]).read_text()
        for name in re.findall(r"\w+", place[2].replace(" and ", " ")):
            assert re.search(rf"(def|class) {name}\b", module), mistake.id


SMALL = {"gelu-tanh-stem", "gelu-tanh-layers", "layer-norm-eps", "layer-norm-eps=1e-3"}
# The mistakes that are smaller than a type's rounding, with all stages.
DROWNED = {
    torch.float16: SMALL,
    torch.bfloat16: SMALL | {"mel-float32", "rope-bfloat16-angles"},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DROWNED, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows_in_sixteen_bits_if_it_is_larger_than_their_rounding(mistake, dtype):
    assert compared(ported(mistake, dtype=dtype))["equal"] == (mistake in DROWNED[dtype])


@pytest.mark.parametrize("mistake", ["taps-reversed", "no-qk-norm", "no-time-markers"])
def test_a_mistake_is_found_in_bfloat16(mistake):
    assert diagnosed(ported(mistake, dtype=torch.bfloat16))["mistakes"] == [mistake]


def test_mel_is_held_to_float32_in_every_type_but_for_a_rounding_that_comes_later():
    stages = ported(dtype=torch.bfloat16)
    half = ported(dtype=torch.float16)
    unrounded = {"mel.0": ported("mel-float32")["mel.0"]}
    assert compared(stages | unrounded)["equal"]
    assert compared(half | unrounded)["first"] == "mel.0"
    wrong = {"mel.0": ported("mel-symmetric-window")["mel.0"]}
    assert compared(stages | wrong)["first"] == "mel.0"


# ---- what can't be used ----


def spoilt(folder: Path) -> None:
    """Files that can't be used, each in its own way."""
    (folder / "map.json").write_text('{"adapter": 3}')
    (folder / "both.json").write_text('{"encoder": "adapter"}')
    (folder / "text.npz").write_text("no zip")
    (folder / "text.bin").write_text("?")
    (folder / "cut.safetensors").write_bytes(saved(ported()).read_bytes()[:5000])
    np.savez(folder / "objects.npz", adapter=np.array([{}]))
    np.savez(folder / "complex.npz", adapter=np.ones(3, complex))
    floats = {"input_ids": torch.ones(131), "logits": torch.ones(1, 320)}
    save_file(floats, folder / "float_ids.safetensors")
    save_file({"weight": torch.ones(1)}, folder / "other.safetensors")
    save_file({"deepstack.7": torch.ones(1)}, folder / "none.safetensors")
    for version in ("0", "1"):
        metadata = {"format": "moss-min parity", "version": version}
        save_file(floats, folder / f"version{version}.safetensors", metadata)


# The command line, with R for the reference and P for a right port -> words of the answer.
REFUSED = {
    "compare P R": "is not what `parity.py dump` writes",
    "compare R cut.safetensors": "can't be read: Error while deserializing",
    "compare R missing.safetensors": "No such file",
    "compare R text.bin": "expected a .safetensors, an .npz or a folder of .npy",
    "compare R text.npz": "text.npz can't be read",
    "compare R objects.npz": "objects.npz can't be read",
    "compare R complex.npz": "adapter is torch.complex128",
    "compare R float_ids.safetensors": "input_ids is torch.float32 [131]; expected integers",
    "compare R other.safetensors": "none of its 1 tensors (weight) has the name of a stage",
    "compare R none.safetensors": "no stage is in both files",
    "compare version0.safetensors P": "is of version 0; expected 1",
    "compare version1.safetensors P": "its metadata is damaged (KeyError('axes'))",
    "compare R P --names map.json": 'expected an object, {"port\'s name"',
    "compare R P --names nothing.json": "nothing.json can't be read",
    "compare R P --names both.json": "two of its tensors are adapter",
    "compare R P --model VARIANT": "its config.json is another",
    "compare R P --rtol 0": "--rtol: expected a number above 0",
    "compare R P --port-dtype int8": "--port-dtype is 'int8'",
    "diagnose R P": "the following arguments are required: --model",
    "dump -o o --model CHECKPOINT --prompt Hi --dtype half": "dtype is 'half'",
    "dump -o o --model CHECKPOINT --prompt Hi --stages decoder.layer.*": "decoder.layer.* is none",
    "dump -o o --model CHECKPOINT --prompt Hi --max-new-tokens 0": "max_new_tokens is 0",
    "compere R P": "invalid choice: 'compere'",
}


def test_what_cannot_be_used_is_one_clear_line_and_status_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoilt(tmp_path)
    names = {"R": reference(), "VARIANT": VARIANT, "CHECKPOINT": CHECKPOINT}
    names["P"] = saved(ported())
    for line, words in REFUSED.items():
        got = run(*[names.get(word, word) for word in line.split()])
        assert got.status == 2 and got.out == "", line
        assert got.err.startswith("parity.py: ") and got.err.count("\n") == 1, got.err
        assert words in got.err, got.err
