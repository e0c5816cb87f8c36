"""Runs of the study in processes of one thread each, their rows, and the choices that are made from them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from .. import measure
from ..rows import Device, Row
from .runs import CANDIDATES, OMEGAS, Candidate, Run, execute
from .tasks import Shift


class Rows:
    """The rows of this machine. New ones are appended to its files as they are added.

    Args:
        save: Append to the files.
        kind: Kind of the runs' rows.
        where: Columns that all rows of runs have, with their values.
    """

    def __init__(self, *, save: bool = True, kind: str = "when", where: Row | None = None):
        device = Device(measure.RESULTS / measure.slug(measure.cpu_name()))
        self._save, self._kind, self._where = save, kind, where or {}
        self.runs = device.latest_rows(kind, **self._where)

    def run(self, runs: Iterable[Run], workers: int, title: str) -> None:
        """Execute the runs that have no row, and append the rows of each when it ends."""
        done = {tuple(row[column] for column in ("task", "method", "phase", "seed", "setting")) for row in self.runs}
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
            left = [pool.submit(execute, run) for run in runs if run.key not in done]
            for finished in track(as_completed(left), title, len(left)):
                self.add(finished.result())

    def add(self, found: list[dict[str, Any]]) -> None:
        """Append the rows of a run."""
        rows = [measure.machine(measure.CPU) | self._where | row for row in found]
        if self._save:
            measure.append_rows(rows, self._kind)
        self.runs += [{column: str(value) for column, value in row.items()} for row in rows]

    def best(self, shift: Shift, method: str) -> Candidate:
        """The setting of a method with the best mean of base and new in the search; of equal ones the first.

        The harmonic mean would follow the noise of new classes at chance: on emoji a setting with 10 and 9 %, of base
        and new, would be better than one with 72 and 5 %.
        """
        task = shift.settings_of or shift.name
        accuracy = {
            row["setting"]: float(row["base"]) + float(row["new"])
            for row in self.runs
            if (row["task"], row["phase"], row["blended"]) == (task, "search", "0")
            and row["method"].partition(" ")[0] == method
        }
        return max(CANDIDATES[method], key=lambda candidate: accuracy[candidate.name])


def reported(shift: Shift, seed: int, emoji_font: Path, found: Rows) -> Iterator[Run]:
    """The reported runs of a task with a seed, with the settings of the search."""
    for method in CANDIDATES:
        run = Run(shift, method, found.best(shift, method), "report", seed, emoji_font=emoji_font)
        yield from (replace(run, skip_layers=omega) for omega in OMEGAS) if method == "skip" else (run,)
