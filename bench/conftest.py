"""Options of bench/test_operators.py."""

from __future__ import annotations

import pytest

from skipkernels.ops import OPERATORS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--op", action="append", choices=OPERATORS, help="which operator; may be given again")
    parser.addoption("--all-shapes", action="store_true", help="every shape of the operators, not the first alone")
