"""tools/train.py: upstream's loss and gradients, peft's adapters, batches, resuming, and what it writes and refuses."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moss_min
from conftest import GOLDEN, HERE, JFK, edit_json, golden_model
from moss_min import MossAudio, Prompt, read_lora

TOOL = HERE.parent / "tools" / "train.py"
sys.path.insert(0, str(TOOL.parent))
import train  # noqa: E402
from train import (  # noqa: E402
    SummedLoss,
    add_lora,
    batch_hidden,
    main,
    make_sample,
    random_model,
    save_checkpoint,
)

FOLDER, TRAINING = GOLDEN / "checkpoint", GOLDEN / "training"
LORA = TRAINING / "lora"
SECONDS = (
    0.3,
    1.1,
    4.0,
    5.5,
    9.0,
)  # three have a whole chunk: one call of the encoder is for them together
PROMPT = "Transcribe the audio."
ANSWERS = "and", "and so", "my fellow [1.25] americans", "ask not what your country", "can do"
REST = {"added_tokens.json", "config.json", "generation_config.json", "merges.txt", "processor_config.json",
        "tokenizer_config.json", "vocab.json"}  # a released folder's files beside the weights  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data_line(clip, answer: str = "yes", prompt: str = PROMPT) -> dict:
    turns = ("user", "audio", str(clip)), ("user", "text", prompt), ("assistant", "text", answer)
    return {
        "conversation": [dict(zip(("role", "message_type", "content"), turn)) for turn in turns]
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five clips of 0.3 to 9 s, under paths that are relative to the file."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "clips").mkdir()
    samples, rate = soundfile.read(JFK, dtype="int16")
    for i, seconds in enumerate(SECONDS):
        soundfile.write(
            folder / "clips" / f"{i}.wav", samples[8000 * i :][: int(seconds * rate)], rate
        )
    lines = [json.dumps(data_line(f"clips/{i}.wav", answer)) for i, answer in enumerate(ANSWERS)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def arguments(data, out, *argv) -> list[str]:
    source = () if "--init" in argv else ("--model", FOLDER)
    common = "--data", data, "--out", out, "--device", "cpu", "--warmup", "1"
    return [str(argument) for argument in (*source, *common, *argv)]


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]


def trained_weights(out: Path) -> dict[str, torch.Tensor]:
    """What a run trained, in float32, from its saved state."""
    state = load_file(out / "training" / "state.safetensors")
    return {
        name.removeprefix("weight."): state[name] for name in state if name.startswith("weight.")
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refusal(capsys, argv: list[str]) -> str:
    """The one line on stderr of a command line that is refused."""
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("train.py: ")
    return err


# ---- upstream's figures ----


@functools.cache
def golden_training() -> tuple[dict, dict]:
    with safe_open(TRAINING / "loss.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def golden_sample() -> train.Sample:
    tensors, metadata = golden_training()
    return make_sample(
        golden_model(), metadata["text"], [tensors["waveform.0"]], metadata["answer"]
    )


def logits_of(model: MossAudio, sample: train.Sample) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(batch_hidden(model, [sample])[0])[0]


def close(ours, upstreams, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, upstreams, rtol=tolerance, atol=tolerance)


def test_ids_labels_and_logits_are_upstreams():
    tensors, sample = golden_training()[0], golden_sample()
    assert sample.ids.tolist() == tensors["input_ids"].tolist()
    assert sample.labels.tolist() == tensors["labels"].tolist()
    close(logits_of(golden_model(), sample), tensors["logits"])


def test_the_loss_and_the_gradient_of_all_170_parameters_are_upstreams():
    model = MossAudio.from_pretrained(FOLDER, "cpu", "float32").requires_grad_(True)
    tensors, sample = golden_training()[0], golden_sample()
    loss = SummedLoss(model)([sample]) / (sample.labels != -100).sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = json.loads((TRAINING / "gradient_norms.json").read_text())
    assert loss.item() == pytest.approx(norms["loss"], rel=1e-5)
    assert loss.item() == pytest.approx(tensors["loss"].item(), rel=1e-5)
    whole = [name for name in tensors if name.startswith("grad.")]
    assert len(whole) == 5
    for name in whole:
        close(gradients[name.removeprefix("grad.")], tensors[name])
    assert len(norms["gradient_norms"]) == 170
    ours = {name: gradient.norm().item() for name, gradient in gradients.items()}
    assert ours == pytest.approx(norms["gradient_norms"], rel=1e-5)


# ---- peft's adapter ----


def test_pefts_adapter_added_to_the_weights_gives_pefts_logits():
    model = MossAudio.from_pretrained(FOLDER, "cpu", "float32", lora=LORA)
    close(
        logits_of(model, golden_sample()), load_file(TRAINING / "lora_logits.safetensors")["logits"]
    )


def test_the_command_line_adds_an_adapter(capsys):
    argv = [
        str(JFK),
        "--model",
        str(FOLDER),
        "--device",
        "cpu",
        "--greedy",
        "--max-new-tokens",
        "8",
        "--quiet",
    ]
    answers = []
    for lora in (None, LORA):
        assert moss_min.main([*argv, *(["--lora", str(lora)] if lora else [])]) == 0
        model = MossAudio.from_pretrained(FOLDER, "cpu", lora=lora)
        answers.append(model.ask(JFK, "Describe this audio.", temperature=0, max_new_tokens=8))
        assert capsys.readouterr().out == answers[-1] + "\n"
    assert answers[0] != answers[1]


def test_pefts_tensors_put_into_add_lora_give_pefts_logits():
    model = MossAudio.from_pretrained(FOLDER, "cpu", "float32")
    config = json.loads((LORA / "adapter_config.json").read_text())
    assert add_lora(model, 4, 2, with_encoder=True) == config["target_modules"]
    tensors = load_file(LORA / "adapter_model.safetensors")
    renamed = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected and not [name for name in missing if ".lora_" in name]
    close(
        logits_of(model, golden_sample()), load_file(TRAINING / "lora_logits.safetensors")["logits"]
    )


def test_a_new_adapter_changes_nothing():
    model = MossAudio.from_pretrained(FOLDER, "cpu", "float32")
    before = logits_of(model, golden_sample())
    add_lora(model, 4, 2, with_encoder=True)
    assert torch.equal(logits_of(model, golden_sample()), before)


# ---- samples and batches ----


@pytest.fixture(scope="module")
def samples(data) -> list[train.Sample]:
    lines = train.read_data(data, golden_model())
    return [make_sample(golden_model(), prompt, clips, answer) for clips, prompt, answer in lines]


@pytest.mark.parametrize("time_markers", [None, True, False])
def test_a_sample_is_inferences_prompt_and_the_answer_which_alone_is_learned(time_markers):
    model = golden_model()
    prompt = model.prompt(PROMPT, [JFK], time_markers)
    learned = [
        *model.tokenizer.encode("ask [0.50] not").ids,
        model.tokenizer.token_to_id("<|im_end|>"),
    ]
    sample = make_sample(model, PROMPT, [JFK], "ask [0.50] not", time_markers)
    assert sample.ids.tolist() == prompt.ids.tolist() + learned
    assert sample.labels.tolist() == [-100] * len(prompt.ids) + learned
    assert all(torch.equal(*pair) for pair in zip(sample.mels, prompt.mels, strict=True))
    digits = len(prompt.ids) - len(model.prompt(PROMPT, [JFK], False).ids)
    assert digits == (0 if time_markers is False else 6)  # 2, 4, 6, 8, 10


def test_a_sample_in_a_batch_has_the_hidden_states_of_inference_and_the_loss_it_has_alone(samples):
    model, summed = golden_model(), SummedLoss(golden_model())
    text = make_sample(
        model, "hello", [], "a longer answer than prompt " * 9
    )  # without a sound, and the longest
    two = make_sample(model, PROMPT, [samples_of_jfk(0.2), samples_of_jfk(4.7)], "two clips")
    everything = [*samples, text, two]
    with torch.no_grad():
        embedded = [model.embed(Prompt(sample.ids, sample.mels)) for sample in everything]
        alone = [
            model.language_model(x, torch.arange(x.shape[1])[None], deepstack=rows)[0]
            for x, rows in embedded
        ]
        losses = [summed([sample]).item() for sample in everything]
        for order in (
            [0, 1, 2, 3, 4, 5, 6],
            [6, 4, 5, 3, 2, 1, 0],
            [1, 4],
            [2, 0, 3, 1, 6],
            [5, 2],
            [3, 3, 6],
            [5],
        ):
            hidden, labels = batch_hidden(model, [everything[i] for i in order])
            for row, label, i in zip(hidden, labels, order):
                N = len(everything[i].ids)
                close(row[:N], alone[i])
                assert label.tolist() == everything[i].labels.tolist() + [-100] * (len(label) - N)
            loss = summed([everything[i] for i in order]).item()
            assert loss == pytest.approx(sum(losses[i] for i in order), rel=1e-5)  # rounding


def samples_of_jfk(seconds: float) -> torch.Tensor:
    return moss_min.load_audio(JFK)[: int(16_000 * seconds)]


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


def test_a_few_steps_from_random_weights_lower_the_loss(data, tmp_path, capsys):
    capsys.readouterr()
    assert (
        main(arguments(data, tmp_path, "--init", FOLDER, "--steps", 12, "--batch", 5, "--lr", 3e-3))
        == 0
    )
    lines, log = capsys.readouterr().err.splitlines(), read_log(tmp_path)
    assert (
        len(lines) == 12
        and lines[-1].startswith("step 12/12: loss ")
        and "minutes left" in lines[-1]
    )
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert set(log[0]) == {"step", "loss", "lr"} and log[0]["lr"] == pytest.approx(3e-3)
    assert log[0]["loss"] == pytest.approx(
        np.log(320), abs=0.5
    )  # nothing is known of a vocabulary of 320
    assert log[-1]["loss"] < log[0]["loss"] - 1


def test_random_weights_are_the_seeds_and_take_nothing_from_the_folders():
    first, again, other = (
        dict(random_model(FOLDER, seed).named_parameters()) for seed in (0, 0, 1)
    )
    drawn = [
        name for name, weight in first.items() if len(weight.unique()) > 1
    ]  # norms begin as 1, biases as 0
    assert len(drawn) > 100
    for name in drawn:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert not torch.equal(first[name], golden_model().get_parameter(name))
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in first.values())


def test_full_training_goes_on_from_the_model_and_changes_every_parameter(full_run, samples):
    weights = trained_weights(full_run)
    before = dict(golden_model().named_parameters())
    assert weights.keys() == before.keys()
    assert not [name for name in weights if torch.equal(weights[name], before[name])]
    chosen = train.draw(samples, 0, 0, 2)
    learned = sum((sample.labels != -100).sum().item() for sample in chosen)
    first = SummedLoss(golden_model())(chosen).item() / learned
    assert read_log(full_run)[0]["loss"] == pytest.approx(first, rel=1e-5)


def test_what_is_saved_is_a_released_folder_in_bfloat16(full_run):
    assert {path.name for path in full_run.iterdir()} == REST | {"model.safetensors", "training"}
    assert all((full_run / name).read_bytes() == (FOLDER / name).read_bytes() for name in REST)
    stored, weights = load_file(full_run / "model.safetensors"), trained_weights(full_run)
    golden = json.loads((FOLDER / "model.safetensors.index.json").read_text())["weight_map"]
    buffers = {"audio_encoder.embed_positions.inv_timescales"}  # upstream's, which no loader needs
    assert stored.keys() == golden.keys() - buffers
    assert all(torch.equal(tensor, weights[name].bfloat16()) for name, tensor in stored.items())
    loaded = MossAudio.from_pretrained(full_run, "cpu", "float32")
    assert all(
        torch.equal(parameter, stored[name].float())
        for name, parameter in loaded.named_parameters()
    )


def test_what_is_larger_than_a_shard_is_saved_in_shards_with_an_index(tmp_path):
    save_checkpoint(golden_model(), tmp_path, FOLDER, shard_bytes=300_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) == 3
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    tensors = [load_file(tmp_path / shard) for shard in shards]
    assert all(sum(tensor.nbytes for tensor in shard.values()) <= 300_000 for shard in tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: file for file, shard in zip(shards, tensors) for name in shard
    }
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for shard in tensors for tensor in shard.values()
    )
    loaded = MossAudio.from_pretrained(tmp_path, "cpu", "bfloat16").state_dict()
    expected = golden_model("checkpoint", "bfloat16").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_one_file_takes_the_place_of_shards_and_the_other_way_round(tmp_path):
    first, second = random_model(FOLDER, 0), random_model(FOLDER, 1)
    for model, shard_bytes in (
        (first, 300_000),
        (second, 5_000_000),
        (first, 300_000),
        (second, 400_000),
    ):
        save_checkpoint(model, tmp_path, FOLDER, shard_bytes)
        loaded = MossAudio.from_pretrained(tmp_path, "cpu", "bfloat16").lm_head.weight
        assert torch.equal(loaded, model.lm_head.weight.bfloat16())
        names = {path.name for path in tmp_path.iterdir()} - REST
        if shard_bytes == 5_000_000:
            assert names == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            assert names == {"model.safetensors.index.json", *index["weight_map"].values()}


# ---- LoRA ----


@pytest.fixture(scope="module")
def lora_run(data, tmp_path_factory):
    """The folder of a LoRA run, and the model as it was at its end."""
    out, models = tmp_path_factory.mktemp("lora"), []
    with pytest.MonkeyPatch.context() as patch:
        real = train.train
        patch.setattr(
            train,
            "train",
            lambda model, lines, args: (models.append(model), real(model, lines, args)),
        )
        argv = "--steps", 3, "--batch", 2, "--lr", 1e-2, "--lora-rank", 4, "--lora-encoder"
        assert main(arguments(data, out, *argv)) == 0
    return out, models[0]


def test_lora_trains_its_a_and_b_and_nothing_else_to_the_bit(lora_run):
    out, model = lora_run
    trained, state = trained_weights(out), model.state_dict()
    assert trained.keys() == {name for name in state if ".lora_" in name}
    assert all(tensor.any() for tensor in trained.values())  # B began as 0
    frozen = {
        name.replace(".base.", "."): tensor for name, tensor in state.items() if name not in trained
    }
    before = golden_model().state_dict()
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    assert len({entry["loss"] for entry in read_log(out)}) == 3


def test_the_saved_adapter_has_pefts_names_and_keys_and_loads(lora_run, samples):
    out, model = lora_run
    saved, pefts = (
        load_file(out / "adapter_model.safetensors"),
        load_file(LORA / "adapter_model.safetensors"),
    )
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in pefts.items()
    }
    config, golden = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (out, LORA)
    )
    assert config == {name: golden[name] for name in config}
    assert {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "target_modules",
        "bias",
        "modules_to_save",
    } <= config.keys()
    assert {path.name for path in out.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "training",
    }
    loaded = MossAudio.from_pretrained(FOLDER, "cpu", "float32", lora=out)
    assert not torch.allclose(
        logits_of(loaded, samples[3]), logits_of(golden_model(), samples[3]), atol=1e-2
    )
    close(
        logits_of(loaded, samples[3]), logits_of(model, samples[3]), 2e-5
    )  # W x + s B A x is not (W + s B A) x


def test_without_lora_encoder_the_decoder_alone_is_adapted(data, tmp_path):
    argv = "--steps", 1, "--batch", 1, "--lora-rank", 2, "--lora-alpha", 6
    assert main(arguments(data, tmp_path, *argv)) == 0
    saved, pefts = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, LORA))
    assert saved.keys() == {name for name in pefts if "audio_encoder" not in name}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6) and "audio_encoder" not in config[
        "target_modules"
    ]
    assert {scale for *_, scale in read_lora(tmp_path, golden_model()).values()} == {3}


def test_a_merged_adapter_is_what_loading_with_it_gives_rounded_once(tmp_path):
    assert main(["--model", str(FOLDER), "--merge", str(LORA), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == REST | {"model.safetensors"}
    assert (
        len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    )  # whoever may read one may read all
    merged = MossAudio.from_pretrained(tmp_path, "cpu", "bfloat16")
    loaded = MossAudio.from_pretrained(FOLDER, "cpu", "bfloat16", lora=LORA)
    assert torch.equal(logits_of(merged, golden_sample()), logits_of(loaded, golden_sample()))
    base, adapter = golden_model().state_dict(), load_file(LORA / "adapter_model.safetensors")
    for name, weight in merged.state_dict().items():
        part = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        product = (
            0.5 * adapter[f"{part}B.weight"] @ adapter[f"{part}A.weight"]
            if f"{part}A.weight" in adapter
            else 0
        )
        assert torch.equal(weight, (base[name] + product).bfloat16()), name


def test_weights_that_are_stored_in_float32_are_rounded_after_the_adapter_is_added_not_before(
    checkpoint,
):
    for path in checkpoint.glob("model*"):
        path.unlink()
    weights = {name: weight.detach() for name, weight in random_model(FOLDER, 0).named_parameters()}
    save_file(weights, checkpoint / "model.safetensors")
    exact, rounded = (
        MossAudio.from_pretrained(checkpoint, "cpu", t, lora=LORA) for t in ("float32", "bfloat16")
    )
    for name, weight in rounded.named_parameters():
        assert torch.equal(weight, exact.get_parameter(name).bfloat16()), name


# ---- stopping and going on ----


@pytest.mark.parametrize("lora", [(), ("--lora-rank", 2)])
def test_a_run_that_was_stopped_and_goes_on_ends_as_one_that_was_not(
    lora, data, tmp_path, monkeypatch
):
    argv = "--steps", 5, "--batch", 2, "--lr", 1e-3, "--save-every", 2, *lora
    whole, halves, real, drawn, last = (
        tmp_path / "whole",
        tmp_path / "halves",
        train.learning_rate,
        [],
        5,
    )

    def learning_rate(step, *rest):
        if step == last:
            raise KeyboardInterrupt
        drawn.append(
            (step, torch.rand(1).item())
        )  # for the random state; training itself draws nothing today
        return real(step, *rest)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    assert main(arguments(data, whole, *argv)) == 0
    expected = [(step, number) for step, number in drawn if step >= 2]
    last = 3  # Ctrl-C after three steps, of which two are in the saved state
    assert main(arguments(data, halves, *argv)) == 130
    assert len(read_log(halves)) == 3 and {path.name for path in halves.iterdir()} == {"training"}
    last = 5
    drawn.clear()
    assert main(arguments(data, halves, *argv)) == 0
    assert drawn == expected
    assert read_log(halves) == read_log(whole)
    assert contents(halves) == contents(whole)
    states = [load_file(out / "training" / "state.safetensors") for out in (whole, halves)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    drawn.clear()
    assert main(arguments(data, halves, *argv)) == 0 and not drawn  # all is done


def test_going_on_with_other_arguments_is_refused(full_run, data, capsys):
    before = contents(full_run) | contents(full_run / "training")
    said = refusal(capsys, arguments(data, full_run, "--steps", 4, "--batch", 2, "--lr", 2e-3))
    assert "another steps, lr" in said and "--out" in said
    assert contents(full_run) | contents(full_run / "training") == before


# ---- one step, divided in different ways ----


def test_a_batch_is_the_same_as_accumulated_passes_and_as_processes(data, tmp_path, capsys):
    common = "--steps", 3, "--lr", 1e-3, "--batch"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(TOOL),
    ]
    two = subprocess.Popen(
        [*command, *arguments(data, tmp_path / "processes", *common, 2)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert main(arguments(data, tmp_path / "batch", *common, 4)) == 0
    one = capsys.readouterr().err
    assert main(arguments(data, tmp_path / "accumulated", *common, 2, "--accumulate", 2)) == 0
    said = two.communicate(timeout=120)[0]
    assert two.returncode == 0, said
    norms = [[float(norm) for norm in re.findall(r"gradient (\S+),", text)] for text in (one, said)]
    assert len(norms[1]) == 3  # one process speaks
    assert norms[1] == pytest.approx(
        norms[0], abs=0.011
    )  # of two decimals, the last may be rounded otherwise
    losses = [entry["loss"] for entry in read_log(tmp_path / "batch")]
    weights = trained_weights(tmp_path / "batch")
    for other in "accumulated", "processes":
        assert [entry["loss"] for entry in read_log(tmp_path / other)] == pytest.approx(
            losses, rel=1e-5
        )
        for name, tensor in trained_weights(tmp_path / other).items():
            # AdamW divides by the gradient's size: where that is rounding, so is the step's sign, 3e-3 in all
            assert (tensor - weights[name]).abs().mean() < 3e-5, name
    assert {path.name for path in (tmp_path / "processes").iterdir()} == REST | {
        "model.safetensors",
        "training",
    }


# ---- writing ----


def failing_save(after: int):
    """A save_file that, from its call number `after` on, leaves half a file and fails, as on a full disk."""
    calls = []

    def save(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > after:
            Path(path).write_bytes(b"half a file")
            raise OSError("no space left")
        save_file(tensors, path, metadata)

    return save


@pytest.mark.parametrize("after", [0, 1])
def test_a_checkpoint_stays_whole_when_writing_the_next_one_fails(after, tmp_path, monkeypatch):
    save_checkpoint(golden_model(), tmp_path, FOLDER, shard_bytes=300_000)
    before = contents(tmp_path)
    monkeypatch.setattr(train, "save_file", failing_save(after))
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(random_model(FOLDER, 0), tmp_path, FOLDER, shard_bytes=300_000)
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("lora", [(), ("--lora-rank", 2)])
def test_what_was_there_stays_when_saving_fails_and_the_run_is_refused_in_one_line(
    lora, data, tmp_path, monkeypatch, capsys
):
    argv = "--steps", 4, "--batch", 1, "--save-every", 2, *lora
    assert main(arguments(data, tmp_path, *argv)) == 0
    whole = contents(tmp_path)
    shutil.rmtree(tmp_path / "training")
    monkeypatch.setattr(
        train, "save_file", failing_save(1)
    )  # the first state is written, the second is not
    capsys.readouterr()
    assert main(arguments(data, tmp_path, *argv)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "train.py: no space left"
    assert contents(tmp_path) == whole
    with safe_open(tmp_path / "training" / "state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == 2
    monkeypatch.setattr(
        train, "save_file", failing_save(1)
    )  # now the last state is, and the weights are not
    assert main(arguments(data, tmp_path, *argv)) == 2
    assert {
        name: content for name, content in contents(tmp_path).items() if not name.endswith(".part")
    } == whole


# ---- bad data ----


@pytest.fixture
def small(tmp_path, data, monkeypatch) -> Path:
    """The working folder, with clips, and a checkpoint of 200 positions."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data.parent / "clips", "clips")
    shutil.copytree(FOLDER, "small")
    edit_json(Path("small/config.json"), **{"language_config.max_position_embeddings": 200})
    Path("noise.wav").write_text("not a sound")
    soundfile.write("short.wav", np.zeros(100), 16_000)
    return tmp_path


