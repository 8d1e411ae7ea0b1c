"""tools/train.py and lora.py: upstream's loss and gradients, peft's adapters, what is saved."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import train
from common import random_model
from conftest import FOLDER, GOLDEN, JFK, data_line, edit_json, golden_model, refusal, write_clip
from lora import lora_change
from moss_min import MossAudio, load_audio
from train import SummedLoss, hidden_states, main, make_sample, save_checkpoint

CLIP = "<|audio_bos|><|AUDIO|><|audio_eos|>"
TRAINING = GOLDEN / "training"
LORA = TRAINING / "lora"
SECONDS = 0.3, 1.1, 4.0, 5.5, 9.0  # two are shorter than a chunk, one is a whole one
PROMPT = "Transcribe the audio."
ANSWERS = "and", "and so", "my fellow [1.25] americans", "ask not what your country", "can do"
# A released folder's files beside the weights.
REST = {path.name for path in FOLDER.iterdir() if not path.name.startswith("model")}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def jfk(seconds: float, skip: int = 0) -> torch.Tensor:
    return load_audio(JFK)[skip:][: int(16_000 * seconds)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five clips of 0.3 to 9 s, under paths that are relative to the file."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "clips").mkdir()
    for i, seconds in enumerate(SECONDS):
        write_clip(folder / "clips" / f"{i}.wav", jfk(seconds, 8000 * i))
    lines = [data_line([f"clips/{i}.wav"], PROMPT, answer) for i, answer in enumerate(ANSWERS)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder / "train.jsonl"


def arguments(data, out, *argv) -> list[str]:
    source = () if "--init" in argv else ("--model", FOLDER)
    common_ones = "--data", data, "--out", out, "--device", "cpu", "--warmup", "1"
    return [str(argument) for argument in (*source, *common_ones, *argv)]


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]


def trained_weights(out: Path) -> dict[str, torch.Tensor]:
    """What a run trained, in float32, from its saved state."""
    state = load_file(out / "training" / "state.safetensors")
    return {name[7:]: state[name] for name in state if name.startswith("weight.")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def load(folder: Path = FOLDER, dtype: str = "float32", lora: Path | None = None) -> MossAudio:
    return MossAudio.from_pretrained(folder, "cpu", dtype, change=lora_change(lora, folder))


# ---- upstream's and peft's figures ----


def golden_training() -> tuple[dict[str, torch.Tensor], train.Sample]:
    """Upstream's tensors, and our sample of the same text, sound and answer."""
    with safe_open(TRAINING / "loss.safetensors", "pt") as file:
        said = file.metadata()
    tensors = load_file(TRAINING / "loss.safetensors")
    clips = [tensors["waveform.0"]]
    return tensors, make_sample(golden_model(), said["text"], clips, said["answer"])


def logits_of(model: MossAudio, sample: train.Sample) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(hidden_states(model, [sample])[0])[0]


def close(ours, upstreams, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, upstreams, rtol=tolerance, atol=tolerance)


def test_ids_labels_and_logits_are_upstreams():
    tensors, sample = golden_training()
    assert sample.ids.tolist() == tensors["input_ids"].tolist()
    assert sample.labels.tolist() == tensors["labels"].tolist()
    close(logits_of(golden_model(), sample), tensors["logits"])


