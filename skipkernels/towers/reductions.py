"""State of the exact reductions: optimisations that change no result, each with a condition on the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Reduction(NamedTuple):
    """State of one exact reduction."""

    enabled: bool
    reason: str  # Reason why it is not applied; "" if it is

    @classmethod
    def unless(cls, reason: str | None) -> Reduction:
        """Return an enabled reduction, or one disabled for `reason`."""
        return cls(not reason, reason or "")


def of_every_template(reductions: Sequence[dict[str, Reduction]]) -> dict[str, Reduction]:
    """Reductions of the text towers of several templates as one; enabled if they are for every template."""
    merged = {}
    for name, first in reductions[0].items():
        reasons = [reason for each in reductions if (reason := each[name].reason)]
        some = f"{len(reasons)} of {len(reductions)} templates: " if reasons and len(reasons) < len(reductions) else ""
        merged[name] = Reduction.unless(some + reasons[0]) if reasons else first
    return merged
