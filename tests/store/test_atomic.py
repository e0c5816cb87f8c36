"""Atomic replacement of files."""

from __future__ import annotations

import os
import re

import pytest
import torch

from skipkernels.store import partial_of, replace_file, replace_text, write_tensors


def test_replace_file_keeps_the_old_file_on_an_error(tmp_path):
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
def test_replace_file_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        replace_file(tmp_path / "replaced", lambda temporary: write_tensors(temporary, {"x": torch.ones(1)}, {}))
    finally:
        os.umask(before)
    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_replace_file_does_not_set_the_umask(tmp_path, monkeypatch):
    """Setting and restoring it in two threads could leave a wrong one."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("umask"))
    replace_text(tmp_path / "file", "whole")


def test_replace_file_flushes_the_file_and_then_the_folder(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "file").exists()))
    )
    replace_text(tmp_path / "file", "whole")
    assert flushed == [((tmp_path / "file").stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def temporary_name(folder) -> str:
    """Temporary name under which a file is written."""
    names = []
    replace_file(folder / "file", lambda temporary: names.extend(path.name for path in folder.iterdir()))
    (name,) = set(names) - {"file"}
    return name


def test_replace_file_temporary_names_are_unique(tmp_path):
    first, second = temporary_name(tmp_path), temporary_name(tmp_path)
    assert first != second
    assert re.fullmatch(r"\.file\.[0-9a-f]{16}\.skipkernels-partial", first)
    assert partial_of(first) == "file"


def test_replace_file_does_not_follow_a_link(tmp_path, monkeypatch):
    """Even if the temporary name is known in advance."""
    target = tmp_path / "target"
    target.write_text("precious")
    monkeypatch.setattr("skipkernels.store.atomic._partial_name", lambda name: f".{name}.{os.getpid()}.partial")
    link = tmp_path / f".file.{os.getpid()}.partial"
    link.symlink_to(target)
    with pytest.raises(FileExistsError):
        replace_text(tmp_path / "file", "new")
    assert target.read_text() == "precious" and link.is_symlink() and not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    "name", [".my-download.partial", ".mine.partial", "file.0123456789abcdef.skipkernels-partial", ".a.12x.partial"]
)
def test_partial_of_foreign_names(name):
    assert partial_of(name) is None
