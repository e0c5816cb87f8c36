"""`packed_layout`: the rows to gather for the prompts of K classes, of lengths n, behind the P rows of a shared prefix.

    offset_k = Σ_{j<k} n_j,   row P + offset_k + i of the result is row start_k + i of all prompts, for i < n_k

The rows are then gathered by `index_select`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import registration
from .assertions import assert_rows
from .launching import launch, launch_options, tl, triton

MOST_PACKED = 4096  # classes; PyTorch adds more lengths faster


@triton.jit
def _packed_layout_kernel(
    class_ids_ptr,
    starts_ptr,
    lengths_ptr,
    row_numbers_ptr,
    offsets_ptr,
    last_rows_ptr,
    C,
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
        assert_rows(class_ids, offs_j < K, C, "packed_layout: class_ids must be rows of lengths")
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
    # 3. Row numbers: of this class, of the prefix, and of the spare rows, which repeat the first ones. All end at R
    for first in range(0, length, BLOCK_J):
        offs = first + lane
        mask = (offs < length) & (P + offset + offs < R)
        tl.store(row_numbers_ptr + P + offset + offs, start + offs, mask=mask)  # [BLOCK_J]
    for first in range(k * BLOCK_J, P, K * BLOCK_J):
        offs = first + lane
        tl.store(row_numbers_ptr + offs, offs.to(tl.int64), mask=(offs < P) & (offs < R))  # [BLOCK_J]
    for first in range(stop + k * BLOCK_J, R, K * BLOCK_J):
        offs = first + lane
        tl.store(row_numbers_ptr + offs, offs - stop, mask=offs < R)  # [BLOCK_J]


def _launch(
    class_ids: Tensor, starts: Tensor, lengths: Tensor, prefix_length: int, row_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    K = len(class_ids)
    if not 0 < K <= MOST_PACKED:
        return NotImplemented
    row_numbers, offsets, last_rows = _fake(class_ids, starts, lengths, prefix_length, row_count)
    launch(
        _packed_layout_kernel,
        (K,),
        device=class_ids.device,
        debug=True,  # compiles the assertion
        class_ids_ptr=class_ids.contiguous(),
        starts_ptr=starts.contiguous(),
        lengths_ptr=lengths.contiguous(),
        row_numbers_ptr=row_numbers,
        offsets_ptr=offsets,
        last_rows_ptr=last_rows,
        C=len(lengths),
        K=K,
        P=prefix_length,
        R=row_count,
        **launch_options("packed_layout", class_ids),
    )
    return row_numbers, offsets, last_rows


def _fallback(
    class_ids: Tensor, starts: Tensor, lengths: Tensor, prefix_length: int, row_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    # index_select refuses ids below 0, unlike `lengths[class_ids]`
    offsets = F.pad(lengths.index_select(0, class_ids).cumsum(0), (1, 0))  # [K + 1]
    first_rows = prefix_length + offsets  # [K + 1]; the last is the first spare row
    # What a row adds to its number: nothing in the prefix, then by class, then for the spare rows
    shifts = torch.cat([offsets.new_zeros(1), starts[class_ids] - first_rows[:-1], -first_rows[-1:]])  # [K + 2]
    rows = torch.arange(row_count, device=class_ids.device)
    return rows + shifts[torch.searchsorted(first_rows, rows, right=True)], offsets, first_rows[1:] - 1


def _fake(
    class_ids: Tensor, starts: Tensor, lengths: Tensor, prefix_length: int, row_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    K = class_ids.shape[0]
    return class_ids.new_empty(row_count), class_ids.new_empty(K + 1), class_ids.new_empty(K)


packed_layout = registration.define(
    "packed_layout(Tensor class_ids, Tensor starts, Tensor lengths, int prefix_length, SymInt row_count)"
    " -> (Tensor row_numbers, Tensor offsets, Tensor last_rows)",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
    fallback_note=f"more than {MOST_PACKED:,} classes",
)
