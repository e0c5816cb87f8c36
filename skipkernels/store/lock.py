"""One builder a folder: a second one is told who the first is."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .atomic import replace_text
from .manifest import StoreError

LOCK, OWNER = ".lock", ".owner.json"


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
        lock.acquire()
    except Timeout:
        held = f"{folder}: {_owner(folder)} is at work in it."
        if on_wait is None:
            remedy = "Call close() on the FeatureCache that has it" if ": this process" in held else "Wait for it"
            raise StoreError(f"{held} {remedy}, or choose another folder.") from None
        on_wait(held)
        lock.acquire(timeout=-1)
    try:
        mine = {"pid": os.getpid(), "host": platform.node(), "since": time.time()}
        with contextlib.suppress(OSError):  # a full disk has no room for it, and may still be cleared
            replace_text(folder / OWNER, json.dumps(mine))
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
        mine = (owner["pid"], owner["host"]) == (os.getpid(), platform.node())
        who = "this process" if mine else f"process {int(owner['pid'])} on {owner['host']}"
        return f"{who}, since {age:.0f} seconds,"
    except (OSError, ValueError, TypeError, KeyError, OverflowError):  # it has only just begun
        return "another process"
