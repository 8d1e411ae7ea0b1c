"""Every stage of every golden case against upstream's figures, and the roundings that those are too small to show.

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

import qwen3  # noqa: E402
from conftest import GOLDEN, draws_as_upstream, golden_case, golden_model  # noqa: E402
from encoder import AudioEncoder, EncoderLayer, sinusoids, split_chunks  # noqa: E402
from qwen3 import Qwen3, RMSNorm, rope_table  # noqa: E402

CASES = sorted(path.stem for path in (GOLDEN / "cases").iterdir()) + ["variant"]
FLOAT32 = [name for name in CASES if not name.endswith(".bfloat16")]
BFLOAT16 = [name for name in CASES if name.endswith(".bfloat16")]
NOT_STAGES = ("waveform", "mel", "input_ids", "generated")


def stages_of(model, prompt) -> dict[str, torch.Tensor]:
    """What a model computes of a prompt on the way, by golden's names for the stages."""
    encoder, decoder = model.audio_encoder, model.language_model
    inputs = {
        "encoder.stem": encoder.layers[0],
        "inputs_embeds": decoder.layers[0],
    }  # stage -> the module it enters
    inputs |= {
        f"decoder.layers.{i}": layer for i, layer in enumerate(decoder.layers[1:])
    }  # injection included
    outputs = {"encoder": encoder, "adapter": model.audio_adapter, "final_norm": decoder.norm}
    outputs |= {f"encoder.layers.{i}": layer for i, layer in enumerate(encoder.layers)}
    outputs |= {
        f"deepstack.{k}": merger for k, merger in enumerate(model.deepstack_audio_merger_list)
    }
    seen = {}  # stage -> its batches

    def record(name, x):
        seen.setdefault(name, []).append(x[0] if isinstance(x, tuple) else x)

    with contextlib.ExitStack() as hooks:
        for name, module in inputs.items():
            hooks.enter_context(
                module.register_forward_pre_hook(lambda _, args, name=name: record(name, args))
            )
        for name, module in outputs.items():
            hooks.enter_context(
                module.register_forward_hook(lambda _, args, out, name=name: record(name, out))
            )
        logits = model(prompt)
    found = {name: torch.cat(batches).flatten(0, -2) for name, batches in seen.items()}
    if prompt.mels:
        tokens = split_chunks(prompt.mels, encoder.config.n_window)[1]
        length = len(found["encoder.stem"]) // len(tokens)
        keep = (torch.arange(length) < tokens[:, None]).flatten()  # False where a chunk is padding
        chunked = ["encoder.stem", *(f"encoder.layers.{i}" for i in range(len(encoder.layers)))]
        found |= {name: found[name][keep] for name in chunked}
    return found | {"logits": logits}


@functools.cache
def run(name: str) -> SimpleNamespace:
    """A case's prompt and stages, as this implementation computes them."""
    case = golden_case(name)
    model = golden_model(case.checkpoint, case.dtype)
    prompt = model.prompt(case.text, case.clips, case.time_markers)
    return SimpleNamespace(case=case, model=model, prompt=prompt, stages=stages_of(model, prompt))


def stage(name: str, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """This implementation's stage and upstream's; of the logits, the rows that golden keeps: all or the last."""
    ours, upstream = run(name).stages[key].float(), golden_case(name).tensors[key].float()
    return (ours[-len(upstream) :] if key == "logits" else ours), upstream


def largest_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the largest exact value."""
    assert ours.shape == exact.shape
    return float((ours - exact).abs().max() / exact.abs().max())


def assert_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    assert (
        largest_error(ours, exact) <= 3e-6
    )  # float32 sums in another order come to 1e-6 (golden/README.md)


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The root mean square of the difference, over that of the exact values."""
    return float((x.float() - exact).norm() / exact.norm())


def distance_ratio(name: str, key: str) -> float:
    """How far from float32 this implementation's bfloat16 is, where upstream's own is 1."""
    exact = golden_case(name.removesuffix(".bfloat16")).tensors[key]
    ours, upstream = stage(name, key)
    return distance(ours, exact) / distance(upstream, exact)


def stages_in(names: list[str]) -> list[tuple[str, str]]:
    return [
        (name, key)
        for name in names
        for key in golden_case(name).tensors
        if key.split(".")[0] not in NOT_STAGES
    ]


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
def test_a_stage_is_within_3e_6_of_its_largest_value(name, key):
    assert_close(*stage(name, key))


DRAWN = {name for name in FLOAT32 if "seed" in golden_case(name).sampling}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=draws_as_upstream if name in DRAWN else ()) for name in FLOAT32],
)
def test_generation_is_upstreams_id_by_id_and_as_text(name):
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
    x = (
        torch.randn(16, 64, generator=generator) * torch.logspace(-3, 2, 16)[:, None]
    )  # epsilon shows in the first rows
    norm = RMSNorm(64, eps=1e-6)
    norm.weight.data = torch.rand(64, generator=generator) + 0.5
    norm, x = norm.bfloat16(), x.bfloat16()
    exact, weight = x.double().numpy(), norm.weight.detach().double().numpy()
    scaled = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    got = norm(x).detach()
    assert got.dtype == torch.bfloat16
    expected, other_order = bfloat16(weight * bfloat16(scaled)), bfloat16(weight * scaled)
    assert np.array_equal(got.double().numpy(), expected) and not np.array_equal(
        expected, other_order
    )


