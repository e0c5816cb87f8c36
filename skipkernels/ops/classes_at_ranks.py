"""`classes_at_ranks`: the classes of a step, at the ranks that `selection.RankSampler` draws, from scores.

Classes are not sorted: the rank of a class is the number of classes in front of it, and the position of a kept class is
the number of kept classes with smaller ids.

    rank_c = |{j : s_j > s_c or (s_j = s_c and j < c)}|,   class_at[rank_c] = c
    kept = {class_at[r] : r in ranks},   position of c = |{j in kept : j < c}|

Not differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import registration
from .assertions import assert_rows
from .launching import launch, launch_options, tl, triton

MOST_RANKED = 16_384  # PyTorch sorts more classes faster


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
    assert_rows(ranks, is_kept, C, "classes_at_ranks: ranks must be from 0 to C - 1")
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


def _launch(scores: Tensor, ranks: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    C, K, B = len(scores), len(ranks), 0 if labels is None else len(labels)
    if C > MOST_RANKED:
        return NotImplemented
    class_ids, targets = _fake(scores, ranks, labels)
    class_at = torch.empty(C, dtype=torch.int64, device=scores.device)
    options = launch_options("class_at", scores, C=C)
    launch(
        _class_at_kernel,
        (triton.cdiv(C, options["BLOCK_C"]),),
        device=scores.device,
        scores_ptr=scores.contiguous(),
        class_at_ptr=class_at,
        C=C,
        **options,
    )
    options = launch_options("positions", scores, K=K)
    launch(
        _positions_kernel,
        (triton.cdiv(K + B, options["BLOCK_C"]),),
        device=scores.device,
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
        **options,
    )
    return class_ids, targets


def _fallback(scores: Tensor, ranks: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    # [C], by descending score
    class_at = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).argsort(descending=True, stable=True)
    class_ids = class_at.index_select(0, ranks).sort().values  # [K]; refuses ranks below 0, unlike `class_at[ranks]`
    return class_ids, class_ids.new_empty(0) if labels is None else torch.searchsorted(class_ids, labels.contiguous())


def _fake(scores: Tensor, ranks: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    return ranks.new_empty(ranks.shape), ranks.new_empty(0 if labels is None else labels.shape)


classes_at_ranks = registration.define(
    "classes_at_ranks(Tensor scores, Tensor ranks, Tensor? labels) -> (Tensor class_ids, Tensor targets)",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
    fallback_note=f"fp64, and more than {MOST_RANKED:,} classes",
)
