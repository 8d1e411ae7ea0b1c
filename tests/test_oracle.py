"""Parts of the model against transformers 4.57.1, which upstream is built on: skipped where that is not installed."""

import functools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
if transformers.__version__ != "4.57.1":
    pytest.skip(f"transformers is {transformers.__version__}, not 4.57.1", allow_module_level=True)

from transformers import (
    DynamicCache,
    Qwen2Tokenizer,
    Qwen2TokenizerFast,
    Qwen3ForCausalLM,
    WhisperConfig,
)
from transformers import Qwen3Config as OracleConfig
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from conftest import GOLDEN, JFK, QWEN3_TOKENIZER
from encoder import EncoderLayer, load_audio, log_mel, mel_filters
from moss_min import load_tokenizer, read_config
from qwen3 import KVCache, Qwen3, Qwen3Config, RMSNorm, apply_rope, rope_table

# ---- log-mel ----

EXTRACTOR = WhisperFeatureExtractor(feature_size=128)


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).standard_normal(samples).astype(np.float32) / 4


def tone(hertz: float, samples: int) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(samples) / 16_000).astype(np.float32)


SOUNDS = {
    "speech, 11 s": load_audio(JFK).numpy(),
    "silence": np.zeros(16_000, np.float32),
    "silence, then noise": np.concatenate([np.zeros(8000, np.float32), noise(8000)]),
    "a click": np.eye(1, 16_000, 8000, dtype=np.float32)[0],
    "constant": np.full(4000, 0.5, np.float32),
    "full scale, clipped": noise(16_000).clip(-0.1, 0.1) * 10,
    "barely there": noise(16_000) * np.float32(1e-6),
    "louder than full scale": noise(16_000) * 100,
    "10 s and more of noise": noise(175_999),
    "50 Hz": tone(50, 16_000),
    "440 Hz": tone(440, 16_001),
    "7999 Hz": tone(7999, 15_999),
}
LENGTHS = (*range(160, 202), 319, 320, 399, 400, 401, 12_345, 64_000)
SOUNDS |= {f"noise, {samples} samples": noise(samples) for samples in LENGTHS}


@pytest.mark.parametrize("name", SOUNDS)
def test_the_log_mel_is_whispers_to_the_bit(name):
    wave = SOUNDS[name]
    expected = EXTRACTOR._np_extract_fbank_features(wave[None], "cpu")[0]
    assert torch.equal(
        log_mel(torch.from_numpy(wave)), torch.from_numpy(expected).to(torch.bfloat16)
    )


