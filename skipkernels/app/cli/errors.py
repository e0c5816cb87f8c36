"""Errors and interruptions of a command: flags in place of Python arguments, messages, and exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from typing import Any

from skipkernels.app import option_groups
from skipkernels.formatting import first_line

_FLAGS = {"templates": "template", "text_cache": "cache"}  # Python argument → flag, where they differ
_POSITIONAL = {"run": "RUN", "images": "IMAGES"}  # Python argument → its name in the usage
_GROUPS = filter(dataclasses.is_dataclass, vars(option_groups).values())
_SETTINGS = [field.name for group in _GROUPS for field in dataclasses.fields(group)]
_ARGUMENTS = "|".join([*_SETTINGS, *_FLAGS, "sort_into"])
_FUNCTION = r"^([^:]+: )?(?:[a-z_]\w*|[A-Z]\w*(?:\.\w+)?): "  # optionally after a prefix, such as the name of a variant
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
_ONLY_IN_PYTHON = ", or a tuple (image, text) of either"  # values of skip_layers


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


@contextlib.contextmanager
def on_interrupt(message: str) -> Iterator[None]:
    """Set the message of a `KeyboardInterrupt` that is raised in the block."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (message,)
        raise


def failure(error: Exception) -> tuple[int, str, str] | None:
    """Return exit code, kind and message of an expected error; None if it is a bug, to be shown with its traceback."""
    from skipkernels.app.data import InputError

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
    """Return the message of an error with flags in place of Python arguments.

    The invalid argument is `error.argument`, or else the first word after the function's name. Other arguments are
    translated if they are in backquotes or have a value (`name=value`).

    >>> from skipkernels.app.data import InputError
    >>> with_flags(InputError("few_shot: shots must be at least 1; got 0.", "shots"))
    '--shots must be at least 1; got 0.'
    >>> with_flags(InputError("export: out must be a new or an empty folder; got a. Use `overwrite=True`.", "out"))
    '--out must be a new or an empty folder; got a. Use --overwrite.'
    >>> with_flags(ValueError("SkipCLIP: text_cache keeps features at the cut; with skip_layers=0 there is no cut."))
    '--cache keeps features at the cut; with --skip-layers 0 there is no cut.'
    >>> with_flags(InputError("full: open_source: no dataset 'x'.", "data"))
    "full: --data: no dataset 'x'."
    >>> with_flags(InputError("config.yaml: seed must be an integer; got 'a'."))
    "config.yaml: seed must be an integer; got 'a'."
    """
    message, argument = str(error).replace(_ONLY_IN_PYTHON, ""), getattr(error, "argument", None)
    found = re.match(rf"{_FUNCTION}({argument or _ARGUMENTS})\b(?!=)", message)
    if found:
        message = f"{found[1] or ''}{_flag(found[2])}{message[found.end() :]}"
    elif found := re.match(rf"{_FUNCTION}(?=({_ARGUMENTS})=)", message):  # the value is translated below
        message = f"{found[1] or ''}{message[found.end() :]}"
    elif argument is not None:
        found = re.match(_FUNCTION, message)
        prefix, rest = (found[1] or "", message[found.end() :]) if found else ("", message)
        message = f"{prefix}{_flag(argument)}: {rest}"
    message = re.sub(rf"`({_ARGUMENTS})(?:=True|=…)?`", lambda found: _flag(found[1]), message)
    value = rf'(?<![\w/.-])`?({_ARGUMENTS})="?([\w.-]+)"?`?(?![\w/])'
    return re.sub(value, lambda found: f"{_flag(found[1])} {found[2]}", message)


def _flag(argument: str) -> str:
    return _POSITIONAL.get(argument) or "--" + _FLAGS.get(argument, argument).replace("_", "-")
