"""Parts of the model against transformers 4.57.1, which upstream is built on.

They are skipped where it is not installed.
"""

# ruff: noqa: E402 (what imports transformers comes after the look whether it is there)

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
if transformers.__version__ != "4.57.1":
    pytest.skip(f"transformers is {transformers.__version__}, not 4.57.1", allow_module_level=True)

from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from conftest import GOLDEN, JFK, QWEN3_TOKENIZER, assert_close, noise
from encoder import EncoderLayer, load_audio, log_mel, mel_filters
from moss_min import load_tokenizer, read_config
from qwen3 import KVCache, Qwen3, Qwen3Config

# ---- log-mel ----

EXTRACTOR = transformers.WhisperFeatureExtractor(feature_size=128)


SOUNDS = {
    "speech, 11 s": load_audio(JFK).numpy(),
    "silence": np.zeros(16_000, np.float32),
    "silence, then noise": np.concatenate([np.zeros(8000, np.float32), noise(8000)]),
    "a click": np.eye(1, 16_000, 8000, dtype=np.float32)[0],
    "full scale, clipped": noise(16_000).clip(-0.1, 0.1) * 10,
    "barely there": noise(16_000) * np.float32(1e-6),
    "louder than full scale": noise(16_000) * 100,
    "10 s and more of noise": noise(175_999),
}
LENGTHS = (160, 161, 199, 200, 201, 319, 320, 399, 400, 401, 12_345, 64_000)
SOUNDS |= {f"noise, {samples} samples": noise(samples) for samples in LENGTHS}


@pytest.mark.parametrize("name", SOUNDS)
def test_the_log_mel_is_whispers_to_the_bit(name):
    wave = SOUNDS[name]
    expected = EXTRACTOR._np_extract_fbank_features(wave[None], "cpu")[0]
    expected = torch.from_numpy(expected).to(torch.bfloat16)
    assert torch.equal(log_mel(torch.from_numpy(wave)), expected)


def test_the_mel_filters_are_slaneys():
    expected = mel_filter_bank(201, 128, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    # Float64, of values up to 0.04.
    np.testing.assert_allclose(mel_filters(), expected.T, rtol=0, atol=1e-15)


# ---- encoder layer ----


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Gives norms random weights around 1, and the rest such that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * values)
            else:
                parameter.copy_(values / max(parameter.shape[-1], 4) ** 0.5)


