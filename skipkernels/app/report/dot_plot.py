"""Paired dot plot: a row per test, from the accuracy before tuning to the accuracy after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_LOWS = (90, 80, 50, 20, 0)  # where the axis may begin


@dataclass(frozen=True)
class DotRow:
    """A row of the plot."""

    name: str
    before: float  # Accuracy in per cent before tuning
    after: float | None  # Accuracy after tuning, or None
    note: str = ""  # Further information, such as the number of images
    before_interval: tuple[float, float] | None = None  # Lower and upper limit of `before`, or None
    after_interval: tuple[float, float] | None = None  # Lower and upper limit of `after`, or None

    @property
    def change(self) -> float | None:
        """Change of the accuracy in percentage points."""
        return None if self.after is None else self.after - self.before

    @property
    def verdict(self) -> str:
        """CSS class: "better", "worse", or "same"."""
        return "same" if not self.change else "better" if self.change > 0 else "worse"


@dataclass(frozen=True)
class DotPlot:
    """Rows in the order of the plot."""

    title: str
    rows: list[DotRow]
    low: int  # Start of the axis, which ends at 100

    @property
    def ticks(self) -> list[float]:
        """Five values of the axis."""
        return [self.low + (100 - self.low) * part / 4 for part in range(5)]

    def place(self, value: float) -> str:
        """Position on the axis in per cent of its length."""
        return f"{max(0.0, 100 * (value - self.low) / (100 - self.low)):.2f}"


def dot_plot(title: str, rows: Iterable[DotRow]) -> DotPlot:
    """Lay out a plot with a row per test."""
    rows = list(rows)
    least = min([value for row in rows for value in (row.before, row.after) if value is not None], default=0.0)
    return DotPlot(title, rows, next(low for low in _LOWS if low <= max(least, 0.0)))
