"""Trainings that are killed at random moments: each leaves a whole checkpoint, and resumes to equal bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import skipkernels as sk
from skipkernels.app.config import TuneConfig
from skipkernels.app.train import checkpoint, tune
from tests.app.runs import results, small

KILLS, SEED = 2, 0
# The least work per checkpoint, so that many kills come while one is written. The best epoch is seldom the last.
SETTINGS: dict[str, Any] = {"epochs": 4, "shots": 1, "max_classes": 4, "validation": 0.5}


def config_of(folder: Path) -> TuneConfig:
    return small(folder, **SETTINGS, resume=True)


def killed(folder: Path, seconds: float) -> bool:
    """Resume a training in a forked process, and kill it after some seconds; returns False if it ended before."""
    child = os.fork()  # with torch and the packages loaded
    if child == 0:
        os.close(1)
        os.close(2)
        tune(config_of(folder))
        os._exit(0)
    end = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.001)
    return False


def check_readable(folder: Path) -> None:
    """Check that a killed training can be used: no epoch is complete, or the parts of its checkpoint are of one."""
    saved = checkpoint.load(folder)
    if saved is not None:
        assert saved.training["schedule"]["last_epoch"] == len(saved.rows)
    if saved is not None or (folder / "metrics.json").exists():
        sk.Classifier.load(folder, device="cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A forked process has no other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_killed_training_resumes_to_equal_bits(tmp_path, one_thread):
    whole, draw, began = tmp_path / "whole", random.Random(SEED), time.monotonic()
    assert not killed(whole, 600)
    duration, expected = time.monotonic() - began, results(whole)
    for number in range(KILLS):
        folder = tmp_path / f"{number}"
        while not killed(folder, draw.random() * duration):
            assert results(folder) == expected
            shutil.rmtree(folder)
        check_readable(folder)
        tune(config_of(folder))
        assert results(folder) == expected
        assert not [*folder.glob(".checkpoint*"), *folder.glob(".*.partial")] and not (folder / "checkpoint").exists()
