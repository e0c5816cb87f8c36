"""Files that are whole or not there."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from skipkernels.store import replace_file


def test_replace_file_keeps_the_old_one_when_writing_fails(tmp_path):
    file = tmp_path / "file"
    replace_file(file, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(file, fail)
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"], "no temporary file is left"
    replace_file(file, lambda temporary: temporary.write_text("new"))
    assert file.read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_file_has_the_permissions_that_new_files_have(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        replace_file(tmp_path / "ours", lambda temporary: save_file({"x": torch.ones(1)}, temporary))
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_mask_of_the_process_is_left_alone(tmp_path, monkeypatch):
    """Two threads that set it and put it back would leave each other's."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("umask"))
    replace_file(tmp_path / "file", lambda temporary: temporary.write_text("whole"))


def test_the_file_and_then_its_name_reach_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "file").exists()))
    )
    replace_file(tmp_path / "file", lambda temporary: temporary.write_text("whole"))
    assert flushed == [((tmp_path / "file").stat().st_ino, False), (tmp_path.stat().st_ino, True)]
