"""Counts the kernels that Triton would compile for the launches of the tests, also where the interpreter runs them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from skipkernels.ops import launching

# Of the tests on the interpreter, in two dtypes; 991 were counted. Each is about a second of compilation: if a test
# needs many more, give it fewer classes of sizes.
MOST = 1050

found: set[str] = set()


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Add the specialisation of each launch to `found`."""
    run = launching._run

    def record(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], arguments: dict[str, Any]) -> None:
        found.add(key_of(kernel, options, arguments))
        run(kernel, grid, options, arguments)

    launching._run = record
    try:
        yield
    finally:
        launching._run = run


def key_of(kernel: Any, options: dict[str, Any], arguments: dict[str, Any]) -> str:
    """The key of a compiled kernel: constants, dtypes, integers of 1, divisibility by 16, and options."""
    annotations = inspect.get_annotations(kernel.fn)
    kinds = {name: kind_of(x, "constexpr" in str(annotations.get(name, ""))) for name, x in arguments.items()}
    return f"{kernel.fn.__name__} {kinds} {options}"


def kind_of(x: Any, constant: bool) -> str:
    """The class of an argument that Triton distinguishes."""
    if constant or x is None or isinstance(x, (bool, str)):
        return repr(x)
    if isinstance(x, torch.Tensor):
        return f"{x.dtype} {x.data_ptr() % 16 == 0}"
    if isinstance(x, int):
        return "1" if x == 1 else f"{'i32' if abs(x) < 2**31 else 'i64'} {x % 16 == 0}"
    return type(x).__name__


# ---- pytest ----------------------------------------------------------------------------------------------------------


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what a worker of pytest-xdist found to the main process; fail there if it is too much."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["specialisations"] = sorted(found)
    elif len(found) > MOST and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    found.update(getattr(node, "workeroutput", {}).get("specialisations", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if found:
        terminalreporter.write_line(f"{len(found)} specialisations of Triton kernels; at most {MOST} are allowed")
