"""Reading files that may hold anything: regular ones only, of bounded size, and JSON of bounded depth."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

_DEEPEST = 64  # levels of JSON; the deepest that is written is a manifest with notes, 19


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. A pipe or a device, from which reading may never end, is refused.

    Raises:
        OSError: If it can't be read, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, most: int) -> bytes:
    """Contents of a regular file of at most so many bytes.

    Raises:
        OSError: If it can't be read, is something else, or larger.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
    return data


def parse_object(text: bytes | str, *, finite: bool = True) -> dict[str, Any]:
    """The mapping that a JSON text holds.

    Args:
        text: In UTF-8.
        finite: Refuse numbers that are not finite, which Python writes as NaN and Infinity.

    Raises:
        ValueError: If it is no JSON, no mapping, or nested too deeply; in one line.

    Example:
        >>> parse_object('{"a": [1]}')
        {'a': [1]}
        >>> parse_object('{"a": NaN}')
        Traceback (most recent call last):
        ValueError: not JSON (NaN is not a finite number)
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a finite number")

    def number(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(digits[:20])

    strict: dict[str, Any] = {"parse_constant": refuse, "parse_float": number} if finite else {}
    try:
        value = json.loads(text, **strict)
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise ValueError("no mapping")
    if not fits(value, _DEEPEST):
        raise ValueError("not JSON (nested too deeply)")
    return value


def read_object(path: Path, most: int) -> dict[str, Any]:
    """The mapping that a JSON file of at most `most` bytes holds; its numbers are finite.

    Raises:
        OSError: As `read_regular`.
        ValueError: As `parse_object`.
    """
    return parse_object(read_regular(path, most))


def fits(value: Any, levels: int) -> bool:
    """Whether a tree of lists and mappings has at most so many levels."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(fits(part, levels - 1) for part in parts)
