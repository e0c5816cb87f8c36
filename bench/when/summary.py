"""Tables of the study, from rows: means over seeds with their 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..rows import Row, grouped
from .runs import OMEGAS
from .tasks import SHIFTS

PACKAGED_STEPS = 4500
"""Pre-training steps of glyph-tiny."""
ZERO_SHOT, BLENDED = "zero-shot", ", blended"
_SKIP = [f"skip {round(4 * omega)}/4" for omega in OMEGAS]
_HALF = "skip 2/4"
_OTHERS = ["full", "lora", "clip-adapter", "coop"]
METHODS = [*_SKIP, *_OTHERS]
VARIANTS = [ZERO_SHOT, *METHODS, *(name + BLENDED for name in [*_SKIP, "full", "lora"])]
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "clip-adapter": "CLIP-Adapter", "coop": "CoOp"}
NAMES |= {"skip 1/4": "Skip Tuning, ω = ¼", "skip 2/4": "Skip Tuning, ω = ½", "skip 3/4": "Skip Tuning, ω = ¾"}
# Compared variants in the table of differences.
_PAIRS = [(_HALF, other) for other in (ZERO_SHOT, *_OTHERS)] + [(name, _HALF) for name in _SKIP if name != _HALF]
_PAIRS += [(name + BLENDED, name) for name in (_HALF, "full", "lora")] + [(_HALF + BLENDED, "full" + BLENDED)]
# 97.5 % quantile of Student's t distribution, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Table = tuple[list[str], list[list[str]]]
"""Header and lines of cells."""


class Interval(NamedTuple):
    """Mean of a value over seeds, and half of the width of its 95 % interval; None for a single seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        """The interval of some values; None without values.

        >>> Interval.of([40.0, 42.0, 44.0])
        Interval(mean=42.0, half=4.968...)
        """
        if not values:
            return None
        degrees = len(values) - 1
        half = _T[min(degrees, max(_T))] * statistics.stdev(values) / math.sqrt(len(values)) if degrees else None
        return cls(statistics.fmean(values), half)

    def text(self, sign: str = "") -> str:
        """The interval with a digit after the point; `sign` "+" also shows the sign of positive means."""
        return f"{self.mean:{sign}.1f}" + ("" if self.half is None else f" ± {self.half:.1f}")


def values(rows: Sequence[Row], task: str, variant: str, column: str) -> dict[str, float]:
    """A column of the reported runs of a variant by seed. The zero-shot model is that of any run."""
    blended = variant.endswith(BLENDED)
    method = variant.removesuffix(BLENDED)
    if variant == ZERO_SHOT:
        method, column = "full", f"zero_shot_{column}"
    wanted = {"task": task, "phase": "report", "method": method, "blended": str(int(blended))}
    return {row["seed"]: float(row[column]) for row in rows if wanted.items() <= row.items()}


def interval(rows: Sequence[Row], task: str, variant: str, column: str) -> Interval | None:
    """Mean of a column of the reported runs of a variant."""
    return Interval.of(list(values(rows, task, variant, column).values()))


def difference(rows: Sequence[Row], task: str, variant: str, other: str, column: str = "harmonic") -> Interval | None:
    """Mean of the difference of two variants with the same seed: the same classes and images."""
    of, against = (values(rows, task, name, column) for name in (variant, other))
    return Interval.of([of[seed] - against[seed] for seed in of if seed in against])


def reported_tasks(rows: Sequence[Row]) -> list[str]:
    """The tasks with reported runs, in the order of `SHIFTS`."""
    found = {row["task"] for row in rows if row["phase"] == "report"}
    return [shift.name for shift in SHIFTS if shift.name in found]


def named(variant: str) -> str:
    """The name of a variant in tables."""
    method = variant.removesuffix(BLENDED)
    return NAMES.get(method, method) + variant[len(method) :]


def accuracy_table(rows: Sequence[Row], column: str) -> Table:
    """Accuracy in per cent of every variant on every task; the best in bold."""
    tasks = reported_tasks(rows)
    found = {(v, task): interval(rows, task, v, column) for v in VARIANTS for task in tasks}
    best = {task: max(f.mean for v in VARIANTS if (f := found[v, task])) for task in tasks}

    def cell(variant: str, task: str) -> str:
        figure = found[variant, task]
        if figure is None:
            return ""
        return f"**{figure.text()}**" if figure.mean == best[task] else figure.text()

    return ["", *tasks], [[named(v), *(cell(v, task) for task in tasks)] for v in VARIANTS]


