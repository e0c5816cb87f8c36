"""Tables of the study: means over seeds with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Rows
from .tasks import Shift


def show(found: Rows, shifts: Sequence[Shift]) -> None:
    """Print the tables."""
    for row in found.runs:
        print(row)
