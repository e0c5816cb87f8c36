"""Pictures as SVG that is readable on white and on black, with equal bytes for equal data."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable

from matplotlib import style
from matplotlib.figure import Figure

# Contrast of at least 3 with white, and with #121212, the background of the dark mode of browsers.
COLOURS = ("#3b7dd8", "#cf7a1f", "#2e9e5b", "#d1495b")
GREY = "#808080"
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # None leaves a key out, for equal bytes


def svg_of(name: str, label: str, draw: Callable[[Figure], None], *, size: tuple[float, float]) -> str:
    """Return what is drawn on a figure of `size` in inches as SVG; `label` is for screen readers."""
    # Text is not drawn as paths, so that it has the font of the page. The matplotlibrc of the user is ignored.
    with style.context(["default", {"svg.hashsalt": name, "svg.fonttype": "none"}]):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.tick_params(colors=GREY)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(GREY)
            axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([\w.-]+)", svg))  # other ids, such as figure_1, are removed
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
