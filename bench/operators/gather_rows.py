"""`gather_rows` at ViT-B/16's 197 × 768 features: batches of 4 to 256 images from a store that is in memory.

The batch goes into a buffer that is used again, as the loader does it (new memory costs more than the copy). For every
result dtype the store is in that dtype, and in int8. The last case is a batch whose images are spread over 4 shards of
a store: each gathers what it has into its places in the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from skipkernels import functional, reference

from . import Case


def cases(dtype: torch.dtype) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    R, N, W = 500, 197, 768
    rows = torch.randn(R, N, W, generator=rng).to(dtype)
    quantised = torch.randint(-127, 128, (R, N, W), generator=rng, dtype=torch.int8)
    scale = torch.rand(R, N, generator=rng)
    for B in (4, 32, 256):
        index = torch.randint(0, R, (B,), generator=rng)
        ours, theirs = torch.empty(B, N, W, dtype=dtype), torch.empty(B, N, W, dtype=dtype)
        yield Case(
            shape=f"B{B}-N{N}-W{W}",
            runs={
                "skipkernels": lambda index=index, ours=ours: [functional.gather_rows(rows, index, out=ours)],
                "eager": lambda index=index, theirs=theirs: [torch.index_select(rows, 0, index, out=theirs)],
            },
            truth=lambda index=index: [reference.gather_rows(rows, index)],
            moved=2 * B * N * W * dtype.itemsize + 8 * B,
            target="≥ 1",
        )
        yield Case(
            shape=f"B{B}-N{N}-W{W}-from-int8",
            runs={
                "skipkernels": lambda index=index, ours=ours: [
                    functional.gather_rows(quantised, index, scale, out=ours)
                ],
                "eager": lambda index=index, theirs=theirs: [
                    theirs.copy_(quantised.index_select(0, index) * scale.index_select(0, index).unsqueeze(-1))
                ],
            },
            truth=lambda index=index: [reference.gather_rows(quantised, index, scale, torch.float64)],
            moved=B * N * W * (1 + dtype.itemsize) + 4 * B * N + 8 * B,
            target="> 1",
        )

    shards, each = rows.split(R // 4), R // 4
    parts = [
        (shard, index[(here := index // each == i)] - i * each, here.nonzero()[:, 0]) for i, shard in enumerate(shards)
    ]

    def from_shards() -> list[Tensor]:
        for shard, own, places in parts:
            functional.gather_rows(shard, own, out=ours, out_index=places)
        return [ours]

    def assigned() -> list[Tensor]:
        for shard, own, places in parts:
            theirs[places] = shard[own]
        return [theirs]

    yield Case(
        shape=f"B{B}-N{N}-W{W}-from-{len(shards)}-shards",
        runs={"skipkernels": from_shards, "eager": assigned},
        truth=lambda: [reference.gather_rows(rows, index)],
        moved=2 * B * N * W * dtype.itemsize + 16 * B,
        target="> 1",
    )
