"""Streams that fail."""

from __future__ import annotations

import errno
import io
import os


class Broken(io.StringIO):
    """Stream that raises an error at each write, such as that of a full disk or of a pipe without reader."""

    def __init__(self, number: int = errno.EPIPE):
        super().__init__()
        self.number, self.writes = number, 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise OSError(self.number, os.strerror(self.number))
