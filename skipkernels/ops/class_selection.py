"""Selection of the classes of a step, and the layout of their prompts in rows.

`classes_at_ranks` sorts nothing: the rank of a class is the number of classes in front of it, and the position of a kept
class is the number of kept classes with smaller ids. Both are counted.

    rank_c = |{j : s_j > s_c or (s_j = s_c and j < c)}|,   class_at[rank_c] = c
    kept = {class_at[r] : r in ranks},   position of c = |{j in kept : j < c}|

`packed_layout` places the rows of K prompts, of lengths n, one after the other behind the P rows of a shared prefix:

    offset_k = Σ_{j<k} n_j,   row P + offset_k + i of the result is row start_k + i of all prompts, for i < n_k
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import registration
from .launching import launch, tl, triton

BLOCK_C = 16  # classes or items per program
BLOCK_J = 128  # classes, kept classes or rows per iteration
MOST_CLASSES = 16_384  # counted; PyTorch sorts more of them faster
MOST_KEPT = 4096

# ---- classes at ranks ------------------------------------------------------------------------------------------------


@triton.jit
def _class_at_kernel(scores_ptr, class_at_ptr, C, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr):
    """class_at[rank_c] = c. One program: BLOCK_C classes, compared with all."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    score = tl.load(scores_ptr + offs_c, mask=mask_c, other=float("-inf")).to(tl.float32)  # [BLOCK_C]
    score = tl.where(score == score, score, float("-inf"))  # NaN ranks last
    in_front = tl.zeros([BLOCK_C, BLOCK_J], tl.int32)
    for start in range(0, C, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < C
        other = tl.load(scores_ptr + offs_j, mask=mask_j, other=float("-inf")).to(tl.float32)  # [BLOCK_J]
        other = tl.where(other == other, other, float("-inf"))
        first = (other[None, :] == score[:, None]) & (offs_j[None, :] < offs_c[:, None])  # [BLOCK_C, BLOCK_J]
        in_front += (((other[None, :] > score[:, None]) | first) & mask_j[None, :]).to(tl.int32)
    rank = tl.sum(in_front, axis=1)  # [BLOCK_C]
    tl.store(class_at_ptr + rank, offs_c.to(tl.int64), mask=mask_c)  # [BLOCK_C]


@triton.jit
def _positions_kernel(
    class_at_ptr,
    ranks_ptr,
    labels_ptr,
    class_ids_ptr,
    targets_ptr,
    C,
    K,
    B,
    stride_ranks,
    stride_labels,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """class_ids[position of c] = c for kept classes, targets_b = position of label_b. One program: BLOCK_C of both."""
    # 1. Kept classes, then labels
    offs = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_kept = offs < K
    ranks = tl.load(ranks_ptr + offs.to(tl.int64) * stride_ranks, mask=is_kept, other=0)  # [BLOCK_C]
    tl.device_assert((ranks >= 0) & (ranks < C), "classes_at_ranks: ranks must be below C")
    class_id = tl.load(class_at_ptr + ranks, mask=is_kept, other=0)  # [BLOCK_C]
    if labels_ptr is not None:
        is_label = (offs >= K) & (offs < K + B)
        label = tl.load(labels_ptr + (offs - K).to(tl.int64) * stride_labels, mask=is_label, other=0)
        class_id = tl.where(is_label, label, class_id)  # [BLOCK_C]
    # 2. Number of kept classes with smaller ids
    smaller = tl.zeros([BLOCK_C, BLOCK_J], tl.int32)
    for start in range(0, K, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < K
        kept_ranks = tl.load(ranks_ptr + offs_j.to(tl.int64) * stride_ranks, mask=mask_j, other=0)  # [BLOCK_J]
        kept = tl.load(class_at_ptr + kept_ranks, mask=mask_j, other=C)  # [BLOCK_J]
        smaller += (kept[None, :] < class_id[:, None]).to(tl.int32)  # [BLOCK_C, BLOCK_J]
    position = tl.sum(smaller, axis=1)  # [BLOCK_C]
    # 3. In the order of their ids
    tl.store(class_ids_ptr + position, class_id, mask=is_kept)  # [BLOCK_C]
    if labels_ptr is not None:
        tl.store(targets_ptr + offs - K, position.to(tl.int64), mask=is_label)  # [BLOCK_C]


def _launch_ranks(scores: Tensor, ranks: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    C, K, B = len(scores), len(ranks), 0 if labels is None else len(labels)
    if C > MOST_CLASSES:
        return _fallback_ranks(scores, ranks, labels)
    class_ids, targets = _fake_ranks(scores, ranks, labels)
    class_at = torch.empty(C, dtype=torch.int64, device=scores.device)
    blocks = {"BLOCK_C": BLOCK_C, "BLOCK_J": BLOCK_J}
    launch(
        _class_at_kernel,
        (triton.cdiv(C, BLOCK_C),),
        device=scores.device,
        num_warps=4,
        scores_ptr=scores.contiguous(),
        class_at_ptr=class_at,
        C=C,
        **blocks,
    )
    launch(
        _positions_kernel,
        (triton.cdiv(K + B, BLOCK_C),),
        device=scores.device,
        num_warps=4,
        debug=True,  # compiles the assertion
        class_at_ptr=class_at,
        ranks_ptr=ranks,
        labels_ptr=labels,
        class_ids_ptr=class_ids,
        targets_ptr=targets,
        C=C,
        K=K,
        B=B,
        stride_ranks=ranks.stride(0),
        stride_labels=0 if labels is None else labels.stride(0),
        **blocks,
    )
    return class_ids, targets


def _fallback_ranks(scores: Tensor, ranks: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    # [C], by descending score
    class_at = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).argsort(descending=True, stable=True)
    class_ids = class_at[ranks].sort().values  # [K]
    return class_ids, class_ids.new_empty(0) if labels is None else torch.searchsorted(class_ids, labels.contiguous())


def _fake_ranks(scores: Tensor, ranks: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    return ranks.new_empty(len(ranks)), ranks.new_empty(0 if labels is None else len(labels))


classes_at_ranks = registration.define(
    "classes_at_ranks(Tensor scores, Tensor ranks, Tensor? labels) -> (Tensor class_ids, Tensor targets)",
    fallback=_fallback_ranks,
    fake=_fake_ranks,
    launch=_launch_ranks,
    fallback_cases=f"fp64, and more than {MOST_CLASSES:,} classes",
)
registration.not_differentiable(classes_at_ranks)


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
    if not 0 < K <= MOST_KEPT:
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
        BLOCK_J=BLOCK_J,
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
    fallback_cases=f"more than {MOST_KEPT:,} classes",
)
registration.not_differentiable(packed_layout)
