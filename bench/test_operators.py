"""Run the first shape of each operator under pytest-benchmark: pytest bench/ --benchmark-only -k add_layer_norm

Uses a GPU if there is one. A wrong result of ours fails; an implementation that is wrong or cannot run here is skipped
with the reason. Rows in bench/results come from `python -m bench.run`, where the implementations run in turn.
"""

from __future__ import annotations

import functools

import pytest

from skipkernels.ops import OPERATORS

from . import measure, run
from .operators import OURS

DEVICE = run.default_device()


@functools.lru_cache(maxsize=1)
def gate_of(op: str, dtype: str) -> run.Gate:
    """The first case and its check, cached for its implementations."""
    return run.Gate(next(run.cases_of(op, [dtype], DEVICE))[1], run.DTYPES[dtype], DEVICE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Building the cases of all operators takes half a minute: only of those that -k names, if it names any.
    named = [op for op in OPERATORS if op in metafunc.config.getoption("keyword")]
    found = [
        pytest.param(op, dtype, name, id=f"{op}-{case.shape}-{dtype}-{name.replace(' ', '-')}")
        for op in named or OPERATORS
        for dtype, case in (next(run.cases_of(op, [dtype], DEVICE)) for dtype in ("fp32", "bf16"))
        for name in (*case.runs, *case.absent)
    ]
    metafunc.parametrize("op, dtype, implementation", found)


def test_operator(benchmark, op: str, dtype: str, implementation: str) -> None:
    gate = gate_of(op, dtype)
    case = gate.case
    if reason := case.absent.get(implementation) or gate.error_of(implementation):
        (pytest.fail if implementation == OURS else pytest.skip)(f"{implementation}: {reason}")

    def call() -> None:
        case.runs[implementation]()
        measure.synchronize(DEVICE)

    benchmark.group = f"{op} {case.shape} {dtype}"
    benchmark.extra_info |= measure.machine(DEVICE) | {"bytes": case.moved, "flops": case.flops}
    benchmark(call)