def test_the_mel_filters_are_slaneys():
    expected = mel_filter_bank(201, 128, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(
        mel_filters(), expected.T, rtol=0, atol=1e-15
    )  # float64, values up to 0.04


# ---- encoder layer ----


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Random weights for everything: norms around 1, the rest of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * values)
            else:
                parameter.copy_(values / max(parameter.shape[-1], 4) ** 0.5)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 3e-6 of the largest value: float32 sums of some hundred products in another order (6e-8 each)."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def encoder_layers(
    width: int, heads: int, mlp: int, attention="eager"
) -> tuple[EncoderLayer, WhisperEncoderLayer]:
    """Our layer with random weights, and Whisper's with the same."""
    shape = {"d_model": width, "encoder_attention_heads": heads, "encoder_ffn_dim": mlp}
    config = read_config(GOLDEN / "checkpoint").encoder
    ours = EncoderLayer(
        replace(config, **shape, layer_norm_eps=1e-2)
    )  # the final norm's: it must not get into a layer
    randomize(ours, 0)
    theirs = WhisperEncoderLayer(WhisperConfig(**shape, attn_implementation=attention)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("width, heads, mlp", [(64, 4, 256), (48, 2, 100), (80, 1, 80)])
@torch.no_grad()
def test_an_encoder_layer_is_whispers(width, heads, mlp, padded):
    ours, theirs = encoder_layers(width, heads, mlp)
    x = (
        torch.randn(3, 50, width, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-3, 1, 50)[:, None]
    )
    tokens = torch.tensor([50, 17, 1])
    keep = torch.arange(50) < tokens[:, None]  # [C, L]
    mask = keep[:, None, None] if padded else None
    bias = (
        torch.zeros(3, 1, 50, 50).masked_fill(~mask, torch.finfo(torch.float32).min)
        if padded
        else None
    )
    expected = theirs(x, bias, None)[0]
    rows = (
        keep if padded else torch.ones_like(keep)
    )  # what stands in a padded row is nobody's business
    close(ours(x, mask)[rows], expected[rows])


@torch.no_grad()
def test_in_bfloat16_an_encoder_layer_is_whispers_to_the_bit():
    ours, theirs = (
        layer.bfloat16() for layer in encoder_layers(72, 3, 200, "sdpa")
    )  # 24 ** -0.5 rounds
    x = torch.randn(3, 50, 72, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(ours(x, None), theirs(x, None, None)[0])


@torch.no_grad()
def test_in_float16_an_encoder_layer_stops_short_of_infinity_as_whispers_does():
    ours, theirs = (layer.half() for layer in encoder_layers(64, 4, 256))
    for layer in (ours, theirs):
        layer.fc2.bias.copy_(torch.tensor([60_000.0, -60_000, 0, 0] * 16))
    x = torch.tensor([60_000.0, -60_000, 1, -1] * 16).half().expand(1, 5, 64)
    y, expected = ours(x, None), theirs(x, None, None)[0]
    assert torch.equal(y[..., 0::4], expected[..., 0::4]) and torch.equal(
        y[..., 1::4], expected[..., 1::4]
    )
    assert (
        y.max() == 64_512 and y.min() == -64_512
    )  # 65,504 - 1000 = 64,504, to the nearest multiple of 32


# ---- decoder ----


def decoder_config(
    hidden, mlp, layers, heads, groups, head_dim, theta=1e6, eps=1e-6, positions=512
) -> Qwen3Config:
    widths = {
        "vocab_size": 50,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "head_dim": head_dim,
    }
    counts = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }
    return Qwen3Config(
        **widths, **counts, rope_theta=theta, rms_norm_eps=eps, max_position_embeddings=positions
    )


DECODERS = {
    "a key/value head to each head": decoder_config(64, 128, 2, heads=4, groups=4, head_dim=16),
    "a key/value head to two, head_dim above hidden / heads": decoder_config(
        64, 96, 3, heads=4, groups=2, head_dim=24
    ),
    "a key/value head to four": decoder_config(
        48, 160, 2, heads=8, groups=2, head_dim=32, theta=1e4, eps=1e-5
    ),
    "one for all, head_dim below hidden / heads": decoder_config(
        72, 72, 4, heads=3, groups=1, head_dim=10, eps=1e-3
    ),
    "positions up to 40,959": decoder_config(
        64, 96, 2, heads=4, groups=2, head_dim=128, positions=40_960
    ),
}


@functools.cache
def decoders(name: str) -> tuple[Qwen3, Qwen3ForCausalLM]:
    """A decoder of that configuration with random weights, and transformers' with the same."""
    config = DECODERS[name]
    oracle = OracleConfig(
        **vars(config), attention_bias=False, tie_word_embeddings=False, attn_implementation="eager"
    )
    theirs = Qwen3ForCausalLM(oracle).eval()
    randomize(theirs, 0)
    ours = Qwen3(config)
    ours.load_state_dict(theirs.model.state_dict())
    return ours, theirs


def random_ids(batch: int, n: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, n), generator=torch.Generator().manual_seed(n))


each_decoder = pytest.mark.parametrize("name", DECODERS)


@each_decoder
@torch.no_grad()
def test_a_whole_prompt_through_the_decoder_is_transformers(name):
    ours, theirs = decoders(name)
    ids = random_ids(2, 40)
    hidden = ours(ours.embed_tokens(ids), torch.arange(40)[None])
    close(hidden, theirs.model(ids).last_hidden_state)
    close(theirs.lm_head(hidden), theirs(ids).logits)


@each_decoder
@torch.no_grad()
def test_a_prefill_and_cached_steps_are_transformers(name):
    ours, theirs = decoders(name)
    ids = random_ids(2, 40)
    cache = KVCache(ours.config, 2, 40, torch.float32, torch.device("cpu"))
    oracle_cache = DynamicCache(config=theirs.config)
    for start, end in [(0, 30), *((i, i + 1) for i in range(30, 40))]:
        part, positions = ids[:, start:end], torch.arange(start, end)[None]
        expected = theirs.model(
            part, past_key_values=oracle_cache, use_cache=True
        ).last_hidden_state
        close(ours(ours.embed_tokens(part), positions, cache), expected)


@pytest.mark.parametrize("sizes", [[10, 10, 10, 10], [1, 38, 1], [39, 1], [17, 2, 1, 20]], ids=str)
@each_decoder
@torch.no_grad()
def test_a_prefill_in_slices_is_transformers_whole_pass(name, sizes):
    ours, theirs = decoders(name)
    ids = random_ids(1, 40)
    cache = KVCache(
        ours.config, 1, 64, torch.float32, torch.device("cpu")
    )  # longer than it has to be
    slices = zip(ids.split(sizes, dim=1), torch.arange(40)[None].split(sizes, dim=1))
    hidden = [ours(ours.embed_tokens(part), positions, cache) for part, positions in slices]
    close(torch.cat(hidden, dim=1), theirs.model(ids).last_hidden_state)


