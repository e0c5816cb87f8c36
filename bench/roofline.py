"""Compute the least time of each operator on data-centre GPUs from bytes and products. Nothing is measured.

    python -m bench.roofline                print the table and write bench/results/roofline.csv
    python -m bench.roofline --no-save

The time of an operator, forward and backward, is at least its bytes over the memory bandwidth and at least the
operations of its matrix products over the rate of the matrix units. Both counts come from the microbenchmark of the
operator (`Case.moved` and `Case.flops` in bench/operators); bandwidths and rates are the vendors' (bench/targets.py).
An fp32 product counts as three tf32 products (`launching.dot_precision`).
"""

from __future__ import annotations

import argparse
import csv
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from skipkernels.ops import OPERATORS

from . import measure
from .targets import GPUS, Gpu

TABLE = measure.RESULTS / "roofline.csv"
BASIS = "computed, not measured"


class Floor(NamedTuple):
    microseconds: float
    bound: str


def floor(moved: int, flops: int, dtype: str, gpu: Gpu) -> Floor:
    """The least time for this many bytes and operations of matrix products."""
    memory, products = moved / gpu.bandwidth, flops / (gpu.tf32 / 3 if dtype == "fp32" else gpu.half)
    return Floor(1e6 * max(memory, products), "memory" if memory >= products else "products")


def floors() -> Iterator[dict[str, Any]]:
    """A row for each operator, shape and dtype of the microbenchmarks."""
    for op in OPERATORS:
        cases = importlib.import_module(f"bench.operators.{op.rstrip('_')}").cases
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for case in cases(dtype):
                row = {"op": op, "shape": case.shape, "dtype": name, "bytes": case.moved, "flops": case.flops}
                for gpu, limits in GPUS.items():
                    microseconds, bound = floor(case.moved, case.flops, name, limits)
                    row |= {f"{gpu}_us": f"{microseconds:.3g}", f"{gpu}_bound": bound}
                yield row | {"basis": BASIS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    rows, console = list(floors()), Console(width=170)
    title = f"Least time in µs, forward and backward ({BASIS})"
    table = Table("operator", "shape", "dtype", "bytes", "operations", *GPUS, title=title)
    for row in rows:
        floors_us = (f"{row[f'{gpu}_us']} {row[f'{gpu}_bound']}" for gpu in GPUS)
        table.add_row(row["op"], row["shape"], row["dtype"], f"{row['bytes']:,}", f"{row['flops']:,}", *floors_us)
    console.print(table)
    if not args.no_save:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        console.print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
