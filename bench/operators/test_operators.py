"""Microbenchmarks: check each operator, eager PyTorch and peers, then time them with pytest-benchmark.

    pytest bench/operators -k "add_layer_norm and bf16 and not compiled" --benchmark-max-time=3
    pytest bench/operators --minutes=9 --benchmark-autosave      # a file in bench/results/DEVICE/operators
    pytest bench/operators --benchmark-compare                   # with the last file

A result of ours is wrong, and the test fails, if its error against the reference in fp64 exceeds eager's by more than
the slack of the tests. Others that are wrong get no time (xfail); those that cannot run here are skipped with the
reason. The implementations of a case run one after the other, the first shapes of all operators first; --minutes skips
the last ones. On a GPU torch.compile comes last, and the times are those of `triton.testing.do_bench_cudagraph`.

`extra_info` has the further columns of a row (`bench.rows`). `of_ceiling` is the least time by the measured limits of
the machine (bench.measure) over the measured time; it is above 1 if the inputs were in a CPU cache.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import measure
from bench.operators import COMPILED, DTYPES, OURS, Case, cases_of
from bench.operators.gate import Gate
from skipkernels import testing
from skipkernels.ops import OPERATORS

TIMED = ("fp32", "bf16")
ROTATED_BYTES, MOST_COPIES = 256 << 20, 8  # on a GPU: copies of the inputs, together larger than the L2 cache


class ReplayClock:
    """The timer of pytest-benchmark on a GPU: each call of `advance` adds one of the times of replayed CUDA graphs."""

    def __init__(self) -> None:
        self.seconds, self.times = 0.0, iter([0.0])

    def __call__(self) -> float:
        return self.seconds

    def measure(self, run: Callable[[], Any]) -> int:
        """Measure a function; returns the number of times."""
        import triton.testing

        times = triton.testing.do_bench_cudagraph(run, return_mode="all")
        self.times = iter(times)
        return len(times)

    def advance(self) -> None:
        self.seconds += next(self.times) / 1000


CLOCK = ReplayClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option, found = metafunc.config.option, []
    timer = {"timer": CLOCK} if option.device.type == "cuda" else {}
    for op, dtype in itertools.product(OPERATORS, TIMED):
        for number, case in enumerate(itertools.islice(cases_of(op, dtype, option.device), option.shapes)):
            group = pytest.mark.benchmark(group=f"{op} {case.shape} {dtype}", **timer)
            for name in (*case.runs, *case.absent):
                last = bool(timer) and name == COMPILED  # on a GPU all the rest takes less time than torch.compile
                found.append((last, number, pytest.param(op, dtype, case.shape, name, marks=group)))
    found.sort(key=lambda each: each[:2])
    metafunc.parametrize("op, dtype, shape, implementation", [case for *_, case in found])


@functools.lru_cache(maxsize=1)  # the implementations of a case follow each other
def prepared(op: str, dtype: str, shape: str, device: torch.device) -> tuple[list[Case], Gate]:
    """A case, on a GPU with copies, and its gate."""

    def new() -> Case:
        return next(case for case in cases_of(op, dtype, device) if case.shape == shape)

    cases = [new()]
    if device.type == "cuda":
        cases += [new() for _ in range(min(MOST_COPIES - 1, ROTATED_BYTES // cases[0].moved))]
    return cases, Gate(cases[0], DTYPES[dtype], device)


def test_operator(
    benchmark: Any, pytestconfig: pytest.Config, op: str, dtype: str, shape: str, implementation: str
) -> None:
    device = pytestconfig.option.device
    if time.monotonic() > pytestconfig.option.deadline:
        pytest.skip("left out: no time left")
    (case, *copies), gate = prepared(op, dtype, shape, device)
    if implementation in case.absent:
        pytest.skip(case.absent[implementation])
    without_time = pytest.fail if implementation == OURS else pytest.xfail
    if wrong := gate.error_of(implementation):
        without_time(wrong)
    case.prepare()
    run = case.runs[implementation]
    if device.type == "cuda":
        turns = itertools.cycle([run, *(copy.runs[implementation] for copy in copies)])
        try:
            rounds = CLOCK.measure(lambda: next(turns)())
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            without_time(f"no CUDA graph: {str(error).splitlines()[0]}")
        benchmark.pedantic(CLOCK.advance, rounds=rounds)
    else:
        benchmark(run)
    if benchmark.stats:  # None with --benchmark-disable
        peak = testing.peak_bytes(run, device)
        benchmark.extra_info |= columns(case, implementation, benchmark.stats.stats.data, peak, DTYPES[dtype], device)


def columns(
    case: Case, implementation: str, seconds: list[float], peak: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The columns of a row that pytest-benchmark does not have."""
    median = measure.quantile(seconds, 0.5)
    least = case.moved / measure.bandwidth(device)
    if case.flops:
        least = max(least, case.flops / measure.matrix_rate(device, dtype))
    return measure.milliseconds(seconds, 4) | {
        "wanted": case.target if implementation == "eager" else "",
        "peak_mib": round(peak / 2**20, 1),
        "gbytes_s": round(case.moved / median / 1e9, 3),
        "gflops_s": round(case.flops / median / 1e9, 2) if case.flops else "",
        "of_ceiling": round(least / median, 4),
        "note": case.versions.get(implementation, ""),
    }
