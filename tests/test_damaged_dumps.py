"""What parity.py can't read, or what dump has not written: one line, no traceback."""

import struct

import numpy as np
import pytest
from safetensors.torch import load_file

import parity
from conftest import FOLDER, rewrite_dump


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    """A reference of a run without a sound."""
    path = tmp_path_factory.mktemp("dump") / "reference.safetensors"
    argv = ["dump", "--prompt", "Hello there", "-o", path, "--model", FOLDER, "--device", "cpu"]
    assert parity.main([*map(str, argv), "--max-new-tokens", "2"]) == 0
    return path


@pytest.fixture
def refused_by_compare(refused, dumped):
    """Why a port's file is refused, or a reference."""

    def refused_by_compare(port, reference=dumped) -> str:
        return refused(parity.main, "compare", reference, port)

    return refused_by_compare


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("axes", None),
        ("axes", '{"no stage": "tokens"}'),
        ("axes", "[" * 10**5),
        ("injected", "1000000000"),
        ("sounds", "3"),
        ("audio_ids", "[1]"),
        ("chunk_tokens", "[40]"),
        ("chunk_tokens", "[-1, 1]"),
        ("dtype", "int8"),
        ("versions", "no JSON"),
    ],
)
def test_metadata_of_another_kind_is_refused(key, value, dumped, tmp_path, refused_by_compare):
    bad = tmp_path / "bad.safetensors"
    rewrite_dump(dumped, bad, load_file(dumped), **{key: value})
    said = refused_by_compare(dumped, reference=bad)
    assert "its metadata is damaged" in said and said.endswith("dump it again")


def test_a_scalar_is_no_stage_of_a_port(tmp_path, refused_by_compare):
    np.savez(tmp_path / "port.npz", final_norm=np.float32(1))
    said = refused_by_compare(tmp_path / "port.npz")
    assert "final_norm is torch.float32 []; expected floats" in said


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
def test_a_damaged_file_of_a_port_is_refused(name, tmp_path, refused_by_compare):
    (tmp_path / name).write_bytes(DAMAGED[name])
    port = tmp_path if name.endswith(".npy") else tmp_path / name
    assert f"{port} can't be read: " in refused_by_compare(port)


@pytest.mark.parametrize("place", ["data", "method", "flags"])
def test_a_damaged_archive_of_a_port_is_refused(place, tmp_path, refused_by_compare):
    path = tmp_path / "port.npz"
    np.savez_compressed(path, logits=np.zeros((9, 320), np.float32))
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    at = {"data": directory - 9, "method": directory + 10, "flags": directory + 8}[place]
    data[at] ^= 1  # "flags": encrypted
    path.write_bytes(data)
    assert f"{path} can't be read: " in refused_by_compare(path)
