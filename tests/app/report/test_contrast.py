"""Colours of pages and plots have contrast."""

from __future__ import annotations

import re

from skipkernels.app.report import plots
from tests.app.report.pages import (
    page,
)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        colour = "#" + "".join(2 * digit for digit in colour[1:]) if len(colour) == 4 else colour
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one) + 0.05, luminance(other) + 0.05))
    return light / dark


def test_colours_have_contrast():
    schemes = [
        dict(re.findall(r"--(\w+): (#\w+);", rule)) for rule in re.findall(r":root \{(.*?)\}", page(), re.DOTALL)
    ]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys(), "light and dark"
    for colours in schemes:
        for name in ("ink", "quiet", "better", "worse", "accent"):  # of text
            for background in ("page", "soft"):
                assert contrast(colours[name], colours[background]) >= 4.5, (name, background)
        assert contrast(colours["zero"], colours["page"]) >= 3
    assert len(set(plots.COLOURS)) == 12
    for colour in (*plots.COLOURS, plots.LOSS, plots.GREY):
        for scheme in schemes:
            assert contrast(colour, scheme["page"]) >= 2.9, colour
    assert "color-scheme: light dark" in page()
