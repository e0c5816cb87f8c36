"""Deterministic sums over rows: partial sums of blocks of rows, added in the order of the blocks.

In a fused block on a GPU, `column_sums` completes the partial sums of several backward operators by one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import registration
from .launching import launch, launch_options, tl, triton

MATRICES = 5  # of one launch, as many as a fused block has: of two norms, the activation, and one or two projections
MAX_ROWS = 2048  # rows of a matrix other than partial sums: a program adds them all


@triton.jit
def sum_in_order(sums_ptr, P, offs_w, W, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr):
    """Compute Σ_p sums[p, w] in fp32, [BLOCK_W], of contiguous rows [P, W], BLOCK_P at a time; P · W < 2³¹."""
    return sum_in_order_strided(sums_ptr, P, W, offs_w, W, BLOCK_P, BLOCK_W)


@triton.jit
def sum_in_order_strided(sums_ptr, P, stride_p, offs_w, W, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr):
    """The same for rows at a stride."""
    total = tl.zeros([BLOCK_P, BLOCK_W], tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & (offs_w < W)[None, :]
        # [BLOCK_P, BLOCK_W]
        total += tl.load(sums_ptr + offs_p[:, None] * stride_p + offs_w[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)  # [BLOCK_W]


@triton.jit
def _store_column_sums(x_ptr, out_ptr, R, W, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    if x_ptr is not None:
        offs_w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
        total = sum_in_order(x_ptr, R, offs_w, W, BLOCK_R, BLOCK_W)  # [BLOCK_W]
        tl.store(out_ptr + offs_w, total.to(out_ptr.dtype.element_ty), mask=offs_w < W)  # [BLOCK_W]


@triton.jit
def _column_sums_kernel(
    x0_ptr,
    x1_ptr,
    x2_ptr,
    x3_ptr,
    x4_ptr,
    out_ptr,
    R0,
    R1,
    R2,
    R3,
    R4,
    W0,
    W1,
    W2,
    W3,
    W4,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """out = Σ_r x0[r], Σ_r x1[r], … side by side. One program: BLOCK_W columns of one matrix, all of its rows."""
    which = tl.program_id(1)
    if which == 0:
        _store_column_sums(x0_ptr, out_ptr, R0, W0, BLOCK_R, BLOCK_W)
    elif which == 1:
        _store_column_sums(x1_ptr, out_ptr + W0, R1, W1, BLOCK_R, BLOCK_W)
    elif which == 2:
        _store_column_sums(x2_ptr, out_ptr + W0 + W1, R2, W2, BLOCK_R, BLOCK_W)
    elif which == 3:
        _store_column_sums(x3_ptr, out_ptr + W0 + W1 + W2, R3, W3, BLOCK_R, BLOCK_W)
    else:
        _store_column_sums(x4_ptr, out_ptr + W0 + W1 + W2 + W3, R4, W4, BLOCK_R, BLOCK_W)


def blocks_of_rows(R: int, BLOCK_R: int, least_rows: int, most_blocks: int) -> tuple[int, int]:
    """Return the number of blocks, at most `most_blocks`, and the rows of each, a multiple of BLOCK_R ≥ least_rows."""
    tiles = -(-R // BLOCK_R)
    tiles_per_block = max(-(-least_rows // BLOCK_R), -(-tiles // most_blocks))
    return max(1, -(-tiles // tiles_per_block)), tiles_per_block * BLOCK_R  # without rows the sums are 0


def _launch(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    out = _fake(matrices, dtype)  # [W0 + W1 + …]
    parts = [matrices[start : start + MATRICES] for start in range(0, len(matrices), MATRICES)]
    sums = out.split([sum(x.shape[1] for x in part) for part in parts])
    for part, part_sums in zip(parts, sums, strict=True):
        _launch_once(part, part_sums)
    return out


def _launch_once(matrices: Sequence[Tensor], out: Tensor) -> None:
    """Write the sums of at most MATRICES matrices."""
    arguments: dict[str, Any] = {}
    options = launch_options("column_sums", out)
    for i in range(MATRICES):
        x = matrices[i].contiguous() if i < len(matrices) else None
        R, W = (0, 0) if x is None else x.shape
        arguments |= {f"x{i}_ptr": x, f"R{i}": R, f"W{i}": W}
    launch(
        _column_sums_kernel,
        (triton.cdiv(max(x.shape[1] for x in matrices), options["BLOCK_W"]), len(matrices)),
        device=out.device,
        **arguments,
        out_ptr=out,
        **options,
    )


def _fallback(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([reference.at_least_fp32(x).sum(dim=0).to(dtype) for x in matrices])


def _fake(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return matrices[0].new_empty(sum(x.shape[1] for x in matrices), dtype=dtype)


column_sums = registration.define(
    "column_sums(Tensor[] matrices, ScalarType dtype) -> Tensor sums", fallback=_fallback, fake=_fake, launch=_launch
)
