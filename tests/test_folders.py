"""Replacement of files and whole folders, and the lock of a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from skipkernels.folders import is_locked, locked, replace_tensors, replace_text, replaced_file, replaced_files, sweep
from tests.failures import STOPS, Killed, stopped_at

# ---- files -----------------------------------------------------------------------------------------------------------


def test_replaced_file_keeps_the_old_file_on_an_error(tmp_path):
    replace_text(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), replaced_file(tmp_path / "file") as new:
        new.write_text("half")
        1 / 0  # noqa: B018
    assert contents(tmp_path) == {"file": "old"}, "and no temporary file"
    replace_text(tmp_path / "file", "new")
    assert contents(tmp_path) == {"file": "new"}


def test_replace_tensors_on_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        replace_tensors(tmp_path / "file", {"x": torch.ones(1)})
    assert names(tmp_path) == set()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        replace_tensors(tmp_path / "tensors", {"x": torch.ones(1)})
        with replaced_files(tmp_path, []) as new:
            (new / "private").touch(0o600)
    finally:
        os.umask(before)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_replaced_file_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "file").exists()))
    )
    replace_text(tmp_path / "file", "whole")
    assert flushed == [((tmp_path / "file").stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_kill_leaves_the_old_file_and_releases_the_lock(tmp_path):
    replace_text(tmp_path / "file", "old")
    child = os.fork()
    if child == 0:
        try:
            with locked(tmp_path), replaced_file(tmp_path / "file") as new:
                new.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old" and not is_locked(tmp_path)
    assert len(names(tmp_path)) == 3, "the temporary folder is left"
    for name in (".mine.partial", "file-x1y2z3_4.partial"):
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == {"file", ".lock", ".mine.partial", "file-x1y2z3_4.partial"}


def test_two_writers_of_a_file(tmp_path):
    """Neither deletes what the other has begun; the last one stays."""
    with replaced_file(tmp_path / "note.txt") as new:
        new.write_text("first")
        replace_text(tmp_path / "note.txt", "second")
        assert contents(tmp_path)["note.txt"] == "second"
    assert contents(tmp_path) == {"note.txt": "first"}


def test_lock_is_held_once(tmp_path):
    assert not is_locked(tmp_path) and names(tmp_path) == set(), "nothing is written"
    with locked(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(OSError, match="in use by another process"), locked(tmp_path):
            pass
    with locked(tmp_path, wait=True):
        pass


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with files of ours, and others."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name in ("model.json", "names.json", "mine.txt", "sub/mine.json"):
        (folder / name).write_text("old")
    (folder / "link").symlink_to("nothing")
    return folder


def write(folder: Path) -> None:
    with replaced_files(folder, ["model.json", "names.json", "other.json", "sub", "../outside"]) as new:
        for name in ("names.json", "other.json"):
            (new / name).write_text("new")


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


OTHERS = {"mine.txt": "old", "sub/mine.json": "old"}
AFTER = {"names.json": "new", "other.json": "new"} | OTHERS


@pytest.mark.parametrize("stop", STOPS)
def test_stop_at_any_call_leaves_the_old_file_or_the_new(tmp_path, stop):
    seen = set()
    with stopped_at(0) as made:
        replace_text(tmp_path / "note.txt", "new")
    for moment in range(1, len(made) + 1):
        replace_text(tmp_path / "note.txt", "old")
        with contextlib.suppress(Killed, OSError), stopped_at(moment, stop):
            replace_text(tmp_path / "note.txt", "new")
        seen.add((tmp_path / "note.txt").read_text())
    assert seen == {"old", "new"}


@pytest.mark.parametrize("stop", STOPS)
def test_stop_at_any_call_leaves_no_mixture_of_files(folder, tmp_path, stop):
    before, seen = contents(folder), []
    target = shutil.copytree(folder, tmp_path / "whole", symlinks=True)
    with stopped_at(0) as made:
        write(target)
    assert contents(target) == AFTER and names(target) == {"names.json", "other.json", "mine.txt", "sub", "link"}
    for moment in range(1, len(made) + 1):
        target = shutil.copytree(folder, tmp_path / f"{moment}", symlinks=True)
        with contextlib.suppress(Killed, OSError), stopped_at(moment, stop):
            write(target)
        seen.append({name: text for name, text in contents(target).items() if not name.startswith(".")})
        ours = seen[-1].items() - OTHERS.items()
        assert OTHERS.items() <= seen[-1].items() and (ours <= before.items() or ours <= AFTER.items()), (moment, made)
        write(target)
        sweep(target)
        assert contents(target) == AFTER, "a second write completes it"
    assert before in seen and AFTER in seen


@pytest.mark.parametrize("exists", [False, True])
def test_error_in_the_block_changes_nothing(folder, tmp_path, exists):
    target = folder if exists else tmp_path / "a" / "b"
    before = contents(target)
    with pytest.raises(ZeroDivisionError), replaced_files(target, ["model.json", "half"]) as new:
        (new / "half").write_text("half")
        1 / 0  # noqa: B018
    assert contents(target) == before and target.exists() == exists


@pytest.mark.parametrize("through", ["new", "link", "current folder"])
def test_replaced_files_of_a_folder(folder, tmp_path, monkeypatch, through):
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    write({"new": tmp_path / "a" / "b", "link": tmp_path / "link", "current folder": Path(".")}[through])
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "a" / "b" if through == "new" else folder).items() >= {"names.json": "new"}.items()
    with pytest.raises(FileExistsError):
        write(folder / "mine.txt")
