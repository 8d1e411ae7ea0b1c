"""Every stage of every golden case against upstream's, and roundings that those do not show.

`python tests/test_golden.py` prints the stages and their errors as a markdown table.
"""

import contextlib
import functools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # as a script

from conftest import (  # noqa: E402
    GOLDEN,
    assert_close,
    distance,
    draws_as_upstream,
    golden_case,
    golden_model,
    golden_prompt,
    largest_error,
)
from encoder import AudioEncoder, EncoderLayer, split_chunks  # noqa: E402
from qwen3 import KVCache, RMSNorm  # noqa: E402

CASES = sorted(path.stem for path in (GOLDEN / "cases").iterdir()) + ["variant"]
FLOAT32 = [name for name in CASES if not name.endswith(".bfloat16")]
BFLOAT16 = [name for name in CASES if name.endswith(".bfloat16")]
NOT_STAGES = ("waveform", "mel", "input_ids", "generated")


def stages_of(model, prompt) -> dict[str, torch.Tensor]:
    """What a model computes of a prompt on the way, by golden's names for the stages."""
    encoder = model.audio_encoder
    decoder = model.language_model
    # A stage is what enters one module or what leaves another. What enters decoder layer i + 1 is
    # what leaves layer i with DeepStack's rows added.
    entering = {"encoder.stem": encoder.layers[0], "inputs_embeds": decoder.layers[0]}
    for i, layer in enumerate(decoder.layers[1:]):
        entering[f"decoder.layers.{i}"] = layer
    leaving = {"encoder": encoder, "adapter": model.audio_adapter, "final_norm": decoder.norm}
    for i, layer in enumerate(encoder.layers):
        leaving[f"encoder.layers.{i}"] = layer
    for k, merger in enumerate(model.deepstack_audio_merger_list):
        leaving[f"deepstack.{k}"] = merger
    seen = {}  # stage -> [rows, width] of each batch

    def keep(name, x):
        x = x[0] if isinstance(x, (tuple, list)) else x
        seen.setdefault(name, []).append(x.flatten(0, -2))

    with contextlib.ExitStack() as hooks:
        for name, module in entering.items():
            hook = module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args))
            hooks.enter_context(hook)
        for name, module in leaving.items():
            hook = module.register_forward_hook(lambda _, args, out, name=name: keep(name, out))
            hooks.enter_context(hook)
        logits = model(prompt)
    found = {name: torch.cat(batches) for name, batches in seen.items()}
    if prompt.mels:
        _, tokens = split_chunks(prompt.mels, encoder.config.n_window)
        length = len(found["encoder.stem"]) // len(tokens)
        is_real = (torch.arange(length) < tokens[:, None]).flatten()  # False where it is padding
        for name in ["encoder.stem", *(f"encoder.layers.{i}" for i in range(len(encoder.layers)))]:
            found[name] = found[name][is_real]
    return found | {"logits": logits}


@functools.cache
def run(name: str) -> SimpleNamespace:
    """A case's prompt and stages, as this implementation computes them."""
    case = golden_case(name)
    prompt = golden_prompt(name)
    model = golden_model(case.checkpoint, case.dtype)
    return SimpleNamespace(case=case, model=model, prompt=prompt, stages=stages_of(model, prompt))


