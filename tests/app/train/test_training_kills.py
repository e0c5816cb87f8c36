"""Trainings that are killed at random moments: each leaves a whole checkpoint, and resumes to equal bits.

A run of more kills: `python -c "from tests.app.train.test_training_kills import main; main(100)"`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import skipkernels as sk
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.train import checkpoint, tune
from tests.app.runs import results, shortened, small

KILLS, SEED = 2, 0
# The least work per checkpoint, so that many kills come while one is written. The best epoch is seldom the last.
SETTINGS: dict[str, Any] = {"epochs": 4, "shots": 1, "max_classes": 4, "validation": 0.5}


def config_of(folder: Path, **changes: Any) -> TuneConfig:
    return small(folder, **SETTINGS, **changes)


def killed(folder: Path, seconds: float) -> bool:
    """Resume a training in a forked process, and kill it after some seconds; returns False if it ended before."""
    child = os.fork()  # with torch and the packages loaded
    if child == 0:
        os.close(1)
        os.close(2)
        tune(config_of(folder, resume=True))
        os._exit(0)
    end = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.001)
    return False


def state(folder: Path) -> str:
    """State of the folder of a killed training for a reader."""
    try:
        found = checkpoint.load(folder)
        if found is None and not (folder / "metrics.json").exists():
            return "no epoch"
        sk.Classifier.load(folder, device="cpu")
    except (InputError, OSError) as error:
        return f"unreadable: {error}"
    if found is None:
        return "complete"
    return "one epoch" if found.training["schedule"]["last_epoch"] == len(found.rows) else "mixed"


def after_kills(parent: Path, kills: int) -> Iterator[tuple[str, bool]]:
    """State after each kill, and whether the training that is then resumed gives equal bits."""
    whole, draw = parent / "whole", random.Random(SEED)
    began = time.monotonic()
    assert not killed(whole, 600)
    duration, expected = time.monotonic() - began, results(whole)
    for number in range(kills):
        folder = parent / f"{number}"
        while not killed(folder, draw.random() * duration):
            assert results(folder) == expected
            shutil.rmtree(folder)
        found = state(folder)
        tune(config_of(folder, resume=True))
        assert not [*folder.glob(".checkpoint*"), *folder.glob(".*.partial")] and not (folder / "checkpoint").exists()
        yield found, results(folder) == expected


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A forked process has no other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_killed_training_resumes_to_equal_bits(tmp_path, one_thread):
    for found, equal in after_kills(tmp_path, KILLS):
        assert found in ("no epoch", "one epoch", "complete") and equal


def main(kills: int) -> None:
    torch.set_num_threads(1)
    found: Counter[tuple[str, bool]] = Counter()
    with tempfile.TemporaryDirectory() as folder, shortened():
        for number, each in enumerate(after_kills(Path(folder), kills), 1):
            found[each] += 1
            print(number, dict(found), flush=True)  # noqa: T201
