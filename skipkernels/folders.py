"""Replacement of a file or a whole folder at once, and the lock of a folder."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".lock"
"""Name of the lock file in a folder."""
_PARTIAL = re.compile(r"\.(.+)-[a-z0-9_]{8}\.partial")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield an empty file in a temporary folder beside `path`, which takes the place of `path` at the end of the block.

    A crash or an error at any moment leaves the old file or the new one, whole. A kill also leaves the temporary
    folder, `.NAME-….partial`.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replaced_file(folder / "note.txt") as new:
        ...     _ = new.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    name: dict[str, Any] = {"prefix": f".{path.name}-", "suffix": ".partial", "dir": path.parent}
    with tempfile.TemporaryDirectory(**name, ignore_cleanup_errors=True) as temporary:
        new = Path(temporary, path.name)
        new.touch()
        mode = new.stat().st_mode  # follows the umask, unlike the file that safetensors puts in its place
        yield new
        new.chmod(mode)
        sync(new)
        os.replace(new, path)
    sync(path.parent)  # flushes the rename


def replace_text(path: Path, text: str) -> None:
    """Replace a file by text in UTF-8, as `replaced_file` does; delete what a kill left of an earlier replacement."""
    sweep(path.parent, path.name)
    with replaced_file(path) as new:
        new.write_bytes(text.encode())


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace a file by tensors in safetensors, as `replaced_file` does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replaced_file(path) as new:
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, new, metadata)
        except SafetensorError as error:  # raised in place of an OSError
            raise OSError(errno.EIO, str(error), str(path)) from error


def partial_of(name: str) -> str | None:
    """Return the final name of a temporary folder of `replaced_file`; None for another name.

    >>> partial_of(".note.txt-x1y2z3_4.partial"), partial_of(".mine.partial")
    ('note.txt', None)
    """
    found = _PARTIAL.fullmatch(name)
    return None if found is None else found[1]


def sweep(folder: Path, name: str | None = None) -> None:
    """Delete the temporary folders of `replaced_file` that kills left in a folder, of which the lock is held.

    With a name only those of one file are deleted, in a folder without a lock.
    """
    for path in folder.iterdir():
        of = partial_of(path.name)
        if of is not None and name in (None, of) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def locked(folder: Path, *, wait: bool = False) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a folder. The system releases it when the process ends, also after a kill.

    Raises:
        OSError: If another process holds it and `wait` is False, or the file system has no locks.
    """
    return _holding(folder / LOCK, folder, "in use by another process; wait for it", wait=wait)


def is_locked(folder: Path) -> bool:
    """Return True if a process holds the lock of a folder. Writes nothing."""
    if not (folder / LOCK).exists():
        return False
    try:
        with locked(folder):
            return False
    except OSError as error:
        return error.errno == errno.EBUSY


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
            sweep(new)  # an error may have left a temporary folder
            for path in new.rglob("*"):
                if path.is_file():
                    path.chmod(new.stat().st_mode & 0o666)  # of the umask: safetensors and tempfile have 0600
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


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link to a file, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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
    """Hold the lock of the replacement of a folder, and delete its file."""
    file = _beside(folder, "lock")
    with _holding(file, folder, "another process is replacing it"):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a system that deletes no open file
                file.unlink()  # filelock takes no lock on a file that was deleted meanwhile


@contextlib.contextmanager
def _holding(file: Path, folder: Path, fault: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; if another process holds it and `wait` is False, raise an OSError of the folder."""
    lock = FileLock(file, timeout=-1 if wait else 0, thread_local=False)  # another thread may release it
    try:
        lock.acquire()
    except Timeout:
        raise OSError(errno.EBUSY, fault, str(folder)) from None
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