def stage(name: str, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """This implementation's stage and upstream's; of the logits the rows that golden keeps."""
    ours = run(name).stages[key].float()
    upstream = golden_case(name).tensors[key].float()
    return (ours[-len(upstream) :] if key == "logits" else ours), upstream


def distance_ratio(name: str, key: str) -> float:
    """How far from float32 this implementation's bfloat16 is, where upstream's own is 1."""
    exact = golden_case(name.removesuffix(".bfloat16")).tensors[key]
    ours, upstream = stage(name, key)
    return distance(ours, exact) / distance(upstream, exact)


def stages_in(names: list[str]) -> list[tuple[str, str]]:
    found = []
    for name in names:
        keys = golden_case(name).tensors
        found += [(name, key) for key in keys if key.split(".")[0] not in NOT_STAGES]
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_prompt_has_upstreams_ids(name):
    assert run(name).prompt.ids.tolist() == golden_case(name).tensors["input_ids"].tolist()


@pytest.mark.parametrize("name", [name for name in CASES if golden_case(name).clips])
def test_the_log_mel_is_upstreams_to_the_bit(name):
    tensors = golden_case(name.removesuffix(".bfloat16")).tensors
    upstream = [tensors[key] for key in sorted(tensors) if key.startswith("mel.")]
    mels = run(name).prompt.mels
    assert len(mels) == len(upstream) and all(map(torch.equal, mels, upstream))
    assert all(mel.dtype == torch.bfloat16 for mel in mels)


@pytest.mark.parametrize("name, key", stages_in(FLOAT32))
def test_a_stage_is_upstreams(name, key):
    assert_close(*stage(name, key))


ANSWERS = [
    pytest.param(name, marks=draws_as_upstream if "seed" in golden_case(name).sampling else ())
    for name in FLOAT32
]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_upstreams_id_by_id_and_as_text(name):
    ours = run(name)
    ids = list(ours.model.generate(ours.prompt, ours.case.max_new_tokens, **ours.case.sampling))
    assert ids == ours.case.tensors["generated"].tolist()
    assert ours.model.tokenizer.decode(ids) == ours.case.answer


@pytest.mark.parametrize("name, key", stages_in(BFLOAT16))
def test_a_bfloat16_stage_is_no_further_from_float32_than_upstreams(name, key):
    assert distance_ratio(name, key) <= 1.15  # a faithful one comes to 0.95-1.05 (golden/README.md)


# ---- what a small checkpoint does not show ----


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Float64 rounded to bfloat16's 8 bits of mantissa, ties to even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**8), exponent - 8)


def test_rms_norm_rounds_first_and_is_weighted_then():
    generator = torch.Generator().manual_seed(0)
    # Epsilon shows in the first rows.
    x = torch.randn(16, 64, generator=generator) * torch.logspace(-3, 2, 16)[:, None]
    x = x.bfloat16()
    norm = RMSNorm(64, eps=1e-6)
    norm.weight.data = torch.rand(64, generator=generator) + 0.5
    norm = norm.bfloat16()
    exact = x.double().numpy()
    weight = norm.weight.detach().double().numpy()
    scaled = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    expected = bfloat16(weight * bfloat16(scaled))
    other_order = bfloat16(weight * scaled)
    got = norm(x).detach()
    assert got.dtype == torch.bfloat16
    assert np.array_equal(got.double().numpy(), expected)
    assert not np.array_equal(expected, other_order)


POSITIONS = 40_960  # the released models'


def rope_tables(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The cosines and sines that a decoder of this type rotates by: [2, positions, head_dim]."""
    config = replace(golden_model().config.decoder, head_dim=head_dim, num_hidden_layers=1)
    cache = KVCache(config, POSITIONS, 1, torch.zeros(1, dtype=dtype))
    cache.place(torch.arange(POSITIONS)[:, None], in_use=1)
    return torch.stack([cache.cos[:, 0, 0], cache.sin[:, 0, 0]])


@pytest.mark.parametrize("head_dim", [24, 128])
def test_a_bfloat16_decoder_rotates_by_float32_angles_rounded_last(head_dim):
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    rates = 1 / torch.pow(torch.tensor(1e6), exponents)
    angles = torch.outer(torch.arange(POSITIONS).to(torch.float32), rates).repeat(1, 2)
    expected = torch.stack([angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)])
    tables = rope_tables(head_dim, torch.bfloat16)
    assert tables.dtype == torch.bfloat16 and torch.equal(tables, expected)


@pytest.mark.parametrize("head_dim", [24, 128])
def test_a_float32_decoder_rotates_by_the_right_angle_at_every_position(head_dim):
    rates = 1e6 ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = np.outer(np.arange(float(POSITIONS)), rates)
    tables = rope_tables(head_dim, torch.float32).numpy()
    for table, exact in zip(tables, (np.cos(angles), np.sin(angles))):
        # A rate is good to about 2**-23 of itself, which the position multiplies.
        assert np.abs(table - np.tile(exact, 2)).max() < POSITIONS * 2**-23


def exact_sinusoids(length: int, width: int) -> torch.Tensor:
    rates = np.exp(-np.arange(width // 2) * np.log(10_000) / (width / 2 - 1))
    angles = np.outer(np.arange(length), rates)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))


@torch.no_grad()
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
def test_encoder_positions_restart_in_every_chunk_and_are_rounded_last(dtype, rounding):
    encoder = AudioEncoder(golden_model().config.encoder).to(dtype)
    encoder.stem_proj.weight.zero_()
    encoder.stem_proj.bias.zero_()  # so that the positions are all that is left
    rows = encoder.stem(torch.zeros(3, 128, 400, dtype=dtype))
    # As above, of a float32 rate.
    assert (rows - exact_sinusoids(50, 48)).abs().max() < rounding + 50 * 2**-23


@torch.no_grad()
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 64_504), (torch.float32, 120_000)])
def test_an_encoder_layers_output_is_clamped_in_float16_alone(dtype, bound, sign):
    layer = EncoderLayer(golden_model().config.encoder).to(dtype)
    layer.fc2.weight.zero_()
    layer.self_attn.out_proj.weight.zero_()
    layer.self_attn.out_proj.bias.zero_()
    layer.fc2.bias.fill_(
        sign * 60_000
    )  # is added to an input of 60,000: the largest float16 is 65,504
    out = layer(torch.full((1, 3, 48), sign * 60_000.0, dtype=dtype), None)
    assert (out == torch.tensor(sign * bound, dtype=dtype)).all()


# ---- the table ----


def table() -> str:
    """Each stage's largest error in float32, and largest ratio of distances in bfloat16."""
    lines = [
        "| stage | float32: largest error | bfloat16: distance, where upstream's is 1 |",
        "|---|---|---|",
    ]
    for key in run("three_chunks").stages:
        exact = [name for name, found in stages_in(FLOAT32) if found == key]
        rounded = [name for name, found in stages_in(BFLOAT16) if found == key]
        error = max(largest_error(*stage(name, key)) for name in exact)
        ratio = max(distance_ratio(name, key) for name in rounded)
        lines.append(f"| {key} | {error:.1e} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
