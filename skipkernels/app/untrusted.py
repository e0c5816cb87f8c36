"""Reading of files that others may have written: JSON of bounded size, and sources that they may name."""

from __future__ import annotations

import errno
import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from ..formatting import first_line
from .data.base import InputError
from .data.registry import is_remote

_ELSEWHERE = re.compile(r"^(hf-hub|hf|local-dir):|://|^[/\\~]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)")


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a file of at most `max_bytes` bytes."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", str(path))
    return data


def parse_object(text: bytes | str, *, finite: bool = True) -> dict[str, Any]:
    """Parse a JSON object in UTF-8; with `finite`, refuse NaN and infinities.

    Raises:
        ValueError: If it is not JSON or not an object; the message has one line.

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
    except ValueError as error:
        raise ValueError(f"not JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object with finite numbers from a file of at most `max_bytes` bytes; see `parse_object`.

    Raises:
        OSError: If the file cannot be read or is larger.
    """
    return parse_object(read_bounded(path, max_bytes))


def check_source(where: object, name: str, value: str, trust: bool) -> None:
    """Refuse a source that the file `where` names if it is remote or elsewhere on this machine, unless with `trust`.

    "data" and "targets" may name images on this machine: they are only decoded.

    >>> check_source("config.yaml", "model", "ViT-B-32", trust=False)
    >>> check_source("config.yaml", "model", "hf-hub:org/name", trust=True)
    """
    refused = is_remote(value) if name in ("data", "targets") else _ELSEWHERE.search(value)
    if refused and not trust:
        raise refused_source(where, name, value)


def refused_source(where: object, name: str, value: str) -> InputError:
    """Return the error for a source that a file names."""
    return InputError(
        f"{where}: {name} must not be remote or elsewhere on this machine where only a file names it; got {value!r}. "
        "If you trust the author of the file, add `trust=True`."
    )
