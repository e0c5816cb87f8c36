"""`class_scores`: scores that select the classes of a step, see `classes_at_ranks`.

    score_c = max_b ⟨x_b/|x_b|, p_c⟩,   score_c = +∞ where c is the label of an image, if there are labels

One pass over the prototypes; the [B, C] cosines are never written. Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dtypes, reference
from ..checks import check_values
from . import registration
from .assertions import assert_rows
from .launching import dot_precision, launch, launch_options, tl, triton, with_contiguous_rows


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
            assert_rows(labels, mask_b, C, "class_scores: labels must be rows of prototypes")
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
    if labels is not None:
        C = len(prototypes)
        in_range = (labels >= 0) & (labels < C)
        check_values("class_scores", "labels", labels, in_range, f"rows of prototypes, 0 to {C - 1}")


def _fake(image: Tensor, prototypes: Tensor, labels: Tensor | None) -> Tensor:
    return image.new_empty(prototypes.shape[0], dtype=dtypes.wide_dtype(image.dtype))


class_scores = registration.define(
    "class_scores(Tensor image, Tensor prototypes, Tensor? labels) -> Tensor scores",
    fallback=reference.class_scores,
    fake=_fake,
    launch=_launch,
    check=_check,
    autocast_arguments=2,
)
