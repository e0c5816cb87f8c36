"""Rows of the study in bench/results/DEVICE/when.csv and when_advice.csv."""

from __future__ import annotations

from typing import Any

from .. import measure
from ..rows import Kind, Row, latest, number, read
from .advice import Advised
from .runs import CANDIDATES, Candidate
from .tasks import Shift

RUNS = Kind("bench.when", "task method phase seed setting skip_layers blended", "harmonic", "zero_shot_new")
ADVICE = Kind("bench.when", "task", "image_blocks", "keep_ratio gradient_share")


class Rows:
    """The rows that there are; new ones are appended to the files as they are added.

    Args:
        save: Append to the files.

    Attributes:
        runs: Rows of runs.
        advice: Advice by task.
    """

    def __init__(self, *, save: bool = True):
        folder = measure.RESULTS / measure.slug(measure.cpu_name())
        self._save = save
        self.runs: list[Row] = latest(read(folder / "when.csv", RUNS), RUNS)
        self.advice = {row["task"]: Advised.of(row) for row in latest(read(folder / "when_advice.csv", ADVICE), ADVICE)}

    @property
    def keys(self) -> set[tuple[str, ...]]:
        """`Run.key` of the runs that have a row."""
        return {tuple(row[column] for column in ("task", "method", "phase", "seed", "setting")) for row in self.runs}

    def add(self, found: list[dict[str, Any]]) -> None:
        """Add the rows of a run."""
        self.runs += self._appended(found, "when")

    def add_advice(self, found: dict[str, Any]) -> None:
        """Add the advice for a task."""
        (row,) = self._appended([found], "when_advice")
        self.advice[row["task"]] = Advised.of(row)

    def _appended(self, found: list[dict[str, Any]], name: str) -> list[Row]:
        full = [measure.machine(measure.CPU) | row for row in found]
        if self._save:
            measure.append_rows(full, name)
        return [{column: str(value) for column, value in row.items()} for row in full]

    def best(self, shift: Shift, method: str) -> Candidate:
        """The setting of a method with the best harmonic mean in the search; of equal ones the first."""

        def harmonic(candidate: Candidate) -> float:
            return max(
                number(row, "harmonic") or 0.0
                for row in self.of(shift, phase="search", setting=candidate.name, blended="0")
                if row["method"].partition(" ")[0] == method
            )

        return max(CANDIDATES[method], key=harmonic)

    def of(self, shift: Shift, **where: str) -> list[Row]:
        """The rows of a task with these values."""
        where = {"task": shift.name} | where
        return [row for row in self.runs if where.items() <= row.items()]