def without(line: dict, *kind: str) -> dict:
    return {
        "conversation": [t for t in line["conversation"] if (t["role"], t["message_type"]) != kind]
    }


GOOD = data_line("clips/0.wav")
SOUND = golden_model().tokenizer.id_to_token(golden_model().config.adapter.audio_token_id)
TWICE = {"conversation": [*GOOD["conversation"], GOOD["conversation"][-1]]}
BAD = {
    "not JSON": ("{", "expected turns"),
    "not a conversation": ([1], "expected turns"),
    "no role": ({"conversation": [{"content": "x"}]}, "expected turns"),
    "no audio": (without(GOOD, "user", "audio"), "no audio"),
    "no answer": (without(GOOD, "assistant", "text"), "no answer"),
    "empty answer": (data_line("clips/0.wav", ""), "no answer"),
    "blank answer": (data_line("clips/0.wav", " \n"), "no answer"),
    "two answers": (TWICE, "2 answers"),
    "no prompt": (without(GOOD, "user", "text"), "0 texts"),
    "absent": (data_line("clips/absent.wav"), "absent.wav: No such file"),
    "a folder": (data_line("clips"), "clips: Is a directory"),
    "not sound": (data_line("noise.wav"), "noise.wav: "),
    "too short": (data_line("short.wav"), "short.wav: 100 samples"),
    "long clip": (data_line("long.wav"), "expected at most 200"),
    "long answer": (
        data_line("clips/0.wav", "yes " * 100),
        "tokens with its answer; expected at most 200",
    ),
    "placeholders": (
        data_line("clips/0.wav", prompt="".join(moss_min.CLIP) * 2),
        "2 audio placeholders",
    ),
    "sound in the answer": (
        data_line("clips/0.wav", f"a {SOUND}"),
        "the answer has a token that stands for sound",
    ),
    "not UTF-8": ("\udcff", "expected turns"),  # written as the byte 0xff
    "a surrogate": (data_line("clips/0.wav", "\ud800"), "the answer has bytes that are not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_before_the_first_step(kind, small, capsys):
    bad, expected = BAD[kind]
    soundfile.write("long.wav", np.zeros(30 * 16_000), 16_000)
    lines = [
        json.dumps(GOOD),
        "",
        bad if isinstance(bad, str) else json.dumps(bad),
        json.dumps(GOOD),
    ]
    Path("bad.jsonl").write_text("\n".join(lines), "utf-8", "surrogateescape")
    said = refusal(capsys, arguments("bad.jsonl", "out", "--steps", 1)[2:] + ["--model", "small"])
    assert said.startswith("train.py: bad.jsonl: 1 bad lines: line 3: ") and expected in said
    assert not Path("out").exists()


def test_the_first_three_bad_lines_and_their_count_are_in_one_message(small, capsys):
    kinds = "not JSON", "no audio", "absent", "no answer", "not sound"
    bad = (BAD[kind][0] for kind in kinds)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in bad]
    Path("bad.jsonl").write_text("\n".join([json.dumps(GOOD), *texts]) + "\n")
    said = refusal(capsys, arguments("bad.jsonl", "out"))
    assert "5 bad lines" in said
    assert [i for i in range(1, 7) if f"line {i}: " in said] == [2, 3, 4]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--data", "empty.jsonl"], "expected at least one line"),
        ([], "expected --data or --merge"),
        (["--data", "good.jsonl", "--steps", "0"], "--steps: expected a number above 0"),
        (["--data", "good.jsonl", "--lora-rank", "-1"], "--lora-rank: expected a number from 0 up"),
        (["--data", "good.jsonl", "--lora-encoder"], "--lora-encoder: expected --lora-rank"),
        (["--data", "good.jsonl", "--init", "small"], "not allowed with"),
        (["--data", "good.jsonl", "--out", "good.jsonl"], "good.jsonl"),
        (["--merge", "absent"], "adapter_config.json can't be read"),
    ],
)
def test_a_bad_command_line_is_refused(argv, expected, small, capsys):
    Path("good.jsonl").write_text(json.dumps(GOOD))
    Path("empty.jsonl").write_text("\n")
    said = refusal(capsys, ["--model", str(FOLDER), "--out", "out", "--device", "cpu", *argv])
    assert expected in said
    assert not Path("out").exists()


