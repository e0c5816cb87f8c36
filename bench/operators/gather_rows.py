"""Benchmark of `gather_rows` at ViT-B/16's 197 × 768 features: batches of 4 to 256 images from a store in memory.

The batch is written into a reused buffer, as in the loader (new memory costs more than the copy). For every result
dtype the store has that dtype, and int8. In the last case the images of the batch are spread over 4 shards, and each
shard is gathered into its positions of the buffer. With --device cuda the store is on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from skipkernels import functional, reference

from . import COMPILED, CPU, Case, compiled, random

R, N, W = 500, 197, 768
BATCHES = (4, 32, 256)
SHARDS = 4


def into(out: Tensor, rows: Tensor, index: Tensor, scale: Tensor | None = None) -> Tensor:
    """The reference with the buffer as output, for torch.compile."""
    return out.copy_(reference.gather_rows(rows, index, scale))


def into_places(out: Tensor, places: Tensor, shard: Tensor, own: Tensor) -> None:
    out[places] = shard[own]


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    rows = random(rng, R, N, W, dtype=dtype, device=device)
    quantised = torch.randint(-127, 128, (R, N, W), generator=rng, dtype=torch.int8).to(device)
    scale = torch.rand(R, N, generator=rng).to(device)
    for B in BATCHES:
        index = torch.randint(0, R, (B,), generator=rng).to(device)
        yield plain(rows, index)
        yield from_int8(quantised, scale, index, dtype)
    yield from_shards(rows, index)


def plain(rows: Tensor, index: Tensor) -> Case:
    (B,) = index.shape
    ours, theirs = rows.new_empty(B, N, W), rows.new_empty(B, N, W)
    gather = compiled(into)
    return Case(
        shape=f"B{B}-N{N}-W{W}",
        runs={
            "skipkernels": lambda: [functional.gather_rows(rows, index, out=ours)],
            "eager": lambda: [torch.index_select(rows, 0, index, out=theirs)],
            COMPILED: lambda: [gather(theirs, rows, index)],
        },
        truth=lambda: [reference.gather_rows(rows, index)],
        moved=2 * B * N * W * rows.element_size() + 8 * B,
        target="≥ 1",
    )


def from_int8(rows: Tensor, scale: Tensor, index: Tensor, dtype: torch.dtype) -> Case:
    (B,) = index.shape
    ours, theirs = (torch.empty(B, N, W, dtype=dtype, device=rows.device) for _ in range(2))
    gather = compiled(into)
    return Case(
        shape=f"B{B}-N{N}-W{W}-from-int8",
        runs={
            "skipkernels": lambda: [functional.gather_rows(rows, index, scale, out=ours)],
            "eager": lambda: [
                theirs.copy_(rows.index_select(0, index) * scale.index_select(0, index).unsqueeze(-1)),
            ],
            COMPILED: lambda: [gather(theirs, rows, index, scale)],
        },
        truth=lambda: [reference.gather_rows(rows, index, scale, torch.float64)],
        moved=B * N * W * (1 + dtype.itemsize) + 4 * B * N + 8 * B,
        target="> 1",
    )


def from_shards(rows: Tensor, index: Tensor) -> Case:
    (B,) = index.shape
    ours, theirs = rows.new_empty(B, N, W), rows.new_empty(B, N, W)
    each = R // SHARDS
    parts = [
        (shard, index[(here := index // each == i)] - i * each, here.nonzero()[:, 0])
        for i, shard in enumerate(rows.split(each))
    ]
    assign = compiled(into_places)

    def gathered() -> list[Tensor]:
        for shard, own, places in parts:
            functional.gather_rows(shard, own, out=ours, out_index=places)
        return [ours]

    def assigned() -> list[Tensor]:
        for shard, own, places in parts:
            theirs[places] = shard[own]
        return [theirs]

    def assigned_by_compiled() -> list[Tensor]:
        for shard, own, places in parts:
            assign(theirs, places, shard, own)
        return [theirs]

    return Case(
        shape=f"B{B}-N{N}-W{W}-from-{SHARDS}-shards",
        runs={"skipkernels": gathered, "eager": assigned, COMPILED: assigned_by_compiled},
        truth=lambda: [reference.gather_rows(rows, index)],
        moved=2 * B * N * W * rows.element_size() + 16 * B,
        target="> 1",
    )
