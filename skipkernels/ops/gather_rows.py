"""`gather_rows`: gather a batch of rows of a feature store.

    out_b = rows[index_b] · token_scale[index_b]

`gather_rows_out` writes into an existing buffer, which may be pinned and reused; with `out_index` into its rows
out_index_b, so that a batch can be gathered from several stores. Not differentiable: the store is a constant.

`packed_layout`: the rows to gather for the prompts of K classes, of lengths n, one prompt after the other behind the P
rows of a shared prefix.

    offset_k = Σ_{j<k} n_j,   row P + offset_k + i of the result is row start_k + i of all prompts, for i < n_k
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import registration
from .launching import launch, tl, triton

BLOCK_N = 4  # tokens per program
MAX_BLOCK_W = 1024  # columns per iteration: 8 KiB in flight with 4 tokens in bf16
NUM_WARPS = 4
BLOCK_LAYOUT = 128  # classes or rows per iteration of `packed_layout`
MOST_PACKED = 4096  # classes; PyTorch adds more lengths faster


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


# ---- layout of prompts -----------------------------------------------------------------------------------------------


@triton.jit
def _packed_layout_kernel(
    class_ids_ptr,
    starts_ptr,
    lengths_ptr,
    row_numbers_ptr,
    offsets_ptr,
    last_rows_ptr,
    K,
    P,
    R,
    BLOCK_J: tl.constexpr,
):
    """Rows of one class, and its share of the rows of the prefix and of the spare rows. One program: one class."""
    k = tl.program_id(0)
    lane = tl.arange(0, BLOCK_J)
    # 1. Rows of the classes in front of this one, and of all
    in_front = tl.zeros([BLOCK_J], tl.int64)
    total = tl.zeros([BLOCK_J], tl.int64)
    for start in range(0, K, BLOCK_J):
        offs_j = start + lane
        class_ids = tl.load(class_ids_ptr + offs_j, mask=offs_j < K, other=0)  # [BLOCK_J]
        lengths = tl.load(lengths_ptr + class_ids, mask=offs_j < K, other=0)  # [BLOCK_J]
        in_front += tl.where(offs_j < k, lengths, 0)
        total += lengths
    offset, stop = tl.sum(in_front, axis=0), P + tl.sum(total, axis=0)
    # 2. Offset and last row of this class
    class_id = tl.load(class_ids_ptr + k)
    start, length = tl.load(starts_ptr + class_id), tl.load(lengths_ptr + class_id)
    tl.store(offsets_ptr + k, offset)
    tl.store(last_rows_ptr + k, P + offset + length - 1)
    if k == K - 1:
        tl.store(offsets_ptr + K, offset + length)
    # 3. Row numbers: of this class, of the prefix, and of the spare rows, which repeat the first ones
    for first in range(0, length, BLOCK_J):
        offs = first + lane
        tl.store(row_numbers_ptr + P + offset + offs, start + offs, mask=offs < length)  # [BLOCK_J]
    for first in range(k * BLOCK_J, P, K * BLOCK_J):
        offs = first + lane
        tl.store(row_numbers_ptr + offs, offs.to(tl.int64), mask=offs < P)  # [BLOCK_J]
    for first in range(stop + k * BLOCK_J, R, K * BLOCK_J):
        offs = first + lane
        tl.store(row_numbers_ptr + offs, offs - stop, mask=offs < R)  # [BLOCK_J]


def _launch_layout(
    class_ids: Tensor, starts: Tensor, lengths: Tensor, prefix_length: int, row_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    K = len(class_ids)
    if not 0 < K <= MOST_PACKED:
        return _fallback_layout(class_ids, starts, lengths, prefix_length, row_count)
    row_numbers, offsets, last_rows = _fake_layout(class_ids, starts, lengths, prefix_length, row_count)
    launch(
        _packed_layout_kernel,
        (K,),
        device=class_ids.device,
        num_warps=4,
        class_ids_ptr=class_ids.contiguous(),
        starts_ptr=starts,
        lengths_ptr=lengths,
        row_numbers_ptr=row_numbers,
        offsets_ptr=offsets,
        last_rows_ptr=last_rows,
        K=K,
        P=prefix_length,
        R=row_count,
        BLOCK_J=BLOCK_LAYOUT,
    )
    return row_numbers, offsets, last_rows


def _fallback_layout(
    class_ids: Tensor, starts: Tensor, lengths: Tensor, prefix_length: int, row_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    offsets = F.pad(lengths[class_ids].cumsum(0), (1, 0))  # [K + 1]
    first_rows = prefix_length + offsets  # [K + 1]; the last is the first spare row
    # What a row adds to its number: nothing in the prefix, then by class, then for the spare rows
    shifts = torch.cat([offsets.new_zeros(1), starts[class_ids] - first_rows[:-1], -first_rows[-1:]])  # [K + 2]
    rows = torch.arange(row_count, device=class_ids.device)
    return rows + shifts[torch.searchsorted(first_rows, rows, right=True)], offsets, first_rows[1:] - 1


def _fake_layout(
    class_ids: Tensor, starts: Tensor, lengths: Tensor, prefix_length: int, row_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    K = len(class_ids)
    return class_ids.new_empty(row_count), class_ids.new_empty(K + 1), class_ids.new_empty(K)


packed_layout = registration.define(
    "packed_layout(Tensor class_ids, Tensor starts, Tensor lengths, int prefix_length, SymInt row_count)"
    " -> (Tensor row_numbers, Tensor offsets, Tensor last_rows)",
    fallback=_fallback_layout,
    fake=_fake_layout,
    launch=_launch_layout,
    fallback_cases=f"more than {MOST_PACKED:,} classes",
)
registration.not_differentiable(packed_layout)
