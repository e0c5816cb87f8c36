"""Replacement of a whole folder at once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextlib.contextmanager
def replaced_folder(folder: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yield a new folder beside `folder`, which takes the place of `folder` at the end of the block.

    A crash or an error at any moment leaves the old folder or the new one, whole. The next call deletes what a crash
    left. Between the two renames of a system that can't exchange folders, a crash leaves none, until `restored`.

    Args:
        folder: Folder to replace, which need not exist. A link to a folder is followed.
        ours: Patterns of the names of the files to replace. Others are kept, as hard links.

    Raises:
        OSError: If the folder can't be written or replaced, or another process is replacing it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp(), "folder")
        >>> for name in ("a.txt", "b.txt"):
        ...     with replaced_folder(folder, ["*.txt"]) as new:
        ...         _ = (new / name).write_text("whole")
        >>> [path.name for path in folder.iterdir()]
        ['b.txt']
    """
    folder = folder.resolve()
    if os.path.ismount(folder) or folder == Path.cwd():
        raise OSError(errno.EBUSY, "is a mount point or the current folder; name a folder in it", str(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file", str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = _beside(folder, "new"), _beside(folder, "old")
    with _locked(folder):
        _restore(folder, old)
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            for path in new.rglob("*"):
                sync(path)
            if folder.exists():
                shutil.copymode(folder, new)
                _keep_others(folder, new, ours)
            sync(new)
            if not folder.exists():
                os.rename(new, folder)
            elif not _exchange(new, folder):
                os.rename(folder, old)
                os.rename(new, folder)
            sync(folder.parent)
        finally:
            _restore(folder, old)
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)


def restored(folder: Path) -> Path:
    """Return a folder, after its restoration if a crash came between the two renames of `replaced_folder`."""
    old = _beside(folder.resolve(), "old")
    if old.exists() and not folder.exists():
        with _locked(folder.resolve()):
            _restore(folder.resolve(), old)
    return folder


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.skipkernels-{role}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(_beside(folder, "lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(errno.EBUSY, "another process is replacing it", str(folder)) from None
    try:
        yield
    finally:
        lock.release()


def _restore(folder: Path, old: Path) -> None:
    if old.exists() and not folder.exists():
        os.rename(old, folder)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one system call; False if the system or the file system can't."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    arguments = _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    return rename is not None and rename(*arguments) == 0


def _keep_others(folder: Path, new: Path, ours: Collection[str]) -> None:
    """Link the files of a folder that match none of the patterns into the new one, unless they are in it."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(source, target, follow_symlinks=False)

    for path in folder.iterdir():
        if os.path.lexists(new / path.name) or any(fnmatch.fnmatchcase(path.name, pattern) for pattern in ours):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=link)
        else:
            link(str(path), str(new / path.name))