def encoder_layers(
    width: int, heads: int, mlp: int, attention="eager"
) -> tuple[EncoderLayer, WhisperEncoderLayer]:
    """Our layer with random weights, and Whisper's with the same."""
    shape = {"d_model": width, "encoder_attention_heads": heads, "encoder_ffn_dim": mlp}
    config = read_config(GOLDEN / "checkpoint").encoder
    # This epsilon is the final norm's: it must not get into a layer.
    ours = EncoderLayer(replace(config, **shape, layer_norm_eps=1e-2))
    randomize(ours, 0)
    theirs = WhisperEncoderLayer(
        transformers.WhisperConfig(**shape, attn_implementation=attention)
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("width, heads, mlp", [(64, 4, 256), (48, 2, 100), (80, 1, 80)])
@torch.no_grad()
def test_an_encoder_layer_is_whispers(width, heads, mlp, padded):
    ours, theirs = encoder_layers(width, heads, mlp)
    x = torch.randn(3, 50, width, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-3, 1, 50)[:, None]
    tokens = torch.tensor([50, 17, 1] if padded else [50, 50, 50])
    is_real = torch.arange(50) < tokens[:, None]  # [C, L]
    mask = None
    bias = None
    if padded:
        mask = is_real[:, None, None]
        bias = torch.zeros(3, 1, 50, 50).masked_fill(~mask, torch.finfo(torch.float32).min)
    # What stands in the place of padding matters to nobody.
    assert_close(ours(x, mask)[is_real], theirs(x, bias, None)[0][is_real])


@torch.no_grad()
def test_in_bfloat16_an_encoder_layer_is_whispers_to_the_bit():
    # 24 ** -0.5 is rounded.
    ours, theirs = (layer.bfloat16() for layer in encoder_layers(72, 3, 200, "sdpa"))
    x = torch.randn(3, 50, 72, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(ours(x, None), theirs(x, None, None)[0])


# ---- decoder ----


def decoder_config(hidden, mlp, layers, heads, groups, head_dim, **values) -> Qwen3Config:
    sizes = {
        "vocab_size": 50,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40_960,
    }
    return Qwen3Config(**sizes | values)


DECODERS = {
    "a key head to two": decoder_config(64, 96, 3, heads=4, groups=2, head_dim=24),
    "one for all, head_dim below hidden / heads": decoder_config(
        72, 72, 4, heads=3, groups=1, head_dim=10, rope_theta=1e4, rms_norm_eps=1e-3
    ),
    "head_dim above hidden / heads": decoder_config(64, 96, 2, heads=4, groups=2, head_dim=128),
}


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_prefill_and_cached_steps_are_transformers(name):
    config = DECODERS[name]
    theirs = transformers.Qwen3Model(
        transformers.Qwen3Config(**vars(config), attention_bias=False, attn_implementation="eager")
    ).eval()
    randomize(theirs, 0)
    ours = Qwen3(config)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = KVCache(config, 2, 40, torch.zeros(1))
    oracle_cache = transformers.DynamicCache(config=theirs.config)
    for start, end in [(0, 30), *((i, i + 1) for i in range(30, 40))]:
        part = ids[:, start:end]
        positions = torch.arange(start, end)[None]
        expected = theirs(part, past_key_values=oracle_cache, use_cache=True)
        hidden = ours(ours.embed_tokens(part), positions, cache, end)
        assert_close(hidden, expected.last_hidden_state)


# ---- tokenizer ----

OURS = load_tokenizer(QWEN3_TOKENIZER)
FAST = transformers.Qwen2TokenizerFast.from_pretrained(QWEN3_TOKENIZER, local_files_only=True)
SLOW = transformers.Qwen2Tokenizer.from_pretrained(QWEN3_TOKENIZER, local_files_only=True)

TEXTS = [
    "",
    "  leading, trailing and     inner spaces   ",
    "\n\n\r\n \t\n   \r\r\n\tindented\n",
    # Spaces and line ends of Unicode, some of no width.
    "a\u00a0b\u2003c\u3000d\u2028e\u2029f\x85g\x1ch\u200bi\ufeffj",
    "I'm, you're, he'd, they'll, I've, it's, don't; I'M, YOU'RE, HE'D, THEY'LL, I'VE, IT'S, DON'T",
    "'ſ 'ﬆ; O'THE it'Me",
    # Digits of other scripts.
    "0123456789 1,234.5 3/4 10:30 ½ ² Ⅷ ٣٤٥ १२३ ๑๒๓ 〇一二 𝟘𝟙 𑁦",
    # In NFC and not.
    "Zoë, naïve café: e\u0301 a\u030a \u1e9b\u0323 \u212b \u2126 \u0344",
    "s\u0323\u0307 s\u0307\u0323",
    # The letters of a syllable, and the syllable.
    "\u1100\u1161\u11a8 각 한국어 문장입니다.",
    "ここで話しているのは誰ですか。「東京」ｶﾞﾗｽ が",
    "这段录音里有几个人？繁體中文，𠮷野家",
    "ภาษาไทย น้ำ กำลัง เก็บ ๆ ฯลฯ",
    "مرحبا بِكُمْ؟ لا إله إلّا ﷺ ـــ",
    "नमस्ते, क्या हाल है? क्षत्रिय क़ ज़ \u0958",
    "ελληνικά, русский, עִבְרִית, ქართული, Հայերեն, አማርኛ, தமிழ், မြန်မာ, ខ្មែរ, 𐍈𐌰𐌹",
    # Emoji with joiners.
    "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👍🏽 🇩🇪🇫🇷 ☺\ufe0f 😀😀 1\ufe0f\u20e3",
    # Control characters, private ones, one that is not assigned.
    "\0\x01\x07\x08\x1b[0m\x7f \ufffd \ue000 \U0010ffff \u0378",
    "def f(x):\n    return x**2  # ¹\n\n\nif __name__ == '__main__':\n\tprint(f(3))\n",
    "!!!...???---___***\n///\r\n;;; \"'`´’ …—–",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|>",
    "a<think>b </think> c<think></think>d <|im_end|> e\u0301<|im_end|>\u0301f",
    "<|endoftext|><|im_end| <<think>> < think> <|IM_END|> <|audio_bos|><|AUDIO|><|audio_eos|>",
    "supercalifragilisticexpialidocious " * 3 + "x" * 300 + " " * 300 + "\n" * 50,
]

PIECES = [
    *"abcXYZ 019.,'!?\t\n\réßﬁ漢字ไทยกำעבארסहिन्दी٣५Ⅷ½²ſ가😀𝟘",
    *"\u0344\u212b\u00a0\u3000\u2028\u200b\ufeff\x85\0\7",
    *"👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 e\u0301 \u1e9b\u0323 \u1100\u1161 'S 'LL 're".split(" "),
    *"<think> </think> <|im_start|> <|im_end|> <|audio_bos|> <| |> ing".split(),
    *(" the", "  ", "\r\n"),
]


def ids_of(tokenizer, text: str) -> list[int]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding if isinstance(encoding, list) else encoding.ids


def check(text: str) -> None:
    """Encodes and decodes as both of transformers' tokenizers do."""
    ids = ids_of(OURS, text)
    for oracle in (FAST, SLOW):
        assert ids == ids_of(oracle, text), text
        for skip in (True, False):
            expected = oracle.decode(ids, skip_special_tokens=skip)
            assert OURS.decode(ids, skip_special_tokens=skip) == expected, text


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_text_is_tokenized_as_transformers_does(text):
    check(text)


def test_random_texts_are_tokenized_as_transformers_does():
    draw = random.Random(0)
    for _ in range(1000):
        check("".join(draw.choices(PIECES, k=draw.randint(1, 24))))
