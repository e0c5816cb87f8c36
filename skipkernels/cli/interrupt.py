"""Interruptions: Ctrl-C, SIGTERM and SIGHUP."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(KeyboardInterrupt):
    """Interruption by a signal other than SIGINT (Ctrl-C)."""

    number: int = signal.SIGTERM


def _terminate(number: int, frame: Any) -> None:
    error = Terminated()
    error.number = number
    raise error


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM (a cluster ends the job) and SIGHUP (the terminal closes)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup
    numbers = [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.signal(number, _terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def on_interrupt(message: str) -> Iterator[None]:
    """Set the message of a `KeyboardInterrupt` that is raised in the block."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (message,)
        raise
