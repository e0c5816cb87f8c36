"""Plots of values over the epochs of a run, as SVG in the colours of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from .parts import part

COLOURS = ("accent", "worse")
"""Colours of lines, variables of report.css."""
_WIDTH, _HEIGHT = 520, 230  # of the area of the lines


class Line(NamedTuple):
    """Line of a plot."""

    name: str
    colour: str  # variable of report.css
    points: Sequence[tuple[float, float]]  # epochs and values


def plot(title: str, lines: Sequence[Line]) -> Markup:
    """Return a figure with lines over the epochs, from 0; their values fill its height. "" without points.

    >>> plot("training loss", [Line("loss", "accent", [])])
    Markup('')
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup()
    epochs, values = zip(*(point for line in lines for point in line.points), strict=True)
    last, low, high = max(1, *epochs), min(values), max(values)

    def height(value: float) -> float:
        return round(_HEIGHT * (high - value) / (high - low or 1), 1)

    def path(line: Line) -> str:
        places = [f"{_WIDTH * epoch / last:.1f},{height(value)}" for epoch, value in line.points]
        return " ".join([*places, places[-1]])  # of one point, a dot

    ticks = [(height(value), f"{value:.3g}") for value in dict.fromkeys((high, (low + high) / 2, low))]
    return part("plot", title, ticks, [(line, path(line)) for line in lines], last)
