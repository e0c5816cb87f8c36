"""Compute the least time of each operator on data-centre GPUs from bytes and products. Nothing is measured.

    python -m bench.roofline                print the table and write bench/results/roofline.csv
    python -m bench.roofline --no-save

The time of an operator, forward and backward, is at least its bytes over the memory bandwidth and at least the
operations of its matrix products over the rate of the matrix units. Both counts come from the microbenchmark of the
operator (`Case.moved` and `Case.flops` in bench/operators); bandwidths and rates are the vendors'.
An fp32 product counts as three tf32 products (`launching.dot_precision`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from skipkernels.ops import OPERATORS

from . import measure, tables

TABLE = measure.RESULTS / "roofline.csv"
BASIS = "computed, not measured"


class Gpu(NamedTuple):
    """Published specifications, without sparsity: memory bandwidth in bytes/s, and rates in FLOP/s.

    Attributes:
        bandwidth: Memory bandwidth.
        half: Rate of the matrix units in fp16 or bf16 with fp32 accumulation.
        tf32: Rate of the matrix units in tf32.
    """

    bandwidth: float
    half: float
    tf32: float


# NVIDIA's data sheets: A100 80 GB SXM; H100 SXM; H200 SXM; HGX B200, per GPU. Where a sheet gives rates "with
# sparsity" only, half of the rate.
GPUS = {
    "A100": Gpu(2.039e12, 312e12, 156e12),
    "H100": Gpu(3.35e12, 989.4e12, 494.7e12),
    "H200": Gpu(4.8e12, 989.4e12, 494.7e12),
    "B200": Gpu(7.7e12, 2250e12, 1100e12),
}


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
    parser = measure.command(__doc__)
    args = parser.parse_args()
    rows, columns = list(floors()), ("op", "shape", "dtype", "bytes", "flops")
    lines = [[row[n] for n in columns] + [f"{row[f'{gpu}_us']} {row[f'{gpu}_bound']}" for gpu in GPUS] for row in rows]
    tables.show([*columns, *GPUS], lines, f"Least time in µs, forward and backward ({BASIS})", width=170)
    if not args.no_save:
        tables.write_dicts(TABLE, rows)
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
