"""State of the exact reductions: optimisations that change no result, each with a condition on the model."""

from __future__ import annotations

from typing import NamedTuple


class Reduction(NamedTuple):
    """State of one exact reduction.

    Attributes:
        enabled: True if the reduction is applied.
        reason: Why it is not applied; "" if it is.
    """

    enabled: bool
    reason: str

    @classmethod
    def unless(cls, reason: str | None) -> Reduction:
        """Return an enabled reduction, or one disabled for `reason`."""
        return cls(not reason, reason or "")
