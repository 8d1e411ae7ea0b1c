"""tools/parity.py: what dump writes, and that compare and diagnose find what port.py does wrong."""

import contextlib
import functools
import io
import itertools
import json
import os
import re
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mistakes
import parity
import port
import stages as stages_of_the_model
from conftest import GOLDEN, HERE, golden_case, golden_model, golden_prompt, slow, write_clip
from encoder import EncoderLayer, log_mel
from moss_min import TINY, MossAudio
from test_port import PORTS, around_the_clip

CHECKPOINT = GOLDEN / "checkpoint"
VARIANT = GOLDEN / "variant" / "checkpoint"
# 518 frames: a full chunk and a tail of 118, which is no multiple of 8, so that its padding shows.
SAMPLES = 83_000
WORKSHOP = tempfile.TemporaryDirectory()  # for what is made once
FOLDER = Path(WORKSHOP.name)
SOUND = load_file(GOLDEN / "ports" / "waveform.safetensors")["waveform.0"]
# The mistakes that need a second clip. It is quieter, and a lone chunk of 126 frames.
OF_TWO_CLIPS = ("mel-floor-shared", "clips-padded-alone", "clip-rows-restarted")
SECOND = SOUND[40_000:60_300] / 30
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
    if "--json" in argv:
        answer = json.loads(out.getvalue(), parse_constant=pytest.fail)
        assert status == (not answer["equal"])
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), answer=answer)


def dumped(path: Path, waves, *options) -> Path:
    """A reference for sounds at 16 kHz, by the command line."""
    files = [write_clip(path.with_suffix(f".{i}.wav"), wave) for i, wave in enumerate(waves)]
    made = run("dump", *files, "-o", path, *options)
    assert made.status == 0, made.err
    return path


@functools.cache
def reference(dtype="float32", checkpoint=CHECKPOINT, samples=SAMPLES, clips=1, inside="") -> Path:
    parts = [checkpoint.parent.name, dtype, samples, clips, inside, "safetensors"]
    path = FOLDER / ".".join(map(str, parts))
    options = ["--inside", inside] if inside else []
    waves = [SOUND[:samples], SECOND][:clips]
    return dumped(path, waves, "--model", checkpoint, "--dtype", dtype, *options)


@functools.cache
def ported(
    *wrong: str, dtype=torch.float32, checkpoint=CHECKPOINT, clips=1, inside="", new_tokens=0
) -> dict:
    """The porter's stages of the reference's run."""
    ids = load_file(reference(checkpoint=checkpoint, clips=clips))["input_ids"]
    config = load(checkpoint, "auto", "float32").config.adapter
    before, after = around_the_clip(ids, config.audio_start_id, config.audio_end_id)
    more = []
    if clips == 2:
        more = [(SECOND, after)]
        after = []
    layers = [layer.replace(".", ".layers.") for layer in inside.split(",")]
    options = {"more": more, "inside": layers, "new_tokens": new_tokens}
    return port.run(checkpoint, SOUND[:SAMPLES], before, after, wrong, dtype, **options)


def part_of(stages: dict, subset: str) -> dict:
    parts = {"decoder": ("decoder.", "final_norm", "logits"), "logits": "logits"}
    return {name: x for name, x in stages.items() if name.startswith(parts.get(subset, ""))}


def saved(stages: dict) -> Path:
    path = FOLDER / "port.safetensors"
    save_file({key: x.contiguous() for key, x in stages.items()}, path)
    return path


def compared(stages: dict, *options, of: Path | None = None, model=CHECKPOINT) -> dict:
    with_model = ["--model", model] if model else []
    files = [of or reference(), saved(stages)]
    answer = run("compare", *files, *with_model, *options, "--json").answer
    wrong = [row["name"] for row in answer["stages"] if not row["ok"]]
    return answer | {"stages": {row["name"]: row for row in answer["stages"]}, "wrong": wrong}


def first_wrong(stages: dict, of: Path | None = None, model=CHECKPOINT) -> str | None:
    """The first stage that differs, which is the same with a model and without."""
    first = compared(stages, of=of, model=model)["first"]
    assert compared(stages, of=of, model=None)["first"] == first
    return first


def said(stages: dict) -> str:
    """What compare prints without a model."""
    return run("compare", reference(), saved(stages)).out


def diagnosed(stages: dict, of: Path | None = None, model=CHECKPOINT) -> dict:
    return run("diagnose", of or reference(), saved(stages), "--model", model, "--json").answer


