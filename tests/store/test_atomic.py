"""Files that are whole or not there."""

from __future__ import annotations

import os
import re

import pytest
import torch

from skipkernels.store import partial_of, replace_file, replace_text, write_tensors


def test_replace_file_keeps_the_old_one_when_writing_fails(tmp_path):
    file = tmp_path / "file"
    replace_file(file, lambda temporary: temporary.write(b"old"))

    def fail(temporary):
        temporary.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(file, fail)
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"], "no temporary file is left"
    replace_text(file, "new")
    assert file.read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_file_has_the_permissions_that_new_files_have(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        replace_file(tmp_path / "ours", lambda temporary: write_tensors(temporary, {"x": torch.ones(1)}, {}))
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_mask_of_the_process_is_left_alone(tmp_path, monkeypatch):
    """Two threads that set it and put it back would leave each other's."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("umask"))
    replace_text(tmp_path / "file", "whole")


def test_the_file_and_then_its_name_reach_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "file").exists()))
    )
    replace_text(tmp_path / "file", "whole")
    assert flushed == [((tmp_path / "file").stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def temporary_name(folder) -> str:
    """The name under which a file is written."""
    names = []
    replace_file(folder / "file", lambda temporary: names.extend(path.name for path in folder.iterdir()))
    (name,) = set(names) - {"file"}
    return name


def test_replace_file_uses_another_temporary_name_each_time(tmp_path):
    first, second = temporary_name(tmp_path), temporary_name(tmp_path)
    assert first != second
    assert re.fullmatch(r"\.file\.[0-9a-f]{16}\.skipkernels-partial", first)
    assert partial_of(first) == "file"


def test_replace_file_follows_no_link(tmp_path, monkeypatch):
    """Even where somebody knows the name in advance."""
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    monkeypatch.setattr("skipkernels.store.atomic._partial_name", lambda name: f".{name}.{os.getpid()}.partial")
    link = tmp_path / f".file.{os.getpid()}.partial"
    link.symlink_to(theirs)
    with pytest.raises(FileExistsError):
        replace_text(tmp_path / "file", "ours")
    assert theirs.read_text() == "precious" and link.is_symlink() and not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    "name", [".my-download.partial", ".mine.partial", "file.0123456789abcdef.skipkernels-partial", ".a.12x.partial"]
)
def test_partial_of_a_name_of_somebody_else(name):
    assert partial_of(name) is None