def test_the_loss_and_the_gradient_of_all_170_parameters_are_upstreams():
    model = load().requires_grad_(True)
    tensors, sample = golden_training()
    loss = SummedLoss(model)([sample]) / (sample.labels != -100).sum()
    loss.backward()
    assert loss.item() == pytest.approx(tensors["loss"].item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in tensors:
        if name.startswith("grad."):
            close(gradients[name.removeprefix("grad.")], tensors[name])
    norms = json.loads((TRAINING / "gradient_norms.json").read_text())["gradient_norms"]
    ours = {name: gradient.norm().item() for name, gradient in gradients.items()}
    assert ours == pytest.approx(norms, rel=1e-5)


def test_pefts_adapter_gives_pefts_logits():
    pefts = load_file(TRAINING / "lora_logits.safetensors")["logits"]
    close(logits_of(load(lora=LORA), golden_training()[1]), pefts)


# ---- samples and batches ----


@pytest.fixture(scope="module")
def samples(data) -> list[train.Sample]:
    examples = train.read_data(data, golden_model()).values()
    return [make_sample(golden_model(), each.prompt, each.clips, each.answer) for each in examples]


@pytest.mark.parametrize("time_markers", [None, True, False])
def test_a_sample_is_inferences_prompt_and_the_answer_which_alone_is_learned(time_markers):
    model = golden_model()
    prompt = model.prompt(PROMPT, [JFK], time_markers)
    learned = [*model.tokenizer.encode("ask [0.50] not").ids]
    learned.append(model.tokenizer.token_to_id("<|im_end|>"))
    sample = make_sample(model, PROMPT, [JFK], "ask [0.50] not", time_markers)
    assert sample.ids.tolist() == prompt.ids.tolist() + learned
    assert sample.labels.tolist() == [-100] * len(prompt.ids) + learned
    assert all(torch.equal(*pair) for pair in zip(sample.mels, prompt.mels, strict=True))
    digits = len(prompt.ids) - len(model.prompt(PROMPT, [JFK], False).ids)
    assert digits == (0 if time_markers is False else 6)  # 2, 4, 6, 8, 10


def test_a_sample_in_a_batch_has_the_hidden_states_of_inference_and_the_loss_it_has_alone(samples):
    model, summed = golden_model(), SummedLoss(golden_model())
    text = make_sample(model, "hello", [], "longer than its prompt " * 9)  # no sound, the longest
    two = make_sample(model, PROMPT, [jfk(0.2), jfk(4.7)], "two clips")
    everything = [*samples, text, two]
    with torch.no_grad():
        alone = [logits_of(model, sample) for sample in everything]
        inference = model(model.prompt(PROMPT, [jfk(0.2), jfk(4.7)]))
        close(alone[-1][: len(inference)], inference)
        losses = [summed([sample]).item() for sample in everything]
        for order in [0, 1, 2, 3, 4, 5, 6], [6, 4, 5, 3, 2, 1, 0], [1, 4], [2, 0, 3], [5, 2], [5]:
            hidden, labels = hidden_states(model, [everything[i] for i in order])
            for row, label, i in zip(hidden, labels, order):
                N = len(everything[i].ids)
                close(model.lm_head(row)[:N], alone[i])
                assert label.tolist() == everything[i].labels.tolist() + [-100] * (len(label) - N)
            loss = summed([everything[i] for i in order]).item()
            assert loss == pytest.approx(sum(losses[i] for i in order), rel=1e-5)  # rounding


def test_drawing_goes_through_all_lines_every_epoch_in_another_order():
    drawn = train.draw(list(range(50)), 3, 0, 150)
    epochs = [drawn[i : i + 50] for i in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(50))]}) == 4
    assert train.draw(list(range(50)), 3, 40, 20) == drawn[40:60]  # wherever one begins
    assert train.draw(list(range(50)), 4, 0, 50) != epochs[0]


def test_the_learning_rate_warms_up_then_falls_as_half_a_cosine():
    rates = [train.learning_rate(step, 12, 1.0, 4) for step in range(12)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.5)  # half of the way from step 4 to 12
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.038, abs=1e-3)  # (1 + cos(7 / 8 pi)) / 2


# ---- full training ----


@pytest.fixture(scope="module")
def full_run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("full")
    assert main(arguments(data, out, "--steps", 3, "--batch", 2, "--lr", 1e-3)) == 0
    return out