def explained(stages: dict) -> str:
    """What diagnose prints, with its lines joined."""
    got = run("diagnose", reference(), saved(stages), "--model", CHECKPOINT)
    return " ".join(got.out.split())


def changed(name: str, change) -> dict:
    """The right port's stages, but for one, which is `change` of itself."""
    return ported() | {name: change(ported()[name])}


# ---- dump ----

WALKED = ["short", "three_chunks", "two_audios", "text_only", "no_markers", "variant"]


def walked(name: str, dtype: str = "float32", inside=()) -> dict[str, torch.Tensor]:
    """The stages of a golden case, and what is inside of some of them."""
    case = golden_case(name)
    model = golden_model(case.checkpoint, dtype)
    of = stages_of_the_model.Run(model, case.text, case.time_markers, len(case.clips))
    of.inside = frozenset(inside)
    waves = {f"waveform.{i}": wave for i, wave in enumerate(case.clips)}
    return dict(stages_of_the_model.compute(of, waves))


@pytest.mark.parametrize("dtype", ["float32", *slow("bfloat16")])
@pytest.mark.parametrize("name", WALKED)
def test_the_stages_logits_are_the_models_to_the_bit(name, dtype):
    model = golden_model(golden_case(name).checkpoint, dtype)
    with torch.no_grad():
        assert torch.equal(walked(name, dtype)["logits"], model(golden_prompt(name)))


def test_a_dump_has_every_stage_in_order_with_its_axes():
    data = reference().read_bytes()
    (length,) = struct.unpack("<Q", data[:8])  # as a port in C++ reads it
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    axes = json.loads(metadata["axes"])
    assert list(header) == list(axes) == [*ported(), "step_logits", "generated"]
    # The documents' readers in C++ and Rust look for this.
    assert b'"encoder.stem": {"dtype": "F32", "shape": [65, 48], "data_offsets": [' in data
    assert axes["encoder.conv1"] == "chunks, channels, mel bands, frames"
    entries = {name: (entry["dtype"], *entry["shape"]) for name, entry in header.items()}
    assert entries["encoder.conv1"] == ("F32", 2, 8, 64, 200)
    assert entries["logits"] == ("F32", 131, 320)
    assert entries["generated"] == ("I32", 16)
    begin, end = (8 + length + offset for offset in header["input_ids"]["data_offsets"])
    assert struct.unpack("<131i", data[begin:end]) == tuple(ported()["input_ids"].tolist())
    assert (metadata["prompt"], metadata["dtype"]) == ("Describe this audio.", "float32")
    assert json.loads(metadata["chunk_tokens"]) == [50, 15]
    assert json.loads(metadata["sounds"]) == [parity.digest(SOUND[:SAMPLES].numpy().tobytes())]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numpy_opens_a_dump_whatever_the_run_computed_in(dtype):
    stages = safetensors.numpy.load_file(reference(dtype))
    assert {x.dtype.name for x in stages.values()} == {"float32", "int32"}
    assert torch.equal(torch.from_numpy(stages["mel.0"]), log_mel(SOUND[:SAMPLES]).float())
    layer = torch.from_numpy(stages["encoder.layers.5"])
    assert torch.equal(layer, layer.bfloat16().float()) == (dtype == "bfloat16")


@pytest.mark.parametrize("samples, said", [(48_000, "longer than 4 s"), (89_600, "not padded")])
def test_a_clip_in_which_mistakes_change_nothing_is_warned_of(tmp_path, samples, said):
    clip = write_clip(tmp_path / "clip.wav", np.resize(SOUND.numpy(), samples))
    made = run("dump", clip, "-o", tmp_path / "out.safetensors", "--stages", "mel.*")
    assert made.status == 0 and said in made.err


def test_no_warning_without_a_sound_of_ones_own(tmp_path):
    made = run("dump", "-o", tmp_path / "out.safetensors", "--stages", "mel.*")
    assert (made.status, made.err) == (0, "")


def test_chosen_stages_come_with_the_sound_and_the_prompts_ids(tmp_path):
    options = ["--model", CHECKPOINT, "--stages", "encoder.layers.[01],logits"]
    path = dumped(tmp_path / "r.safetensors", [SOUND[:SAMPLES]], *options)
    stages = load_file(path)
    names = ["waveform.0", "encoder.layers.0", "encoder.layers.1", "logits"]
    assert stages.keys() == {*names, "input_ids"}
    assert torch.equal(stages["logits"], load_file(reference())["logits"])
    assert list(compared(ported(), of=path, model=None)["stages"]) == names
    # A model makes up for what the reference lacks.
    assert compared(changed("encoder", lambda x: x + 0.1), of=path)["first"] == "encoder"


