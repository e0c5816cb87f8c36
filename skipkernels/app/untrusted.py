"""Reading of files that others may have written: JSON, and sources that they may name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..formatting import first_line
from .data.base import InputError
from .data.registry import is_remote

_ELSEWHERE = re.compile(r"^(hf-hub|hf|local-dir):|://|^[/\\~]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON or not an object; the message has one line.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"not JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def check_source(where: object, name: str, value: str, trust: bool) -> None:
    """Refuse a source that the file `where` names if it is remote or elsewhere on this machine, unless with `trust`.

    "data" may name images on this machine: they are only decoded.

    >>> check_source("config.yaml", "model", "ViT-B-32", trust=False)
    >>> check_source("config.yaml", "model", "hf-hub:org/name", trust=True)
    """
    refused = is_remote(value) if name == "data" else _ELSEWHERE.search(value)
    if refused and not trust:
        raise refused_source(where, name, value)


def refused_source(where: object, name: str, value: str) -> InputError:
    """Return the error for a source that a file names."""
    return InputError(
        f"{where}: {name} must not be remote or elsewhere on this machine where only a file names it; got {value!r}. "
        "If you trust the author of the file, add `trust=True`."
    )