@pytest.mark.slow
def test_a_few_steps_from_random_weights_lower_the_loss(data, tmp_path, capsys):
    argv = "--init", FOLDER, "--steps", 12, "--batch", 5, "--lr", 3e-3
    assert main(arguments(data, tmp_path, *argv)) == 0
    lines, log = capsys.readouterr().err.splitlines(), read_log(tmp_path)
    assert len(lines) == 12 and lines[-1].startswith("step 12/12: loss ")
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert log[0]["lr"] == pytest.approx(3e-3)
    # Nothing is known yet of a vocabulary of 320.
    assert log[0]["loss"] == pytest.approx(math.log(320), abs=0.5)
    assert log[-1]["loss"] < log[0]["loss"] - 1


def mean_loss(model: MossAudio, samples: list[train.Sample]) -> float:
    """The loss of the first step with --batch 2."""
    drawn = train.draw(samples, 0, 0, 2)
    learned = sum((sample.labels != -100).sum().item() for sample in drawn)
    return SummedLoss(model)(drawn).item() / learned


def test_random_weights_are_the_seeds_and_take_nothing_from_the_folders():
    first, again, other = (random_model(FOLDER, seed).state_dict() for seed in (0, 0, 1))
    for name, golden in golden_model().state_dict().items():
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], golden)
        if len(first[name].unique()) > 1:  # norms begin as 1, biases as 0
            assert not torch.equal(first[name], other[name])


def test_full_training_changes_every_parameter(full_run):
    weights, before = trained_weights(full_run), golden_model().state_dict()
    assert weights.keys() == before.keys()
    assert not [name for name in weights if torch.equal(weights[name], before[name])]


def test_what_is_saved_is_a_released_folder_in_bfloat16(full_run):
    assert {path.name for path in full_run.iterdir()} == REST | {"model.safetensors", "training"}
    assert all((full_run / name).read_bytes() == (FOLDER / name).read_bytes() for name in REST)
    stored, weights = load_file(full_run / "model.safetensors"), trained_weights(full_run)
    golden = json.loads((FOLDER / "model.safetensors.index.json").read_text())["weight_map"]
    buffers = {"audio_encoder.embed_positions.inv_timescales"}  # upstream's, which no loader needs
    assert stored.keys() == golden.keys() - buffers
    assert all(torch.equal(tensor, weights[name].bfloat16()) for name, tensor in stored.items())


def test_what_is_larger_than_a_shard_is_saved_in_shards_with_an_index(tmp_path):
    save_checkpoint(golden_model(), tmp_path, FOLDER, shard_bytes=300_000)
    shards = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert shards.keys() == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards.values()]
    assert max(sizes) <= 300_000
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}


def test_one_file_takes_the_place_of_shards_and_the_other_way_round(tmp_path):
    shards_and_index = (300_000, 4), (600_000, 3)
    for seed, (shard_bytes, files) in enumerate([*shards_and_index, (5_000_000, 1), (300_000, 4)]):
        model = random_model(FOLDER, seed)
        save_checkpoint(model, tmp_path, FOLDER, shard_bytes)
        assert len(contents(tmp_path).keys() - REST) == files
        for name, weight in load(tmp_path, "bfloat16").state_dict().items():
            assert torch.equal(weight, model.state_dict()[name].bfloat16()), name


# ---- LoRA ----

ADAPTER = "--lora-rank", 4, "--lora-alpha", 2, "--lora-encoder"  # as peft's in golden/training
LORA_RUN = "--steps", 3, "--batch", 2, "--lr", 1e-2, *ADAPTER


@pytest.fixture(scope="module")
def lora_run(data, tmp_path_factory) -> tuple[Path, MossAudio]:
    """The folder of a LoRA run, and the model as it was at its end."""
    out, model = tmp_path_factory.mktemp("lora"), load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_model", lambda *_: model.requires_grad_(True))
        assert main(arguments(data, out, *LORA_RUN)) == 0
    return out, model


def test_lora_trains_its_a_and_b_and_nothing_else_to_the_bit(lora_run):
    out, model = lora_run
    trained, state = trained_weights(out), model.state_dict()
    assert trained.keys() == {name for name in state if ".lora_" in name}
    assert all(tensor.any() for tensor in trained.values())  # B began as 0
    for name, weight in golden_model().state_dict().items():
        module, _, kind = name.rpartition(".")
        assert torch.equal(state.get(f"{module}.base.{kind}", state.get(name)), weight)


