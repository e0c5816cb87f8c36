"""`gather_rows`: gather a batch of rows of a feature store.

    out_b = rows[index_b] · token_scale[index_b]

`gather_rows_out` writes into an existing buffer, which may be pinned and reused; with `out_index` into its rows
out_index_b, so that a batch can be gathered from several stores. Not differentiable: the store is a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import registration
from .launching import launch, tl, triton

BLOCK_N = 4  # tokens per program
MAX_BLOCK_W = 1024  # columns per iteration: 8 KiB in flight with 4 tokens in bf16
NUM_WARPS = 4


@triton.jit
def _gather_rows_kernel(
    rows_ptr,
    index_ptr,
    token_scale_ptr,
    out_index_ptr,
    out_ptr,
    R,
    M,
    N,
    W,
    stride_rows_r,
    stride_rows_n,
    stride_rows_w,
    stride_index,
    stride_scale_r,
    stride_scale_n,
    stride_out_index,
    QUANTISED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """out_bn = rows[index_b, n] · token_scale[index_b, n]. One program: BLOCK_N tokens of one image, all columns."""
    blocks = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    # 1. Row of the store, and row of out
    row = tl.load(index_ptr + b * stride_index)
    tl.device_assert((row >= 0) & (row < R), "gather_rows: index must be rows of rows")
    out_row = b
    if out_index_ptr is not None:
        out_row = tl.load(out_index_ptr + b * stride_out_index)
        tl.device_assert((out_row >= 0) & (out_row < M), "gather_rows: out_index must be rows of out")

    # 2. BLOCK_N tokens, BLOCK_W columns at a time
    offs_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = offs_n < N
    rows_ptrs = rows_ptr + row * stride_rows_r + offs_n[:, None] * stride_rows_n  # [BLOCK_N, 1]
    out_ptrs = out_ptr + (out_row * N + offs_n[:, None]) * W  # [BLOCK_N, 1]
    if QUANTISED:
        # [BLOCK_N]
        scale = tl.load(token_scale_ptr + row * stride_scale_r + offs_n * stride_scale_n, mask=mask_n, other=0.0)
    for start in range(0, W, BLOCK_W):
        offs_w = start + tl.arange(0, BLOCK_W)
        mask = mask_n[:, None] & (offs_w < W)[None, :]  # [BLOCK_N, BLOCK_W]
        tokens = tl.load(rows_ptrs + offs_w[None, :].to(tl.int64) * stride_rows_w, mask=mask)  # [BLOCK_N, BLOCK_W]
        if QUANTISED:
            tokens = tokens.to(tl.float32) * scale[:, None]
        tl.store(out_ptrs + offs_w[None, :], tokens.to(out_ptr.dtype.element_ty), mask=mask)  # [BLOCK_N, BLOCK_W]


def _launch_out(rows: Tensor, index: Tensor, token_scale: Tensor | None, out_index: Tensor | None, out: Tensor) -> None:
    (B,), (R, N, W) = index.shape, rows.shape
    launch(
        _gather_rows_kernel,
        (B * triton.cdiv(N, BLOCK_N),),
        device=rows.device,
        num_warps=NUM_WARPS,
        debug=True,  # compiles the assertions
        rows_ptr=rows,
        index_ptr=index,
        token_scale_ptr=token_scale,
        out_index_ptr=out_index,
        out_ptr=out,
        R=R,
        M=0 if out_index is None else out.shape[0],
        N=N,
        W=W,
        stride_rows_r=rows.stride(0),
        stride_rows_n=rows.stride(1),
        stride_rows_w=rows.stride(2),
        stride_index=index.stride(0),
        stride_scale_r=0 if token_scale is None else token_scale.stride(0),
        stride_scale_n=0 if token_scale is None else token_scale.stride(1),
        stride_out_index=0 if out_index is None else out_index.stride(0),
        QUANTISED=token_scale is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_W=min(triton.next_power_of_2(W), MAX_BLOCK_W),
    )


def _launch(
    rows: Tensor, index: Tensor, token_scale: Tensor | None, dtype: torch.dtype | None, pin_memory: bool
) -> Tensor:
    out = _fake(rows, index, token_scale, dtype, pin_memory)
    _launch_out(rows, index, token_scale, None, out)
    return out


def _fallback_out(
    rows: Tensor, index: Tensor, token_scale: Tensor | None, out_index: Tensor | None, out: Tensor
) -> None:
    batch = reference.gather_rows(rows, index, token_scale, out.dtype)
    if out_index is None:
        out.copy_(batch)
    else:
        out.index_copy_(0, out_index, batch)


def _check(rows: Tensor, index: Tensor, *_: object) -> None:
    R = rows.shape[0]
    if (wrong := index[(index < 0) | (index >= R)]).numel() > 0:
        raise ValueError(f"gather_rows: index must be rows of rows, 0 to {R - 1}; got {wrong[0]}.")


def _check_out(rows: Tensor, index: Tensor, token_scale: Tensor | None, out_index: Tensor | None, out: Tensor) -> None:
    """Also check `out_index`. Duplicates in it are not found on a GPU."""
    _check(rows, index)
    if out_index is None:
        return
    M = out.shape[0]
    if (wrong := out_index[(out_index < 0) | (out_index >= M)]).numel() > 0:
        raise ValueError(f"gather_rows: out_index must be rows of out, 0 to {M - 1}; got {wrong[0]}.")
    row, times = out_index.unique(return_counts=True)
    if (repeated := row[times > 1]).numel() > 0:
        raise ValueError(f"gather_rows: out_index must have no duplicates; got {repeated[0]} more than once.")


def _fake_out(rows: Tensor, index: Tensor, token_scale: Tensor | None, out_index: Tensor | None, out: Tensor) -> None:
    pass


def _fake(
    rows: Tensor, index: Tensor, token_scale: Tensor | None, dtype: torch.dtype | None, pin_memory: bool
) -> Tensor:
    dtype = dtype or (torch.float32 if rows.dtype == torch.int8 else rows.dtype)
    return rows.new_empty((index.shape[0], *rows.shape[1:]), dtype=dtype, pin_memory=pin_memory)


gather_rows = registration.define(
    "gather_rows(Tensor rows, Tensor index, Tensor? token_scale, ScalarType? dtype, bool pin_memory) -> Tensor out",
    fallback=reference.gather_rows,
    fake=_fake,
    launch=_launch,
    check=_check,
)
registration.not_differentiable(gather_rows)

gather_rows_out = registration.define(
    "gather_rows_out(Tensor rows, Tensor index, Tensor? token_scale, Tensor? out_index, Tensor(a!) out) -> ()",
    fallback=_fallback_out,
    fake=_fake_out,
    launch=_launch_out,
    check=_check_out,
)
registration.not_differentiable(gather_rows_out)
registration.mutates(gather_rows_out)