@each_decoder
@torch.no_grad()
def test_a_batch_padded_on_the_left_is_transformers(name):
    ours, theirs = decoders(name)
    ids = random_ids(3, 20)
    real = torch.arange(20) >= torch.tensor(
        [[0], [7], [19]]
    )  # [B, n], False where there is padding
    positions = (real.cumsum(1) - 1).clamp(min=0)
    visible = (
        real[:, None, None] | torch.eye(20).bool()
    )  # padding sees itself, or its row would be empty
    mask = visible & torch.ones(20, 20).tril().bool()
    hidden = ours(ours.embed_tokens(ids), positions, mask=mask)
    expected = theirs.model(
        ids, attention_mask=real.long(), position_ids=positions
    ).last_hidden_state
    close(hidden[real], expected[real])


@torch.no_grad()
def test_the_decoder_at_its_last_positions_is_transformers():
    ours, theirs = decoders("positions up to 40,959")
    ids, positions = random_ids(1, 40), torch.arange(40_960 - 40, 40_960)[None]
    close(
        ours(ours.embed_tokens(ids), positions),
        theirs.model(ids, position_ids=positions).last_hidden_state,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width, eps", [(128, 1e-6), (2560, 1e-6), (64, 1e-5)])
def test_rms_norm_is_transformers_to_the_bit(width, eps, dtype):
    ours, theirs = RMSNorm(width, eps), Qwen3RMSNorm(width, eps)
    randomize(ours, 0)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    with torch.no_grad():
        ours.weight.normal_(1, 0.5, generator=torch.Generator().manual_seed(0))
        theirs.load_state_dict(ours.state_dict())
        x = (
            torch.randn(200, width, generator=torch.Generator().manual_seed(1))
            * torch.logspace(-4, 3, 200)[:, None]
        )
        assert torch.equal(ours(x.to(dtype)), theirs(x.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim, theta", [(128, 1e6), (24, 1e6), (64, 1e4)])
def test_cos_and_sin_are_transformers_to_the_bit_at_every_position(head_dim, theta, dtype):
    config = decoder_config(
        64, 96, 1, heads=4, groups=2, head_dim=head_dim, theta=theta, positions=40_960
    )
    positions = torch.arange(40_960)[None]
    expected = Qwen3RotaryEmbedding(OracleConfig(**vars(config)))(
        torch.zeros((), dtype=dtype), positions
    )
    for ours, theirs in zip(rope_table(positions, config, dtype), expected, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_rotation_is_transformers_to_the_bit(dtype):
    config = DECODERS["a key/value head to two, head_dim above hidden / heads"]
    positions = torch.tensor([[0, 1, 2, 500], [7, 8, 9, 40_959]])
    q, k = torch.randn(2, 2, 4, 4, 24, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )  # [B, heads, n, hd]
    cos, sin = rope_table(positions, config, dtype)
    expected = apply_rotary_pos_emb(q, k, cos[:, 0], sin[:, 0])
    assert torch.equal(apply_rope(q, cos, sin), expected[0]) and torch.equal(
        apply_rope(k, cos, sin), expected[1]
    )


# ---- tokenizer ----

OURS = load_tokenizer(QWEN3_TOKENIZER)
FAST = Qwen2TokenizerFast.from_pretrained(QWEN3_TOKENIZER, local_files_only=True)
SLOW = Qwen2Tokenizer.from_pretrained(QWEN3_TOKENIZER, local_files_only=True)

TEXTS = [
    "",
    "Describe this audio.",
    "  leading, trailing and     inner spaces   ",
    "\n\n\r\n \t\n   \r\r\n\tindented\n",
    "a\u00a0b\u2003c\u3000d\u2028e\u2029f\x85g\x1ch\u200bi\ufeffj",  # spaces and line ends of Unicode, some of no width
    "I'm, you're, he'd, they'll, I've, it's, don't; I'M, YOU'RE, HE'D, THEY'LL, I'VE, IT'S, DON'T; 'ſ 'ﬆ; O'THE it'Me",
    "0123456789 1,234.5 3/4 10:30 ½ ² Ⅷ ٣٤٥ १२३ ๑๒๓ 〇一二 𝟘𝟙 𑁦",  # digits of other scripts
    "Zoë, naïve café: e\u0301 a\u030a \u1e9b\u0323 \u212b \u2126 \u0344 s\u0323\u0307 s\u0307\u0323",  # in NFC and not
    "\u1100\u1161\u11a8 각 한국어 문장입니다.",  # letters of a syllable, and the syllable
    "ここで話しているのは誰ですか。「東京」ｶﾞﾗｽ が",
    "这段录音里有几个人？繁體中文，𠮷野家",
    "ภาษาไทย น้ำ กำลัง เก็บ ๆ ฯลฯ",
    "مرحبا بِكُمْ؟ لا إله إلّا ﷺ ـــ",
    "नमस्ते, क्या हाल है? क्षत्रिय क़ ज़ \u0958",
    "ελληνικά, русский, עִבְרִית, ქართული, Հայերեն, አማርኛ, தமிழ், မြန်မာ, ខ្មែរ, 𐍈𐌰𐌹",
    "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👍🏽 🇩🇪🇫🇷 ☺\ufe0f 😀😀 1\ufe0f\u20e3",  # emoji with joiners
    "\0\x01\x07\x08\x1b[0m\x7f \ufffd \ue000 \U0010ffff \u0378",  # control characters, private, not assigned
    "def f(x):\n    return x**2  # ¹\n\n\nif __name__ == '__main__':\n\tprint(f(3))\n",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\dir\\file.txt $HOME <b>&amp;</b>",
    "!!!...???---___***\n///\r\n;;; \"'`´’ …—–",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|><|endoftext|>",
    "a<think>b </think> c<think></think>d <|im_end|> e\u0301<|im_end|>\u0301f <tool_call>{}</tool_call>",
    "<|im_end|", "<|im_end|>>", "<<think>>", "< think>", "<|IM_END|>", "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "supercalifragilisticexpialidocious " * 3 + "x" * 300 + " " * 300 + "\n" * 50,
]  # fmt: skip

PIECES = [
    *"abcXYZ 019.,'!?\t\n\réßﬁ漢字ไทยกำעבארسहिन्दी٣५Ⅷ½²ſ가😀𝟘", "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈",
    "e\u0301", "\u1e9b\u0323", "\u1100\u1161", "\u0344", "\u212b", "\u00a0", "\u3000", "\u2028", "\u200b",
    "\ufeff", "\x85", "\0", "\x07", "'S", "'LL", "'re", "  ", "\r\n", "<think>", "</think>", "<|im_start|>",
    "<|im_end|>", "<|audio_bos|>", "<|", "|>", " the", "ing",
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    """Texts of up to 24 pieces, which meet in every order."""
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, 24))) for _ in range(count)]


def ids_of(tokenizer, text: str) -> list[int]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding if isinstance(encoding, list) else encoding.ids


def check(text: str) -> None:
    """Encoding and decoding are those of both of transformers' tokenizers."""
    ids = ids_of(OURS, text)
    for oracle in (FAST, SLOW):
        assert ids == ids_of(oracle, text), text
        for skip in (True, False):
            assert OURS.decode(ids, skip_special_tokens=skip) == oracle.decode(
                ids, skip_special_tokens=skip
            ), text


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_text_is_tokenized_as_transformers_does(text):
    check(text)


def test_thousands_of_random_texts_are_tokenized_as_transformers_does():
    for text in random_texts(4000):
        check(text)


def test_thousands_of_random_ids_are_decoded_as_transformers_does():
    draw, vocabulary = random.Random(1), range(len(FAST))
    for _ in range(4000):  # bytes that are no UTF-8 among them
        ids = draw.choices(vocabulary, k=draw.randint(1, 8)) + draw.choices(range(256), k=2)
        for skip in (True, False):
            assert OURS.decode(ids, skip_special_tokens=skip) == FAST.decode(
                ids, skip_special_tokens=skip
            ), ids


def test_random_code_points_are_tokenized_as_the_fast_tokenizer_does():
    draw = random.Random(2)
    planes = [
        (0x20, 0x7F),
        (0x80, 0x250),
        (0x250, 0x3000),
        (0x3000, 0xD800),
        (0xE000, 0x20000),
        (0x20000, 0x110000),
    ]
    for _ in range(4000):
        text = "".join(
            chr(draw.randrange(*draw.choice(planes))) for _ in range(draw.randint(1, 12))
        )
        assert ids_of(OURS, text) == ids_of(FAST, text), ascii(text)


def test_where_the_slow_tokenizer_differs_the_fast_one_is_followed():
    """They differ where one knows a newer Unicode: here, in the order of two marks under NFC."""
    text = "\u1df6\u0820"
    assert ids_of(OURS, text) == ids_of(FAST, text) != ids_of(SLOW, text)


def test_the_vocabulary_is_transformers():
    assert OURS.get_vocab() == FAST.get_vocab() == SLOW.get_vocab()
