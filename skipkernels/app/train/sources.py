"""Sources of models, weights and data that a file names: refused unless the user trusts the file. Imports no torch."""

from __future__ import annotations

import re

from ..data.base import InputError

_REMOTE_DATA = re.compile(r"^hf:|://")
_ELSEWHERE = re.compile(r"^(hf-hub|hf|local-dir):|://|^[/\\~]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)")


def check_source(where: object, name: str, value: str, trust: bool) -> None:
    """Check that a file may name this source.

    Images on this machine may be named without trust: they are only decoded.

    Args:
        where: The file.
        name: Setting in the file. For "data" and "targets", only remote sources are refused.
        value: Its value.
        trust: True if the user trusts the author of the file.

    Raises:
        InputError: If the source is remote or elsewhere on this machine, and the file is not trusted.

    Example:
        >>> check_source("config.yaml", "model", "ViT-B-32", trust=False)
        >>> check_source("config.yaml", "model", "hf-hub:org/name", trust=True)
        >>> check_source("config.yaml", "model", "hf-hub:org/name", trust=False)
        Traceback (most recent call last):
        skipkernels.app.data.base.InputError: config.yaml: model must not be remote or elsewhere on this machine where only a file names it; got 'hf-hub:org/name'. If you trust the author of the file, add `trust=True`.
    """  # noqa: E501
    pattern = _REMOTE_DATA if name in ("data", "targets") else _ELSEWHERE
    if not trust and pattern.search(value):
        raise refused_source(where, name, value)


def refused_source(where: object, name: str, value: str) -> InputError:
    """Return the error for a source that a file names."""
    return InputError(
        f"{where}: {name} must not be remote or elsewhere on this machine where only a file names it; got {value!r}. "
        "If you trust the author of the file, add `trust=True`."
    )
