"""Lock of a folder, for one writing process at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .atomic import replace_text
from .manifest import StoreError, file_errors
from .safe_read import read_object

LOCK, OWNER = ".lock", ".owner.json"
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
_MAX_BYTES = 4096  # of OWNER


@contextlib.contextmanager
def locked(folder: Path, *, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of a folder. The system releases it when the process ends, also after a kill.

    `on_wait` is called with a description of the process that holds the lock, before waiting; without it, do not wait.

    Raises:
        StoreError: If another process holds the lock; the message describes it.
    """
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)  # another thread may release it
    try:
        with _missing_locks_as_errors(folder):
            lock.acquire()
    except Timeout:
        held = f"{folder}: in use by {_owner(folder)}."
        if on_wait is None:
            remedy = "Call close() on its FeatureCache" if ": in use by this process" in held else "Wait for it"
            raise StoreError(f"{held} {remedy}, or choose another folder.") from None
        on_wait(held)
        with _missing_locks_as_errors(folder):
            lock.acquire(timeout=-1)
    try:
        owner = {"pid": os.getpid(), "host": platform.node(), "since": time.time()}
        with contextlib.suppress(OSError):  # a full disk may still be pruned
            replace_text(folder / OWNER, json.dumps(owner))
        yield
    finally:
        with file_errors(folder, "Complete shards stay. Delete .owner.json if no process uses the folder."):
            try:
                (folder / OWNER).unlink(missing_ok=True)
            finally:
                lock.release()


@contextlib.contextmanager
def _missing_locks_as_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # Timeout is an OSError, too
            raise
        raise StoreError(
            f"{folder}: cannot be locked ({error.strerror}). Choose a folder on a file system with locks (flock)."
        ) from error


def lock_owner(folder: Path) -> str | None:
    """Describe the process that holds the lock of a folder; None if it is free. Writes nothing."""
    if not (folder / OWNER).exists():
        return None
    try:
        with FileLock(folder / LOCK, timeout=0, thread_local=False):
            return None  # the owner was killed
    except (Timeout, OSError):  # OSError: in a read-only folder the lock cannot be tried
        return _owner(folder)


def _owner(folder: Path) -> str:
    try:
        owner = read_object(folder / OWNER, _MAX_BYTES)
        age = max(time.time() - float(owner["since"]), 0.0)  # the clock may have been set back
        own = (owner["pid"], owner["host"]) == (os.getpid(), platform.node())
        process = "this process" if own else f"process {int(owner['pid'])} on {owner['host']}"
        return f"{process}, for {age:.0f} seconds"
    except (OSError, ValueError, TypeError, KeyError, OverflowError):  # not written yet
        return "another process"
