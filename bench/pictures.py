"""Pictures of stored results: rows → SVG that is readable on white and on black; "" where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from skipkernels.ops import OPERATORS
from skipkernels.tuner.plots import COLOURS, GREY, coloured, panels_svg

from .profile import ATTENTION, MATRIX, OURS, REST
from .step import COMPILED, FULL, MIN, PROMPTS, PUBLISHED, WHO

Row = dict[str, str]
"""A line of a result: text by column, "" where there is none."""

PRECISIONS = ("fp32", "bf16")
_SKIP, _AS_PUBLISHED, _FULL, _PROMPTS = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[3]
_STYLES = {  # variants of one have its colour
    WHO[0]: (_SKIP, "-"),
    MIN: (_SKIP, "--"),
    PUBLISHED: (_AS_PUBLISHED, "-"),
    COMPILED: (_AS_PUBLISHED, "--"),
    FULL: (_FULL, "-"),
    PROMPTS: (_PROMPTS, "-"),
}
# The last point of a line that does not go on to the largest number of classes, by why.
_ENDS: dict[str, dict[str, Any]] = {
    "does not fit with more classes": {"marker": "x", "markersize": 10, "markeredgewidth": 2},
    "not run with more classes": {"marker": "D", "markersize": 9, "markeredgewidth": 1.6, "fillstyle": "none"},
}
_SMALL = 8  # points
_NARROW = 0.05  # of the longest bar: no number has room in a part that is narrower


def number(row: Row, column: str) -> float | None:
    """Of a row; None where it has none.

    >>> number({"p50_ms": "12.5", "peak_mib": ""}, "p50_ms"), number({"peak_mib": ""}, "peak_mib")
    (12.5, None)
    """
    return float(row[column]) if row.get(column) else None


def step_over_classes(rows: Sequence[Row]) -> str:
    """Milliseconds of a step over the number of classes, of everyone, a panel for each precision."""
    panels = [partial(_curves, rows, "p50_ms", "{}, a step, ms", precision) for precision in PRECISIONS]
    return _over_classes("step", "milliseconds of a step over the number of classes", rows, panels)


def memory_over_classes(rows: Sequence[Row]) -> str:
    """What a step keeps for backward, and how far memory rises in it, over the number of classes."""
    titles = {"saved_mib": "{}, kept for backward, MiB", "peak_mib": "{}, rise at the peak, MiB"}
    panels = [partial(_curves, rows, *title, precision) for title in titles.items() for precision in PRECISIONS]
    return _over_classes("memory", "memory of a step over the number of classes", rows, panels)


def time_budget(rows: Sequence[Row]) -> str:
    """Where the time of a step goes, a bar for each, from rows of bench.profile."""
    bars: dict[str, dict[str, Row]] = {}
    for row in rows:
        mode = row["step"].removeprefix(WHO[0])  # ", memory=min"
        name = f"{row['precision']}, {row['K']} of {int(row['C']):,} classes{mode}"
        bars.setdefault(name, {})[row["group"]] = row
    colours = coloured((MATRIX, ATTENTION, OURS, REST)) | {REST: GREY}
    longest = max((sum(number(row, "p50_ms") or 0 for row in of.values()) for of in bars.values()), default=0.0)

    def draw(axes: Axes) -> None:
        for place, of in enumerate(bars.values()):
            start = 0.0
            for group, colour in colours.items():
                width = (number(of[group], "p50_ms") or 0) if group in of else 0.0
                axes.barh(place, width, left=start, color=colour, height=0.62, label=None if place else group)
                if width > _NARROW * longest:
                    share = f"{100 * float(of[group]['share']):.0f} %"
                    where = start + width / 2, place
                    axes.text(*where, share, ha="center", va="center", color="white", fontsize=_SMALL)
                start += width
            axes.text(start + longest / 80, place, f"{start:,.0f} ms", va="center", color=GREY, fontsize=_SMALL)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1 * longest)
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.set_xlabel("milliseconds of a step")
        _legend(axes, columns=4)

    size = 8.0, 1.1 + 0.42 * len(bars)
    return panels_svg("budget", "where the time of a step goes", [draw], size=size) if bars else ""


def operator_speedups(rows: Sequence[Row]) -> str:
    """How many times faster than eager PyTorch each operator is, a dot for each shape."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["who"] == "eager" and (faster := number(row, "faster")) is not None:
            found.setdefault((row["op"], row["dtype"]), []).append(faster)
    operators = [op for op in OPERATORS if any(op == of for of, _ in found)]
    dtypes = list(dict.fromkeys(dtype for _, dtype in found))

    def draw(axes: Axes) -> None:
        for dtype, colour in coloured(dtypes).items():
            beside = 0.3 * (dtypes.index(dtype) - (len(dtypes) - 1) / 2)
            label: str | None = dtype
            for place, op in enumerate(operators):
                if values := found.get((op, dtype)):
                    line = [place + beside] * len(values)
                    axes.plot([min(values), max(values)], line[:1] * 2, color=colour, linewidth=1, alpha=0.5)
                    axes.plot(values, line, "o", color=colour, markersize=5, markeredgewidth=0, alpha=0.8, label=label)
                    label = None
        axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
        axes.set_yticks(range(len(operators)), operators)
        axes.set_ylim(len(operators) - 0.5, -0.5)
        axes.grid(axis="both", color=GREY, alpha=0.25, linewidth=0.8)
        axes.set_xlabel("times faster than eager PyTorch; a dot for each shape")
        _legend(axes, columns=len(dtypes))

    size = 8.0, 1.2 + 0.42 * len(operators)
    label = "how many times faster than eager PyTorch each operator is"
    return panels_svg("operators", label, [draw], size=size) if found else ""