def difference_table(rows: Sequence[Row]) -> Table:
    """Differences of harmonic means between two variants, seed by seed."""
    tasks, lines = reported_tasks(rows), []
    for variant, other in _PAIRS:
        cells = [difference(rows, task, variant, other) for task in tasks]
        lines.append([f"{named(variant)} − {named(other)}", *(cell.text("+") if cell else "" for cell in cells)])
    return ["", *tasks], lines


def settings_table(rows: Sequence[Row]) -> Table:
    """The chosen setting of each method on each task: optimizer, learning rate of the text and of the image side."""
    tasks = reported_tasks(rows)
    chosen = {(row["task"], row["method"]): row["setting"] for row in rows if row["phase"] == "report"}
    cells = [[chosen.get((task, method), "") for task in tasks] for method in (_HALF, *_OTHERS)]
    names = ["Skip Tuning, every ω", *map(named, _OTHERS)]
    return ["", *tasks], [[name, *line] for name, line in zip(names, cells, strict=True)]


def cost_table(cost: Sequence[Row]) -> Table:
    """Time and memory of training, one process at a time."""
    tasks = [shift.name for shift in SHIFTS if any(row["task"] == shift.name for row in cost)]
    found = {(row["task"], row["method"]): row for row in cost}
    lines = []
    for method in (name for name in METHODS if any((task, name) in found for task in tasks)):
        of = [found.get((task, method)) for task in tasks]
        steps = next(row["steps"] for row in of if row)
        cells = [f"{float(row['train_s']):.1f} s, {float(row['train_mib']):.0f} MiB" if row else "" for row in of]
        lines.append([named(method), steps, *cells])
    return ["", f"steps on {tasks[0]}" if tasks else "", *tasks], lines


def pretraining_table(rows: Sequence[Row], others: Sequence[Row]) -> Table:
    """Skip Tuning and full fine-tuning by pre-training steps: harmonic means on every task, and their mean.

    Args:
        rows: Rows of the model in the package.
        others: Rows of models with other numbers of pre-training steps.
    """
    tasks, lines = reported_tasks(others), []
    by_steps = {int(steps): of for (steps,), of in grouped(others, "pretraining_steps").items()}
    for steps, of in sorted({**by_steps, PACKAGED_STEPS: rows}.items()):
        by_task = {task: [values(of, task, name, "harmonic") for name in (ZERO_SHOT, _HALF, "full")] for task in tasks}
        by_task["mean of the tasks"] = [
            {seed: statistics.fmean(task[seed] for task in found) for seed in set.intersection(*map(set, found))}
            for found in zip(*by_task.values(), strict=True)
        ]
        for task, (zero_shot, skip, full) in by_task.items():
            gaps = [skip[seed] - full[seed] for seed in skip if seed in full]
            figures = [Interval.of(list(found.values())) for found in (zero_shot, skip, full)]
            cells = [figure.text() if figure else "" for figure in figures]
            lines.append([f"{steps:,}", task, *cells, gap.text("+") if (gap := Interval.of(gaps)) else ""])
    return ["steps", "task", ZERO_SHOT, named(_HALF), named("full"), "difference"], lines


class Study(NamedTuple):
    """Rows of the study, by kind."""

    when: Sequence[Row]
    when_cost: Sequence[Row]
    when_pretraining: Sequence[Row]


TABLES: dict[str, tuple[str, str, Callable[[Study], Table]]] = {
    "harmonic": ("harmonic mean, %", "when", lambda study: accuracy_table(study.when, "harmonic")),
    "base": ("base, %", "when", lambda study: accuracy_table(study.when, "base")),
    "new": ("new, %", "when", lambda study: accuracy_table(study.when, "new")),
    "differences": ("harmonic mean, differences", "when", lambda study: difference_table(study.when)),
    "settings": ("chosen settings", "when", lambda study: settings_table(study.when)),
    "cost": ("time and memory of training", "when_cost", lambda study: cost_table(study.when_cost)),
    "pretraining": (
        "pre-training",
        "when_pretraining",
        lambda study: pretraining_table(study.when, study.when_pretraining),
    ),
}
"""The tables by name: title, kind of the rows, and function of the rows."""
