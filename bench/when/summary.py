"""Tables of the study: functions of rows."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from ..rows import Row, grouped
from .accuracy import ACCURACIES
from .lines import (
    DEFAULT,
    FULL,
    HALF,
    LINES,
    METHODS,
    PROBE,
    ZERO_SHOT,
    Line,
    corrected,
    differences,
    interval,
    reported_tasks,
    together,
    values,
)
from .tasks import SHIFTS
from .trials import REFERENCE

_FROZEN, _GAUSSIAN = ZERO_SHOT._replace(head="anchored"), HALF._replace(head="gaussian")
_OTHERS = [line for line in map(Line, METHODS) if line not in (HALF, FULL, PROBE, DEFAULT, ZERO_SHOT)]
_OF_HEADS = ("base", "harmonic", "joint")  # heads leave new classes as they are
# Lines of the table of differences: one, the one it is compared with, and columns.
_COMPARED: list[tuple[Line, Line, tuple[str, ...]]] = [
    (HALF, PROBE, ("base",)),
    (HALF, FULL, ("base", "new", "harmonic")),
    (HALF, ZERO_SHOT, ("new", "harmonic")),
    (FULL, ZERO_SHOT, ("new",)),
    *((HALF, other, ("harmonic",)) for other in _OTHERS),
    *((line._replace(blended=True), line, ("harmonic",)) for line in (HALF, FULL)),
    (HALF._replace(blended=True), FULL._replace(blended=True), ("harmonic",)),
    *((DEFAULT, other, _OF_HEADS) for other in (ZERO_SHOT, HALF, _FROZEN)),
    (DEFAULT, PROBE, ("base",)),
    (_FROZEN, HALF, _OF_HEADS),
    *((line, _FROZEN, _OF_HEADS) for line in (Line(HALF.method, blended=True, head="anchored"), _GAUSSIAN)),
    (_GAUSSIAN, PROBE, ("base",)),
]
_TOGETHER = "five categories"
_CATEGORIES = ("animals", "food", "objects", "travel", "activities")
_CLEAR = 0.05  # probability of a difference at least as large if there were none, after correction
REFERENCE_SECONDS = (10, 30, 100)
# Columns of the tables of own sets: the set and the column of its rows, by title.
_OF_TAIL = {
    "accuracy": ("long tail", "accuracy"),
    "balanced accuracy": ("long tail", "balanced"),
    "of the large class": ("long tail", "large"),
    "of the fourteen": ("long tail", "rare"),
}
_OF_OTHERS = {task: (task, "accuracy") for task in ("flags", "flagpack", "tiles")}

Key = TypeVar("Key")
Table = tuple[list[str], list[list[str]]]
"""Header and lines of cells."""


def accuracy_table(rows: Sequence[Row], column: str) -> Table:
    """Accuracy in per cent of every line with results on every task, and over five of them; the best in bold."""
    tasks = [_TOGETHER, *reported_tasks(rows)]
    samples: dict[tuple[Line, str], list[float]] = {}
    lines = [line for line in LINES if not (line.head and column == "new")]  # a head leaves new classes as they are
    for line in lines:
        by_task = {task: values(rows, task, line, column) for task in tasks[1:]}
        samples |= {(line, task): [*of.values()] for task, of in by_task.items() if of}
        if whole := together(by_task[task] for task in _CATEGORIES):
            samples[line, _TOGETHER] = whole
    means = {case: statistics.fmean(sample) for case, sample in samples.items()}
    best = {task: max((mean for (_, of), mean in means.items() if of == task), default=None) for task in tasks}

    def cell(line: Line, task: str) -> str:
        text = interval(samples.get((line, task), []))
        return f"**{text}**" if text and means[line, task] == best[task] else text

    shown = [line for line in lines if any((line, task) in samples for task in tasks)]
    return ["", *tasks], [[line.name, *(cell(line, task) for task in tasks)] for line in shown]


def difference_table(rows: Sequence[Row]) -> Table:
    """Differences between two lines, seed by seed: of the mean of the five categories, and on each task.

    Bold: the difference is not 0, corrected by Holm's method for the tasks of the line.
    """
    tasks, lines = reported_tasks(rows), []
    for line, other, column in ((line, other, column) for line, other, columns in _COMPARED for column in columns):
        by_task = {task: differences(rows, task, line, other, column) for task in tasks}
        whole = together(by_task.get(name, {}) for name in _CATEGORIES)
        samples = {task: [*of.values()] for task, of in by_task.items()}
        clear, texts = not_zero(samples), {task: interval(sample, "+") for task, sample in samples.items()}
        cells = [f"**{text}**" if task in clear else text for task, text in texts.items()]
        lines.append([f"{line.name} − {other.name}, {column}", interval(whole, "+"), *cells])
    return ["", _TOGETHER, *tasks], lines


def default_table(rows: Sequence[Row]) -> Table:
    """Lines clearly above the default of `skipkernels tune`, by task, and how many were compared with it.

    Differences are seed by seed, and corrected by Holm's method for the lines of a cell.
    """

    def cell(task: str, column: str) -> str:
        found = {line: differences(rows, task, line, DEFAULT, column) for line in LINES if line != DEFAULT}
        samples = {line: [*of.values()] for line, of in found.items() if len(of) > 1}
        above = [line for line in not_zero(samples) if statistics.fmean(samples[line]) > 0]
        texts = [f"{line.name} {interval(samples[line], '+')}" for line in above]
        return f"{', '.join(texts) or 'none'} of {len(samples)}" if samples else ""

    tasks = [task for task in reported_tasks(rows) if values(rows, task, DEFAULT, "base")]
    return ["", *_OF_HEADS], [[task, *(cell(task, column) for column in _OF_HEADS)] for task in tasks]


def not_zero(samples: Mapping[Key, Sequence[float]]) -> list[Key]:
    """Keys of the samples with a mean that is not 0, corrected for their number by Holm's method."""
    several = {key: sample for key, sample in samples.items() if len(sample) > 1}
    probabilities = corrected([*several.values()])
    return [key for key, probability in zip(several, probabilities, strict=True) if probability < _CLEAR]


