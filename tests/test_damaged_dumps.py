"""What parity.py can't read, or what dump has not written: one line, no traceback."""

import struct

import numpy as np
import pytest
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
    assert out == "" and err.startswith("parity: ") and err.count("\n") == 1
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
        ("axes", '{"no stage": "tokens"}'),
        ("axes", "[" * 10**5),
        ("injected", "1000000000"),
        ("sounds", "3"),
        ("audio_ids", "[1]"),
        ("dtype", "int8"),
        ("versions", "no JSON"),
    ],
)
def test_metadata_of_another_kind_is_refused(key, value, dumped, tmp_path, capsys):
    rewrite(dumped, tmp_path / "bad.safetensors", **{key: value})
    said = refusal(capsys, tmp_path / "bad.safetensors", dumped)
    assert "its metadata is damaged" in said and said.endswith("dump it again\n")


def test_a_scalar_is_no_stage_of_a_port(dumped, tmp_path, capsys):
    np.savez(tmp_path / "port.npz", final_norm=np.float32(1))
    assert "final_norm is torch.float32 []; expected floats" in refusal(
        capsys, dumped, tmp_path / "port.npz"
    )


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header


ARRAY = b"{'descr': '<f4', 'fortran_order': False, 'shape': %s}\n"
DAMAGED = {
    "empty.npy": b"",
    "huge.npy": npy(ARRAY % b"(1000000000000, 1000)"),
    "nested.npy": npy(ARRAY % (b"(" * 10**5)),
    "objects.npy": npy(ARRAY.replace(b"<f4", b"|O") % b"(1,)"),
    "empty.npz": b"",
    "header.safetensors": struct.pack("<Q", 2**63) + b"{}",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_a_port_is_refused(name, dumped, tmp_path, capsys):
    (tmp_path / name).write_bytes(DAMAGED[name])
    port = tmp_path if name.endswith(".npy") else tmp_path / name
    assert f"{port} can't be read: " in refusal(capsys, dumped, port)


@pytest.mark.parametrize("place", ["data", "method", "flags"])
def test_a_damaged_archive_of_a_port_is_refused(place, dumped, tmp_path, capsys):
    path = tmp_path / "port.npz"
    np.savez_compressed(path, logits=np.zeros((9, 320), np.float32))
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    at = {"data": directory - 9, "method": directory + 10, "flags": directory + 8}[place]
    data[at] ^= 1  # "flags": encrypted
    path.write_bytes(data)
    assert f"{path} can't be read: " in refusal(capsys, dumped, path)
