"""Pictures: a step's time and memory over the number of classes or processes, as SVG readable on white and on black."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

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
_CROSS: dict[str, Any] = {"marker": "x", "markersize": 8, "markeredgewidth": 2, "linestyle": "none"}  # does not fit


def step_over_classes(rows: Sequence[Row]) -> str:
    """Milliseconds per step over the number of classes, one panel per precision; "" without rows."""
    panels = [("p50_ms", f"{precision}, step, ms", precision) for precision in PRECISIONS]
    return _figure("step", "milliseconds per step over the number of classes", rows, panels)


def memory_over_classes(rows: Sequence[Row]) -> str:
    """Bytes saved for backward and peak memory over the number of classes, one panel per precision; "" without rows."""
    titles = {"saved_mib": "saved for backward, MiB", "peak_mib": "rise at the peak, MiB"}
    panels = [(column, f"{p}, {title}", p) for column, title in titles.items() for p in PRECISIONS]
    return _figure("memory", "memory of a step over the number of classes", rows, panels)


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
        write_legend(axes)

    panels = [partial(draw, "p50_ms", "a training step, seconds"), last]
    return panels_svg("bars", "time and memory of a step at 100 and at 1,000 classes", panels, size=(9.6, 3.4))


def step_over_processes(rows: Sequence[dict[str, Any]]) -> str:
    """Predicted time, and memory for the classes, over the number of processes, from rows of bench.scale."""
    ways = {"class-parallel": "-", "replicated": "--"}
    colours = dict(zip(dict.fromkeys(row["C"] for row in rows), COLOURS, strict=False))

    def draw(column: str, title: str, axes: Axes) -> None:
        axes.set(xscale="log", yscale="log", xlabel="processes")
        for C, colour in colours.items():
            of = [row for row in rows if row["C"] == C]
            for way, style in ways.items():
                axes.plot([row["W"] for row in of], [row[f"{way} {column}"] for row in of], style, color=colour)
        _set_ticks(axes, sorted({row["W"] for row in rows}))
        axes.set_title(title, color=GREY, fontsize=10)

    def last(axes: Axes) -> None:
        draw("class_mib", "classes, MiB per process", axes)
        for C, colour in colours.items():
            axes.plot([], [], color=colour, label=f"{C:,} classes")
        for way, style in ways.items():
            axes.plot([], [], style, color=GREY, label=way)
        write_legend(axes)

    panels = [partial(draw, "H100_ms", "step on H100, ms, predicted"), last]
    return panels_svg("scale", "predicted step over the number of processes", panels, size=(9.6, 3.6))


def _set_ticks(axes: Axes, over: Sequence[int]) -> None:
    """Set ticks at the values of x, and at 1, 2 and 5 times powers of ten of y, with a grid."""
    axes.xaxis.set_major_locator(FixedLocator(over))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.8)


def write_legend(axes: Axes) -> None:
    """Write the legend of the figure below its plots."""
    figure = axes.get_figure()
    assert figure is not None
    where = {"loc": "outside lower center", "ncols": 4, "frameon": False, "labelcolor": GREY, "fontsize": 9}
    figure.legend(*axes.get_legend_handles_labels(), **where)  # type: ignore[arg-type]


def _figure(name: str, label: str, rows: Sequence[Row], panels: Sequence[tuple[str, str, str]]) -> str:
    drawn = [i for i in IMPLEMENTATIONS if any(row["implementation"] == i and row["p50_ms"] for row in rows)]
    if not drawn:
        return ""

    def last(axes: Axes) -> None:
        _curves(rows, *panels[-1], axes)
        for implementation in drawn:
            colour, style = _STYLES[implementation]
            axes.plot([], [], color=colour, linestyle=style, label=implementation)
        if any(_not_fitting(rows, i, p) for i in drawn for p in PRECISIONS):
            axes.plot([], [], color=GREY, label="does not fit", **_CROSS)
        write_legend(axes)

    draw = [*(partial(_curves, rows, *panel) for panel in panels[:-1]), last]
    return panels_svg(name, label, draw, size=(9.6, 0.6 + 1.5 * len(panels)), columns=2)


def _curves(rows: Sequence[Row], column: str, title: str, precision: str, axes: Axes) -> None:
    """One line per implementation; above the lines, a cross of its colour at the classes with which it does not fit."""
    classes = sorted({int(row["C"]) for row in rows})
    every = [y for p in PRECISIONS for i in IMPLEMENTATIONS for y in _points(rows, column, i, p).values()]
    axes.set_xscale("log")
    axes.set_yscale("log")
    if every:  # the same limits for both precisions
        axes.set_ylim(min(every) / 1.4, 1.4 * max(every) * (max(every) / min(every)) ** 0.25)
    for name in IMPLEMENTATIONS:
        colour, style = _STYLES[name]
        points = _points(rows, column, name, precision)
        x, y = list(points), list(points.values())
        axes.plot(
            x, y, color=colour, linestyle=style, linewidth=2.2 if name == OURS else 1.5, marker="o", markersize=3.5
        )
        if at := _not_fitting(rows, name, precision):
            height = 0.97 - 0.06 * COLOURS.index(colour)
            axes.plot(at, height, color=colour, transform=axes.get_xaxis_transform(), **_CROSS)
    axes.set_xlim(min(classes) / 1.4, max(classes) * 1.6)
    _set_ticks(axes, classes)
    axes.set_xlabel("classes")
    axes.set_title(title, color=GREY, fontsize=10)


def _of(rows: Sequence[Row], implementation: str, precision: str) -> list[Row]:
    found = (row for row in rows if (row["implementation"], row["precision"]) == (implementation, precision))
    return sorted(found, key=lambda row: int(row["C"]))


def _points(rows: Sequence[Row], column: str, implementation: str, precision: str) -> dict[int, float]:
    """Values by the number of classes, ascending."""
    return {int(row["C"]): value for row in _of(rows, implementation, precision) if (value := number(row, column))}


def _not_fitting(rows: Sequence[Row], implementation: str, precision: str) -> int:
    """The smallest number of classes, above all that ran, with which a step does not fit; 0 if there is none."""
    ran = max(_points(rows, "p50_ms", implementation, precision), default=0)
    fitting = (row for row in _of(rows, implementation, precision) if row["note"].startswith("does not fit"))
    return next((int(row["C"]) for row in fitting if int(row["C"]) > ran), 0)
