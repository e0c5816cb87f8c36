"""Runs of the study in processes of one thread each, their rows, and the choices that are made from them."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from rich.progress import track

from .. import measure
from ..rows import RESULTS, append_rows, devices, machine_columns, of_all_devices
from .plan import CANDIDATES, KEPT, RECIPES, VARIANTS, Candidate, Run
from .runs import execute
from .tail import TailRun
from .tasks import Shift

RUN_COLUMNS = ("task", "method", "phase", "seed", "setting")
_WHOLE_TOWERS = ("full", "lora", "coop")  # train through the whole text tower


class Rows:
    """The rows of all machines. New ones are appended to the files of this one as they are added.

    Args:
        save: Append to the files.
        kind: Kind of the rows.
        execute: Function of a run that returns its rows.
    """

    def __init__(self, *, save: bool = True, kind: str = "when", execute: Callable[[Any], list[Any]] = execute):
        self._save, self._kind, self._execute = save, kind, execute
        self.rows = of_all_devices(devices(RESULTS), kind)

    def run(self, runs: Iterable[Run | TailRun], workers: int, title: str) -> None:
        """Execute the runs that have no row, and append the rows of each when it ends."""
        done = {tuple(row[column] for column in RUN_COLUMNS) for row in self.rows}
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
            left = [pool.submit(_recorded, self._execute, run) for run in runs if (*run.columns.values(),) not in done]
            for finished in track(as_completed(left), title, len(left)):
                self.add(finished.result())

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append the rows of a run."""
        if self._save:
            append_rows(rows, self._kind)
        self.rows += [{column: str(value) for column, value in row.items()} for row in rows]

    def best(self, method: str) -> Candidate:
        """The setting of a method with the best mean of base and new over the seeds of the search.

        The harmonic mean would follow the noise of new classes where they are near chance.
        """
        where = {"phase": "search", "method": method, "blended": "0"}
        rows = [row for row in self.rows if where.items() <= row.items() and not row.get("head")]

        def mean(candidate: Candidate) -> float:
            found = (row for row in rows if row["setting"] == candidate.name)
            return statistics.fmean(float(row["base"]) + float(row["new"]) for row in found)

        candidates = CANDIDATES[method]
        return max(candidates, key=mean) if len(candidates) > 1 else candidates[0]


def _recorded(execute: Callable[[Any], list[dict[str, Any]]], run: Run | TailRun) -> list[dict[str, Any]]:
    """Execute a run; its rows get the columns of the machine here, in the process that has their number of threads."""
    rows = execute(run)
    machine = machine_columns(measure.CPU)
    return [machine | row for row in rows]


def reported(
    shift: Shift, seed: int, found: Rows, methods: Collection[str], *, skip_slow: bool = True, **settings: Any
) -> Iterator[Run]:
    """The reported runs of a task with a seed, with the settings of the search, and further fields of a `Run`.

    `skip_slow` leaves out the methods that train for hours with many classes.
    """
    variants = dict(VARIANTS)
    if shift.many or shift.name == "all":
        variants |= KEPT
    if shift.name == "all":
        variants |= RECIPES
    for name, variant in variants.items():
        slow = shift.many and variant.method in _WHOLE_TOWERS
        if variant.method in methods and not (slow and skip_slow):
            yield Run(shift, name, variant, found.best(variant.method), "report", seed, **settings)
