"""Microbenchmarks: check each operator, eager PyTorch and peers, then time them with pytest-benchmark.

    pytest bench/operators -k "add_layer_norm and bf16 and not compiled" --benchmark-max-time=3
    pytest bench/operators --minutes=9 --save bench/results      # append rows to bench/results/DEVICE/operators.csv
    pytest bench/operators --benchmark-autosave                  # in .benchmarks; --benchmark-compare reads it

A result of ours is wrong, and the test fails, if its error against the reference in fp64 exceeds eager's by more than
the slack of the tests. Others that are wrong get no time (xfail); those that cannot run here are skipped with the
reason. The implementations of a case run one after the other, the first shapes of all operators first; --minutes skips
the last ones.

On a GPU they run in turn, as CUDA graphs of up to CALLS calls, since the time between two events is several
microseconds longer than one small kernel. The calls of a graph have different inputs, or more bytes of them than twice
the L2 cache, which is flushed before each replay: no call finds its inputs there. torch.compile comes last, in turn
with itself.

With `--save` each row is appended as soon as it is measured. Its `faster` is the median over ours, which comes first.
`of_ceiling` is the least time by the measured limits of the machine (`bench.measure`) over the measured time; it is
above 1 if the inputs were in a CPU cache.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bench import measure
from bench.measure import DTYPES, OURS
from bench.operators import COMPILED, Case, Run
from bench.operators.gate import Gate
from bench.operators.record import cases_of
from bench.rows import PRECISIONS, append_rows, machine_columns
from skipkernels import testing
from skipkernels.ops import OPERATORS

CALLS, GRAPH_SECONDS = 20, 0.01  # of a graph: at most
ROUNDS, CASE_SECONDS = 50, 0.2  # of each implementation: at most, but at least FEWEST rounds
FEWEST = 5


class ReplayClock:
    """The timer of pytest-benchmark on a GPU: each call of `advance` adds one of the times of replayed CUDA graphs."""

    def __init__(self) -> None:
        self.seconds, self.times = 0.0, iter([0.0])

    def __call__(self) -> float:
        return self.seconds

    def advance(self) -> None:
        self.seconds += next(self.times)


CLOCK = ReplayClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option, found = metafunc.config.option, []
    timer = {"timer": CLOCK} if option.device.type == "cuda" else {}
    for op, dtype in itertools.product(OPERATORS, PRECISIONS):
        for number, case in enumerate(itertools.islice(cases_of(op, dtype, option.device), option.shapes)):
            group = pytest.mark.benchmark(group=f"{op} {case.shape} {dtype}", **timer)
            for name in (*case.runs, *case.absent):
                last = bool(timer) and name == COMPILED  # on a GPU all the rest takes less time than torch.compile
                found.append((last, number, pytest.param(op, dtype, case.shape, name, marks=group)))
    found.sort(key=lambda each: each[:2])
    metafunc.parametrize("op, dtype, shape, implementation", [case for *_, case in found])


@functools.lru_cache(maxsize=1)  # the implementations of a case follow each other
def prepared(op: str, dtype: str, shape: str, device: torch.device) -> tuple[Case, Gate]:
    """A case and its gate."""
    case = next(case for case in cases_of(op, dtype, device) if case.shape == shape)
    return case, Gate(case, DTYPES[dtype], device)


Times = dict[str, list[float] | str]


@functools.lru_cache(maxsize=1)
def replayed(op: str, dtype: str, shape: str, device: torch.device, compiled: bool) -> Times:
    """Times of the correct implementations of a case on a GPU, of torch.compile alone or of the others."""
    case, gate = prepared(op, dtype, shape, device)
    names = [name for name in case.runs if (name == COMPILED) == compiled and not gate.error_of(name)]
    return in_turn(case, names, device)


def in_turn(case: Case, names: Sequence[str], device: torch.device) -> Times:
    """Seconds of a call of each implementation in each round, or the reason why it cannot be captured."""
    cache = torch.empty(2 * l2_bytes(device), dtype=torch.uint8, device=device)
    inputs = min(CALLS, -(-len(cache) // case.work.moved))
    copies = [case.copy() for _ in range(inputs - 1)] if case.copy else []
    runs = {name: [case.runs[name], *(copy[name] for copy in copies)] for name in names}
    for of_name in runs.values():
        of_name[0]()  # an in-place operator copies its inputs in the first call
    slowest = max((measure.seconds_of(of_name[0], device) for of_name in runs.values()), default=GRAPH_SECONDS)
    calls = min(CALLS, max(1, int(GRAPH_SECONDS / slowest)))
    rounds = min(ROUNDS, max(FEWEST, int(CASE_SECONDS / (calls * slowest))))
    replays: dict[str, Callable[[], None]] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            replays[name] = captured(runs[name], calls, device)
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            failed[name] = f"no CUDA graph: {str(error).splitlines()[0]}"
    times = measure.time_alternately(replays, rounds, device, before=cache.zero_)
    return {**failed, **{name: [each / calls for each in seconds] for name, seconds in times.items()}}


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def captured(runs: Sequence[Run], calls: int, device: torch.device) -> Callable[[], None]:
    """The replay of a CUDA graph of `calls` calls, of each run in turn."""
    stream = torch.cuda.Stream(device)  # backward must be captured on the stream of its warm-up
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in itertools.islice(itertools.cycle(runs), calls):
            run()
    return graph.replay


def test_operator(
    benchmark: Any, pytestconfig: pytest.Config, op: str, dtype: str, shape: str, implementation: str
) -> None:
    device = pytestconfig.option.device
    if time.monotonic() > pytestconfig.option.deadline:
        pytest.skip("left out: no time left")
    case, gate = prepared(op, dtype, shape, device)
    if implementation in case.absent:
        pytest.skip(case.absent[implementation])
    without_time = pytest.fail if implementation == OURS else pytest.xfail
    if wrong := gate.error_of(implementation):
        without_time(wrong)
    case.prepare()
    run = case.runs[implementation]
    if device.type == "cuda":
        try:
            times = replayed(op, dtype, shape, device, implementation == COMPILED)[implementation]
        except torch.AcceleratorError as error:  # no later kernel of this process would run
            pytest.exit(f"{benchmark.group}, {implementation}: {error}", 3)
        if isinstance(times, str):
            without_time(times)
        CLOCK.times = iter(times)
        benchmark.pedantic(CLOCK.advance, rounds=len(times))
    else:
        benchmark(run)
    if benchmark.stats:  # None with --benchmark-disable
        row = {"op": op, "shape": shape, "dtype": dtype, "implementation": implementation}
        peak = testing.peak_bytes(run, device)
        row |= columns(case, implementation, benchmark.stats.stats.data, peak, DTYPES[dtype], device)
        row["faster"] = speed_up(row, pytestconfig.option.measured)
        pytestconfig.option.measured.append(row)
        if (folder := pytestconfig.option.save) is not None:
            append_rows([machine_columns(device) | row], "operators", folder)


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
    median = measure.quantile(seconds, 0.5)
    least = measure.floor(case.work.flops, dtype, case.work.moved, device)
    return measure.milliseconds(seconds, 4) | {
        "wanted": case.work.target if implementation == "eager" else "",
        "peak_mib": round(peak / 2**20, 1),
        "gbytes_s": round(case.work.moved / median / 1e9, 3),
        "gflops_s": round(case.work.flops / median / 1e9, 2) if case.work.flops else "",
        "of_ceiling": round(least / median, 4),
        "note": case.versions.get(implementation, ""),
    }
