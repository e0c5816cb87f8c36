"""Tables of the study, from rows: means over seeds with their 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from ..rows import Row
from .plan import EVERY, HEADED, HEADS, VARIANTS
from .tail import VARIANTS as VARIANTS_OF_TAIL
from .tasks import SHIFTS

REFERENCE_SECONDS = (10, 30, 100)
ZERO_SHOT, BLENDED, WITH = "zero-shot", ", blended", " + "
METHODS = list(EVERY)
_HALF = "skip, ω = ½"
DEFAULT = "auto"
_FROZEN = f"{ZERO_SHOT}{WITH}anchored"
_BLENDS = [name for name in VARIANTS if name.startswith("skip") or name in ("full", "lora")]
_PLAIN = [*METHODS, *(name + BLENDED for name in _BLENDS)]
SHOWN = [*_PLAIN, *(name + WITH + head for head in HEADS for name in _PLAIN if name.removesuffix(BLENDED) in HEADED)]
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "clip-adapter": "CLIP-Adapter", "coop": "CoOp"}
NAMES |= {"linear-probe": "linear probe", "auto": "the default"}
_COMPARED_ALREADY = (_HALF, "full", "linear-probe", DEFAULT, ZERO_SHOT)
# Lines of the table of differences: a variant, the one it is compared with, and columns.
_COMPARED: list[tuple[str, str, tuple[str, ...]]] = [
    (_HALF, "linear-probe", ("base",)),
    (_HALF, "full", ("base", "new", "harmonic")),
    (_HALF, ZERO_SHOT, ("new", "harmonic")),
    ("full", ZERO_SHOT, ("new",)),
    *((_HALF, other, ("harmonic",)) for other in METHODS if other not in _COMPARED_ALREADY),
    *((name + BLENDED, name, ("harmonic",)) for name in (_HALF, "full", "lora")),
    (_HALF + BLENDED, "full" + BLENDED, ("harmonic",)),
    *((DEFAULT, other, ("base", "new", "harmonic", "joint")) for other in (ZERO_SHOT, _HALF, _FROZEN)),
    (DEFAULT, "linear-probe", ("base",)),
    (_FROZEN, _HALF, ("base", "new", "harmonic", "joint")),
    (f"{_HALF}{BLENDED}{WITH}anchored", _FROZEN, ("base", "harmonic", "joint")),
    (f"{_HALF}{WITH}gaussian", _FROZEN, ("base", "harmonic", "joint")),
    (f"{_HALF}{WITH}gaussian", "linear-probe", ("base",)),
]
_TOGETHER = "five categories"
_CATEGORIES = ("animals", "food", "objects", "travel", "activities")
_CLEAR = 0.05  # probability of a difference at least as large if there were none, after correction

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
        n = len(values)
        half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
        return cls(statistics.fmean(values), half)

    def text(self, sign: str = "") -> str:
        """The interval with a digit after the point; `sign` "+" also shows the sign of positive means."""
        return f"{self.mean:{sign}.1f}" + ("" if self.half is None else f" ± {self.half:.1f}")


def values(rows: Sequence[Row], task: str, variant: str, column: str) -> dict[str, float]:
    """A column of the reported runs of a variant by seed. The zero-shot model is that of any run."""
    weights, _, head = variant.partition(WITH)
    method, blended = weights.removesuffix(BLENDED), weights.endswith(BLENDED)
    if variant == ZERO_SHOT:
        method, column = _HALF, f"zero_shot_{column}"
    wanted = {"task": task, "phase": "report", "method": method, "blended": str(int(blended))}
    found = (row for row in rows if wanted.items() <= row.items() and row.get("head", "") == head)
    return {row["seed"]: float(row[column]) for row in found if row.get(column)}


def interval(rows: Sequence[Row], task: str, variant: str, column: str) -> Interval | None:
    """Mean of a column of the reported runs of a variant."""
    return Interval.of(list(values(rows, task, variant, column).values()))


def together(by_task: Sequence[Mapping[str, float]]) -> Interval | None:
    """Mean over tasks of values by seed."""
    seeds = set.intersection(*map(set, by_task))
    return Interval.of([statistics.fmean(found[seed] for found in by_task) for seed in sorted(seeds)])


def differences(rows: Sequence[Row], task: str, variant: str, other: str, column: str) -> dict[str, float]:
    """Differences of two variants by seed: with the same classes and images."""
    of, against = (values(rows, task, name, column) for name in (variant, other))
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


def named(variant: str) -> str:
    """The name of a variant in tables."""
    method = variant.partition(WITH)[0].removesuffix(BLENDED)
    return NAMES.get(method, method.replace("skip", "Skip Tuning")) + variant[len(method) :]


def accuracy_table(rows: Sequence[Row], column: str) -> Table:
    """Accuracy in per cent of every variant with results on every task, and over five of them; the best in bold."""
    tasks = [_TOGETHER, *reported_tasks(rows)]
    found = {(v, task): interval(rows, task, v, column) for v in SHOWN for task in tasks[1:]}
    found |= {(v, _TOGETHER): together([values(rows, task, v, column) for task in _CATEGORIES]) for v in SHOWN}
    best = {task: max((f.mean for v in SHOWN if (f := found[v, task])), default=None) for task in tasks}
    shown = [variant for variant in SHOWN if any(found[variant, task] for task in tasks)]

    def cell(variant: str, task: str) -> str:
        figure = found[variant, task]
        if figure is None:
            return ""
        return f"**{figure.text()}**" if figure.mean == best[task] else figure.text()

    return ["", *tasks], [[named(v), *(cell(v, task) for task in tasks)] for v in shown]


def difference_table(rows: Sequence[Row]) -> Table:
    """Differences between two variants, seed by seed: of the mean of the five categories, and on each task.

    Bold: the difference is not 0, corrected by Holm's method for the tasks of the line.
    """
    tasks, lines = reported_tasks(rows), []
    for variant, other, columns in _COMPARED:
        for column in columns:
            by_task = {task: differences(rows, task, variant, other, column) for task in tasks}
            samples = {task: list(found.values()) for task, found in by_task.items() if len(found) > 1}
            clear = {task for task, p in zip(samples, corrected([*samples.values()]), strict=True) if p < _CLEAR}
            whole = together([by_task.get(name, {}) for name in _CATEGORIES])
            cells = [cell.text("+") if (cell := Interval.of([*by_task[task].values()])) else "" for task in tasks]
            cells = [f"**{cell}**" if task in clear else cell for task, cell in zip(tasks, cells, strict=True)]
            name = f"{named(variant)} − {named(other)}, {column}"
            lines.append([name, whole.text("+") if whole else "", *cells])
    return ["", _TOGETHER, *tasks], lines


def default_table(rows: Sequence[Row]) -> Table:
    """Variants clearly above the default of `skipkernels tune`, by task, and how many were compared with it.

    Differences are seed by seed, and corrected by Holm's method for the variants of a cell.
    """

    def cell(task: str, column: str) -> str:
        found = {v: [*differences(rows, task, v, DEFAULT, column).values()] for v in SHOWN if v != DEFAULT}
        samples = {variant: sample for variant, sample in found.items() if len(sample) > 1}
        probabilities = corrected([*samples.values()])
        above = [
            f"{named(variant)} {Interval.of(sample).text('+')}"  # type: ignore[union-attr]
            for (variant, sample), p in zip(samples.items(), probabilities, strict=True)
            if p < _CLEAR and statistics.fmean(sample) > 0
        ]
        return f"{', '.join(above) or 'none'} of {len(samples)}" if samples else ""

    columns = ("base", "harmonic", "joint")
    tasks = [task for task in reported_tasks(rows) if values(rows, task, DEFAULT, "base")]
    return ["", *columns], [[task, *(cell(task, column) for column in columns)] for task in tasks]


def choices_table(rows: Sequence[Row]) -> Table:
    """Candidates that the default chose, and in how many runs of a task."""
    found = [row for row in rows if row["method"] == DEFAULT and row["phase"] == "report"]
    names = sorted({row["chosen"] for row in found})
    tasks = [task for task in reported_tasks(rows) if any(row["task"] == task for row in found)]
    counts = Counter((row["task"], row["chosen"]) for row in found)
    return ["", *tasks], [[name, *(str(counts[task, name] or "") for task in tasks)] for name in names]


def settings_table(rows: Sequence[Row]) -> Table:
    """The chosen setting of each method: optimizer, learning rate of the text and of the image side."""
    chosen = {row["method"]: row["setting"] for row in rows if row["phase"] == "report"}
    return ["", "setting"], [[named(method), chosen[method]] for method in METHODS if method in chosen]


def cost_table(cost: Sequence[Row]) -> Table:
    """Time and harmonic mean at the end, and the time to reach the best of full fine-tuning within some seconds."""
    lines = []
    for task in (shift.name for shift in SHIFTS):
        by_method = {name: [row for row in cost if (row["task"], row["method"]) == (task, name)] for name in METHODS}
        reference = [(float(row["train_s"]), float(row["harmonic"])) for row in by_method["full"]]
        goals = [max((best for s, best in reference if s <= seconds), default=None) for seconds in REFERENCE_SECONDS]
        for method, of in by_method.items():
            if not of or method == "linear-probe":
                continue
            curve = [(float(row["train_s"]), float(row["harmonic"])) for row in of]
            reached = [next((s for s, value in curve if goal and value >= goal), None) for goal in goals]
            end = [of[-1]["steps"], f"{curve[-1][0]:.1f} s", f"{curve[-1][1]:.1f}"]
            lines.append([task, named(method), *end, *(f"{s:.1f} s" if s is not None else "" for s in reached)])
    header = ["", "", "steps", "training", "harmonic mean"]
    return header + [f"as full within {seconds} s" for seconds in REFERENCE_SECONDS], lines


def steps_table(steps: Sequence[Row]) -> Table:
    """Time of a step and peak of memory by the number of trained classes."""
    by_case = {(int(row["classes"]), row["method"]): row for row in steps}
    counts = sorted({classes for classes, _ in by_case})

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        return f"{1000 * float(row['step_s']):,.0f} ms, {float(row['train_mib']):,.0f} MiB"

    header = ["", "images per step", *(f"{classes:,} classes" for classes in counts)]
    lines = [
        [named(method), of[0]["batch_size"], *(cell(by_case.get((classes, method))) for classes in counts)]
        for method in METHODS
        if (of := [row for row in steps if row["method"] == method])
    ]
    return header, lines


def tail_table(rows: Sequence[Row]) -> Table:
    """Accuracies in per cent on the long tail, and how often the default chose which candidate."""
    lines = []
    for variant in VARIANTS_OF_TAIL:
        of = [row for row in rows if row["method"] == variant]
        cells = [
            Interval.of([float(row[column]) for row in of]) for column in ("accuracy", "balanced", "large", "rare")
        ]
        chosen = Counter(row["chosen"] for row in of if row["chosen"] != variant.partition(",")[0])
        names = ", ".join(f"{name} ({count})" for name, count in sorted(chosen.items()))
        lines += [[variant, *(cell.text() if cell else "" for cell in cells), names]] if of else []
    return ["", "accuracy", "balanced accuracy", "of the large class", "of the fourteen", "chosen (runs)"], lines


class Study(NamedTuple):
    """Rows of the study, by kind."""

    when: Sequence[Row]
    when_cost: Sequence[Row]
    when_steps: Sequence[Row]
    when_tail: Sequence[Row]


TABLES: dict[str, tuple[str, str, Callable[[Study], Table]]] = {
    "harmonic": ("harmonic mean, %", "when", lambda study: accuracy_table(study.when, "harmonic")),
    "base": ("base, %", "when", lambda study: accuracy_table(study.when, "base")),
    "new": ("new, %", "when", lambda study: accuracy_table(study.when, "new")),
    "joint": ("joint, %", "when", lambda study: accuracy_table(study.when, "joint")),
    "differences": ("differences", "when", lambda study: difference_table(study.when)),
    "default": ("clearly above the default", "when", lambda study: default_table(study.when)),
    "choices": ("what the default chose", "when", lambda study: choices_table(study.when)),
    "settings": ("chosen settings", "when", lambda study: settings_table(study.when)),
    "cost": ("time of training", "when_cost", lambda study: cost_table(study.when_cost)),
    "steps": ("time and memory of a step", "when_steps", lambda study: steps_table(study.when_steps)),
    "tail": ("accuracy on a long tail, %", "when_tail", lambda study: tail_table(study.when_tail)),
}
"""The tables by name: title, kind of the rows, and function of the rows."""
