"""Microbenchmarks: each operator against what a user would write, in one run.

    python -m bench.run --op add_layer_norm --dtype fp32 bf16

Before anything is timed its results are checked: an error above eager's own (against the reference in fp64) by more
than the tests' slack is reported in the place of a time. Ratios are medians over rounds in which everyone runs in turn,
a plain copy of as many bytes among them. The process keeps the memory it frees, as one with jemalloc does;
--system-malloc leaves that to the system. Rows go to bench/results/DEVICE/operators.csv.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from skipkernels.ops import OPERATORS
from tests.tolerances import SLACK, relative_error

from . import measure
from .operators import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=OPERATORS, help="which operators; all by default")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case, about")
    parser.add_argument("--system-malloc", action="store_true", help="freed memory goes back to the system")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.system_malloc:
        measure.keep_freed_memory()

    console = Console()
    console.width = max(console.width, 130)  # a cut figure is none, also in a file
    for op in args.op:
        cases = importlib.import_module(f"bench.operators.{op.rstrip('_')}").cases
        table = Table("shape", "dtype", "who", "p20 ms", "p50 ms", "p80 ms", "faster", "wanted", "peak MiB", "of copy")
        for column in table.columns:
            column.no_wrap = column.header != "wanted"
        table.title = f"{op}: forward and backward, {args.threads} threads"
        rows = []
        for name in args.dtype:
            for case in cases(DTYPES[name]):
                console.print(f"[dim]{op} {case.shape} {name}[/dim]", end="\r", highlight=False)
                for row in rows_of(case, args.seconds):
                    rows.append(measure.machine(CPU) | {"op": op, "shape": case.shape, "dtype": name} | row)
                    table.add_row(case.shape, name, *(str(row[key]) for key in list(row)))
        console.print(table)
        if not args.no_save:
            console.print(f"appended to {measure.append_rows(rows, 'operators')}")


def rows_of(case: Case, seconds: float) -> list[dict[str, Any]]:
    """A row for everyone: times, how many times faster ours is, memory; or why there is no time."""
    wrong = {name: reason for name in case.runs if (reason := error_of(case, name))}
    runs = {name: run for name, run in case.runs.items() if name not in wrong}
    runs |= {"copy": measure.copying(case.moved)}
    once = sum(times[0] for times in measure.time_alternately(runs, 1, CPU).values())
    times = measure.time_alternately(runs, max(5, min(int(seconds / once), 2000)), CPU)
    rows = []
    for name in case.runs:
        row: dict[str, Any] = dict.fromkeys(("who", "p20_ms", "p50_ms", "p80_ms", "faster", "wanted", "peak_mib"), "")
        row |= {"who": name, "of_copy": ""}
        if name in wrong:
            rows.append(row | {"wanted": wrong[name]})
            continue
        for q in (20, 50, 80):
            row[f"p{q}_ms"] = f"{1000 * measure.quantile(times[name], q / 100):.3f}"
        if name != "skipkernels" and "skipkernels" in runs:
            row["faster"] = f"{measure.median_ratio(times[name], times['skipkernels']):.2f}"
            row["wanted"] = case.target if name == "eager" else ""
        row["peak_mib"] = f"{measure.peak_bytes(case.runs[name]) / 2**20:.1f}"
        row["of_copy"] = f"{measure.quantile(times['copy'], 0.5) / measure.quantile(times[name], 0.5):.2f}"
        rows.append(row)
    for name, reason in case.absent.items():
        rows.append(dict.fromkeys(rows[0], "") | {"who": name, "wanted": reason})
    return rows


def error_of(case: Case, name: str) -> str:
    """Why the results are wrong, or nothing."""
    case.prepare()
    results = zip(case.runs[name](), case.truth(), case.runs["eager"](), strict=True)
    for number, (value, truth, eager) in enumerate(results):
        if not value.is_floating_point():
            continue
        error, bound = relative_error(value, truth), relative_error(eager, truth)
        if not error <= bound + SLACK[value.dtype] * 10:  # ten: the gate catches wrong results; the tests are exact
            return f"wrong: result {number} is off by {error:.1e}, eager by {bound:.1e}"
    return ""


if __name__ == "__main__":
    main()
