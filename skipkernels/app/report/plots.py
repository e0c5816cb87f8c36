"""Plots of report.html, as SVG that is readable on white and on black, with equal bytes for equal data."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from .formats import finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Contrast of at least 3 with white, and with #121212, the background of the dark mode of browsers.
COLOURS: tuple[str, ...] = ("#3b7dd8", "#cf7a1f", "#2e9e5b", "#d1495b", "#8f6be0", "#1793a5")
COLOURS += ("#c2529f", "#7f8c1f", "#a8703f", "#5b83a6", "#e0563a", "#5f9148")
LOSS, GREY = "#7a5ccc", "#808080"

_MAX_DOTS = 40  # on a line
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # None leaves a key out, for equal bytes


def coloured(names: Iterable[str]) -> dict[str, str]:
    """Assign a colour to each name, cycling after the twelfth.

    >>> coloured(["base", "new"])
    {'base': '#3b7dd8', 'new': '#cf7a1f'}
    """
    return {name: colour for name, colour in zip(names, cycle(COLOURS), strict=False)}


def loss_svg(rows: list[dict[str, Any]]) -> str:
    """Plot the training loss over the epochs; "" if no epoch has one.

    >>> loss_svg([{"epoch": 1, "loss": None}])
    ''
    """
    points = [(row["epoch"] - 0.5, row["loss"]) for row in rows if finite(row.get("loss"))]  # means over the epoch
    if not points:
        return ""
    return figure_svg("loss", "training loss over the epochs", lambda axes: _line(axes, points, LOSS))


def accuracy_svg(
    rows: list[dict[str, Any]],
    zero_shot: Mapping[str, float | None],
    colours: Mapping[str, str],
) -> str:
    """Plot the accuracy of each test of `colours` over the epochs, zero-shot at 0; "" if there is no epoch."""
    steps = [(0, zero_shot), *((row["epoch"], row["accuracy"]) for row in rows)]
    validation = [(row["epoch"], row["validation"]) for row in rows if finite(row.get("validation"))]

    def draw(axes: Axes) -> None:
        for name, colour in colours.items():
            points = [(epoch, accuracy[name]) for epoch, accuracy in steps if finite(accuracy.get(name))]
            _line(axes, points, colour)
            if points and points[0][0] == 0:
                axes.axhline(points[0][1], color=colour, linestyle=":", linewidth=1)
        if validation:
            axes.plot([x for x, _ in validation], [y for _, y in validation], color=GREY, linestyle="--", linewidth=1.4)
        within_per_cent(axes)

    return figure_svg("accuracy", "test accuracy over the epochs, in per cent", draw) if rows else ""


def within_per_cent(axes: Axes) -> None:
    """Limit the axis of accuracies to 0 to 100 %; points on its ends are drawn whole."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 100.0))
    for line in axes.lines:
        line.set_clip_on(False)


def _line(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    marker = "o" if len(points) <= _MAX_DOTS else None
    axes.plot([x for x, _ in points], [y for _, y in points], color=colour, marker=marker, markersize=4, linewidth=1.6)


def figure_svg(name: str, label: str, draw: Callable[[Axes], None]) -> str:
    """Return a plot over the epochs as SVG; `name` is unique on the page, `label` is for screen readers."""

    def framed(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)

    return plot_svg(name, label, framed, size=(5.2, 3))


def plot_svg(name: str, label: str, draw: Callable[[Figure], None], *, size: tuple[float, float]) -> str:
    """Return what is drawn on a figure of `size` in inches as SVG."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # Text is not drawn as paths, so that it has the font of the page. The matplotlibrc of the user is ignored.
    with style.context(["default", {"svg.hashsalt": name, "svg.fonttype": "none"}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # the page has other fonts
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.tick_params(colors=GREY)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(GREY)
            for part in (axes.xaxis.label, axes.yaxis.label):
                part.set_color(GREY)
            axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([\w.-]+)", svg))  # other ids, such as figure_1, are removed: pages have several plots
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
