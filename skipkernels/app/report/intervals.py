"""95 % intervals: of an accuracy over the images of a test, and of a mean over runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST_RUNS = 3  # fewest runs with an interval of the mean
_NORMAL = 1.959964  # quantile 0.975 of the normal distribution
# Quantile 0.975 of Student's t with 2 to 10 degrees of freedom.
_T = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def wilson(accuracy: float, images: int) -> tuple[float, float]:
    """Return the limits of the 95 % interval of an accuracy over `images` independent images, all in per cent.

        (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n),   z = 1.96

    Unlike p ± z √(p(1 − p)/n), it is not empty at 0 and 100 %, and stays within them.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

    >>> [round(limit, 1) for limit in wilson(100.0, 10)], [round(limit, 1) for limit in wilson(50.0, 100)]
    ([72.2, 100.0], [40.4, 59.6])
    """
    share, square = accuracy / 100, _NORMAL**2
    middle = share + square / (2 * images)
    half = _NORMAL * math.sqrt(share * (1 - share) / images + square / (4 * images**2))
    low, high = (100 * (middle + sign * half) / (1 + square / images) for sign in (-1, 1))
    return round(max(low, 0.0), 4), round(min(high, 100.0), 4)


def half_interval(deviation: float | None, runs: int) -> float:
    """Half of the 95 % interval of the mean of normal values, t₀.₉₇₅(n − 1) · s / √n; 0 with fewer than three runs.

    >>> round(half_interval(1.0, 3), 2), half_interval(None, 1)
    (2.48, 0.0)
    """
    if not deviation or runs < LEAST_RUNS:
        return 0.0
    degrees = runs - 1
    # Beyond the table the expansion of the quantile in 1 / degrees is exact to 0.002.
    quantile = _T[degrees - 2] if degrees <= len(_T) + 1 else 1.96 + 2.372 / degrees + 2.823 / degrees**2
    return quantile * deviation / math.sqrt(runs)


def range_text(limits: Sequence[float]) -> str:
    """Format the limits of an interval.

    >>> range_text((72.246, 100.0))
    '72.2–100.0'
    """
    return f"{limits[0]:.1f}–{limits[1]:.1f}"
