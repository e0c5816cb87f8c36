"""Paired dot plot: a row per class or test, from the accuracy before tuning to the accuracy after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

_EACH = 15  # most rows with the best and with the worst changes
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
    left_out: int  # Number of rows in the middle that are not drawn
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
    rows = [replace(row, name=row.name or "(empty)") for row in rows]
    least = min([value for row in rows for value in (row.before, row.after) if value is not None], default=0.0)
    return DotPlot(title, rows, 0, next(low for low in _LOWS if low <= max(least, 0.0)))


def plot_of_changes(title: str, rows: Iterable[DotRow]) -> DotPlot:
    """Lay out a plot of classes by their change, the largest first; of many, the best and the worst.

    >>> plot = plot_of_changes("classes", [DotRow("a", 50.0, 40.0), DotRow("b", 60.0, 70.0)])
    >>> [row.name for row in plot.rows], plot.low
    (['b', 'a'], 20)
    >>> plot = plot_of_changes("classes", [DotRow(str(c), 50.0, 50.0 + c % 40) for c in range(500)])
    >>> len(plot.rows), plot.left_out, plot.rows[0].after, plot.rows[-1].after
    (30, 470, 89.0, 50.0)
    """

    def order(row: DotRow) -> tuple[float, float, str]:
        return -(row.change or 0.0), -(row.before if row.after is None else row.after), row.name

    rows = sorted(rows, key=order)
    left_out = max(len(rows) - 2 * _EACH, 0)
    shown = rows[:_EACH] + rows[-_EACH:] if left_out else rows
    return replace(dot_plot(title, shown), left_out=left_out)
