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
        self.runs = of_all_devices(devices(RESULTS), kind)

    def run(self, runs: Iterable[Run | TailRun], workers: int, title: str) -> None:
        """Execute the runs that have no row, and append the rows of each when it ends.

        Reported rows from before the joint test do not count.
        """
        done = {
            tuple(row[column] for column in RUN_COLUMNS)
            for row in self.runs
            if (self._kind, row["phase"]) != ("when", "report") or row.get("zero_shot_joint")
        }
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
            left = [pool.submit(self._execute, run) for run in runs if tuple(run.columns.values()) not in done]
            for finished in track(as_completed(left), title, len(left)):
                self.add(finished.result())

    def add(self, found: list[dict[str, Any]]) -> None:
        """Append the rows of a run."""
        rows = [machine_columns(measure.CPU) | row for row in found]
        if self._save:
            append_rows(rows, self._kind)
        self.runs += [{column: str(value) for column, value in row.items()} for row in rows]

    def best(self, method: str) -> Candidate:
        """The setting of a method with the best mean of base and new over the seeds of the search.

        The harmonic mean would follow the noise of new classes where they are near chance.
        """
        candidates = CANDIDATES[method]
        found: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
        for row in self.runs:
            if (row["phase"], row["blended"], row["method"]) == ("search", "0", method):
                found[row["setting"]].append(float(row["base"]) + float(row["new"]))
        return max(candidates, key=lambda c: statistics.fmean(found[c.name])) if len(candidates) > 1 else candidates[0]


def reported(
    shift: Shift, seed: int, found: Rows, methods: Collection[str], *, trains: bool = True, **settings: Any
) -> Iterator[Run]:
    """The reported runs of a task with a seed, with the settings of the search, and further fields of a `Run`.

    Unless a run `trains` to the end, methods that take hours with many classes are among them.
    """
    variants = VARIANTS | (KEPT if shift.many else KEPT | RECIPES if shift.name == "all" else {})
    for name, variant in variants.items():
        if variant.method in methods and not (trains and shift.many and variant.method in _WHOLE_TOWERS):
            yield Run(shift, name, variant, found.best(variant.method), "report", seed, **settings)
