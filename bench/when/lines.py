"""Lines of the tables of the study: their values in the rows by seed, and means with their 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from ..rows import Row
from .plan import EVERY, HEADED, HEADS, VARIANTS
from .tasks import SHIFTS

NAMES = {"full": "full fine-tuning", "lora": "LoRA", "clip-adapter": "CLIP-Adapter", "coop": "CoOp"}
NAMES |= {"linear-probe": "linear probe", "auto": "the default"}


class Line(NamedTuple):
    """Subject of a line of the tables: a method of `EVERY`, perhaps blended, perhaps with a head."""

    method: str
    blended: bool = False
    head: str = ""

    @property
    def name(self) -> str:
        """Name in the tables."""
        name = NAMES.get(self.method, self.method.replace("skip", "Skip Tuning"))
        name = f"{name}, blended" if self.blended else name
        return f"{name} + {self.head}" if self.head else name


METHODS = list(EVERY)
_METHODS = [Line(name) for name in METHODS]
_BLENDS = [Line(name, blended=True) for name in VARIANTS if name.startswith("skip") or name in ("full", "lora")]
_HEADED = [line for line in (*_METHODS, *_BLENDS) if line.method in HEADED]
LINES = [*_METHODS, *_BLENDS, *(line._replace(head=head) for head in HEADS for line in _HEADED)]

ZERO_SHOT, HALF, FULL, PROBE, DEFAULT = map(Line, ("zero-shot", "skip, ω = ½", "full", "linear-probe", "auto"))


def interval(sample: Sequence[float], sign: str = "") -> str:
    """Mean over seeds ± half of the width of its 95 % interval; `sign` "+" also shows the sign of positive means.

    >>> interval([40.0, 42.0, 44.0]), interval([1.5], "+"), interval([])
    ('42.0 ± 5.0', '+1.5', '')
    """
    if not sample:
        return ""
    mean, n = f"{statistics.fmean(sample):{sign}.1f}", len(sample)
    if n == 1:
        return mean
    return f"{mean} ± {float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(sample) / math.sqrt(n):.1f}"


def values(rows: Sequence[Row], task: str, line: Line, column: str) -> dict[str, float]:
    """A column of the reported runs of a line, by seed. The zero-shot model is that of any run."""
    found = [row for row in rows if (row["task"], row["phase"]) == (task, "report")]
    if line == ZERO_SHOT:
        column = f"zero_shot_{column}"
    else:
        wanted = {"method": line.method, "blended": str(int(line.blended))}
        found = [row for row in found if wanted.items() <= row.items() and row.get("head", "") == line.head]
    return {row["seed"]: float(row[column]) for row in found if row.get(column)}


def together(by_task: Iterable[Mapping[str, float]]) -> list[float]:
    """Mean over tasks of values by seed, of the seeds that all of them have."""
    found = [*by_task]
    seeds = set.intersection(*map(set, found))
    return [statistics.fmean(of[seed] for of in found) for seed in sorted(seeds)]


def differences(rows: Sequence[Row], task: str, line: Line, other: Line, column: str) -> dict[str, float]:
    """Differences of two lines by seed: with the same classes and images."""
    of, against = (values(rows, task, each, column) for each in (line, other))
    return {seed: of[seed] - against[seed] for seed in of if seed in against}


def corrected(samples: Sequence[Sequence[float]]) -> list[float]:
    """Probabilities of Student's t test that the mean of each sample is 0, corrected for their number by Holm's method.

    >>> [round(p, 3) for p in corrected([[1.0, 1.1, 0.9], [1.0, -1.0, 0.5]])]
    [0.007, 0.808]
    """
    found = [float(stats.ttest_1samp(sample, 0.0).pvalue) if any(sample) else 1.0 for sample in samples]
    result, least = [0.0] * len(found), 0.0
    for rank, index in enumerate(sorted(range(len(found)), key=found.__getitem__)):
        least = max(least, min(1.0, (len(found) - rank) * found[index]))
        result[index] = least
    return result


def reported_tasks(rows: Sequence[Row]) -> list[str]:
    """The tasks with reported runs, in the order of `SHIFTS`."""
    found = {row["task"] for row in rows if row["phase"] == "report"}
    return [shift.name for shift in SHIFTS if shift.name in found]
