"""What the tools write: whole files only, under any kill, and nothing left beside them."""

import os
from pathlib import Path

import pytest
import torch

import common
from common import write_tensors, write_text


@pytest.fixture(params=["text", "tensors"])
def write(request):
    """Writes a file of one kind, in one of two versions."""
    if request.param == "text":
        return lambda path, version: write_text(f"version {version}", path)
    return lambda path, version: write_tensors({"x": torch.full((9,), version)}, path)


def test_what_a_killed_run_has_left_goes_with_the_next(write, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, 1)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(common.os, "replace", lambda *_: 1 / 0)
        patch.setattr(common.shutil, "rmtree", lambda *_, **options: None)
        with pytest.raises(ZeroDivisionError):
            write(path, 2)
        Path(tmp_path, "file.part", ".tmp4m2qcP").touch()  # safetensors' own, before it is renamed
    assert path.read_bytes() == whole and len(os.listdir(tmp_path)) == 2
    write(path, 2)
    assert path.read_bytes() != whole and os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link_and_its_file_is_replaced(write, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    for version in 1, 2:  # at first it leads nowhere
        write(tmp_path / "link", version)
        assert (tmp_path / "link").is_symlink()
    write(tmp_path / "other", 2)
    written = [tmp_path / name for name in ("elsewhere/file", "other")]
    assert written[0].read_bytes() == written[1].read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link", "other"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_not_an_ordinary_file_is_no_target(kind, write, tmp_path):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(os.devnull)
    with pytest.raises(ValueError, match="is not an ordinary file; expected the name of one"):
        write(path, 1)
    assert os.listdir(tmp_path) == [kind]