def rope_tables(
    head_dim: int, positions: torch.Tensor, dtype: torch.dtype, monkeypatch
) -> torch.Tensor:
    """The cos and sin that a decoder of this type uses at positions [n]: [2, n, head_dim]."""
    config = replace(golden_model().config.decoder, head_dim=head_dim, num_hidden_layers=1)
    decoder, tables = Qwen3(config).to(dtype), []
    monkeypatch.setattr(
        qwen3, "rope_table", lambda *args: tables.append(rope_table(*args)) or tables[-1]
    )
    decoder(torch.zeros(len(positions), 1, config.hidden_size, dtype=dtype), positions[:, None])
    return torch.stack([table[:, 0, 0] for table in tables[0]])


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [24, 128])
def test_cos_and_sin_of_a_bfloat16_decoder_are_those_of_float32_angles_rounded_last(
    head_dim, monkeypatch
):
    positions = torch.arange(40_960)
    rates = 1 / torch.pow(
        torch.tensor(1e6), torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    )
    angles = torch.outer(positions.to(torch.float32), rates).repeat(1, 2)
    expected = torch.stack([angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)])
    tables = rope_tables(head_dim, positions, torch.bfloat16, monkeypatch)
    assert tables.dtype == torch.bfloat16 and torch.equal(tables, expected)


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [24, 128])
def test_cos_and_sin_of_a_float32_decoder_are_right_at_every_position(head_dim, monkeypatch):
    positions = torch.arange(40_960)
    angles = np.outer(np.arange(40_960.0), 1e6 ** -(np.arange(0, head_dim, 2) / head_dim))
    tables = rope_tables(head_dim, positions, torch.float32, monkeypatch)
    for table, exact in zip(tables.numpy(), (np.cos(angles), np.sin(angles))):
        # A rate is good to about 2**-23 of itself, which the position multiplies.
        assert np.abs(table - np.tile(exact, 2)).max() < 40_960 * 2**-23


def exact_sinusoids(length: int, width: int) -> torch.Tensor:
    angles = np.outer(
        np.arange(length), np.exp(-np.arange(width // 2) * np.log(10_000) / (width / 2 - 1))
    )
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))


@pytest.mark.parametrize("width", [32, 48, 1280])
def test_encoder_positions_are_sines_and_then_cosines(width):
    positions = sinusoids(50, width)
    assert positions.dtype == torch.float32
    assert (
        positions - exact_sinusoids(50, width)
    ).abs().max() < 50 * 2**-23  # as above, of a float32 rate


@torch.no_grad()
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
def test_encoder_positions_restart_in_every_chunk_and_are_rounded_last(dtype, rounding):
    encoder = AudioEncoder(golden_model().config.encoder).to(dtype)
    encoder.stem_proj.weight.zero_()
    encoder.stem_proj.bias.zero_()  # so that the positions are all that is left
    rows = encoder.stem(torch.zeros(3, 128, 400, dtype=dtype))
    assert (rows - exact_sinusoids(50, 48)).abs().max() < rounding + 50 * 2**-23


@torch.no_grad()
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float16, 65_504 - 1000), (torch.float32, 2 * 60_000)]
)
def test_what_leaves_an_encoder_layer_is_kept_from_infinity_in_float16_alone(dtype, bound, sign):
    layer = EncoderLayer(golden_model().config.encoder).to(dtype)
    layer.fc2.weight.zero_()
    layer.self_attn.out_proj.weight.zero_()
    layer.self_attn.out_proj.bias.zero_()
    layer.fc2.bias.fill_(sign * 60_000)
    out = layer(torch.full((1, 3, 48), sign * 60_000.0, dtype=dtype), None)
    assert (out == torch.tensor(sign * bound, dtype=dtype)).all()


# ---- the table ----


def table() -> str:
    """Each stage's largest error in float32, and the largest ratio of distances in bfloat16, over all cases."""
    lines = [
        "| stage | float32: largest error | bfloat16: distance, where upstream's is 1 |",
        "|---|---|---|",
    ]
    for key in run("three_chunks").stages:
        error = max(
            largest_error(*stage(name, found)) for name, found in stages_in(FLOAT32) if found == key
        )
        ratio = max(
            distance_ratio(name, found) for name, found in stages_in(BFLOAT16) if found == key
        )
        lines.append(f"| {key} | {error:.1e} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