def test_a_dump_is_written_stage_by_stage_and_a_failure_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "r.safetensors"
    path.write_text("before")

    def stages():
        for count in (1, 2):
            yield f"mel.{count}", torch.zeros(1000, 1000)
            written = sum(file.stat().st_size for file in tmp_path.rglob("*"))
            assert written > count * 4_000_000
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        parity.write(path, {}, stages(), 2)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


CASES = [*WALKED, "one_chunk", "scripts", *slow("long")]


@pytest.mark.parametrize("name", [*CASES, "short.bfloat16", "three_chunks.bfloat16"])
def test_upstream_is_equal(name, tmp_path):
    case = golden_case(name)
    model = GOLDEN / case.checkpoint
    markers = ["--no-time-markers"] if case.time_markers is False else []
    options = ["--model", model, "--prompt", case.text, *markers]
    path = dumped(tmp_path / "r.safetensors", case.clips, *options)
    assert first_wrong(case.tensors, path, model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of", ["float32", "bfloat16", "float16"])
def test_the_right_port_is_equal_in_every_type_to_a_reference_in_every_type(of, dtype):
    stages = ported(dtype=dtype)
    assert first_wrong(stages, reference(of)) is None
    answer = diagnosed(stages, reference(of))
    assert answer["mistakes"] == answer["ties"] == []


def test_mel_in_single_precision_is_no_mistake():
    single = ported("mel-single-precision")
    assert compared(single)["equal"]
    assert diagnosed(single)["mistakes"] == []
    # Too little to tell: nothing, not the wrong thing.
    assert diagnosed(part_of(single, "logits"))["mistakes"] == []
    off = int((single["mel.0"] != ported()["mel.0"]).sum())
    assert 0 < off < 100  # of 66,304; seen: 18
    assert f" {off} values a bfloat16 step off" in said(single)
    assert "--model tells the two apart" in said(single)


# ---- how a port's file is read ----


def chunks_of(x: torch.Tensor) -> torch.Tensor:
    """A full chunk and a tail with what is not to be looked at behind it: [2, 52, width]."""
    parts = x.split([50, 15])
    rows = [torch.nn.functional.pad(part, (0, 0, 0, 52 - len(part)), value=7) for part in parts]
    return torch.stack(rows)


LAYOUTS = {
    "read transposed.": ("adapter", lambda x: x.T),
    "read without its leading axis.": ("decoder.layers.3", lambda x: x[None]),
    "without its leading axis, read transposed": ("mel.0", lambda x: x.T[None]),
    "[chunks, tokens, width], without the padding": ("encoder.layers.2", chunks_of),
    "transposed, read as [chunks, tokens, width]": ("encoder.stem", lambda x: chunks_of(x).mT),
    "encoder.conv2: read transposed": ("encoder.conv2", lambda x: x.permute(0, 2, 3, 1)),
    "of the last position alone": ("logits", lambda x: x[-1:]),
    "logits: of the last position alone": ("logits", lambda x: x[-1]),
    "without its leading axis, of the last position": ("logits", lambda x: x[None, -1:]),
}


@pytest.mark.parametrize("words", LAYOUTS)
def test_another_layout_is_recognised_used_and_said(words):
    name, layout = LAYOUTS[words]
    stages = changed(name, layout)
    assert first_wrong(stages) is None
    assert words in said(stages)
    assert first_wrong(stages | {name: stages[name] * 1.01}) == name


def test_layers_recorded_before_the_injection_are_no_mistake():
    stages = ported("layers-before-injection")
    assert first_wrong(stages) is None
    assert diagnosed(stages)["equal"]
    assert "decoder.layers.0 to decoder.layers.2: recorded before the injection" in said(stages)
    assert diagnosed(ported("layers-before-injection", "no-qk-norm"))["mistakes"] == ["no-qk-norm"]


CUTS = [lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x[:, None], lambda x: x.flatten()]


@pytest.mark.parametrize("cut", CUTS)
def test_another_shape_is_a_difference_and_never_cut_to_fit(cut):
    stages = changed("adapter", cut)
    assert first_wrong(stages) == "adapter"
    assert "adapter has another shape" in said(stages)


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_numpys_files_are_read_too(kind, tmp_path):
    arrays = {name: x.numpy() for name, x in ported().items() if name != "mel.0"}
    # As numpy stores bfloat16 where a library has taught it the type: two bytes each.
    arrays["mel.0"] = ported()["mel.0"].view(torch.int16).numpy().view("V2")
    arrays["adapter"] = arrays["adapter"].astype(np.float16)
    arrays["encoder"] = arrays["encoder"].astype(">f8")
    arrays["input_ids"] = arrays["input_ids"].astype(np.uint32)[None]
    path = tmp_path / "port.npz"
    np.savez(path, **arrays)
    if kind == "npy":
        path = tmp_path / "port"
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    answer = run("compare", reference(), path, "--model", CHECKPOINT, "--json").answer
    assert answer["equal"] and len(answer["stages"]) == 25


def test_a_ports_names_are_mapped(tmp_path):
    stages = {}
    for name, x in ported().items():
        stages[name.replace("decoder.layers.", "dec_").replace("logits", "l_out")] = x
    names = tmp_path / "map.json"
    names.write_text(json.dumps({"dec_{i}": "decoder.layers.{i}", "l_out": "logits"}))
    answer = compared(stages, "--names", names)
    assert answer["equal"] and len(answer["stages"]) == 25


# ---- compare ----

ANOTHER_SOUND = torch.randn(70_000, generator=torch.Generator().manual_seed(0)) / 10
# What compare says, of which stages of one clip.
SENTENCES = {
    "token 50 on, the first token of the second chunk": lambda: ported("positions-not-restarted"),
    "encoder.conv3 differs from chunk 1 on.": lambda: changed(
        "encoder.conv3", lambda x: x + torch.arange(2.0).view(2, 1, 1, 1)
    ),
    "from frame 300 on": lambda: changed("mel.0", lambda x: x + (torch.arange(518) >= 300)),
    "logits differs from position 130 on, text.": lambda: changed("logits", lambda x: x[-1] + 1),
    "waveform.0 is another sound's": lambda: changed("waveform.0", lambda x: ANOTHER_SOUND),
    "mel.0 is another sound's": lambda: {"mel.0": log_mel(ANOTHER_SOUND)},
    "[375, 64], expected [65, 64] (audio tokens, decoder width); 375 tokens": lambda: {
        "deepstack.0": ported("mel-30s")["deepstack.0"]
    },
    "375 are 30 s: the sound was padded": lambda: ported("mel-30s"),
    "The port's prompt ids are taken to be the reference's": lambda: part_of(ported(), "logits"),
    "waveform.0, mel.0, encoder.conv1 to encoder.conv3, ": lambda: part_of(ported(), "decoder"),
    "text rows before the first audio token are right": lambda: part_of(
        ported("tail-not-padded"), "decoder"
    ),
    "not in the reference: mask": lambda: ported() | {"mask": torch.ones(1, 131)},
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_what_compare_found_is_said_in_a_sentence(sentence):
    assert sentence in said(SENTENCES[sentence]())


@functools.cache
def spoilt_from(name: str, row: int) -> dict:
    """The stages of two clips, one of which is wrong from a row on."""
    x = ported(clips=2)[name].float().clone()
    (x.T if name.startswith("mel") else x)[row:] += 1
    return ported(clips=2) | {name: x}


CLIPS = {
    "from token 52 on, in clip 1, its second chunk.": ("encoder.layers.2", 52),
    "from token 65 on, the first token of clip 2, its first chunk.": ("adapter", 65),
    "from chunk 2 on, clip 2, its first chunk.": ("encoder.conv3", 2),
    "mel.1 differs from frame 7 on, of clip 2.": ("mel.1", 7),
    "from position 106 on, an audio token of clip 2.": ("inputs_embeds", 106),
    "from position 104 on, a clip's start of clip 2.": ("decoder.layers.1", 104),
    "from position 130 on, text.": ("decoder.layers.1", 130),
}


@pytest.mark.parametrize("sentence", CLIPS)
def test_with_several_clips_a_row_is_named_with_its_clip(sentence):
    stages = spoilt_from(*CLIPS[sentence])
    assert sentence in run("compare", reference(clips=2), saved(stages)).out


@pytest.mark.parametrize("mistake", ["rope-theta-10000", "causal-mask-without-itself"])
def test_the_encoders_side_is_not_suspected_if_text_before_the_sound_is_wrong(mistake):
    assert "suspect" not in said(part_of(ported(mistake), "decoder"))


def test_the_encoders_side_is_not_suspected_if_the_port_has_it():
    assert "suspect" not in said(ported("no-deepstack"))
    # A token's number is no position.
    late = (torch.arange(65) >= 50)[:, None]
    assert "suspect" not in said({"adapter": ported()["adapter"] + late})


def test_the_last_line_has_the_two_figures_of_the_logits():
    stages = changed("logits", lambda x: x + 0.1 * x.roll(1, 0))
    x = stages["logits"].double()
    exact = load_file(reference())["logits"].double()
    nmse = float((x - exact).square().mean() / exact.square().mean())
    cosine = min(float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, exact))
    answer = compared(stages)
    assert answer["nmse"] == pytest.approx(nmse, rel=1e-5)
    assert answer["worst_cosine"] == pytest.approx(cosine, abs=1e-7)
    last = f"logits: NMSE {nmse:.1e}, the worst token's cosine {cosine:.7f}"
    assert said(stages).splitlines()[-1] == last
    assert "NMSE" not in said(changed("logits", lambda x: x[:, 1:]))


def test_each_row_has_its_figures():
    spoilt = torch.zeros(65, 64)
    spoilt[40, 3] = 0.5
    spoilt[60, 7] = -2
    answer = compared(changed("adapter", lambda x: x + spoilt))
    assert (answer["first"], answer["since"]) == ("adapter", 40)
    row = answer["stages"]["adapter"]
    right = load_file(reference())["adapter"].double()
    cosine = torch.cosine_similarity((right + spoilt).ravel(), right.ravel(), dim=0)
    assert row["row"] == 60
    assert row["max_abs"] == pytest.approx(2, abs=1e-5)
    assert row["max_rel"] == pytest.approx(2 / right.abs().max().item(), abs=1e-5)
    assert row["rms"] == pytest.approx(4.25**0.5 / right.norm().item(), rel=1e-4)
    assert row["cosine"] == pytest.approx(cosine.item(), abs=1e-6)
    assert row["own"] == pytest.approx(row["max_rel"], rel=1e-3)


def test_one_wrong_stage_makes_none_after_it_wrong_and_a_second_is_found_behind_it():
    stages = ported("gelu-tanh-stem", "attention-scale")
    convolutions = [f"encoder.conv{i}" for i in (1, 2, 3)]
    layers = [f"decoder.layers.{i}" for i in range(5)]
    assert compared(stages)["wrong"] == convolutions + layers
    assert len(compared(stages, model=None)["wrong"]) > 15


def test_own_errors_go_on_from_the_nearest_stages_that_the_port_has():
    stages = ported("gelu-tanh-stem", "no-qk-norm")
    names = ["encoder.conv3", "encoder.layers.3", "decoder.layers.1", "logits"]
    few = {name: stages[name] for name in names}
    assert compared(few)["wrong"] == ["encoder.conv3", "decoder.layers.1", "logits"]


def test_what_is_not_finite_differs_and_is_null_in_json():
    name = "encoder.layers.4"
    answer = compared(changed(name, lambda x: x.index_fill(0, torch.tensor([20]), torch.nan)))
    assert (answer["first"], answer["since"]) == (name, 20)
    assert answer["stages"][name]["max_abs"] is None


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
    assert (answer["first"], answer["since"], answer["stages"]) == ("input_ids", since, {})
    assert means in said(stages)


# ---- diagnose ----

MISTAKES = [*port.MISTAKES, "layer-norm-eps=1e-3"]
CHECKPOINTS = {"golden": CHECKPOINT, "variant": VARIANT, "tiny": TINY}
# What a checkpoint does not show, with which stages: it has no out_proj, or the norms' epsilon is
# too small beside its values.
HIDDEN = {
    ("golden", "taps-without-out-proj"): ("all", "decoder", "logits"),
    ("tiny", "taps-without-out-proj"): ("all", "decoder", "logits"),
    ("variant", "rms-norm-eps"): ("all", "decoder"),
    ("variant", "layer-norm-eps"): ("decoder", "logits"),
    ("tiny", "layer-norm-eps"): ("decoder", "logits"),
}
QUICK = {
    ("golden", "all"): MISTAKES,
    ("golden", "logits"): ["layer-norm-eps", "rope-theta-10000"],
    ("variant", "all"): ["taps-without-out-proj"],
    ("tiny", "all"): [
        "full-clip-attention",
        "taps-reversed",
        "no-time-markers",
        "padding-attended",
    ],
}
FOUND = []
for name, subset, mistake in itertools.product(CHECKPOINTS, ("all", "decoder", "logits"), MISTAKES):
    if subset not in HIDDEN.get((name, mistake), ()):
        marks = [] if mistake in QUICK.get((name, subset), ()) else pytest.mark.slow
        FOUND.append(pytest.param(name, subset, mistake, marks=marks))


@pytest.mark.parametrize("name, subset, mistake", FOUND)
def test_a_mistake_is_found(name, subset, mistake):
    # On golden, rms-norm-eps is within a hundredth of the tolerance with one clip, and above it
    # with two.
    clips = 2 if mistake in (*OF_TWO_CLIPS, "rms-norm-eps") else 1
    options = {"checkpoint": CHECKPOINTS[name], "clips": clips}
    # oneDNN's sums depend on the processor, and so does what values of 1e12 leave of them.
    plain = torch.backends.mkldnn.flags(enabled=False)
    with plain if mistake == "weights-as-float16" else contextlib.nullcontext():
        stages = part_of(ported(mistake, **options), subset)
        answer = diagnosed(stages, reference(**options), CHECKPOINTS[name])
    assert (answer["mistakes"], answer["ties"]) == ([mistake.partition("=")[0]], [])
    # With values of 1e12 among them, rounding is larger.
    most = 2e-5 if mistake == "weights-as-float16" else 3e-6
    assert answer["after"] < most < (answer["before"] or 1)


@pytest.mark.parametrize("mistake", ["taps-reversed", "no-qk-norm", "no-time-markers"])
def test_a_mistake_is_found_in_bfloat16(mistake):
    answer = diagnosed(ported(mistake, dtype=torch.bfloat16))
    assert (answer["mistakes"], answer["ties"]) == ([mistake], [])


# ---- inside a layer ----

LAYERS = "encoder.0,decoder.0"
# The first stage that differs inside the first layer of all, of mistakes that are made there.
FIRST_INSIDE = {
    "encoder.layers.0.input_norm": ["layer-norm-eps"],
    "encoder.layers.0.q": ["query-scaled-before-bias"],
    "encoder.layers.0.v": ["no-v-bias"],
    "encoder.layers.0.attention": ["padding-attended"],
    "encoder.layers.0.attention_out": ["no-out-bias"],
    "encoder.layers.0.mlp": ["gelu-tanh-layers"],
    "decoder.layers.0.input_norm": ["deepstack-at-layer-input", "rms-norm-eps"],
    "decoder.layers.0.q": ["no-qk-norm", "qk-norm-after-rope", "qk-norms-swapped"],
    "decoder.layers.0.attention": ["attention-scale", "query-heads-modulo"],
    "decoder.layers.0.mlp": ["deepstack-before-mlp"],
    "decoder.layers.0": ["no-deepstack"],
}
FIRST_INSIDE["decoder.layers.0.q"] += ["rope-interleaved", "rope-theta-10000"]
FIRST_INSIDE["decoder.layers.0.attention"] += ["causal-mask-without-itself"]


@pytest.mark.parametrize("name", WALKED)
def test_an_open_layer_is_the_layer_to_the_bit(name):
    closed = walked(name)
    opened = walked(name, inside=closed)
    assert all(torch.equal(opened[stage], x) for stage, x in closed.items())
    layers = [stage for stage in closed if ".layers." in stage]
    assert len(opened) == len(closed) + 7 * len(layers)


def test_a_dump_has_the_inside_of_the_layers_that_are_asked_for():
    with safe_open(reference(inside=LAYERS), "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes["encoder.layers.0.q"] == shapes["encoder.layers.0.mlp"] == [65, 48]
    # Four query heads and two key heads of 24; the width is 64.
    assert shapes["decoder.layers.0.q"] == shapes["decoder.layers.0.attention"] == [131, 96]
    assert shapes["decoder.layers.0.k"] == [131, 48]
    assert shapes["decoder.layers.0.attention_out"] == [131, 64]
    assert not any(name.startswith("encoder.layers.1.") for name in shapes)
    assert compared(ported(inside=LAYERS), of=reference(inside=LAYERS), model=None)["equal"]


QUICK_INSIDE = ("no-v-bias", "padding-attended", "qk-norms-swapped", "query-heads-modulo")
INSIDE = []
for stage, names in FIRST_INSIDE.items():
    for name in names:
        marks = [] if name in QUICK_INSIDE else pytest.mark.slow
        INSIDE.append(pytest.param(name, stage, marks=marks))


@pytest.mark.parametrize("mistake, stage", INSIDE)
def test_a_mistake_is_found_inside_a_layer(mistake, stage):
    stages = ported(mistake, inside=LAYERS)
    assert first_wrong(stages, reference(inside=LAYERS)) == stage
    # A reference without them is made up for by the model.
    assert compared(stages)["first"] == stage
    answer = diagnosed(stages)
    assert (answer["mistakes"], answer["ties"]) == ([mistake], [])
    assert answer["after"] < 3e-6


@pytest.mark.parametrize("mistake", PORTS)
def test_a_mistake_that_upstream_made_is_found(mistake):
    theirs = load_file(GOLDEN / "ports" / f"{mistake}.safetensors")
    assert diagnosed(theirs, reference(samples=len(SOUND)))["mistakes"] == [mistake]


PAIRS = [
    ("no-qk-norm", "rope-interleaved", "all"),
    ("full-clip-attention", "rope-interleaved", "all"),
    ("query-scaled-before-bias", "deepstack-one-layer-late", "all"),
    ("mel-30s", "no-time-markers", "all"),
    ("mel-30s", "mel-last-frame-kept", "all"),
    ("mel-htk", "no-qk-norm", "logits"),
    ("full-clip-attention", "rope-interleaved", "logits"),
]


@pytest.mark.slow
@pytest.mark.parametrize("first, second, subset", PAIRS)
def test_two_mistakes_at_once_are_found(first, second, subset):
    answer = diagnosed(part_of(ported(first, second), subset))
    assert (sorted(answer["mistakes"]), answer["ties"]) == (sorted([first, second]), [])
    assert answer["after"] < 3e-6


def test_what_cannot_be_told_apart_is_a_tie_and_no_mistake():
    # Layer 0 has no rows with either.
    stages = {"decoder.layers.0": ported("no-deepstack")["decoder.layers.0"]}
    answer = diagnosed(stages)
    ties = [["no-deepstack", "deepstack-one-layer-late"]]
    assert (answer["mistakes"], answer["ties"]) == ([], ties)
    out = explained(stages)
    assert "no-deepstack or deepstack-one-layer-late explains it" in out
    assert "can't tell these apart; decoder.layers.1 to decoder.layers.3 could" in out


def test_what_no_known_mistake_explains_is_said_with_where_to_look():
    stages = changed("decoder.layers.2", lambda x: x * 1.01)
    answer = diagnosed(stages)
    assert answer["mistakes"] == answer["ties"] == []
    assert answer["before"] == answer["after"] > 0.005
    out = explained(stages)
    known = len(port.MISTAKES) + len(port.DECODING)
    assert f"None of the {known} known mistakes explains it" in out
    assert "DecoderLayer and Qwen3.forward in qwen3.py" in out
    assert "Equal" in explained(part_of(stages, "logits"))
    few = {name: stages[name] for name in ("decoder.layers.0", "decoder.layers.2")}
    lacking = "what decoder.layers.2 is computed from: decoder.layers.1, input_ids, deepstack.2"
    assert lacking in explained(few)


def test_a_known_mistake_is_found_beside_one_that_is_not_known():
    layer = {"encoder.layers.3": ported()["encoder.layers.3"] * 1.01}
    answer = diagnosed(ported("rope-theta-10000") | layer)
    assert answer["mistakes"] == ["rope-theta-10000"]
    assert answer["after"] > 0.005


def test_a_part_is_not_said_to_be_explained_by_a_difference_that_stays():
    layer = {"encoder.layers.3": ported()["encoder.layers.3"] * 3}
    out = explained(ported("rope-theta-10000") | layer)
    assert "rope-theta-10000 explains a part of it: 3 of 8 stages that differ are left." in out
    assert "falls from" not in out


def test_the_answer_names_the_mistake_how_well_it_explains_and_what_is_right():
    out = explained(ported("full-clip-attention"))
    assert "full-clip-attention explains it: the largest difference falls from another shape" in out
    assert "Right: over chunks of 4 s" in out


def test_what_a_mistake_does_not_change_is_not_computed_again():
    forward = EncoderLayer.forward
    with mock.patch.object(EncoderLayer, "forward", autospec=True, side_effect=forward) as calls:
        assert diagnosed(ported("rope-interleaved"))["mistakes"] == ["rope-interleaved"]
    # One for each layer's own error, and none for any of the mistakes tried.
    assert calls.call_count == 6


def test_the_table_has_the_porters_mistakes_and_names_places_that_exist():
    assert {mistake.id for mistake in mistakes.MISTAKES} == {*port.MISTAKES, *port.DECODING}
    for mistake in mistakes.MISTAKES:
        place = re.search(r"Right: .*\((\w+\.py), ([\w., ]+)\)\.$", mistake.sentence)
        module = (HERE.parent / place[1]).read_text()
        for name in re.findall(r"\w+", place[2].replace(" and ", " ")):
            assert re.search(rf"(def|class) {name}\b", module), mistake.id


# The mistakes that are larger than a type's rounding, with all stages of golden's single clip.
SMALL = ["gelu-tanh-stem", "gelu-tanh-layers", "layer-norm-eps", "layer-norm-eps=1e-3"]
SMALL += ["rms-norm-eps", "taps-without-out-proj", *OF_TWO_CLIPS]
SMALLER = [*SMALL, "mel-float32", "rope-bfloat16-angles"]
LARGE = [(torch.float16, name) for name in MISTAKES if name not in SMALL]
LARGE += [(torch.bfloat16, name) for name in MISTAKES if name not in SMALLER]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, mistake", LARGE)
def test_a_mistake_larger_than_their_rounding_shows_in_sixteen_bits(dtype, mistake):
    assert not compared(ported(mistake, dtype=dtype))["equal"]


def test_mel_is_held_to_float32_in_every_type_but_for_a_rounding_that_comes_later():
    stages = ported(dtype=torch.bfloat16)
    unrounded = {"mel.0": ported("mel-float32")["mel.0"]}
    assert compared(stages | unrounded)["equal"]
    assert compared(ported(dtype=torch.float16) | unrounded)["first"] == "mel.0"
    wrong = {"mel.0": ported("mel-symmetric-window")["mel.0"]}
    assert compared(stages | wrong)["first"] == "mel.0"


# ---- what can't be used ----


def spoilt(folder: Path) -> None:
    """Files that can't be used, each in its own way."""
    (folder / "map.json").write_text('{"adapter": 3}')
    (folder / "both.json").write_text('{"encoder": "adapter"}')
    (folder / "text.bin").write_text("?")
    np.savez(folder / "objects.npz", adapter=np.array([{}]))
    floats = {"input_ids": torch.ones(131), "logits": torch.ones(1, 320)}
    save_file(floats, folder / "float_ids.safetensors")
    save_file({"weight": torch.ones(1)}, folder / "other.safetensors")
    save_file({"deepstack.7": torch.ones(1)}, folder / "none.safetensors")
    save_file(floats, folder / "old.safetensors", {"format": "moss-min parity", "version": "0"})


# The command line, with R for the reference and P for a right port -> words of the answer.
REFUSED = {
    "compare P R": "is not what `parity.py dump` writes",
    "compare R missing.safetensors": "No such file",
    "compare R text.bin": "expected a .safetensors, an .npz or a folder of .npy",
    "compare R objects.npz": "objects.npz can't be read",
    "compare R float_ids.safetensors": "input_ids is torch.float32 [131]; expected integers",
    "compare R other.safetensors": "none of its 1 tensors (weight) has the name of a stage",
    "compare R none.safetensors": "no stage is in both files",
    "compare old.safetensors P": "is of version 0; expected 1 or 2",
    "compare R P --names map.json": 'expected an object, {"port\'s name"',
    "compare R P --names nothing.json": "nothing.json can't be read",
    "compare R P --names both.json": "two of its tensors are adapter",
    "compare R P --model VARIANT": "its config.json is another",
    "compare R P --rtol 0": "--rtol: expected a number above 0",
    "compare R P --port-dtype int8": "--port-dtype is 'int8'",
    "diagnose R P": "the following arguments are required: --model",
    "dump -o o --model CHECKPOINT --prompt Hi --dtype half": "dtype is 'half'",
    "dump -o o --model CHECKPOINT --prompt Hi --stages decoder.layer.*": "decoder.layer.* is none",
    "dump -o o --model CHECKPOINT --prompt Hi --inside decoder.5": "decoder.5 is none; expected of",
    "dump -o o --model CHECKPOINT --prompt Hi --max-new-tokens 0": "max_new_tokens is 0",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_be_used_is_refused(command, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    spoilt(tmp_path)
    names = {"R": reference(), "P": saved(ported()), "VARIANT": VARIANT, "CHECKPOINT": CHECKPOINT}
    argv = [names.get(word, word) for word in command.split()]
    assert REFUSED[command] in refused(parity.main, *argv)