def test_the_saved_adapter_has_pefts_names_and_keys_and_loads(lora_run, samples):
    out, model = lora_run
    saved, pefts = (load_file(folder / "adapter_model.safetensors") for folder in (out, LORA))
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in pefts.items()}
    config, golden = (json.loads((f / "adapter_config.json").read_text()) for f in (out, LORA))
    assert config == {name: golden[name] for name in config}
    assert {"peft_type", "task_type", "r", "lora_alpha", "target_modules"} <= config.keys()
    assert contents(out).keys() == {"adapter_model.safetensors", "adapter_config.json"}
    # W x + s B A x is rounded otherwise than (W + s B A) x.
    close(logits_of(load(lora=out), samples[3]), logits_of(model, samples[3]), 2e-5)


def test_by_default_the_decoder_alone_is_adapted_and_alpha_is_twice_the_rank(data, tmp_path):
    argv = "--steps", 1, "--batch", 1, "--lora-rank", 3
    assert main(arguments(data, tmp_path, *argv)) == 0
    saved, pefts = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, LORA))
    assert saved.keys() == {name for name in pefts if "audio_encoder" not in name}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert "audio_encoder" not in config["target_modules"]


def test_a_merged_adapter_is_added_to_the_stored_weights_and_rounded_once(checkpoint, tmp_path):
    for path in checkpoint.glob("model*"):
        path.unlink()
    base = random_model(FOLDER, 0).state_dict()
    adapter = load_file(LORA / "adapter_model.safetensors")
    save_file(base, checkpoint / "model.safetensors")  # in float32
    out = tmp_path / "out"
    assert main(["--model", str(checkpoint), "--merge", str(LORA), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == REST | {"model.safetensors"}
    # Whoever may read one may read all.
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    for name, weight in load(out, "bfloat16").state_dict().items():
        part = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        product = 0
        if f"{part}A.weight" in adapter:
            product = 0.5 * (adapter[f"{part}B.weight"] @ adapter[f"{part}A.weight"])
        assert torch.equal(weight, (base[name] + product).bfloat16()), name


def test_the_first_loss_is_the_given_models(full_run, lora_run, data, tmp_path, samples):
    assert main(arguments(data, tmp_path, "--steps", 1, "--batch", 2, "--lora", LORA)) == 0
    # A new adapter changes nothing.
    for out, lora in (full_run, None), (lora_run[0], None), (tmp_path, LORA):
        first = mean_loss(load(lora=lora), samples)
        assert read_log(out)[0]["loss"] == pytest.approx(first, rel=1e-5)


# ---- stopping, going on, dividing a step ----


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--lora-rank", 2)])
def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(lora, data, tmp_path, monkeypatch):
    argv = "--steps", 5, "--batch", 2, "--lr", 1e-3, "--save-every", 2, *lora
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(arguments(data, whole, *argv)) == 0
    rate = train.learning_rate

    def rate_or_stop(step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return rate(step, *rest)

    with monkeypatch.context() as patch:
        # Ctrl-C after three steps, of which two are in the saved state.
        patch.setattr(train, "learning_rate", rate_or_stop)
        assert main(arguments(data, halves, *argv)) == 130
    assert len(read_log(halves)) == 3 and {path.name for path in halves.iterdir()} == {"training"}
    # Weights that are newer than the state don't make a training that was stopped a finished one.
    (halves / ("adapter_model.safetensors" if lora else "model.safetensors")).touch()
    assert main(arguments(data, halves, *argv)) == 0
    assert contents(halves) == contents(whole)
    assert contents(halves / "training") == contents(whole / "training")


@pytest.fixture
def finished(data, lora_run, tmp_path) -> tuple[Path, list[str]]:
    """A copy of a finished training's folder, and the arguments that made it."""
    out = tmp_path / "out"
    shutil.copytree(lora_run[0], out)  # with the files' times
    return out, arguments(data, out, *LORA_RUN)


def test_a_finished_training_says_so_and_does_nothing(finished, capsys, monkeypatch):
    out, argv = finished
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("a model was loaded"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(argv) == 0
    assert f"{out}: this training of 3 steps is finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("kind", ["absent", "older"])
def test_weights_that_a_stopped_training_did_not_write_are_written(kind, finished, monkeypatch):
    out, argv = finished
    path = out / "adapter_model.safetensors"
    right = path.read_bytes()
    path.write_bytes(b"of an earlier training")
    os.utime(path, (0, 0))
    if kind == "absent":
        path.unlink()
    monkeypatch.setattr(train, "learning_rate", lambda *_: pytest.fail("a step was made"))
    assert main(argv) == 0
    assert path.read_bytes() == right


def test_going_on_with_other_arguments_is_refused(full_run, data, refused):
    other = arguments(data, full_run, "--steps", 4, "--batch", 2, "--lr", 2e-3)
    said = refused(main, *other)
    assert "another steps, lr" in said and "--out" in said


@pytest.mark.slow
def test_a_batch_is_the_same_as_accumulated_passes_and_as_processes(data, tmp_path):
    def argv(out: str, *options) -> list[str]:
        return arguments(data, tmp_path / out, "--steps", 3, "--lr", 1e-3, *options)

    assert main(argv("batch", "--batch", 4)) == 0
    assert main(argv("accumulated", "--batch", 2, "--accumulate", 2)) == 0
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    two = subprocess.run(
        [sys.executable, *torchrun, train.__file__, *argv("processes", "--batch", 2)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("step 3/3") == 1  # one process speaks
    losses = [entry["loss"] for entry in read_log(tmp_path / "batch")]
    weights = trained_weights(tmp_path / "batch")
    for other in "accumulated", "processes":
        others = [entry["loss"] for entry in read_log(tmp_path / other)]
        assert others == pytest.approx(losses, rel=1e-5)
        for name, tensor in trained_weights(tmp_path / other).items():
            # AdamW divides by the gradient's size: where that is rounding, so is the step's sign,
            # 3e-3 in all.
            assert (tensor - weights[name]).abs().mean() < 3e-5, name
    assert contents(tmp_path / "processes").keys() == REST | {"model.safetensors"}


def test_a_checkpoint_stays_whole_when_writing_the_next_one_fails(tmp_path, monkeypatch):
    save_checkpoint(golden_model(), tmp_path, FOLDER, shard_bytes=300_000)
    before = contents(tmp_path)
    calls = []

    def save_one_file(tensors, path, metadata):
        if calls:
            Path(path).write_bytes(b"half a file")
            raise OSError("no space left")
        calls.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(common, "save_file", save_one_file)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(random_model(FOLDER, 0), tmp_path, FOLDER, shard_bytes=300_000)
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def loaded(folder: Path) -> tuple[float, torch.Tensor] | None:
    """A checkpoint as it loads, its rope_theta and all of its weights; None if it is refused."""
    try:
        model = load(folder)
    except ValueError:
        return None
    weights = torch.cat([weight.flatten() for weight in model.state_dict().values()])
    return model.config.decoder.rope_theta, weights


def kill_at(count: int, patch: pytest.MonkeyPatch) -> None:
    """Ends the program at the file number `count` that is renamed or removed, with no tidying."""
    calls = itertools.count()
    rename, remove = os.replace, Path.unlink

    def act(work, *args, **options):
        if next(calls) == count:
            patch.setattr(shutil, "rmtree", lambda *args, **options: None)
            raise SystemExit
        work(*args, **options)

    patch.setattr(os, "replace", functools.partial(act, rename))
    patch.setattr(Path, "unlink", lambda *args, **options: act(remove, *args, **options))


@pytest.mark.slow
@pytest.mark.parametrize("theta", [1e6, 9e3])  # the same configuration, and another
@pytest.mark.parametrize("sizes", [(300_000, 300_000), (300_000, 5_000_000), (5_000_000, 300_000)])
def test_a_save_that_is_killed_anywhere_leaves_the_old_checkpoint_or_the_new(
    sizes, theta, checkpoint, tmp_path, monkeypatch
):
    wholes = []
    for seed, (name, size, rate) in enumerate(zip(("old", "new"), sizes, (1e6, theta))):
        edit_json(checkpoint / "config.json", **{"language_config.rope_theta": rate})
        model = random_model(checkpoint, seed)
        save_checkpoint(model, tmp_path / name, checkpoint, size)
        wholes.append(loaded(tmp_path / name))
    found = []
    for count in range(24):
        out = Path(shutil.copytree(tmp_path / "old", tmp_path / str(count)))
        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
            kill_at(count, patch)
            save_checkpoint(model, out, checkpoint, sizes[1])
        now = loaded(out)
        same = [now is not None and now[0] == it[0] and torch.equal(now[1], it[1]) for it in wholes]
        found.append(("old", "new")[same.index(True)] if now else "refused")
        save_checkpoint(model, out, checkpoint, sizes[1])  # removes what was left
        assert len(os.listdir(out)) == len(os.listdir(tmp_path / "new"))
    assert {"old", "new"} <= set(found) <= {"old", "new", "refused"}
    assert "refused" not in found or theta != 1e6


def test_training_stops_at_the_first_loss_that_is_not_finite_and_saves_nothing_of_it(
    data, tmp_path, monkeypatch, capsys
):
    model = load().requires_grad_(True)
    (bracket,) = model.tokenizer.encode("[").ids  # line 3 alone has it
    with torch.no_grad():
        model.language_model.embed_tokens.weight[bracket] = math.nan
    monkeypatch.setattr(train, "load_model", lambda *_: model)
    step = train.draw([1, 2, 3, 4, 5], 0, 0, 5).index(3) + 1
    argv = "--steps", 5, "--batch", 1, "--save-every", 1
    assert main(arguments(data, tmp_path, *argv)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"step {step}: the loss is nan" in said and "data line [3]" in said
    assert os.listdir(tmp_path) == ["training"]
    assert [entry["step"] for entry in read_log(tmp_path)] == list(range(1, step))
    assert common.read_run(tmp_path / "training" / "state.safetensors", {})["step"] == step - 1


@pytest.fixture
def stopped(finished) -> tuple[Path, list[str]]:
    """A training's folder with the state after two of three steps, and its arguments."""
    out, argv = finished
    rewrite(out, {}, step=2)
    return out, argv


def rewrite(out: Path, tensors: dict, step: int = 2) -> None:
    """Changes tensors of a saved state, of which None takes one away, and its step."""
    path = out / "training" / "state.safetensors"
    run = common.read_run(path, {}) | {"step": step}
    tensors = load_file(path) | tensors
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, {"run": json.dumps(run)})


NO_JSON = ["{", "[" * 10**5]
NO_STEP = ["[]", "{}", '{"step": 1.5}', '{"step": -1}']


@pytest.mark.parametrize("text", [*NO_JSON, *NO_STEP])
def test_a_state_of_no_run_is_refused(text, stopped, refused):
    out, argv = stopped
    save_file({}, out / "training" / "state.safetensors", {"run": text})
    expected = "a saved state" if text in NO_JSON else "an object with a step"
    assert refused(main, *argv).endswith(f"; expected {expected}")


@pytest.mark.parametrize("moment", [None, torch.zeros(3)], ids=["absent", "short"])
def test_a_state_without_a_moment_or_with_a_short_one_is_refused(moment, stopped, refused):
    out, argv = stopped
    rewrite(out, {"exp_avg.language_model.layers.0.mlp.up_proj.lora_A.weight": moment})
    assert "state.safetensors: " in refused(main, *argv)


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100], ids=["pipe", "empty", "noise"])
def test_what_is_no_state_is_refused(content, stopped, refused):
    out, argv = stopped
    path = out / "training" / "state.safetensors"
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    assert "state.safetensors" in refused(main, *argv)


@pytest.mark.parametrize("line", ["{", "[" * 10**5, "[]", "{}", '{"step": "1"}', "\ud800"])
def test_a_log_that_was_tampered_with_is_refused(line, stopped, refused):
    out, argv = stopped
    path = out / "training" / "log.jsonl"
    path.write_text('{"step": 1}\n' + line, errors="surrogatepass")
    assert f"{path}: line 2 has no step; expected" in refused(main, *argv)


# ---- bad data ----


@pytest.fixture
def small(tmp_path, data, monkeypatch) -> Path:
    """The working folder, with clips, and a checkpoint of 200 positions."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data.parent / "clips", "clips")
    shutil.copytree(FOLDER, "small")
    edit_json(Path("small/config.json"), **{"language_config.max_position_embeddings": 200})
    write_clip(tmp_path / "short.wav", torch.zeros(100))
    write_clip(tmp_path / "long.wav", torch.zeros(30 * 16_000))
    Path("good.jsonl").write_text(json.dumps(GOOD))
    Path("empty.jsonl").write_text("\n")
    return tmp_path


SHORT = ["clips/0.wav"]
GOOD = data_line(SHORT, PROMPT, "yes")
SOUND = golden_model().tokenizer.id_to_token(golden_model().config.adapter.audio_token_id)
# What no parser of the format takes is in test_evaluate.py; here is what can't be learned from.
BAD = {
    "no answer": ({"conversation": GOOD["conversation"][:2]}, "no answer"),
    "absent": (data_line(["clips/absent.wav"], PROMPT, "yes"), "absent.wav: No such file"),
    "too short": (data_line(["short.wav"], PROMPT, "yes"), "short.wav: 100 samples"),
    "long clip": (data_line(["long.wav"], PROMPT, "yes"), "expected at most 200"),
    "long answer": (data_line(SHORT, PROMPT, "yes " * 100), "its answer; expected at most 200"),
    "placeholders": (data_line(SHORT, CLIP * 2, "yes"), "2 audio placeholders"),
    "sound": (data_line(SHORT, PROMPT, f"a {SOUND}"), "a token that stands for sound"),
    "a surrogate": (data_line(SHORT, PROMPT, "\ud800"), "the answer has bytes that are not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_before_the_first_step(kind, small, refused):
    bad, expected = BAD[kind]
    Path("bad.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(bad)}\n{json.dumps(GOOD)}")
    said = refused(main, "--model", "small", "--data", "bad.jsonl", "--out", "out")
    assert said.startswith("train: bad.jsonl: 1 bad lines: line 3: ") and expected in said
    assert not Path("out").exists()


def test_the_first_three_bad_lines_and_their_count_are_in_one_message(small, refused):
    bad = [BAD[kind][0] for kind in ("no answer", "absent", "sound", "a surrogate", "too short")]
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, [GOOD, *bad])))
    said = refused(main, *arguments("bad.jsonl", "out"))
    assert re.findall(r"(?:line |)\d(?= bad lines|: )", said) == ["5", "line 2", "line 3", "line 4"]


def test_a_line_that_is_nested_too_deep_to_be_shown_is_a_bad_line():
    nested = []
    for _ in range(10**5):
        nested = [nested]
    line = GOOD | {"task": nested}
    with pytest.raises(ValueError, match="x.jsonl: 1 bad lines: line 7: .*recursion"):
        common.each_line("x.jsonl", [(7, line)], lambda value: common.read_example(value, Path()))


BAD_COMMANDS = {
    "--model small --data absent.jsonl": "absent.jsonl",
    "--model small --data empty.jsonl": "expected at least one line",
    "--model small --data good.jsonl --out good.jsonl": "good.jsonl",
    "--model small --data good.jsonl --steps 0": "--steps: expected a number above 0",
    "--model small --data good.jsonl --lora-rank -1": "--lora-rank: expected a number from 0",
    "--model small --data good.jsonl --lora-rank 1000000": "--lora-rank: expected a number from 0",
    "--model small --data good.jsonl --seed 4611686018427387904": "--seed: expected",
    "--model small --data good.jsonl --lr inf": "--lr: expected a number above 0 and below 1e9",
    "--model= --data good.jsonl": "--model: expected a folder's name",
    "--model small --data good.jsonl --lora-encoder": "--lora-encoder: expected --lora-rank",
    "--model small --data good.jsonl --lora absent": "adapter_config.json is not there",
    "--model small --data good.jsonl --init small": "not allowed with",
    "--model small": "expected --data or --merge",
    "--model small --merge absent --lora absent": "not allowed with",
    "--init small --merge absent": "--merge and --lora: expected --model",
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_a_bad_command_line_is_refused(command, small, refused):
    said = refused(main, "--out", "out", "--device", "cpu", *command.split())
    assert BAD_COMMANDS[command] in said
    assert not Path("out").exists()


# ---- bad adapters ----


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A copy of peft's adapter, to be spoilt."""
    return Path(shutil.copytree(LORA, tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("peft_type", "LOHA"),
        ("peft_type", ...),
        ("init_lora_weights", "pissa_niter_4"),
        ("r", None),
        ("lora_alpha", "2"),
    ],
)
def test_an_adapter_with_what_is_not_plain_lora_is_refused(key, value, adapter):
    edit_json(adapter / "adapter_config.json", **{key: value})
    assert f"adapter_config.json: {key}" in refusal(lora_change, adapter, FOLDER)


MODULE = "base_model.model.language_model.layers.0.mlp.up_proj."
A = MODULE + "lora_A.weight"
B = MODULE + "lora_B.weight"
NO_MODULE = {name.replace("layers.0", "layers.9"): torch.ones(4, 4) for name in (A, B)}
SPOILT = {
    "a third tensor": {MODULE + "lora_magnitude_vector": torch.ones(112)},
    "no such module": NO_MODULE,
    "a tensor that is not LoRA's": {"base_model.model.lm_head.weight": torch.ones(320, 64)},
    "A alone": {B: None},
    "B alone": {A: None},
    "a narrow A": {A: torch.ones(4, 63)},
    "another rank": {A: torch.ones(2, 64), B: torch.ones(112, 2)},
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_an_adapter_whose_tensors_fit_no_weight_is_refused(spoilt, adapter):
    tensors = load_file(LORA / "adapter_model.safetensors") | SPOILT[spoilt]
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert "fits no weight" in refusal(lora_change, adapter, FOLDER)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_adapter_that_is_not_finite_is_refused(value, adapter):
    tensors = load_file(LORA / "adapter_model.safetensors")
    tensors[B][0, 0] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert f"{A} or its other half holds NaN or infinity" in refusal(lora_change, adapter, FOLDER)


def test_a_sum_of_weights_and_adapter_that_overflows_is_refused(adapter):
    edit_json(adapter / "adapter_config.json", lora_alpha=2e9)
    tensors = load_file(LORA / "adapter_model.safetensors")
    tensors[A] *= 1e17
    tensors[B] *= 1e17
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="up_proj.weight overflows; expected"):
        load(lora=adapter)


def test_an_adapter_that_is_not_whole_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    save_file({}, path)
    assert "expected pairs" in refusal(lora_change, adapter, FOLDER)
    path.write_bytes(whole[:-100])
    assert f"{path}: " in refusal(lora_change, adapter, FOLDER)
    path.unlink()
    assert str(path) in refusal(lora_change, adapter, FOLDER)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_adapter_config_that_is_no_json_object_is_called_an_adapters(text, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(text)
    said = refusal(lora_change, adapter, FOLDER)
    assert said.startswith(str(path)) and "expected an object, an adapter's configuration" in said
    assert "checkpoint" not in said
