"""Errors and interruptions of a command: messages and exit codes."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from typing import Any

from skipkernels.formatting import first_line

from .options import SETTINGS

_NAMES = {"run": "RUN", "images": "IMAGES", "templates": "--template"}  # Python argument → other name here
_IN_BACKQUOTES = re.compile(r"`([a-z_]+)(?:=([^`]+))?`")
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


class Terminated(KeyboardInterrupt):
    """Interruption by SIGTERM (a cluster ends the job) or SIGHUP (the terminal closes), not by Ctrl-C."""

    number: int = signal.SIGTERM


def _terminate(number: int, frame: Any) -> None:
    error = Terminated()
    error.number = number
    raise error


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGHUP; only in the main thread, which alone can set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # by nohup
            signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def failure(error: Exception) -> tuple[int, str, str] | None:
    """Return exit code, kind and message of an expected error; None if it is a bug, to be shown with its traceback."""
    from pydantic import ValidationError

    from skipkernels.app.data import InputError

    if isinstance(error, ValidationError):  # of a `TuneConfig`
        from skipkernels.app.config import setting_error

        error = setting_error(error)
    if isinstance(error, (InputError, MemoryError)):
        return 2, "error", with_flags(error) or "out of memory"
    from skipkernels.features import CacheError  # these import torch, which a command with invalid input does without
    from skipkernels.memory import out_of_memory

    if isinstance(error, CacheError):
        return 2, "error", with_flags(error)
    if isinstance(error, RuntimeError) and out_of_memory(error):
        return 2, "error", f"out of memory ({first_line(error)})"
    worker = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    if worker or isinstance(error, (FloatingPointError, OSError, BrokenExecutor)):
        return 1, "failed", with_flags(error)
    return None


def with_flags(error: BaseException) -> str:
    """Return the message of an error with flags in place of its argument, and of settings in backquotes.

    >>> from skipkernels.app.data import InputError
    >>> with_flags(InputError("must be a new or an empty folder; got a. Use `overwrite=True`.", "out", "export"))
    '--out must be a new or an empty folder; got a. Use --overwrite.'
    >>> with_flags(InputError("runs/a has no results.", "run", "report"))
    'RUN: runs/a has no results.'
    >>> with_flags(InputError("Lower `text_lr`, or use `precision=fp32`; `skipkernels doctor` prints devices."))
    'Lower --text-lr, or use --precision fp32; `skipkernels doctor` prints devices.'
    """
    from skipkernels.app.data import InputError

    message = str(error)
    if isinstance(error, InputError):
        message = error.about(None if error.argument is None else _flag(error.argument))
    return _IN_BACKQUOTES.sub(_setting, message)


def _setting(match: re.Match[str]) -> str:
    name, value = match.groups()
    if name not in SETTINGS:
        return match[0]
    return _flag(name) if value in (None, "True") else f"{_flag(name)} {value}"


def _flag(argument: str) -> str:
    return _NAMES.get(argument) or f"--{argument.replace('_', '-')}"
