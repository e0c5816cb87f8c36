"""Run the cases of `bench.run` under pytest-benchmark: the first shape of each operator, or all.

    pytest bench/ --benchmark-only
    pytest bench/ --benchmark-only --op add_layer_norm --all-shapes
    pytest bench/ --benchmark-only --benchmark-save=before; pytest bench/ --benchmark-only --benchmark-compare

Uses a GPU if there is one. Results are checked before timing: a wrong result of ours fails; an implementation that is
wrong or cannot run here is skipped with the reason. Each case is a group of the table. Rows in bench/results come from
`python -m bench.run`, where the implementations run in turn.
"""

from __future__ import annotations

import functools
import itertools

import pytest

from skipkernels.ops import OPERATORS

from . import measure, run
from .operators import Case

DEVICE = run.default_device()
TIMED_DTYPES = ("fp32", "bf16")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by case; cases are built again in the test, since together they would fill memory."""
    count = None if metafunc.config.getoption("--all-shapes") else len(TIMED_DTYPES)
    found = []
    for op in metafunc.config.getoption("--op") or OPERATORS:
        for number, (dtype, case) in enumerate(itertools.islice(run.cases_of(op, [*TIMED_DTYPES], DEVICE), count)):
            for implementation in (*case.runs, *case.absent):
                name = f"{op}-{case.shape}-{dtype}-{implementation.replace(' ', '-')}"
                found.append(pytest.param(op, number // len(TIMED_DTYPES), dtype, implementation, id=name))
    metafunc.parametrize("op, number, dtype, implementation", found)


def test_operator(benchmark, op: str, number: int, dtype: str, implementation: str) -> None:
    case, gate = case_and_gate(op, number, dtype)
    if implementation in case.absent:
        pytest.skip(f"{implementation}: {case.absent[implementation]}")
    if reason := gate.error_of(implementation):
        (pytest.fail if implementation == run.OURS else pytest.skip)(f"{implementation}: {reason}")

    def call() -> None:
        case.runs[implementation]()
        measure.synchronize(DEVICE)

    benchmark.group = f"{op} {case.shape} {dtype}"
    benchmark.extra_info |= measure.machine(DEVICE) | {"bytes": case.moved, "flops": case.flops}
    benchmark(call)


@functools.lru_cache(maxsize=1)
def case_and_gate(op: str, number: int, dtype: str) -> tuple[Case, run.Gate]:
    """The case with this number, and its check, cached for its implementations."""
    _, case = next(itertools.islice(run.cases_of(op, [dtype], DEVICE), number, None))
    return case, run.Gate(case, run.DTYPES[dtype], DEVICE)
