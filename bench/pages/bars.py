"""The picture of README.md: time and memory of a step, as SVG readable on white and on black."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from skipkernels.app.report.plots import GREY, coloured, plot_svg

from ..rows import latest_rows, number
from ..step import FULL, OURS, PROMPTS, PUBLISHED
from .cells import SHOWN

_CLASSES = 100, 1000


def step_bars() -> str:
    """Bars of time and saved bytes of a step in fp32."""
    rows = latest_rows("step", **SHOWN, precision="fp32")
    found = {(row["implementation"], int(row["C"])): row for row in rows if int(row["C"]) in _CLASSES}
    names = (OURS, PUBLISHED, PROMPTS, FULL)
    colours = coloured(names)

    def draw(column: str, title: str, axes: Axes) -> None:
        unit, digits = (1024, 2) if column == "saved_mib" else (1000, 1)
        largest = max(number(found[name, classes], column) or 0 for name in names for classes in _CLASSES)
        ticks = []
        for group, classes in enumerate(_CLASSES):
            for place, name in enumerate(names):
                y, value = group * (len(names) + 1) + place, number(found[name, classes], column)
                axes.barh(y, value or 0, color=colours[name], height=0.8, label="" if group else name)
                text = "does not fit in memory" if value is None else f"{value / unit:.{digits}f}"
                axes.text((value or 0) + 0.015 * largest, y, text, va="center", fontsize=8.5, color=GREY)
            ticks.append(group * (len(names) + 1) + (len(names) - 1) / 2)
        axes.set_yticks(ticks, [f"{classes:,}\nclasses" for classes in _CLASSES])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * largest)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(title, color=GREY, fontsize=10)

    def both(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        draw("p50_ms", "a training step, seconds", left)
        draw("saved_mib", "saved for backward, GiB", right)
        where: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False}
        figure.legend(*right.get_legend_handles_labels(), **where, labelcolor=GREY, fontsize=9)

    return plot_svg("bars", "time and memory of a step at 100 and at 1,000 classes", both, size=(9.6, 3.4))
