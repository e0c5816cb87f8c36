"""`class_scores`: scores that select the classes of a step. `classes_at_ranks`: the classes that they select.

    score_c = max_b ⟨x_b/|x_b|, p_c⟩,   score_c = +∞ where c is the label of an image, if there are labels

One pass over the prototypes; the [B, C] cosines are never written. Classes are not sorted: the rank of a class is the
number of classes in front of it, and the position of a kept class is the number of kept classes with smaller ids.

    rank_c = |{j : s_j > s_c or (s_j = s_c and j < c)}|,   class_at[rank_c] = c
    kept = {class_at[r] : r in ranks},   position of c = |{j in kept : j < c}|

Not differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from . import registration
from .launching import dot_precision, launch, launch_options, tl, triton
from .unit_rows import with_contiguous_rows

MOST_RANKED = 16_384  # PyTorch sorts more classes faster


@triton.jit
def _class_scores_kernel(
    image_ptr,
    prototypes_ptr,
    labels_ptr,
    scores_ptr,
    B,
    C,
    D,
    stride_image_b,
    stride_prototypes_c,
    stride_labels,
    eps,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """score_c = max_b ⟨x_b, p_c⟩ / max(|x_b|, eps), and +∞ for labels. One program: BLOCK_C classes, all images."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    prototypes_row = prototypes_ptr + offs_c.to(tl.int64)[:, None] * stride_prototypes_c  # [BLOCK_C, 1]
    # A maximum per column of the tile, reduced once at the end
    best = tl.full([BLOCK_C, BLOCK_B], float("-inf"), tl.float32)
    labelled = tl.zeros([BLOCK_C, BLOCK_B], tl.int1)
    for start_b in range(0, B, BLOCK_B):
        offs_b = start_b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < B
        image_row = image_ptr + offs_b.to(tl.int64)[None, :] * stride_image_b  # [1, BLOCK_B]
        # 1. Cosines of a tile
        product = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
        squares = tl.zeros([BLOCK_D, BLOCK_B], tl.float32)
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            # [BLOCK_C, BLOCK_D] and [BLOCK_D, BLOCK_B]
            prototypes = tl.load(prototypes_row + offs_d[None, :], mask=mask_c[:, None] & mask_d[None, :], other=0.0)
            image = tl.load(image_row + offs_d[:, None], mask=mask_d[:, None] & mask_b[None, :], other=0.0)
            # [BLOCK_C, BLOCK_D] @ [BLOCK_D, BLOCK_B] -> [BLOCK_C, BLOCK_B]
            product = tl.dot(prototypes, image, product, input_precision=PRECISION)
            squares += image.to(tl.float32) * image.to(tl.float32)
        norm = tl.sqrt(tl.sum(squares, axis=0))  # [BLOCK_B]
        cosine = product / tl.maximum(norm, eps, propagate_nan=tl.PropagateNan.ALL)[None, :]
        cosine = tl.where(mask_b[None, :], cosine, float("-inf"))  # [BLOCK_C, BLOCK_B]
        # 2. Running maximum, and the classes that are labels
        best = tl.maximum(best, cosine, propagate_nan=tl.PropagateNan.ALL)
        if labels_ptr is not None:
            labels = tl.load(labels_ptr + offs_b.to(tl.int64) * stride_labels, mask=mask_b, other=-1)  # [BLOCK_B]
            tl.device_assert((labels >= 0) & (labels < C) | ~mask_b, "class_scores: labels must be rows of prototypes")
            labelled |= labels[None, :] == offs_c[:, None]  # [BLOCK_C, BLOCK_B]
    # 3. Scores. tl.max drops NaN; a NaN image must give NaN scores.
    nan = tl.max((best != best).to(tl.int32), axis=1) > 0  # [BLOCK_C]
    score = tl.where(nan, float("nan"), tl.max(best, axis=1))  # [BLOCK_C]
    if labels_ptr is not None:
        score = tl.where(tl.max(labelled.to(tl.int32), axis=1) > 0, float("inf"), score)
    tl.store(scores_ptr + offs_c, score, mask=mask_c)  # [BLOCK_C]


def _launch(image: Tensor, prototypes: Tensor, labels: Tensor | None) -> Tensor:
    image, prototypes = with_contiguous_rows(image), with_contiguous_rows(prototypes)
    (B, D), C, device = image.shape, prototypes.shape[0], image.device
    options = launch_options("class_scores", image, C=C)
    scores = torch.empty(C, dtype=torch.float32, device=device)
    launch(
        _class_scores_kernel,
        (triton.cdiv(C, options["BLOCK_C"]),),
        device=device,
        debug=True,  # compiles the assertion
        image_ptr=image,
        prototypes_ptr=prototypes,
        labels_ptr=labels,
        scores_ptr=scores,
        B=B,
        C=C,
        D=D,
        stride_image_b=image.stride(0),
        stride_prototypes_c=prototypes.stride(0),
        stride_labels=0 if labels is None else labels.stride(0),
        eps=reference.UNIT_NORM_EPS,
        PRECISION=dot_precision(image.dtype, device),
        **options,
    )
    return scores


def _check(image: Tensor, prototypes: Tensor, labels: Tensor | None) -> None:
    C = prototypes.shape[0]
    if labels is None:
        return
    if labels.amin() < 0 or labels.amax() >= C:
        raise ValueError(f"class_scores: labels must be rows of prototypes, 0 to {C - 1}; got {labels.tolist()}.")


def _fake(image: Tensor, prototypes: Tensor, labels: Tensor | None) -> Tensor:
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    return image.new_empty(prototypes.shape[0], dtype=dtype)


class_scores = registration.define(
    "class_scores(Tensor image, Tensor prototypes, Tensor? labels) -> Tensor scores",
    fallback=reference.class_scores,
    fake=_fake,
    launch=_launch,
    check=_check,
    autocast_arguments=2,
)


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
    if C > MOST_RANKED:
        return _fallback_ranks(scores, ranks, labels)
    class_ids, targets = _fake_ranks(scores, ranks, labels)
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
    fallback_note=f"fp64, and more than {MOST_RANKED:,} classes",
)
