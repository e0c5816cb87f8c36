"""Time budgets, and cost models that predict large numbers of classes: a case that does not fit is skipped."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

NO_TIME = "left out: no time left"  # the note of a row; `rows.latest` recognises its beginning
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_MARGIN = 1.25  # times the bytes saved for backward; temporaries and gradients are extra
_MOST = 0.9  # of the free memory


class Budget:
    """A number of seconds from construction on.

    Example:
        >>> Budget().left, Budget(60).allows(20), Budget(60).allows(90)
        (inf, True, False)
        >>> Budget(60).fitting({"first": 40, "second": 40, "third": 15})
        ['first', 'third']
    """

    def __init__(self, seconds: float = math.inf):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Remaining seconds, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def allows(self, seconds: float) -> bool:
        """True if something expected to take this many seconds still fits."""
        return seconds <= self.left

    def fitting(self, needs: Mapping[Any, float]) -> list[Any]:
        """The keys with seconds that fit one after the other; others are left out."""
        left, found = self.left, []
        for key, seconds in needs.items():
            if seconds <= left:
                left -= seconds
                found.append(key)
        return found


def budget(text: str) -> Budget:
    """Parse a duration such as 9m, 90s or 1.5h.

    >>> round(budget("9m").left)
    540
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 9m, 90s or 1.5h; got {text!r}")
    return Budget(float(found[1]) * _UNITS[found[2]])


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Add the option --budget."""
    help = "total time, such as 9m; finished rows are kept"
    parser.add_argument("--budget", type=budget, default=Budget(), help=help)


class Probe(NamedTuple):
    """A small measurement: number of kept classes, seconds, and bytes saved for backward."""

    classes: int
    seconds: float
    saved: int


class CostModel(NamedTuple):
    """Seconds and bytes as linear functions of the number of kept classes.

    Example:
        >>> line = CostModel.of(Probe(10, 2.0, 1000), Probe(20, 3.0, 2000))
        >>> line.seconds(50), line.saved(50), line.most_classes(8000)
        (6.0, 5000.0, 57)
    """

    first: Probe
    seconds_each: float
    saved_each: float

    @classmethod
    def of(cls, few: Probe, more: Probe) -> CostModel:
        """Fit two probes of different sizes."""
        classes = more.classes - few.classes
        each = max(0.0, (more.seconds - few.seconds) / classes), max(0.0, (more.saved - few.saved) / classes)
        return cls(few, *each)

    def seconds(self, classes: int) -> float:
        """Predicted seconds per call with this many kept classes."""
        return self.first.seconds + (classes - self.first.classes) * self.seconds_each

    def saved(self, classes: int) -> float:
        """Predicted bytes saved for backward with this many kept classes."""
        return self.first.saved + (classes - self.first.classes) * self.saved_each

    def fits(self, classes: int, free: float) -> bool:
        """True if this many kept classes fit into this many free bytes."""
        return _MARGIN * self.saved(classes) <= _MOST * free

    def most_classes(self, free: float) -> int:
        """The largest number of kept classes that fits into this many free bytes."""
        room = _MOST * free / _MARGIN - self.first.saved
        return self.first.classes + int(room / max(1.0, self.saved_each))
