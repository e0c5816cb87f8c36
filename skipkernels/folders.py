"""Replacement of a file or a whole folder at once, and the lock of a folder.

What is new has a temporary folder beside its place, is flushed to the disk, and is renamed. A crash or an error at any
moment leaves the old or the new, whole.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import shutil
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
_OLD = ".old"  # in a temporary folder: the folder that is replaced, between two renames

# ---- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield an empty file in a temporary folder beside `path`, which takes the place of `path` at the end of the block.

    A kill also leaves the temporary folder, `.NAME-….partial`.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replaced_file(folder / "note.txt") as new:
        ...     _ = new.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    with _temporary(path) as temporary:
        new = temporary / path.name
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

    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        shared = any(tensor.data_ptr() == other.data_ptr() for other in stored.values())  # safetensors refuses it
        stored[name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
    with replaced_file(path) as new:
        try:
            save_file(stored, new, metadata)
        except SafetensorError as error:  # raised in place of an OSError
            raise OSError(errno.EIO, str(error), str(path)) from error


# ---- folders ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced_folder(folder: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yield a new folder, which takes the place of `folder` at the end of the block.

    The next call deletes what a crash left. A crash between the two renames leaves no folder, until `restored`.

    Args:
        folder: Folder to replace, which need not exist. A link to a folder is followed.
        ours: Patterns of the names of the files to replace. Others are kept, as copies.

    Raises:
        OSError: If the folder can't be written or replaced, or another process is replacing it.

    Example:
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
    with _cleared(folder), _temporary(folder) as temporary:
        new = temporary / folder.name
        new.mkdir()
        mode = new.stat().st_mode & 0o666  # follows the umask, unlike that of a file of safetensors
        yield new
        sweep(new)  # an error may have left a temporary folder
        for path in new.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        if folder.exists():
            _keep_others(folder, new, ours)
        for path in (*new.rglob("*"), new):
            if path.is_file() or path.is_dir():  # or a link to nothing
                sync(path)
        try:
            if folder.exists():
                os.rename(folder, temporary / _OLD)
            os.rename(new, folder)
        finally:
            _restore(folder)
    sync(folder.parent)


def restored(folder: Path) -> Path:
    """Return a folder, after its restoration if a crash came between the two renames of `replaced_folder`."""
    path = folder.resolve()
    if not path.exists() and any((temporary / _OLD).exists() for temporary in _temporaries(path.parent, path.name)):
        with _cleared(path):
            pass
    return folder


def delete_folder(folder: Path) -> None:
    """Delete a folder after a rename, so that a kill leaves no part of it; and what a kill left of a replacement."""
    with _cleared(folder), _temporary(folder) as temporary:
        if folder.exists():
            os.rename(folder, temporary / folder.name)


def sweep(folder: Path, name: str | None = None) -> None:
    """Delete the temporary folders that kills left in a folder, of which the lock is held.

    With a name only those of one file are deleted, in a folder without a lock.
    """
    for temporary in _temporaries(folder, name):
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- locks -----------------------------------------------------------------------------------------------------------


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


# ---- temporary folders -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside a file or folder, and delete it."""
    name: dict[str, Any] = {"prefix": f".{path.name}-", "suffix": ".partial", "dir": path.parent}
    with tempfile.TemporaryDirectory(**name, ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)


def _temporaries(folder: Path, name: str | None) -> list[Path]:
    """Temporary folders in a folder; with a name only those of this file or folder."""
    found = [(path, _PARTIAL.fullmatch(path.name)) for path in folder.iterdir()] if folder.is_dir() else []
    return [path for path, of in found if of and name in (None, of[1]) and path.is_dir() and not path.is_symlink()]


@contextlib.contextmanager
def _cleared(folder: Path) -> Iterator[None]:
    """Hold the lock of the replacement of a folder; restore and delete what a kill left of an earlier one."""
    file = folder.with_name(f".{folder.name}.skipkernels-lock")
    with _holding(file, folder, "another process is replacing it"):
        try:
            _restore(folder)
            sweep(folder.parent, folder.name)
            yield
        finally:
            with contextlib.suppress(OSError):  # a system that deletes no open file
                file.unlink()  # filelock takes no lock on a file that was deleted meanwhile


def _restore(folder: Path) -> None:
    for temporary in [] if folder.exists() else _temporaries(folder.parent, folder.name):
        if (temporary / _OLD).exists():
            os.rename(temporary / _OLD, folder)


def _keep_others(folder: Path, new: Path, ours: Collection[str]) -> None:
    """Copy what matches none of the patterns into the new folder, unless it is there; and the mode of the folder."""

    def left_out(path: str, names: list[str]) -> list[str]:
        top = names if Path(path) == folder else []
        return [name for name in top if os.path.lexists(new / name) or any(fnmatch.fnmatchcase(name, p) for p in ours)]

    shutil.copytree(folder, new, symlinks=True, ignore=left_out, dirs_exist_ok=True)
