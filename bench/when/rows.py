"""Runs of the study in processes of one thread each, their rows, and the choices that are made from them."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from rich.progress import track

from .. import measure
from ..rows import Row, append_rows, grouped, latest_rows, machine_columns
from .own import OwnRun
from .plan import CANDIDATES, KEPT, RECIPES, VARIANTS, Candidate, Run
from .tasks import Shift

RUN_COLUMNS = ("task", "method", "phase", "seed", "setting")
_WHOLE_TOWERS = ("full", "lora", "coop")  # train through the whole text tower


def run_missing(
    runs: Iterable[Run | OwnRun],
    kind: str,
    execute: Callable[[Any], list[dict[str, Any]]],
    *,
    workers: int = 1,
    save: bool = True,
) -> list[Row]:
    """Execute the runs that have no row on any machine; return the rows that there were, and theirs.

    Args:
        runs: The runs.
        kind: Kind of the rows.
        execute: Function of a run that returns its rows.
        workers: Number of runs beside each other.
        save: Append the rows of a run to the file of this machine when it ends.
    """
    rows = latest_rows(kind)
    done = {tuple(row[column] for column in RUN_COLUMNS) for row in rows}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        left = [pool.submit(_recorded, execute, run) for run in runs if (*run.columns.values(),) not in done]
        try:
            for finished in track(as_completed(left), kind, len(left)):
                found = finished.result()
                if save:
                    append_rows(found, kind)
                else:
                    print(*found, sep="\n")
                rows += [{column: str(value) for column, value in row.items()} for row in found]
        finally:
            pool.shutdown(cancel_futures=True)  # after an error no further run begins
    return rows


def _recorded(execute: Callable[[Any], list[dict[str, Any]]], run: Run | OwnRun) -> list[dict[str, Any]]:
    """Execute a run; its rows get the columns of the machine here, in the process that has their number of threads."""
    rows = execute(run)
    machine = machine_columns(measure.CPU)
    return [machine | row for row in rows]


def best(rows: Sequence[Row], method: str) -> Candidate:
    """The setting of a method with the best mean of base and new over the seeds of the search.

    The harmonic mean would follow the noise of new classes where they are near chance.
    """
    candidates = CANDIDATES[method]
    if len(candidates) == 1:
        return candidates[0]
    where = {"phase": "search", "method": method, "blended": "0"}
    searched = grouped((row for row in rows if where.items() <= row.items() and not row.get("head")), "setting")

    def mean(candidate: Candidate) -> float:
        return statistics.fmean(float(row["base"]) + float(row["new"]) for row in searched[candidate.name,])

    return max(candidates, key=mean)


def reported(
    shift: Shift, seed: int, rows: Sequence[Row], methods: Collection[str], *, skip_slow: bool = True, **files: Any
) -> Iterator[Run]:
    """The reported runs of a task with a seed, with the best settings in `rows`, and `files` as fields of a `Run`.

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
            yield Run(shift, name, variant, best(rows, variant.method), "report", seed, **files)
