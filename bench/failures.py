"""A pytest plugin that prints each failure when it happens: a run that is cut off prints no summary.

pytest -p bench.failures
"""

from __future__ import annotations

import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _print(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _print(report)


def _print(report: pytest.TestReport | pytest.CollectReport) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # the process that collects the reports prints
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext}", flush=True)
