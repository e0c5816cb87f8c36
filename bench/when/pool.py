"""Processes of one thread each, and a progress bar."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn


def new_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that import torch anew and use one thread each."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def run_all(
    pool: ProcessPoolExecutor, title: str, work: Callable[[Any], Any], items: Sequence[Any], add: Callable[[Any], None]
) -> None:
    """Do the work on all items, and add each result when it is there."""
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(title, total=len(items))
        for done in as_completed([pool.submit(work, item) for item in items]):
            add(done.result())
            progress.advance(bar)
