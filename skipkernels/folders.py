"""Replacement of files at once, and the lock of a folder.

What is new is written in a temporary folder, flushed to the disk, and renamed. A crash or an error at any moment leaves
the old file or the new one, whole. Where the files of a folder belong together, one of them is written last: see
`app.train.checkpoint` and `features.writer`.
"""

from __future__ import annotations

import contextlib
import errno
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
_PARTIAL = re.compile(r"\..+-[a-z0-9_]{8}\.partial")

# ---- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield an empty file in a temporary folder beside `path`, which takes the place of `path` at the end of the block.

    A kill leaves the temporary folder, `.NAME-….partial`, until `sweep`.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replaced_file(folder / "note.txt") as new:
        ...     _ = new.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    with _temporary(path.parent, path.name) as temporary:
        new = temporary / path.name
        new.touch()
        mode = new.stat().st_mode  # follows the umask, unlike the file that safetensors puts in its place
        yield new
        new.chmod(mode)
        sync(new)
        os.replace(new, path)
    sync(path.parent)  # flushes the rename


def replace_text(path: Path, text: str) -> None:
    """Replace a file by text in UTF-8, as `replaced_file` does."""
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


@contextlib.contextmanager
def replaced_files(folder: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yield a new folder, from which the files move to `folder` at the end of the block.

    Before that, files there with a name of `ours` are deleted: a kill leaves files of before or of now, of which some
    may be missing, but no mixture. An error in the block changes nothing.

    Example:
        >>> folder = Path(tempfile.mkdtemp(), "folder")
        >>> for name in ("a.txt", "b.txt"):
        ...     with replaced_files(folder, ["a.txt"]) as new:
        ...         _ = (new / name).write_text("whole")
        >>> [path.name for path in folder.iterdir()]
        ['b.txt']
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _temporary(folder, "new") as temporary:
            new = temporary / "new"
            new.mkdir()
            mode = new.stat().st_mode & 0o666  # follows the umask, unlike that of a file of safetensors
            yield new
            files = list(new.iterdir())
            for path in files:
                path.chmod(mode)
                sync(path)
            for path in [path for path in folder.iterdir() if path.name in ours and path.is_file()]:
                path.unlink()
            for path in files:
                os.replace(path, folder / path.name)
        sync(folder)
    finally:
        if created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def sweep(folder: Path) -> None:
    """Delete the temporary folders that kills left in a folder, of which the lock is held."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """Yield a temporary folder in a folder, for a file or folder with a name, and delete it."""
    names: dict[str, Any] = {"prefix": f".{name}-", "suffix": ".partial", "dir": folder}
    with tempfile.TemporaryDirectory(**names, ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)


# ---- locks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder. The system releases it when the process ends, also after a kill.

    Raises:
        OSError: If another process holds it and `wait` is False, or the file system has no locks.
    """
    lock = FileLock(folder / LOCK, timeout=-1 if wait else 0, thread_local=False)  # another thread may release it
    try:
        lock.acquire()
    except Timeout:
        raise OSError(errno.EBUSY, "in use by another process; wait for it", str(folder)) from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return True if a process holds the lock of a folder. Writes nothing."""
    if not (folder / LOCK).exists():
        return False
    try:
        with locked(folder):
            return False
    except OSError as error:
        return error.errno == errno.EBUSY
