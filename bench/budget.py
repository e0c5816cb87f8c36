"""How long a benchmark may take in all: what does not fit any more is left out, and said to be."""

from __future__ import annotations

import argparse
import math
import re
import time

NO_TIME = "left out: no time left"  # the note of a row; `stored.latest` knows it by how it begins
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Budget:
    """Seconds that are left, from its making on.

    Example:
        >>> Budget().left, Budget(60).allows(20), Budget(60).allows(90)
        (inf, True, False)
    """

    def __init__(self, seconds: float = math.inf):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; not below 0."""
        return max(0.0, self._end - time.monotonic())

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long, as one expects, can still be begun."""
        return seconds <= self.left


class Plan:
    """What is to be begun one after the other, of the seconds that are left of a budget when the plan is made.

    Example:
        >>> plan = Plan(Budget(60))
        >>> plan.takes(40), plan.takes(40), plan.takes(15)
        (True, False, True)
    """

    def __init__(self, budget: Budget):
        self._left = budget.left

    def takes(self, seconds: float) -> bool:
        """Whether something that takes so long, as one expects, can still be begun behind what was taken before."""
        fits = seconds <= self._left
        self._left -= seconds if fits else 0.0
        return fits


def budget(text: str) -> Budget:
    """From the command line: 9m, 90s, 1.5h.

    >>> round(budget("9m").left)
    540
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 9m, 90s or 1.5h; got {text!r}")
    return Budget(float(found[1]) * _UNITS[found[2]])


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The option --budget."""
    parser.add_argument(
        "--budget", type=budget, default=Budget(), help="time for all of it, such as 9m; what is done is kept"
    )
