"""Paired dot plot: a row per class or test, from the accuracy before tuning to the accuracy after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

_ROWS = 30  # most rows with a name each; of more, the first and the last third have one
_NAMED = 10  # rows with a name at each end
_THIN = 180  # most rows without a name
_THIN_PIXELS = 300  # height of all rows without a name
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
    first: list[DotRow]  # Rows with a name
    thin: list[DotRow]  # Rows without a name, between the others; empty if all have a name
    last: list[DotRow]  # Rows with a name, below the thin ones
    skipped: int  # Number of rows between that are not drawn
    low: int  # Start of the axis, which ends at 100

    @property
    def thin_height(self) -> str:
        """Height of a row without a name, in CSS."""
        return f"{min(7, max(2, _THIN_PIXELS // max(len(self.thin), 1)))}px"

    @property
    def ticks(self) -> list[float]:
        """Five values of the axis."""
        return [self.low + (100 - self.low) * part / 4 for part in range(5)]

    def place(self, value: float) -> str:
        """Position on the axis in per cent of its length."""
        return f"{max(0.0, 100 * (value - self.low) / (100 - self.low)):.2f}"


def with_one_axis(plots: Sequence[DotPlot]) -> list[DotPlot]:
    """Return plots with the same axis, to compare them."""
    low = min((plot.low for plot in plots), default=0)
    return [replace(plot, low=low) for plot in plots]


def dot_plot(title: str, rows: Iterable[DotRow], *, by_change: bool = True) -> DotPlot:
    """Lay out a plot. With `by_change`, rows are sorted by their change, the largest first.

    >>> plot = dot_plot("classes", [DotRow("a", 50.0, 40.0), DotRow("b", 60.0, 70.0)])
    >>> [row.name for row in plot.first], plot.low
    (['b', 'a'], 20)
    >>> plot = dot_plot("classes", [DotRow(str(c), 50.0, 50.0 + c % 40) for c in range(500)])
    >>> len(plot.first), len(plot.thin), len(plot.last), plot.skipped
    (10, 180, 10, 300)
    """
    rows = [replace(row, name=row.name or "(empty)") for row in rows]
    if by_change:
        rows.sort(key=lambda row: (-(row.change or 0.0), -(row.before if row.after is None else row.after), row.name))
    least = min([value for row in rows for value in (row.before, row.after) if value is not None], default=0.0)
    low = next(low for low in _LOWS if low <= max(least, 0.0))
    if len(rows) <= _ROWS:
        return DotPlot(title, rows, [], [], 0, low)
    middle = rows[_NAMED:-_NAMED]
    count = min(len(middle), _THIN)
    thin = [middle[place * len(middle) // count] for place in range(count)]
    return DotPlot(title, rows[:_NAMED], thin, rows[-_NAMED:], len(middle) - count, low)
