"""What is said and heard: phrases, sounds, clips, degradation, questions and data files."""

import itertools
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_text
from encoder import SAMPLE_RATE, load_audio, require
from voices import Bank, Clip, Heard, retime, speak, tighten, trim

# ---- words ----
DIGITS = "zero one two three four five six seven eight nine".split()
TEENS = ("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
COMMANDS = "go stop turn left right up down forward backward meters degrees".split()
GREETINGS = "yes no hello goodbye".split()
RANKS = "ace jack queen king".split()
SUITS = "clubs diamonds hearts spades".split()
NUMBERS = [*DIGITS, "oh", *TEENS, *TENS, "hundred"]
WORDS = [*NUMBERS, *COMMANDS, *GREETINGS, *RANKS, "of", *SUITS]
# Sounds are named by sentences, which no word is.
BELL = "A bell rings"
BEEP = "A beep sounds"
WHISTLE = "A whistle blows"
CLICK = "A click sounds"
NOISE = "A noise starts"
SOUNDS = [BELL, BEEP, WHISTLE, CLICK, NOISE]


def say_number(number: int) -> list[str]:
    """Returns 0 to 999 in words, without "and"."""
    if number < 20:
        return [[*DIGITS, *TEENS][number]]
    if number < 100:
        tens, ones = divmod(number, 10)
        return [TENS[tens - 2]] + (say_number(ones) if ones else [])
    hundreds, rest = divmod(number, 100)
    return [DIGITS[hundreds], "hundred"] + (say_number(rest) if rest else [])


def draw_command(rng: random.Random) -> list[str]:
    distances = [rng.randint(2, 20), rng.randint(2, 99), rng.randint(1, 9) * 100]
    distance = say_number(rng.choice(distances))
    commands = [
        ["go", rng.choice(["forward", "backward", "up", "down"]), *distance, "meters"],
        ["turn", rng.choice(["left", "right"]), *distance, "degrees"],
        [rng.choice(["go", "turn"]), rng.choice(["left", "right", "up", "down"])],
        ["stop"],
        [*distance, rng.choice(["meters", "degrees"])],
        [rng.choice(GREETINGS)],
    ]
    return rng.choice(commands)


def draw_phrase(rng: random.Random) -> list[str]:
    """Draws one thing to say, of one to eight words."""
    kind = rng.random()
    # A word alone, most often a digit, sounds unlike one in a phrase.
    if kind < 0.25:
        return [rng.choice(rng.choice([DIGITS, WORDS]))]
    # Words in any order, or a grammar would be learned.
    if kind < 0.45:
        return rng.choices(WORDS, k=rng.randint(2, 6))
    # Digits, as of a telephone number.
    if kind < 0.62:
        return rng.choices([*DIGITS, "oh"], k=rng.randint(2, 8))
    if kind < 0.74:
        low, high = rng.choice([(10, 19), (20, 99), (20, 99), (100, 999)])
        return say_number(rng.randint(low, high))
    if kind < 0.89:
        return draw_command(rng)
    # A card.
    return [rng.choice([*DIGITS[2:], "ten", *RANKS]), "of", rng.choice(SUITS)]


# ---- sounds ----
def colour(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Returns the spectrum of noise of any colour, from white to that of a rumble."""
    f = np.arange(1, samples // 2 + 2, dtype=np.float32) / samples
    parts = rng.standard_normal((2, len(f)), dtype=np.float32)
    return (parts[0] + 1j * parts[1]) * f ** -np.float32(rng.uniform(0, 1.1))


def make_sound(name: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a sound, float32, its peak at 1."""
    durations = {
        BELL: (0.7, 1.3),
        BEEP: (0.15, 0.5),
        WHISTLE: (0.3, 0.8),
        CLICK: (0.02, 0.05),
        NOISE: (0.4, 1.2),
    }
    seconds = int(rng.uniform(*durations[name]) * 20) / 20
    n = int(max(seconds, 0.02) * SAMPLE_RATE)
    t = np.arange(n, dtype=np.float32) / SAMPLE_RATE
    to_edge = np.minimum(t, t[::-1])
    fade = np.minimum(1, to_edge / 0.01)
    if name == BELL:
        pitch = rng.uniform(500, 1200)
        decay = rng.uniform(3, 8)
        wave = np.zeros_like(t)
        for k, ratio in enumerate((1, 2, 2.76, 4.1)):
            if pitch * ratio < 7000:
                partial = np.sin(2 * np.pi * pitch * ratio * t)
                wave = wave + partial * np.exp(-decay * (1 + 0.4 * k) * t) * rng.uniform(0.3, 1)
    elif name == BEEP:
        wave = np.sin(2 * np.pi * rng.uniform(400, 2200) * t) * fade
        wave = np.clip(wave * rng.choice([1, 5]), -1, 1)
    elif name == WHISTLE:
        first, last = rng.uniform(900, 3000, 2)
        wobble = rng.uniform(0, 60) * np.sin(2 * np.pi * rng.uniform(5, 30) * t)
        pitch = first + (last - first) * t / t[-1] + wobble
        wave = np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE) * fade
        wave = wave + 0.1 * rng.standard_normal(n) * fade
    elif name == CLICK:
        wave = rng.standard_normal(n) * np.exp(-t * rng.uniform(200, 900))
    else:
        wave = np.fft.irfft(colour(rng, n), n) * np.minimum(1, to_edge / 0.03)
    return (wave / np.abs(wave).max()).astype(np.float32)


# ---- clips ----
# Seconds before a phrase or sound, at least and at most, and how often; in a fifth of the clips,
# all gaps are long.
GAPS = ((0.02, 0.4), (0.1, 1), (0.5, 2.5))
GAP_SHARES = (0.6, 0.3, 0.1)
LONG_SHARES = (0, 0.6, 0.4)


def part_words(phrase: Clip, rng: np.random.Generator) -> Clip:
    """Puts gaps between a phrase's words; in a third of them, words come again, in any order."""
    parts = []
    words = []
    at = 0
    longest = rng.choice([0.4, 0.8, 1.6])
    order = phrase.heard
    if rng.random() < 0.33:
        order = [order[i] for i in rng.integers(len(order), size=rng.integers(2, 9))]
    for word in order:
        first = max(0, int((word.start - 0.02) * SAMPLE_RATE))
        piece = phrase.wave[first : int((word.end + 0.02) * SAMPLE_RATE)].copy()
        edge = np.linspace(0, 1, min(160, len(piece) // 2), dtype=np.float32)
        piece[: len(edge)] *= edge
        piece[len(piece) - len(edge) :] *= edge[::-1]
        gap = np.zeros(int(rng.uniform(0.04, longest) * SAMPLE_RATE), np.float32)
        parts += [piece, gap]
        words += retime([word], later=(at - first) / SAMPLE_RATE)
        at += len(piece) + len(gap)
    return Clip(np.concatenate(parts[:-1]), words)


def vary(phrase: Clip, rng: np.random.Generator) -> Clip:
    """Parts a quarter of the phrases, and changes pitch and tempo of most, both together."""
    if rng.random() < 0.25:
        phrase = part_words(phrase, rng)
    if rng.random() < 0.6:
        speed = rng.uniform(0.84, 1.2)
        samples = np.arange(len(phrase.wave))
        places = np.arange(0, len(samples) - 1, speed)
        wave = np.interp(places, samples, phrase.wave).astype(np.float32)
        phrase = Clip(wave, retime(phrase.heard, speed=speed))
    return phrase


def cut(phrase: Clip, room: int) -> Clip:
    """Keeps the first words of a phrase, those that fit into so many samples; there may be none."""
    if len(phrase.wave) <= room:
        return phrase
    words = [word for word in phrase.heard if word.end < room / SAMPLE_RATE - 0.05]
    end = words[-1].end + 0.02 if words else 0
    wave = phrase.wave[: int(end * SAMPLE_RATE)].copy()
    wave[-320:] *= np.linspace(1, 0, len(wave[-320:]), dtype=np.float32)
    return Clip(wave, words)


def compose(bank: Bank, rng: np.random.Generator, seconds: float, engine: str | None) -> Clip:
    """Puts phrases and sounds into a clip, with gaps; if an engine is given, phrases of one of its
    voices, unaltered. In one of fifty clips there is nothing to hear."""
    total = int(seconds * SAMPLE_RATE)
    clip = Clip(np.zeros(total, np.float32), [])
    if rng.random() < 0.02:
        return clip
    altered = engine is None
    engine = engine or bank.draw_engine(rng)
    voice = bank.draw_voice(rng, engine)
    share_of_sounds = rng.choice([0, 0, 0.25, 0.5])
    shares = LONG_SHARES if rng.random() < 0.2 else GAP_SHARES
    at = 0
    while at < total:
        gap = GAPS[rng.choice(len(GAPS), p=shares)]
        at += int(rng.uniform(*gap) * SAMPLE_RATE)
        level = 10 ** (rng.uniform(-8, 0) / 20)
        if rng.random() < share_of_sounds:
            name = str(rng.choice(SOUNDS))
            wave = make_sound(name, rng)
            part = Clip(wave, [Heard(name, 0, len(wave) / SAMPLE_RATE)])
            level *= rng.uniform(0.2, 0.7)
            if at + len(wave) > total:
                break
        else:
            if altered and rng.random() < 0.2:
                engine = bank.draw_engine(rng)
                voice = bank.draw_voice(rng, engine)
            part = bank.draw_clip(rng, engine, voice)
            if altered:
                part = vary(part, rng)
            part = cut(part, total - at)
            if not part.heard and at > total / 2:
                break
        clip.heard.extend(retime(part.heard, later=at / SAMPLE_RATE))
        clip.wave[at : at + len(part.wave)] += level * part.wave
        at += len(part.wave)
    return clip


# ---- degradation: of a clip's spectrum, then of its samples ----
def add_room(spectrum: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reverberates four of ten clips."""
    if rng.random() >= 0.4:
        return spectrum
    t = np.arange(int(rng.uniform(0.05, 0.3) * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    echo = rng.standard_normal(len(t), dtype=np.float32) * np.exp(-t * rng.uniform(10, 60))
    echo *= rng.uniform(0.01, 0.08)
    echo[0] = 1
    return spectrum * np.fft.rfft(echo, 2 * (len(spectrum) - 1))


def draw_microphone(f: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws a microphone's gains in decibels at frequencies f: a tilt, an equalisation."""
    tilt = rng.uniform(-20, 20) * (f / 8000 - 0.5) * (rng.random() < 0.7)
    bands = np.interp(f, np.linspace(0, 8000, 8), rng.uniform(-5, 5, 8))
    return tilt + bands * (rng.random() < 0.5)


def draw_line(f: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws a telephone's band, in decibels at frequencies f; half of them are muffled, as by an
    old carbon microphone."""
    low = rng.uniform(50, 450)
    high = rng.uniform(2400, 4000)
    below = np.clip((low - f) / low * 30, 0, 40)
    above = np.clip((f - high) / rng.uniform(50, 300) * 40, 0, 100)
    octaves = np.log2(np.maximum(f, 600) / 600)
    return -below - above - rng.uniform(0, 14) * octaves * (rng.random() < 0.5)


def add_noise(
    spectrum: np.ndarray, line: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Adds noise of any colour to six of ten clips, most often before a line, if there is one."""
    if rng.random() >= 0.6:
        return spectrum
    noise = colour(rng, 2 * (len(spectrum) - 1))
    if line is not None and rng.random() < 0.6:
        noise = noise * 10 ** (line / 20)
    loudness = 0.01
    if spectrum.any():
        loudness = np.sqrt((np.abs(spectrum) ** 2).sum() / (np.abs(noise) ** 2).sum())
    return spectrum + noise * loudness * 10 ** (-rng.uniform(8, 45) / 20)


def overdrive(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cuts off the peaks of a tenth of the clips."""
    if rng.random() >= 0.1:
        return wave
    limit = (np.abs(wave).max() + 1e-9) * rng.uniform(0.2, 0.8)
    return wave.clip(-limit, limit)


def round_mu_law(x: np.ndarray) -> np.ndarray:
    """Rounds samples from -1 to 1 as eight bits of mu-law do."""
    y = np.round(np.log1p(255 * np.abs(x)) / np.log(256) * 127) / 127
    return np.sign(x) * (256**y - 1) / 255


def round_a_law(x: np.ndarray) -> np.ndarray:
    """Rounds samples from -1 to 1 as A-law's eight bits do, which is linear up to 1 / A."""
    A = 87.6
    whole = 1 + np.log(A)
    y = A * np.abs(x)
    y = np.where(y < 1, y, 1 + np.log(np.maximum(y, 1))) / whole
    y = np.round(y * 127) / 127 * whole
    return np.sign(x) * np.where(y < 1, y, np.exp(y - 1)) / A


def digitise(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sends an even number of samples over a digital line: 8 kHz, G.711, at any level."""
    n = len(wave)
    narrow = np.fft.irfft(np.fft.rfft(wave)[: n // 4 + 1], n // 2)
    level = 10 ** (rng.uniform(-30, 0) / 20) / (np.abs(narrow).max() + 1e-9)
    law = round_mu_law if rng.random() < 0.5 else round_a_law
    return np.fft.irfft(np.fft.rfft(law(narrow * level)), n) / level


def add_hum(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds the mains' hum to three of ten clips, and faint crackle to as many others."""
    kind = rng.random()
    loudness = np.abs(wave).max() * 10 ** (-rng.uniform(15, 45) / 20)
    if kind < 0.3:
        t = 2 * np.pi * rng.choice([50, 60]) / SAMPLE_RATE * np.arange(len(wave))
        wave = wave + loudness * sum(rng.random() * np.sin(k * t) / k for k in range(1, 8))
    elif kind < 0.6:
        places = rng.random(len(wave)) < 10 ** rng.uniform(-4.5, -3.2)
        crackle = places * rng.standard_normal(len(wave))
        wave = wave + loudness * np.convolve(crackle, np.exp(-np.arange(16) / 4), "same")
    return wave


def degrade(wave: np.ndarray, rng: np.random.Generator, telephone: bool) -> np.ndarray:
    """Sends a sound through a room, a microphone, perhaps a telephone line, and noise."""
    # Transforms of a length with a large prime factor take long.
    n = (len(wave) // 4000 + 1) * 4000
    f = np.fft.rfftfreq(n, 1 / SAMPLE_RATE).astype(np.float32)
    spectrum = add_room(np.fft.rfft(wave, n), rng)
    gains = draw_microphone(f, rng)
    line = None
    if telephone:
        line = draw_line(f, rng)
        gains = gains + line
    spectrum = add_noise(spectrum * 10 ** (gains / 20), line, rng)
    long = overdrive(np.fft.irfft(spectrum, n), rng)
    if telephone:
        if rng.random() < 0.6:
            long = digitise(long, rng)
        long = add_hum(long, rng)
    level = 10 ** (rng.uniform(-35, 0) / 20)
    return (long[: len(wave)] * level).astype(np.float32)


def interpolate(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Takes rows of x at places between them."""
    low = np.minimum(places.astype(int), len(x) - 2)
    share = (places - low).astype(np.float32)[:, None]
    return x[low] * (1 - share) + x[low + 1] * share


def warp_mel(mel: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Stretches a log-mel [128, T] to [128, frames], most often its frequencies, too, and masks
    small stretches of both."""
    if frames != mel.shape[1]:
        mel = interpolate(mel.T, np.linspace(0, mel.shape[1] - 1, frames)).T
    if rng.random() < 0.7:
        mel = interpolate(mel, np.minimum(np.arange(128) * rng.uniform(0.88, 1.14), 127))
    if rng.random() < 0.5:
        mel = mel.copy()
        for _ in range(rng.integers(1, 3)):
            first = rng.integers(128)
            mel[first : first + rng.integers(1, 16)] = mel.mean()
        for _ in range(rng.integers(0, frames // 100 + 1)):
            first = rng.integers(frames)
            mel[:, first : first + rng.integers(1, 9)] = mel.mean()
    return np.ascontiguousarray(mel)


# ---- questions and answers ----
PLAIN = "Transcribe the audio."
STAMPS = "Transcribe the audio with timestamps."
DESCRIBE = "Describe this audio."
SILENCE = "(silence)"


def only_words(heard: list[Heard]) -> list[Heard]:
    return [part for part in heard if part.name not in SOUNDS]


def transcript(heard: list[Heard]) -> str:
    return " ".join(word.name for word in only_words(heard)) or SILENCE


def stamp(seconds: float) -> str:
    return f"[{round(seconds / 0.04) * 0.04:.2f}]"


def stamped(heard: list[Heard]) -> str:
    words = only_words(heard)
    return "".join(stamp(w.start) + w.name + stamp(w.end) for w in words) or SILENCE


def describe(heard: list[Heard]) -> str:
    """Returns a sentence for each sound, and one for all the words between two sounds."""
    sentences = []
    for is_sound, group in itertools.groupby(heard, lambda part: part.name in SOUNDS):
        if is_sound:
            sentences += [f"{sound.name} at {sound.start:.1f} seconds." for sound in group]
        else:
            sentences.append(f'A voice says "{transcript(list(group))}".')
    return " ".join(sentences) or "There is silence."


def all_questions(heard: list[Heard]) -> list[tuple[str, str]]:
    """Returns each prompt with its answer."""
    return [(STAMPS, stamped(heard)), (PLAIN, transcript(heard)), (DESCRIBE, describe(heard))]


def ask(heard: list[Heard], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Returns two prompts with their answers: the one for timestamps, and one of the others."""
    stamps, plain, description = all_questions(heard)
    return [stamps, plain if rng.random() < 0.65 else description]


def events(description: str) -> list[str]:
    """Returns what a description names, in order, whatever words and times: "A bell rings" ..."""
    kinds = ["There is silence", "A voice says", *SOUNDS]
    return re.findall("|".join(kinds), re.sub('"[^"]*"', "", description))


# ---- data files ----
def data_line(sound: str, prompt: str, answer: str) -> str:
    """Returns a line of what tools/train.py and tools/evaluate.py read."""
    turns = [("user", "audio", sound), ("user", "text", prompt), ("assistant", "text", answer)]
    names = ("role", "message_type", "content")
    return json.dumps({"conversation": [dict(zip(names, turn)) for turn in turns]}) + "\n"


def join(clips: list[Clip], gaps: tuple[float, float], rng: np.random.Generator) -> Clip:
    """Puts clips one after the other, a gap of so many seconds before each and after the last."""
    wave = np.zeros(int(rng.uniform(*gaps) * SAMPLE_RATE), np.float32)
    heard = []
    for clip in clips:
        heard += retime(clip.heard, later=len(wave) / SAMPLE_RATE)
        gap = np.zeros(int(rng.uniform(*gaps) * SAMPLE_RATE), np.float32)
        wave = np.concatenate([wave, clip.wave, gap])
    return Clip(wave, heard)


def held_out(folder: Path, lengths: list[float]) -> dict[str, list[Clip]]:
    """Composes, for each engine of a bank, clips of the voice that is not trained on, so many
    seconds long: as they are, and degraded, over the telephone. Two more sets are of single digits
    with long gaps, over the telephone, and of what has no words."""
    bank = Bank(folder, held=True)
    sets = {}
    for engine in bank.voices:
        for name in (engine, f"{engine}-telephone"):
            rng = np.random.default_rng(list(name.encode()))
            clips = [compose(bank, rng, seconds, engine) for seconds in lengths]
            if name != engine:
                clips = [clip._replace(wave=degrade(clip.wave, rng, True)) for clip in clips]
            sets[name] = clips
    rng = np.random.default_rng(0)
    sets |= {"digits": [], "quiet": []}
    for i, seconds in enumerate(lengths):
        engine = list(bank.voices)[i % len(bank.voices)]
        drawn = [bank.draw_clip(rng, engine, bank.draw_voice(rng, engine)) for _ in range(100)]
        alone = [clip for clip in drawn if len(clip.heard) == 1 and clip.heard[0].name in DIGITS]
        clip = join(alone[: rng.integers(3, 9)], (0.3, 1.5), rng)
        sets["digits"].append(clip._replace(wave=degrade(clip.wave, rng, True)))
        silence = np.zeros(int(seconds * SAMPLE_RATE), np.float32)
        sets["quiet"].append(Clip(degrade(silence, rng, telephone=rng.random() < 0.5), []))
    return sets


def compose_people(folder: Path, rng: np.random.Generator, count: int) -> list[Clip]:
    """Composes clips of what people said, word by word, with gaps: of WAV files that are named by a
    word or its number."""
    spoken = {}
    for path in sorted(folder.glob("*.wav")):
        word = path.stem
        if word.isdigit() and int(word) < 1000:
            word = " ".join(say_number(int(word)))
        if word in WORDS:
            wave = load_audio(path).numpy()
            whole = Clip(wave, [Heard(word, 0, len(wave) / SAMPLE_RATE)])
            spoken[word] = trim(tighten(whole), before=0.05, after=0.05)
    require(len(spoken) > 0, f"{folder}: expected a bank, or WAV files named by words")
    clips = []
    for _ in range(count):
        words = rng.choice(list(spoken), rng.integers(2, 9))
        clips.append(join([spoken[word] for word in words], (0.05, 0.6), rng))
    return clips


def write_data(folder: Path, name: str, sounds: dict[str, Clip], questions: Callable) -> None:
    """Writes sound files, and a data file of questions(clip), prompts and answers, about each."""
    lines = []
    for sound, clip in sounds.items():
        soundfile.write(folder / sound, clip.wave, SAMPLE_RATE, subtype="PCM_16")
        lines += [data_line(sound, prompt, answer) for prompt, answer in questions(clip)]
    write_text("".join(lines), folder / f"{name}.jsonl")
    print(f"{folder / name}.jsonl: {len(lines)} lines for {len(sounds)} sounds", flush=True)


def write_test(source: Path, folder: Path, count: int, seconds: list[float]) -> None:
    """Writes clips of a bank's held-out voices, or of people, as sound files and, with every
    prompt, a data file for each set. The voices' clips have from the first to the second of so
    many seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    if list(source.glob("*.npy")):
        sets = held_out(source, rng.uniform(*seconds, count).round(1).tolist())
    else:
        sets = {source.name: compose_people(source, rng, count)}

    for name, clips in sets.items():
        sounds = {f"{name}-{i}.wav": clip for i, clip in enumerate(clips)}
        write_data(folder, name, sounds, lambda clip: all_questions(clip.heard))


def write_words(words: list[str], folder: Path) -> None:
    """Writes data that teach other words: 1,200 clips of espeak's and flite's voices, train.jsonl,
    and 40 of their held-out ones, test.jsonl. A phrase has one to four words, three in four of
    them new."""

    def draw(rng: random.Random) -> list[str]:
        count = rng.randint(1, 4)
        return [rng.choice(words if rng.random() < 0.75 else WORDS) for _ in range(count)]

    def transcribe(clip: Clip) -> list[tuple[str, str]]:
        return [(STAMPS, stamped(clip.heard)), (PLAIN, transcript(clip.heard))]

    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("test", range(20)), ("train", range(100, 700))):
        rng = np.random.default_rng(0)
        sounds = {}
        for engine in ("espeak", "flite"):
            for number, _, clip in speak(engine, numbers, draw):
                wave = 0.5 * clip.wave / np.abs(clip.wave).max()
                if name == "train":
                    wave = degrade(wave, rng, telephone=rng.random() < 0.3)
                sounds[f"{engine}-{number}.wav"] = Clip(wave, clip.heard)
        write_data(folder, name, sounds, transcribe)
