"""One builder a folder: a second one is told who the first is."""

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
from .regular import read_object

LOCK, OWNER = ".lock", ".owner.json"
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
_MOST_BYTES = 4096  # of OWNER


@contextlib.contextmanager
def locked(folder: Path, *, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a folder's lock. The system lets go of it when the process ends, however it ends.

    Args:
        folder: Which.
        on_wait: Told who holds it, who is then waited for; None: that is an error.

    Raises:
        StoreError: If another process holds it; says which one, and for how long.
    """
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)  # whichever thread closes what holds it
    try:
        with _without_locks(folder):
            lock.acquire()
    except Timeout:
        held = f"{folder}: {_owner(folder)} is at work in it."
        if on_wait is None:
            remedy = "Call close() on the FeatureCache that has it" if ": this process" in held else "Wait for it"
            raise StoreError(f"{held} {remedy}, or choose another folder.") from None
        on_wait(held)
        with _without_locks(folder):
            lock.acquire(timeout=-1)
    try:
        mine = {"pid": os.getpid(), "host": platform.node(), "since": time.time()}
        with contextlib.suppress(OSError):  # a full disk has no room for it, and may still be cleared
            replace_text(folder / OWNER, json.dumps(mine))
        yield
    finally:
        with file_errors(folder, "What was written before stays; delete .owner.json when nobody is at work there."):
            try:
                (folder / OWNER).unlink(missing_ok=True)
            finally:
                lock.release()


@contextlib.contextmanager
def _without_locks(folder: Path) -> Iterator[None]:
    """Tell of a file system that has no locks."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # nor that of a Timeout
            raise
        raise StoreError(
            f"{folder}: can't be locked ({error.strerror}). Choose a folder on a file system that has locks (flock)."
        ) from error


def holder(folder: Path) -> str | None:
    """The process that holds a folder's lock, in words, or None. Nothing is written."""
    if not (folder / OWNER).exists():
        return None
    try:
        with FileLock(folder / LOCK, timeout=0, thread_local=False):
            return None  # its owner was killed
    except (Timeout, OSError):  # OSError: a folder that can only be read, where a lock can't be tried
        return _owner(folder).rstrip(",")


def _owner(folder: Path) -> str:
    try:
        owner = read_object(folder / OWNER, _MOST_BYTES)
        age = max(time.time() - float(owner["since"]), 0.0)  # the clock may have been set back
        mine = (owner["pid"], owner["host"]) == (os.getpid(), platform.node())
        who = "this process" if mine else f"process {int(owner['pid'])} on {owner['host']}"
        return f"{who}, since {age:.0f} seconds,"
    except (OSError, ValueError, TypeError, KeyError, OverflowError):  # it has only just begun
        return "another process"
