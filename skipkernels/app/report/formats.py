"""Formats of numbers and names, on pages and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeGuard

MISSING = "–"


def finite(value: float | None) -> TypeGuard[float]:
    """Return True for a finite number."""
    return value is not None and math.isfinite(value)


def number(value: float | None, spec: str = ".1f", unit: str = "") -> str:
    """Format a number; a dash if it is missing or not finite.

    >>> number(57.25), number(-3.5, "+.1f"), number(-0.04, "+.1f"), number(None), number(2.0, ".0f", " s")
    ('57.2', '−3.5', '+0.0', '–', '2 s')
    """
    if not finite(value):
        return MISSING
    text = f"{value:{spec}}"
    if not any(digit in text for digit in "123456789"):  # a value that is rounded to zero is not negative
        text = f"{abs(value):{spec}}"
    return f"{text}{unit}".replace("-", "−")


def percent(value: float | None) -> str:
    """Format a percentage, 0 to 100. In texts of a page, the line does not break before "%".

    >>> percent(57.25)
    '57.2 %'
    """
    return number(value, ".1f", " %")


def probability(value: float) -> str:
    """Format a probability, 0 to 1, in percent.

    >>> probability(0.004), probability(0.5), probability(0.9999)
    ('<1 %', '50 %', '>99 %')
    """
    return "<1 %" if value < 0.01 else ">99 %" if value > 0.99 else f"{100 * value:.0f} %"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a number with its noun.

    >>> plural(1, "class", "classes"), plural(1200, "image")
    ('1 class', '1,200 images')
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def joined(names: Iterable[str]) -> str:
    """Join names in a sentence.

    >>> joined(["a"]), joined(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
