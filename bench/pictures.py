"""Pictures of README.md and docs/benchmarks.md: time and memory of a step, as SVG readable on white and on black."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from skipkernels.app.report.plots import COLOURS, GREY, panels_svg

from .rows import PRECISIONS, Row, number
from .step import COMPILED, FULL, IMPLEMENTATIONS, MIN, OURS, PROMPTS, PUBLISHED

_STYLES = {  # variants of one implementation share its colour
    OURS: (COLOURS[0], "-"),
    MIN: (COLOURS[0], "--"),
    PUBLISHED: (COLOURS[1], "-"),
    COMPILED: (COLOURS[1], "--"),
    FULL: (COLOURS[2], "-"),
    PROMPTS: (COLOURS[3], "-"),
}
_BARS_AT = 100, 1000  # classes


def step_bars(rows: Sequence[Row]) -> str:
    """Bars of time and saved bytes of a step in fp32 at 100 and at 1,000 classes; "" without rows."""
    rows = [row for row in rows if row["precision"] == "fp32" and int(row["C"]) in _BARS_AT]
    names = [name for name in (OURS, PUBLISHED, PROMPTS, FULL) if any(row["implementation"] == name for row in rows)]
    if not any(row["p50_ms"] for row in rows):
        return ""

    def draw(column: str, title: str, axes: Axes) -> None:
        found = {(row["implementation"], int(row["C"])): row for row in rows}
        unit, digits = (1024, 2) if column == "saved_mib" else (1000, 1)
        largest = max(value for row in rows if (value := number(row, column)) is not None)
        ticks = []
        for group, classes in enumerate(_BARS_AT):
            for place, name in enumerate(names):
                y, row = group * (len(names) + 1) + place, found.get((name, classes))
                value = None if row is None else number(row, column)
                axes.barh(y, value or 0, color=_STYLES[name][0], height=0.8)
                missing = "does not fit in memory" if row and row["note"].startswith("does not fit") else "not run"
                text = missing if value is None else f"{value / unit:.{digits}f}"
                axes.text((value or 0) + 0.015 * largest, y, text, va="center", fontsize=8.5, color=GREY)
            ticks.append(group * (len(names) + 1) + (len(names) - 1) / 2)
        axes.set_yticks(ticks, [f"{classes:,}\nclasses" for classes in _BARS_AT])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * largest)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(title, color=GREY, fontsize=10)

    def last(axes: Axes) -> None:
        draw("saved_mib", "saved for backward, GiB", axes)
        for name in names:
            axes.barh(0, 0, color=_STYLES[name][0], label=name)
        _write_legend(axes)

    panels = [partial(draw, "p50_ms", "a training step, seconds"), last]
    return panels_svg("bars", "time and memory of a step at 100 and at 1,000 classes", panels, size=(9.6, 3.4))


def step_over_classes(rows: Sequence[Row]) -> str:
    """Time and saved bytes over the number of classes, a panel for each and for each precision; "" without rows."""
    if not any(row["p50_ms"] for row in rows):
        return ""
    columns = {"p50_ms": "step, ms", "saved_mib": "saved for backward, MiB"}
    every = [partial(_curves, rows, column, columns[column], p) for column in columns for p in PRECISIONS]

    def last(axes: Axes) -> None:
        every[-1](axes)
        _write_legend(axes)

    label = "time and memory of a step over the number of classes"
    return panels_svg("step", label, [*every[:-1], last], size=(9.6, 6.6), columns=2)


def _curves(rows: Sequence[Row], column: str, title: str, precision: str, axes: Axes) -> None:
    """One line per implementation."""
    for name in IMPLEMENTATIONS:
        of = [row for row in rows if (row["implementation"], row["precision"]) == (name, precision)]
        points = {int(row["C"]): value for row in of if (value := number(row, column))}
        colour, style = _STYLES[name]
        width = 2.2 if name == OURS else 1.5
        x = sorted(points)
        y = [points[C] for C in x]
        axes.plot(x, y, style, color=colour, linewidth=width, marker="o", markersize=3.5, label=name)
    axes.set(xscale="log", yscale="log", xlabel="classes")
    values = [value for row in rows if (value := number(row, column))]
    axes.set_ylim(min(values) / 1.4, 1.4 * max(values))  # the same limits for both precisions
    axes.xaxis.set_major_locator(FixedLocator(sorted({int(row["C"]) for row in rows})))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.8)
    axes.set_title(f"{precision}, {title}", color=GREY, fontsize=10)


def _write_legend(axes: Axes) -> None:
    """Write the legend of the figure below its plots."""
    figure = axes.get_figure()
    assert figure is not None
    where = {"loc": "outside lower center", "ncols": 4, "frameon": False, "labelcolor": GREY, "fontsize": 9}
    figure.legend(*axes.get_legend_handles_labels(), **where)  # type: ignore[arg-type]
