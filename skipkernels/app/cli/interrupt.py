"""Interruptions: Ctrl-C, SIGTERM and SIGHUP."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from skipkernels.app.train.signals import handled


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
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup
    with handled([signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP], _terminate):
        yield


@contextlib.contextmanager
def on_interrupt(message: str) -> Iterator[None]:
    """Set the message of a `KeyboardInterrupt` that is raised in the block."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (message,)
        raise
