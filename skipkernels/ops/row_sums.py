"""Deterministic sums over rows: partial sums of blocks of rows, added in the order of the blocks.

In a fused block on a GPU, `column_sums` completes the partial sums of several backward operators by one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dtypes
from . import registration
from .launching import launch, launch_options, tl, triton

MAX_ROWS = 2048  # rows of a matrix other than partial sums: a program adds them all


@triton.jit
def _column_sums_kernel(matrices, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """out = Σ_r x[r] of each matrix, a tuple (x, out, R, W, stride of a row); R · stride < 2³¹.

    One program: BLOCK_W columns of one matrix, all of its rows, BLOCK_R at a time.
    """
    offs_w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    for i in tl.static_range(len(matrices)):
        if tl.program_id(1) == i:
            x_ptr, out_ptr, R, W, stride_x_r = matrices[i]
            total = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
            for start in range(0, R, BLOCK_R):
                offs_r = start + tl.arange(0, BLOCK_R)
                offs = offs_r[:, None] * stride_x_r + offs_w[None, :]
                mask = (offs_r < R)[:, None] & (offs_w < W)[None, :]
                total += tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
            sums = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + offs_w, sums, mask=offs_w < W)  # [BLOCK_W]


def blocks_of_rows(R: int, BLOCK_R: int, least_rows: int, most_blocks: int) -> tuple[int, int]:
    """Return the number of blocks, at most `most_blocks`, and the rows of each, a multiple of BLOCK_R ≥ least_rows."""
    tiles = -(-R // BLOCK_R)
    tiles_per_block = max(-(-least_rows // BLOCK_R), -(-tiles // most_blocks))
    return max(1, -(-tiles // tiles_per_block)), tiles_per_block * BLOCK_R  # without rows the sums are 0


def write_column_sums(matrices: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Write the sums of the columns of each matrix [R, W], which has contiguous rows, to a vector [W]: one launch."""
    options = launch_options("column_sums", results[0], R=max(len(x) for x in matrices))
    launch(
        _column_sums_kernel,
        (triton.cdiv(max(len(out) for out in results), options["BLOCK_W"]), len(results)),
        device=results[0].device,
        matrices=tuple((x, out, *x.shape, x.stride(0)) for x, out in zip(matrices, results, strict=True)),
        **options,
    )


def _launch(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    out = _fake(matrices, dtype)  # [W0 + W1 + …]
    write_column_sums([x.contiguous() for x in matrices], out.split([x.shape[1] for x in matrices]))
    return out


def _fallback(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([dtypes.at_least_fp32(x).sum(dim=0).to(dtype) for x in matrices])


def _fake(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return matrices[0].new_empty(sum(x.shape[1] for x in matrices), dtype=dtype)


column_sums = registration.define(
    "column_sums(Tensor[] matrices, ScalarType dtype) -> Tensor sums", fallback=_fallback, fake=_fake, launch=_launch
)
