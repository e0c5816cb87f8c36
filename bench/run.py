"""Microbenchmarks: time each operator against eager PyTorch and peers, in one run.

    python -m bench.run --op add_layer_norm --dtype fp32 bf16
    python -m bench.run --quick
    python -m bench.run --budget 9m

Results are checked first: an error against the reference in fp64 that exceeds eager's by more than the slack of the
tests is reported in place of a time. Ratios are medians over rounds in which the implementations run in turn.
`of_ceiling` is the least time by the measured limits of the machine (bench.ceilings) over the measured time; it is
above 1 if the inputs were in a CPU cache. Peers that cannot run here are listed with the reason (bench.peers).

--quick takes the first shape of each operator, short rounds and no torch.compile, since compilation takes longest. With
--budget each operator gets an equal part of the remaining time, its shapes in order; skipped cases are printed at the
end. Rows are appended to bench/results/DEVICE/operators.csv after each case.

The process keeps freed memory, as with jemalloc; --system-malloc turns that off. The exit status is 1 if a result of
ours is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from skipkernels import testing
from skipkernels.ops import OPERATORS
from skipkernels.testing import SLACK, relative_error

from . import ceilings, measure, tables
from .budget import Budget, add_budget
from .operators import COMPILED, OURS, Case, Run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURED = ("p20_ms", "p50_ms", "p80_ms", "faster", "wanted", "peak_mib", "gbytes_s", "gflops_s", "of_ceiling")
SECONDS, QUICK_SECONDS = 3.0, 0.5
MOST_ROUNDS = 2000
MOST_ERROR = 0.25  # of eager; its error is the bound for the others; in bf16 it is up to 0.06


def main(arguments: list[str] | None = None) -> None:
    parser = measure.command(__doc__)
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=OPERATORS, help="which operators; all by default")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument(
        "--device", type=torch.device, default=measure.default_device(), help="default: a GPU if there is one"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, help=f"for each case, about: {SECONDS}, or {QUICK_SECONDS} if quick")
    parser.add_argument("--quick", action="store_true", help="one shape of each operator, without torch.compile")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="implementations to leave out")
    parser.add_argument("--system-malloc", action="store_true", help="return freed memory to the system")
    add_budget(parser)
    args = parser.parse_args(arguments)
    if "eager" in args.without:
        parser.error("--without eager: everyone's results are measured against eager's")
    torch.set_num_threads(args.threads)
    if not args.system_malloc:
        measure.keep_freed_memory()

    seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    without = dict.fromkeys(args.without, "left out with --without")
    if args.quick:
        without[COMPILED] = "left out with --quick: it compiles for longer than all the rest takes"
    print(", ".join(str(value) for value in measure.machine(args.device).values()))
    print(ceilings_of(args.device, args.dtype))
    ends: list[str] = []
    for number, op in enumerate(args.op):
        ends += operator(op, args, without, seconds, Budget(args.budget.left / (len(args.op) - number)))
    print("\n".join(ends))
    if any(line.startswith(OURS) for line in ends):
        sys.exit(1)


def operator(op: str, args: argparse.Namespace, without: dict[str, str], seconds: float, budget: Budget) -> list[str]:
    """Time the cases of an operator in order while the budget allows; append the rows after each case.

    Returns lines to print at the end: skipped cases, and wrong results of ours.
    """
    lines: list[list[str]] = []
    ends: list[str] = []
    notes: dict[str, None] = {}  # without duplicates, in order
    expected = seconds  # of the first case; later ones take as long as the one before
    count = len(args.dtype) if args.quick else None
    for dtype, case in itertools.islice(cases_of(op, args.dtype, args.device), count):
        if not budget.allows(expected):
            ends.append(f"no time was left for {op}, from {case.shape} in {dtype} on")
            break
        start = time.monotonic()
        rows = rows_of(leaving_out(case, without), DTYPES[dtype], args.device, seconds)
        expected = time.monotonic() - start
        measure.save(args, [{"op": op, "shape": case.shape, "dtype": dtype} | row for row in rows], "operators")
        for row in rows:
            name, note = row["implementation"], row["note"]
            if row["p50_ms"]:
                lines.append([case.shape, dtype, name, *(row[column] for column in MEASURED)])
            elif name in case.runs and name not in without:
                name += f", {case.shape} in {dtype}"  # wrong for this case only
                if row["implementation"] == OURS:
                    ends.append(f"{OURS} is wrong: {op}, {case.shape} in {dtype}: {note}")
            if note:
                notes[f"    {name}: {note}"] = None
    title = f"{op}: forward and backward, {args.device}, {args.threads} threads"
    tables.show(["shape", "dtype", "implementation", *MEASURED], lines, title)
    print("\n".join(notes))
    return ends


def cases_of(op: str, dtypes: list[str], device: torch.device) -> Iterator[tuple[str, Case]]:
    """Cases in the order shape, dtype, so that a budget cuts off the same shapes for all dtypes."""
    cases = importlib.import_module(f"bench.operators.{op.rstrip('_')}").cases
    streams = {name: cases(DTYPES[name], device) for name in dtypes}
    while True:
        for name, stream in streams.items():
            case = next(stream, None)
            if case is None:
                return
            yield name, case


def leaving_out(case: Case, reasons: dict[str, str]) -> Case:
    """The case without some implementations, which are listed with the reason."""
    return case._replace(
        runs={name: run for name, run in case.runs.items() if name not in reasons},
        absent=case.absent | {name: reasons[name] for name in case.runs if name in reasons},
    )


def rows_of(case: Case, dtype: torch.dtype, device: torch.device, seconds: float) -> list[dict[str, str]]:
    """A row per implementation: times, our speed-up, memory and rates, or a note with the reason why there is no time.

    The note of a timed peer is its version.
    """
    gate = Gate(case, dtype, device)
    wrong = {name: reason for name in case.runs if (reason := gate.error_of(name))}
    del gate  # and the reference
    case.prepare()
    runs = {name: run for name, run in case.runs.items() if name not in wrong}
    times = timed(runs, seconds, device)
    rows = []
    for name in (*case.runs, *case.absent):
        note = wrong.get(name) or case.absent.get(name) or case.versions.get(name, "")
        row = {"implementation": name} | dict.fromkeys(MEASURED, "") | {"note": note}
        rows.append(row)
        if name not in times:
            continue
        median = measure.quantile(times[name], 0.5)
        row |= {f"p{q}_ms": f"{1000 * measure.quantile(times[name], q / 100):.3f}" for q in (20, 50, 80)}
        if name != OURS and OURS in times:
            row["faster"] = f"{measure.median_ratio(times[name], times[OURS]):.3f}"
            row["wanted"] = case.target if name == "eager" else ""
        row["peak_mib"] = f"{testing.peak_bytes(case.runs[name], device) / 2**20:.1f}"
        row["gbytes_s"] = f"{case.moved / median / 1e9:.3f}"
        row["gflops_s"] = f"{case.flops / median / 1e9:.2f}" if case.flops else ""
        row["of_ceiling"] = f"{least_seconds(case, dtype, device) / median:.4f}"
    return rows


def timed(runs: dict[str, Run], seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each implementation in each round; about `seconds` in total, at least five rounds."""
    once = sum(times[0] for times in measure.time_alternately(runs, 1, device).values())
    return measure.time_alternately(runs, max(5, min(int(seconds / once), MOST_ROUNDS)), device) if runs else {}


