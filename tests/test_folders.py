"""Replacement of files and whole folders, and the lock of a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from skipkernels.folders import (
    is_locked,
    locked,
    replace_tensors,
    replace_text,
    replaced_file,
    replaced_folder,
    restored,
    sweep,
)

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
def test_replaced_file_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        replace_tensors(tmp_path / "tensors", {"x": torch.ones(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


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
    sweep(tmp_path, "other")
    assert len(names(tmp_path)) == 3, "the temporary folder is left"
    sweep(tmp_path, "file")
    assert names(tmp_path) == {"file", ".lock"}


def test_planted_lock_file_is_no_lock(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere"}')
    assert not is_locked(tmp_path)
    with locked(tmp_path), pytest.raises(OSError, match="in use by another process; wait for it") as caught:
        locked(tmp_path).__enter__()
    assert "elsewhere" not in str(caught.value)


def test_sweep_deletes_what_kills_left(tmp_path):
    for name in (".note.txt-x1y2z3_4.partial", ".mine.partial", "note.txt-x1y2z3_4.partial"):
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == {".mine.partial", "note.txt-x1y2z3_4.partial"}


def test_replace_text_deletes_what_kills_left_of_the_file(tmp_path):
    for name in (".note.txt-x1y2z3_4.partial", ".other.txt-x1y2z3_4.partial"):
        (tmp_path / name).mkdir()
    replace_text(tmp_path / "note.txt", "whole")
    assert names(tmp_path) == {"note.txt", ".other.txt-x1y2z3_4.partial"}


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
    """A folder with a file of ours, and others."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name in ("model.json", "mine.txt", "sub/mine.txt"):
        (folder / name).write_text("old")
    (folder / "link").symlink_to("nothing")
    folder.chmod(0o700)
    return folder


def write(folder: Path) -> None:
    with replaced_folder(folder, ["*.json"]) as new:
        (new / "names.json").write_text("new")


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


class Killed(BaseException):
    """Stands in for SIGKILL."""


CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")  # functions of `os` that change a folder
WRITERS = {"file": lambda folder: replace_text(folder / "model.json", "new"), "folder": write}
STOPS = {"error": OSError(errno.EIO, "Input/output error"), "kill": Killed()}


@contextlib.contextmanager
def stopped_at(moment: int, stop: str = "error") -> Iterator[list[str]]:
    """Raise an error in the call of the system with a number; a killed process makes no later call either."""
    made: list[str] = []

    def wrapped(name: str, call: Callable) -> Callable:
        def wrapper(*arguments, **options):
            made.append(name)
            if len(made) == moment or (stop == "kill" and len(made) > moment):
                raise STOPS[stop]
            return call(*arguments, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield made


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("writer", WRITERS)
def test_stop_at_any_call_leaves_the_old_or_the_new(folder, tmp_path, writer, stop):
    before, write = contents(folder), WRITERS[writer]
    target = shutil.copytree(folder, tmp_path / "whole" / "folder", symlinks=True)
    with stopped_at(0) as made:
        write(target)
    after, seen = contents(target), []
    for moment in range(1, len(made) + 1):
        target = shutil.copytree(folder, tmp_path / f"{moment}" / "folder", symlinks=True)
        with contextlib.suppress(Killed, OSError), stopped_at(moment, stop):
            write(target)
        seen.append({name: text for name, text in contents(restored(target)).items() if not name.startswith(".")})
        assert seen[-1] in (before, after), (moment, made)
        write(target)
        assert contents(target) == after and names(target.parent) == {"folder"}, "nothing is left"
    assert before in seen and after in seen


def test_replaced_folder_keeps_other_files(folder):
    write(folder)
    assert contents(folder) == {"names.json": "new", "mine.txt": "old", "sub/mine.txt": "old"}
    assert os.readlink(folder / "link") == "nothing"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert names(folder.parent) == {"folder"}


def test_replaced_folder_makes_a_new_one(tmp_path):
    write(tmp_path / "a" / "b")
    assert contents(tmp_path / "a" / "b") == {"names.json": "new"}


def test_replaced_folder_follows_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (folder / "names.json").exists()


def test_error_in_the_block_keeps_the_old_folder(folder):
    before = contents(folder)
    with pytest.raises(ZeroDivisionError), replaced_folder(folder, ["*"]) as new:
        (new / "half").write_text("half")
        1 / 0  # noqa: B018
    assert contents(folder) == before and names(folder.parent) == {"folder"}


def test_replaced_folder_in_use_is_refused(folder):
    with replaced_folder(folder, ["*.json"]), pytest.raises(OSError, match="another process is replacing it"):
        write(folder)


def test_current_folder_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for path in (Path("."), Path("/proc")):
        with pytest.raises(OSError, match="is a mount point or the current folder; name a folder in it"):
            write(path)


def test_file_is_refused(folder):
    with pytest.raises(NotADirectoryError, match="is a file"):
        write(folder / "mine.txt")
