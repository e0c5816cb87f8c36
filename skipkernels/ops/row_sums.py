"""Deterministic sums over rows: partial sums of blocks of rows, added in the order of the blocks."""

from __future__ import annotations

from .launching import tl, triton


@triton.jit
def sum_in_order(sums_ptr, P, offs_w, W, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr):
    """Compute Σ_p sums[p, w], [BLOCK_W], of fp32 sums [P, W], BLOCK_P rows at a time; P · W < 2³¹."""
    total = tl.zeros([BLOCK_P, BLOCK_W], tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & (offs_w < W)[None, :]
        total += tl.load(sums_ptr + offs_p[:, None] * W + offs_w[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)
