"""Writes and calls of the system that fail."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator

import pytest


class Broken(io.StringIO):
    """Stream that raises an error at each write, such as that of a full disk or of a pipe without reader."""

    def __init__(self, number: int = errno.EPIPE):
        super().__init__()
        self.number, self.writes = number, 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise OSError(self.number, os.strerror(self.number))


class Killed(BaseException):
    """Stands in for SIGKILL."""


STOPS = {"error": OSError(errno.EIO, "Input/output error"), "kill": Killed()}


@contextlib.contextmanager
def stopped_at(moment: int, stop: str = "error") -> Iterator[list[str]]:
    """Raise one of STOPS in a call that changes a folder, counted from 1; a killed process makes no later call either.

    Yields the names of the calls so far; no call has the number 0.
    """
    made: list[str] = []

    def wrapped(name: str, call: Callable) -> Callable:
        def wrapper(*arguments, **options):
            made.append(name)
            if len(made) == moment or (stop == "kill" and len(made) > moment):
                raise STOPS[stop]
            return call(*arguments, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield made
