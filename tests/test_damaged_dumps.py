"""What parity.py can't read, or what dump has not written: one line, no traceback."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import parity
from conftest import FOLDER


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    """A reference of a run without a sound."""
    path = tmp_path_factory.mktemp("dump") / "reference.safetensors"
    argv = ["dump", "--prompt", "Hello there", "-o", path, "--model", FOLDER, "--device", "cpu"]
    assert parity.main([*map(str, argv), "--max-new-tokens", "2"]) == 0
    return path


def refusal(capsys, reference, port) -> str:
    capsys.readouterr()
    assert parity.main(["compare", str(reference), str(port)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("parity.py: ") and err.count("\n") == 1
    return err


def rewrite(path, target, tensors=(), **metadata) -> None:
    """Copies a reference with some tensors and metadata changed; None takes one away."""
    with safe_open(path, "pt") as file:
        said = file.metadata() | metadata
    said = {key: value for key, value in said.items() if value is not None}
    save_file(load_file(path) | dict(tensors), target, said)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("axes", None),
        ("axes", "3"),
        ("axes", '{"no stage": "tokens"}'),
        ("axes", "[" * 10**5),
        ("injected", '"3"'),
        ("injected", "1000000000"),
        ("sounds", "3"),
        ("chunk_tokens", None),
        ("audio_ids", "[1]"),
        ("dtype", "int8"),
        ("versions", "no JSON"),
    ],
)
def test_metadata_of_another_kind_is_refused(key, value, dumped, tmp_path, capsys):
    rewrite(dumped, tmp_path / "bad.safetensors", **{key: value})
    said = refusal(capsys, tmp_path / "bad.safetensors", dumped)
    assert "its metadata is damaged" in said and said.endswith("dump it again\n")


@pytest.mark.parametrize("shape", [(), (320,), (1, 1, 320)])
def test_a_stage_of_other_axes_is_refused(shape, dumped, tmp_path, capsys):
    bad = {"logits": torch.zeros(shape)}
    rewrite(dumped, tmp_path / "bad.safetensors", bad)
    assert "logits has other axes than" in refusal(capsys, tmp_path / "bad.safetensors", dumped)


def test_a_scalar_is_no_stage_of_a_port(dumped, tmp_path, capsys):
    np.savez(tmp_path / "port.npz", final_norm=np.float32(1))
    assert "final_norm is torch.float32 []; expected floats" in refusal(
        capsys, dumped, tmp_path / "port.npz"
    )


def spoilt_files(folder) -> dict[str, bytes]:
    """Files of numpy's that are damaged in ways of their own."""
    np.savez_compressed(folder / "a.npz", logits=np.zeros((9, 320), np.float32))
    archive = (folder / "a.npz").read_bytes()
    np.save(folder / "a.npy", np.zeros((9, 320), np.float32))
    array = (folder / "a.npy").read_bytes()
    at = archive.index(b"logits.npy") + 10  # the compressed data
    method = archive.index(b"PK\x01\x02") + 10  # how it is compressed, in the directory
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': %s}\n"
    huge = header % b"(1000000000000, 1000)"
    nested = header % (b"(" * 10**5)
    return {
        "cut.npz": archive[: len(archive) // 2],
        "bits.npz": archive[: at + 40] + bytes(20) + archive[at + 60 :],
        "method.npz": archive[:method] + b"\x63" + archive[method + 1 :],
        "encrypted.npz": archive[: method - 2] + b"\x01" + archive[method - 1 :],
        "cut.npy": array[:-1],
        "empty.npy": b"",
        "huge.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", len(huge)) + huge,
        "nested.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", len(nested)) + nested,
        "object.npy": array.replace(b"'<f4'", b"'|O' "),
        "header.safetensors": struct.pack("<Q", 2**63) + b"{}",
        "shape.safetensors": struct.pack("<Q", 60)
        + json.dumps({"logits": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}})
        .ljust(60)
        .encode()
        + bytes(4),
    }


def test_damaged_files_of_a_port_are_refused(dumped, tmp_path, capsys):
    for name, data in spoilt_files(tmp_path).items():
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_bytes(data)
        port = folder if name.endswith(".npy") else folder / name
        assert f"{port} can't be read: " in refusal(capsys, dumped, port), name
        shutil.rmtree(folder)
