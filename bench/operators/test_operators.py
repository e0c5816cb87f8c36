"""Microbenchmarks: check each operator, eager PyTorch and peers, then time them with pytest-benchmark.

    pytest bench/operators -k "add_layer_norm and bf16 and not compiled" --benchmark-max-time=3
    pytest bench/operators --minutes=9 --save bench/results      # append rows to bench/results/DEVICE/operators.csv
    pytest bench/operators --benchmark-autosave                  # in .benchmarks; --benchmark-compare reads it

A result of ours is wrong, and the test fails, if its error against the reference in fp64 exceeds eager's by more than
the slack of the tests. Others that are wrong get no time (xfail); those that cannot run here are skipped with the
reason. The implementations of a case run one after the other, the first shapes of all operators first; --minutes skips
the last ones.

On a GPU they run in turn, as CUDA graphs (`replays`), torch.compile last, in turn with itself. pytest-benchmark is not
used there: rows are printed at the end.

With `--save` each row is appended as soon as it is measured. Its `faster` is the median over ours, which comes first.
`of_ceiling` is the least time by the measured limits of the machine (`bench.measure`) over the measured time; it is
above 1 if the inputs were in a CPU cache.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench import measure
from bench.measure import DTYPES, OURS
from bench.operators import COMPILED, Case
from bench.operators.gate import Gate
from bench.operators.record import cases_of
from bench.operators.replays import Times, time_replays
from bench.rows import PRECISIONS, append_rows, machine_columns
from skipkernels import testing
from skipkernels.ops import OPERATORS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option, found = metafunc.config.option, []
    on_gpu = option.device.type == "cuda"
    for op, dtype in itertools.product(OPERATORS, PRECISIONS):
        for number, case in enumerate(cases_of(op, dtype, option.device)):
            group = pytest.mark.benchmark(group=f"{op} {case.shape} {dtype}")
            for name in (*case.runs, *case.absent):
                last = on_gpu and name == COMPILED  # all the rest takes less time than torch.compile
                found.append((last, number, pytest.param(op, dtype, case.shape, name, marks=group)))
    found.sort(key=lambda each: each[:2])
    metafunc.parametrize("op, dtype, shape, implementation", [case for *_, case in found])


@functools.lru_cache(maxsize=1)  # the implementations of a case follow each other
def prepared(op: str, dtype: str, shape: str, device: torch.device) -> tuple[Case, Gate]:
    """A case and its gate."""
    case = next(case for case in cases_of(op, dtype, device) if case.shape == shape)
    return case, Gate(case, DTYPES[dtype], device)


@functools.lru_cache(maxsize=1)
def replayed(op: str, dtype: str, shape: str, device: torch.device, compiled: bool) -> Times:
    """Times of the correct implementations of a case on a GPU, of torch.compile alone or of the others."""
    case, gate = prepared(op, dtype, shape, device)
    names = [name for name in case.runs if (name == COMPILED) == compiled and not gate.error_of(name)]
    return time_replays(case, names, device)


def test_operator(request: pytest.FixtureRequest, op: str, dtype: str, shape: str, implementation: str) -> None:
    option = request.config.option
    if time.monotonic() > option.deadline:
        pytest.skip("left out: no time left")
    case, gate = prepared(op, dtype, shape, option.device)
    if implementation in case.absent:
        pytest.skip(case.absent[implementation])
    without_time = pytest.fail if implementation == OURS else pytest.xfail
    if wrong := gate.error_of(implementation):
        without_time(wrong)
    case.prepare()
    run = case.runs[implementation]
    if option.device.type == "cuda":
        try:
            seconds = replayed(op, dtype, shape, option.device, implementation == COMPILED)[implementation]
        except torch.AcceleratorError as error:  # no later kernel of this process would run
            pytest.exit(f"{op} {shape} {dtype}, {implementation}: {error}", 3)
        if isinstance(seconds, str):
            without_time(seconds)
    else:
        benchmark = request.getfixturevalue("benchmark")
        benchmark(run)
        if not benchmark.stats:  # with --benchmark-disable
            return
        seconds = benchmark.stats.stats.data
    row = {"op": op, "shape": shape, "dtype": dtype, "implementation": implementation}
    peak = testing.peak_bytes(run, option.device)
    row |= columns(case, implementation, seconds, peak, DTYPES[dtype], option.device)
    row["faster"] = speed_up(row, option.measured)
    option.measured.append(row)
    if option.save is not None:
        append_rows([machine_columns(option.device) | row], "operators", option.save)


def speed_up(row: dict[str, Any], measured: Sequence[dict[str, Any]]) -> float | str:
    """The median of a row over that of ours in the same case, or "" where ours has none."""
    ours = row | {"implementation": OURS}
    case = ("op", "shape", "dtype", "implementation")
    medians = [each["p50_ms"] for each in measured if all(each[name] == ours[name] for name in case)]
    return round(row["p50_ms"] / medians[0], 3) if medians else ""


def columns(
    case: Case, implementation: str, seconds: list[float], peak: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Measurements, in the columns of a row."""
    least = measure.floor(case.work.flops, dtype, case.work.moved, device)
    return measure.milliseconds(seconds, 4) | {
        "peak_mib": round(peak / 2**20, 1),
        "of_ceiling": round(least / measure.quantile(seconds, 0.5), 4),
        "note": case.versions.get(implementation, ""),
    }
