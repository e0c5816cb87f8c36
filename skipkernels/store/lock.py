"""One builder a folder: a second one is told who the first is."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .atomic import replace_file
from .manifest import StoreError

LOCK, OWNER = ".lock", ".owner.json"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock. The system lets go of it when the process ends, however it ends.

    Raises:
        StoreError: If another process holds it; says which one, and for how long.
    """
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)  # whichever thread closes what holds it
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"{folder}: {_owner(folder)} is at work in it. Wait for it, or choose another folder."
        ) from None
    try:
        mine = {"pid": os.getpid(), "host": platform.node(), "since": time.time()}
        replace_file(folder / OWNER, lambda temporary: temporary.write_text(json.dumps(mine)))
        yield
    finally:
        try:
            (folder / OWNER).unlink(missing_ok=True)
        finally:
            lock.release()


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text())
        age = time.time() - float(owner["since"])
        return f"process {int(owner['pid'])} on {owner['host']}, since {age:.0f} seconds,"
    except (OSError, ValueError, TypeError, KeyError, OverflowError):  # it has only just begun
        return "another process"
