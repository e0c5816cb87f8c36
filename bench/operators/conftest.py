"""Options of the microbenchmarks, and what is printed at the end: rows on a GPU, and which of ours are slower."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch

from bench import measure, tables


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", type=torch.device, default=measure.default_device(), help="default: a GPU, if any")
    parser.addoption("--minutes", type=float, default=math.inf, help="skip what has not begun after this time")
    parser.addoption("--save", type=Path, metavar="FOLDER", help="append rows to FOLDER/DEVICE/operators.csv")


def pytest_configure(config: pytest.Config) -> None:
    measure.keep_freed_memory()
    config.option.deadline = time.monotonic() + 60 * config.option.minutes
    config.option.measured = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    option = terminalreporter.config.option
    if option.measured and option.device.type == "cuda":  # on a CPU pytest-benchmark has a table
        tables.show(list(option.measured[0]), [row.values() for row in option.measured])
    compared = [row for row in option.measured if row["faster"] != ""]
    case = ("op", "shape", "dtype", "implementation")
    slower = [" ".join(row[column] for column in case) for row in compared if row["faster"] < 1]
    if compared:
        text = f"another implementation is faster in {len(slower)} of {len(compared)} comparisons"
        terminalreporter.write_line(f"result: {'; '.join([text, *slower])}")