def test_an_adapter_is_not_merged_into_random_weights(small, capsys):
    said = refusal(capsys, ["--init", "small", "--merge", "absent", "--out", "out"])
    assert "--merge: expected --model" in said and not Path("out").exists()


# ---- bad adapters ----


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A copy of peft's adapter, to be spoilt."""
    return Path(shutil.copytree(LORA, tmp_path / "adapter"))


def refused_adapter(adapter: Path, *expected: str) -> None:
    with pytest.raises(ValueError) as error:
        MossAudio.from_pretrained(FOLDER, "cpu", lora=adapter)
    said = str(error.value)
    assert all(part in said for part in expected) and "\n" not in said, said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("fan_in_fan_out", True),
        ("peft_type", "LOHA"),
        ("r", 8),
        ("r", None),
        ("lora_alpha", "2"),
    ],
)
def test_an_adapter_with_what_is_not_plain_lora_is_refused(key, value, adapter):
    edit_json(adapter / "adapter_config.json", **{key: value})
    refused_adapter(adapter, *([] if value == 8 else ["adapter_config.json", key]))


MODULE = "base_model.model.language_model.layers.0.mlp.up_proj."
A, B = MODULE + "lora_A.weight", MODULE + "lora_B.weight"
SPOILT = {
    "a third tensor": lambda tensors: tensors | {MODULE + "lora_magnitude_vector": torch.ones(112)},
    "no such module": lambda tensors: {
        name.replace("layers.4.", "layers.5."): tensors[name] for name in tensors
    },
    "a tensor that is not LoRA's": lambda tensors: (
        tensors | {"base_model.model.lm_head.weight": torch.ones(320, 64)}
    ),
    "A alone": lambda tensors: {name: tensors[name] for name in tensors.keys() - {B}},
    "B alone": lambda tensors: {name: tensors[name] for name in tensors.keys() - {A}},
    "a narrow A": lambda tensors: tensors | {A: torch.ones(4, 63)},
    "a flat A": lambda tensors: tensors | {A: torch.ones(4 * 64)},
    "another rank": lambda tensors: tensors | {A: torch.ones(2, 64), B: torch.ones(112, 2)},
    "none at all": lambda tensors: {},
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_an_adapter_whose_tensors_fit_no_weight_is_refused(spoilt, adapter):
    tensors = SPOILT[spoilt](load_file(LORA / "adapter_model.safetensors"))
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused_adapter(adapter)


def test_an_adapter_that_is_not_whole_is_refused(adapter, capsys):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused_adapter(adapter, "adapter_model.safetensors", "expected a whole file")
    assert (
        main(["--model", str(FOLDER), "--merge", str(adapter), "--out", str(adapter / "out")]) == 2
    )
    assert moss_min.main([str(JFK), "--model", str(FOLDER), "--lora", str(adapter), "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    path.unlink()
    refused_adapter(adapter, "adapter_model.safetensors")
    (adapter / "adapter_config.json").unlink()
    refused_adapter(adapter, "adapter_config.json")
