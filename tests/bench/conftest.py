"""An empty folder of rows, fixed limits of the machine, and workers that are threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import measure
from skipkernels import testing


@pytest.fixture
def results(monkeypatch, tmp_path) -> Path:
    """Folder for rows, in place of bench/results."""
    monkeypatch.setattr("bench.rows.RESULTS", tmp_path)
    return tmp_path


@pytest.fixture
def machine(monkeypatch) -> None:
    """A machine of 1e11 operations and 1e10 bytes a second, on which memory is not measured, which is slow."""
    monkeypatch.setattr(testing, "peak_bytes", lambda function, device, **_: 0)
    monkeypatch.setattr(measure, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(measure, "bandwidth", lambda device: 1e10)


@pytest.fixture
def threads_for_workers(monkeypatch) -> None:
    """Runs of `bench.when` in threads: a process imports PyTorch. A thread has its own number of threads as well."""
    monkeypatch.setattr("bench.when.pool.ProcessPoolExecutor", lambda n, _, *start: ThreadPoolExecutor(n, "", *start))