# ---- curves over the number of classes -------------------------------------------------------------------------------


def _over_classes(name: str, label: str, rows: Sequence[Row], panels: Sequence[Callable[[Axes], None]]) -> str:
    """Panels in rows of two, and whose line is whose below them."""
    if not any(number(row, "p50_ms") for row in rows):
        return ""

    def last(axes: Axes) -> None:
        panels[-1](axes)
        drawn = {row["who"] for row in rows if number(row, "p50_ms")}
        for who in WHO:
            if who in drawn:
                axes.plot([], [], color=_STYLES[who][0], linestyle=_STYLES[who][1], label=who)
        for end in _ENDS:
            if any(_end(rows, who, precision) == end for who in WHO for precision in PRECISIONS):
                axes.plot([], [], color=GREY, linestyle="none", label=end, **_ENDS[end] | {"markersize": 7})
        _legend(axes, columns=4)

    size = 9.6, 0.6 + 1.5 * len(panels)
    return panels_svg(name, label, [*panels[:-1], last], size=size, columns=2)


def _curves(rows: Sequence[Row], column: str, title: str, precision: str, axes: Axes) -> None:
    """A line for everyone, with a mark where the next number of classes could not be run."""
    points = {who: _points(rows, column, who, precision) for who in WHO}
    every = [y for other in PRECISIONS for who in WHO for y in _points(rows, column, who, other).values()]
    classes = sorted({int(row["C"]) for row in rows})
    axes.set_xscale("log")
    axes.set_yscale("log")
    if every:
        axes.set_ylim(min(every) / 1.4, max(every) * 1.4)  # the same in both precisions
    for who in WHO:
        colour, style = _STYLES[who]
        width = 2.2 if who == WHO[0] else 1.5
        x, y = list(points[who]), list(points[who].values())
        axes.plot(x, y, color=colour, linestyle=style, linewidth=width, marker="o", markersize=3.5)
        # A line that ends before the last step that ran, where only earlier ones have this value, has no mark.
        if x and x[-1] == max(_points(rows, "p50_ms", who, precision)) and (end := _end(rows, who, precision)):
            axes.plot(x[-1], y[-1], color=colour, **_ENDS[end])
    axes.set_xlim(min(classes) / 1.4, max(classes) * 1.6)
    axes.xaxis.set_major_locator(FixedLocator(classes))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=_SMALL)
    _plain_ticks(axes.yaxis)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.8)
    axes.set_xlabel("classes")
    axes.set_title(title.format(precision), color=GREY, fontsize=10)


def _points(rows: Sequence[Row], column: str, who: str, precision: str) -> dict[int, float]:
    """Values by the number of classes, in order."""
    return {int(row["C"]): value for row in _in_order(rows, who, precision) if (value := number(row, column))}


def _in_order(rows: Sequence[Row], who: str, precision: str) -> list[Row]:
    """Someone's, by the number of classes."""
    of = (row for row in rows if (row["who"], row["precision"]) == (who, precision))
    return sorted(of, key=lambda row: int(row["C"]))


def _end(rows: Sequence[Row], who: str, precision: str) -> str:
    """Why a line does not go on to the largest number of classes; "" where it does."""
    of = _in_order(rows, who, precision)
    last = max((place for place, row in enumerate(of) if number(row, "p50_ms")), default=-1)
    if last + 1 >= len(of):
        return ""
    does_not_fit, other = _ENDS
    return does_not_fit if of[last + 1]["note"].startswith("does not fit") else other


def _legend(axes: Axes, *, columns: int) -> None:
    """Of the whole picture, below it."""
    figure = axes.get_figure()
    assert figure is not None
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=GREY, fontsize=9
    )


def _plain_ticks(axis: object) -> None:
    """1, 2, 5, 10, … on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # type: ignore[attr-defined]
    axis.set_major_formatter(FuncFormatter(_plain))  # type: ignore[attr-defined]
    axis.set_minor_locator(NullLocator())  # type: ignore[attr-defined]


def _plain(value: float, _: int) -> str:
    """A tick in digits."""
    return f"{value:,.10g}"
