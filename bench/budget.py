"""A time budget for benchmarks: a case that no longer fits is skipped and reported."""

from __future__ import annotations

import argparse
import math
import re
import time

NO_TIME = "left out: no time left"  # the note of a row; `rows.latest` recognises its beginning
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Budget:
    """A number of seconds from construction on.

    Example:
        >>> Budget().left, Budget(60).allows(20), Budget(60).allows(90)
        (inf, True, False)
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


class Plan:
    """Reserve parts of the remaining seconds of a budget, one after the other.

    Example:
        >>> plan = Plan(Budget(60))
        >>> plan.takes(40), plan.takes(40), plan.takes(15)
        (True, False, True)
    """

    def __init__(self, budget: Budget):
        self._left = budget.left

    def takes(self, seconds: float) -> bool:
        """Reserve this many seconds; False if they do not fit beside the earlier reservations."""
        fits = seconds <= self._left
        self._left -= seconds if fits else 0.0
        return fits


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
    parser.add_argument(
        "--budget", type=budget, default=Budget(), help="total time, such as 9m; finished rows are kept"
    )
