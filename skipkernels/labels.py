"""Labels of datasets. Imports no torch, so that the command line reads labels without it."""

from __future__ import annotations

from typing import Any


def whole_number(label: Any) -> int | None:
    """Return a label as an int, or None unless it is an integer, or an array or tensor [] of one."""
    if getattr(label, "ndim", None) == 0:
        label = label.item()
    return label if isinstance(label, int) and not isinstance(label, bool) else None
