"""Benchmark of `gather_rows` at ViT-B/16's 197 × 768 features: batches of 4 to 256 images from a store in memory.

The batch is written into a reused buffer, as in the loader (new memory costs more than the copy). For every result
dtype the store has that dtype, and int8. In the last case the images of the batch are spread over 4 shards, and each
shard is gathered into its positions of the buffer. With --device cuda the store is on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from skipkernels import functional, reference

from . import COMPILED, CPU, OURS, Case, Random, Run, compiled

R, N, W = 500, 197, 768
BATCHES = (4, 32, 256)
SHARDS = 4


def into(out: Tensor, rows: Tensor, index: Tensor, scale: Tensor | None = None) -> Tensor:
    """The reference with the buffer as output, for torch.compile."""
    return out.copy_(reference.gather_rows(rows, index, scale))


def into_places(out: Tensor, places: Tensor, shard: Tensor, own: Tensor) -> None:
    out[places] = shard[own]


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    rows = random(R, N, W)
    quantised = torch.randint(-127, 128, (R, N, W), generator=random.rng, dtype=torch.int8).to(device)
    scale = torch.rand(R, N, generator=random.rng).to(device)
    for B in BATCHES:
        index = random.integers(R, B)
        yield from_store(rows, index, dtype)
        yield from_store(quantised, index, dtype, scale)
    yield from_shards(rows, index)


def from_store(rows: Tensor, index: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Case:
    (B,) = index.shape
    gather = compiled(into)

    def runs(index: Tensor) -> dict[str, Run]:
        ours, theirs = (torch.empty(B, N, W, dtype=dtype, device=rows.device) for _ in range(2))

        def eager() -> list[Tensor]:
            if scale is None:
                return [torch.index_select(rows, 0, index, out=theirs)]
            return [theirs.copy_(rows.index_select(0, index) * scale.index_select(0, index).unsqueeze(-1))]

        return {
            OURS: lambda: [functional.gather_rows(rows, index, scale, out=ours)],
            "eager": eager,
            COMPILED: lambda: [gather(theirs, rows, index, scale)],
        }

    return Case(
        shape=f"B{B}-N{N}-W{W}" + ("" if scale is None else "-from-int8"),
        runs=runs(index),
        copy=lambda: runs(torch.randint_like(index, len(rows))),
        truth=lambda: [reference.gather_rows(rows, index, scale, None if scale is None else torch.float64)],
        moved=B * N * W * (rows.itemsize + dtype.itemsize) + (0 if scale is None else 4 * B * N) + 8 * B,
        target="≥ 1" if scale is None else "> 1",
    )


def from_shards(rows: Tensor, index: Tensor) -> Case:
    (B,) = index.shape
    ours, theirs = rows.new_empty(B, N, W), rows.new_empty(B, N, W)
    each = R // SHARDS
    parts = [
        (shard, index[(here := index // each == i)] - i * each, here.nonzero()[:, 0])
        for i, shard in enumerate(rows.split(each))
    ]

    def ours_into(out: Tensor, places: Tensor, shard: Tensor, own: Tensor) -> None:
        functional.gather_rows(shard, own, out=out, out_index=places)

    def by(gather: Callable[..., None], out: Tensor) -> list[Tensor]:
        for shard, own, places in parts:
            gather(out, places, shard, own)
        return [out]

    assign = compiled(into_places)
    return Case(
        shape=f"B{B}-N{N}-W{W}-from-{SHARDS}-shards",
        runs={
            OURS: lambda: by(ours_into, ours),
            "eager": lambda: by(into_places, theirs),
            COMPILED: lambda: by(assign, theirs),
        },
        truth=lambda: [reference.gather_rows(rows, index)],
        moved=2 * B * N * W * rows.element_size() + 16 * B,
        target="> 1",
    )