def least_seconds(case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """The larger of the times for the bytes and for the products at the measured limits of the machine."""
    moving = case.moved / ceilings.bandwidth(device)
    return max(moving, case.flops / ceilings.matrix_rate(device, dtype)) if case.flops else moving


def ceilings_of(device: torch.device, dtypes: list[str]) -> str:
    rates = [f"{ceilings.matrix_rate(device, DTYPES[name]) / 1e9:.0f} GFLOP/s in {name}" for name in dtypes]
    return f"ceilings of {device}: {ceilings.bandwidth(device) / 1e9:.1f} GB/s, {', '.join(rates)}"


class Gate:
    """Checks results: an error against the reference in fp64 may exceed eager's by the slack of the tests."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device):
        self.case, self.dtype, self.device = case, dtype, device
        case.prepare()
        self.truth = case.truth()
        self.bounds = [0.0] * len(self.truth)
        if not isinstance(results := self._results("eager"), str):
            errors = [_error(value, truth) for value, truth in zip(results, self.truth, strict=True)]
            self.bounds = [error if error <= MOST_ERROR else 0.0 for error in errors]

    def error_of(self, name: str) -> str:
        """The reason why results are wrong or missing, or ""."""
        results = self._results(name)
        if isinstance(results, str):
            return results
        for number, (value, truth, bound) in enumerate(zip(results, self.truth, self.bounds, strict=True)):
            if not value.is_floating_point():
                continue
            # A bf16 implementation may return an fp32 loss. Ten times the slack: this catches wrong results; the tests
            # are exact.
            slack = 10 * max(SLACK[value.dtype], SLACK[self.dtype])
            if not _error(value, truth) <= bound + slack:
                return f"wrong: result {number} is off by {_error(value, truth):.1e}, eager by {bound:.1e}"
        return ""

    def _results(self, name: str) -> list[Tensor] | str:
        self.case.prepare()
        try:
            results = self.case.runs[name]()
            measure.synchronize(self.device)
        except torch.AcceleratorError:  # the device is lost: later results would be meaningless
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            return f"failed: {type(error).__name__}: {lines[0]}"
        return results


def _error(value: Tensor, truth: Tensor) -> float:
    """The error measure of the tests; infinite if shapes or finite positions differ."""
    if value.shape != truth.shape or not torch.equal(value.isfinite(), truth.isfinite()):
        return math.inf
    return relative_error(value, truth)


if __name__ == "__main__":
    main()
