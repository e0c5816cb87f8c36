"""Options of the microbenchmarks, and the columns of the machine in pytest-benchmark's files."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure
from bench.rows import RESULTS, machine_columns, slug


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", type=torch.device, default=measure.default_device(), help="default: a GPU, if any")
    parser.addoption("--shapes", type=int, help="only this many shapes of each operator")
    parser.addoption("--minutes", type=float, default=math.inf, help="skip what has not begun after this time")
    parser.addoption("--rows", type=Path, help="append a line of JSON to this file after each time")
    parser.addoption("--no-save", action="store_true", help="write no file, also with --benchmark-autosave")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    measure.keep_freed_memory()
    config.option.deadline = time.monotonic() + 60 * config.option.minutes
    if config.option.benchmark_storage == "file://./.benchmarks":  # its default
        folder = RESULTS / slug(machine_columns(config.option.device)["device"]) / "operators"
        config.option.benchmark_storage = f"file://{folder}"
    if config.option.no_save:
        config.option.benchmark_autosave = False


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """The columns of every row, in place of the host name and the like."""
    # Without the commit: a comparison of two commits would warn that the machine is another.
    return {name: value for name, value in machine_columns(config.option.device).items() if name != "commit"}


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {"commit": machine_columns(config.option.device)["commit"]}
