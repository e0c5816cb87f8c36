"""Execute the runs that have no row, in processes of one thread each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from rich.progress import track

from .. import measure
from ..rows import Row, append_rows, grouped, latest_rows, machine_columns
from .own import OwnRun
from .plan import Run


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
    done = grouped(rows, "task method phase seed setting")  # the columns of a run
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        left = [pool.submit(_recorded, execute, run) for run in runs if tuple(run.columns.values()) not in done]
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