def settings_table(rows: Sequence[Row]) -> Table:
    """The chosen setting of each method: optimizer, learning rate of the text and of the image side."""
    chosen = {row["method"]: row["setting"] for row in rows if row["phase"] == "report"}
    return ["", "setting"], [[Line(method).name, chosen[method]] for method in METHODS if method in chosen]


def cost_table(cost: Sequence[Row]) -> Table:
    """Time and harmonic mean at the end, and the time to reach the best of full fine-tuning within some seconds."""
    curves, lines = grouped(cost, "task method"), []
    for task, method in itertools.product((shift.name for shift in SHIFTS), METHODS):
        if curve := curves.get((task, method)):
            goals = [_best_within(curves.get((task, "full"), []), seconds) for seconds in REFERENCE_SECONDS]
            end = [curve[-1]["steps"], f"{float(curve[-1]['train_s']):.1f} s", f"{float(curve[-1]['harmonic']):.1f}"]
            lines.append([task, Line(method).name, *end, *(_reached(curve, goal) for goal in goals)])
    header = ["", "", "steps", "training", "harmonic mean"]
    return header + [f"as full within {seconds} s" for seconds in REFERENCE_SECONDS], lines


def _best_within(curve: Sequence[Row], seconds: float) -> float | None:
    return max((float(row["harmonic"]) for row in curve if float(row["train_s"]) <= seconds), default=None)


def _reached(curve: Sequence[Row], goal: float | None) -> str:
    """Time until a curve is at a harmonic mean; empty if it never is, or without one."""
    return next((f"{float(row['train_s']):.1f} s" for row in curve if goal and float(row["harmonic"]) >= goal), "")


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
        [Line(method).name, of[0]["batch_size"], *(cell(by_case.get((classes, method))) for classes in counts)]
        for method in METHODS
        if (of := [row for row in steps if row["method"] == method])
    ]
    return header, lines


def own_table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> Table:
    """Accuracies in per cent on own sets, and how often the default chose which candidate.

    `columns` has the set and the column of its rows by the title in the table.
    """
    tasks, lines = {task for task, _ in columns.values()}, []
    for (method,), of in grouped((row for row in rows if row["task"] in tasks), "method").items():
        chosen = Counter(row["chosen"] for row in of if method.startswith("the default"))
        names = ", ".join(f"{name} ({count})" for name, count in sorted(chosen.items()))
        samples = [[float(row[column]) for row in of if row["task"] == task] for task, column in columns.values()]
        lines.append([method, *map(interval, samples), names])
    return ["", *columns, "chosen (runs)"], lines


def trials_table(rows: Sequence[Row]) -> Table:
    """Accuracies in per cent of the trial that the others are compared with, and differences of the others to it."""
    by_trial: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_trial.setdefault(row["trial"], {})[row["seed"]] = row
    reference = by_trial[REFERENCE]

    def cell(trial: str, column: str) -> str:
        of = {seed: float(row[column]) for seed, row in by_trial[trial].items()}
        if trial == REFERENCE:
            return interval([*of.values()])
        return interval([value - float(reference[seed][column]) for seed, value in of.items()], "+")

    return ["", *ACCURACIES], [[trial, *(cell(trial, column) for column in ACCURACIES)] for trial in by_trial]


# The kind of rows that a table is made of, and the function that makes it, by name.
TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], Table]]] = {
    **{column: ("when", partial(accuracy_table, column=column)) for column in ACCURACIES},
    "differences": ("when", difference_table),
    "default": ("when", default_table),
    "settings": ("when", settings_table),
    "cost": ("when_cost", cost_table),
    "steps": ("when_steps", steps_table),
    "tail": ("when_own", partial(own_table, columns=_OF_TAIL)),
    "own": ("when_own", partial(own_table, columns=_OF_OTHERS)),
    "trials": ("when_trials", trials_table),
}
