"""`class_sampled_ce`: cross-entropy of images against a sample of the rows of a class bank.

    z_bk   = s · ⟨x_b/|x_b|, t_k/|t_k|⟩,   lse_b = log Σ_k exp(z_bk)
    loss_b = (1 − ε) · w_y · (lse_b − z_by) + ε/K · Σ_k w_k · (lse_b − z_bk)
    d_z_bk = d_loss_b · ((1 − ε) · w_y · (p_bk − [k = y]) + ε/K · (W p_bk − w_k)),   p_bk = exp(z_bk − lse_b)

s is `logit_scale`, y the label of the image, w `class_weight`, W = Σ_k w_k and ε `label_smoothing`.

Saved for backward: the inputs; lse [B] in fp64, since rounding it to fp32 changes every probability by 4e-6 at a scale
of 100; the norms of the rows, [B] and [K]; the divisor of the sum of the losses. Backward recomputes the logits.

On a GPU a program of forward loops over tiles of the [B, K] logits. With few images the classes are divided into
splits, each with its own programs; a second kernel combines the splits in order. Backward writes a panel of
d_z_bk/(|x_b| |t_k|) at a time, for a bounded number of images, which the BLAS library multiplies with the rows of text
and image (unit_rows.py).

On the CPU, gradients computed in forward save one matrix product of four. With `keep_…` (for a mean or a sum) the C++
kernel returns the gradients of the unit rows as `kept_…`, without the factors logit_scale and d_loss, in fp32
[B, D] and [K, D] (fp64 for fp64), for its backward. Everything else leaves them as `_unused_kept` allocates them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import dtypes, reference
from ..checks import check_values
from . import autograd, registration, unit_rows
from .assertions import assert_different_rows, assert_rows
from .launching import constexpr, contiguous_or_none, launch, launch_options, tl, triton, with_contiguous_rows
from .unit_rows import contract, cosine_arguments, cosine_tile

# Number of programs that fills a large GPU twice. Equal on all GPUs, so that all split, and round, in the same way.
PROGRAMS = 256
PANEL = 1 << 24  # largest number of factors in memory: 32 MiB in bf16

# What a split stores for each image, planes of `partial`; the last only with smoothing
TOP, EXP_SUM, TARGET, FOUND, WEIGHTED = map(constexpr, range(5))

REDUCTIONS = ("mean", "sum", "none")  # an index in the schemas, since strings leak memory in the stable ABI


class Forward(NamedTuple):
    """Arguments of the operator; its schema is made from them."""

    image: Tensor  # [B, D]
    text: Tensor  # [C, D]
    labels: Tensor  # [B]
    logit_scale: Tensor  # [] or [1]
    class_ids: Tensor | None  # [K]
    class_weight: Tensor | None  # [C]
    label_smoothing: float
    ignore_index: int
    reduction: int  # of REDUCTIONS
    # Of C++ alone
    keep_image: bool = False
    keep_text: bool = False
    keep_logit_scale: bool = False


class Backward(NamedTuple):
    """Arguments of the backward operator; its schema is made from them."""

    d_loss: Tensor  # [] or [B]
    image: Tensor  # [B, D]
    text: Tensor  # [C, D]
    labels: Tensor  # [B]
    logit_scale: Tensor  # [] or [1]
    lse: Tensor  # [B]
    image_norm: Tensor  # [B]
    text_norm: Tensor  # [K]
    denominator: Tensor  # []
    # Of C++ alone
    kept_image: Tensor  # [B, D] or [0, D]
    kept_text: Tensor  # [K, D] or [0, D]
    kept_logit_scale: Tensor  # [1] or [0]
    class_ids: Tensor | None  # [K]
    class_weight: Tensor | None  # [C]
    label_smoothing: float
    ignore_index: int
    reduction: int
    need_image: bool
    need_text: bool
    need_logit_scale: bool


AnyCall = TypeVar("AnyCall", Forward, Backward)


@triton.jit
def _class_sampled_ce_fwd_kernel(
    image_ptr,
    text_ptr,
    labels_ptr,
    logit_scale_ptr,
    class_ids_ptr,
    class_weight_ptr,
    image_norm_ptr,
    text_norm_ptr,
    partial_ptr,
    B,
    K,
    C,
    D,
    split_size,
    stride_image_b,
    stride_text_k,
    stride_partial,
    eps,
    SMOOTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """top_b = max_k ±cosine_bk,   sum_b = Σ_k exp(|s| · (±cosine_bk − top_b)),   with the sign of s.

    One program: BLOCK_B images and one split of the classes, in a loop over its tiles with an online maximum of each
    image. It stores top_b, sum_b, ±cosine_by, the number of classes k = y_b and, with smoothing, Σ_k w_k ±cosine_bk;
    with MEASURE also the norms of the rows.
    """
    split = tl.program_id(1)
    end_k = tl.minimum((split + 1) * split_size, K)
    if class_ids_ptr is not None:
        if tl.program_id(0) == 0:
            assert_different_rows(
                class_ids_ptr, split * split_size, end_k, K, C,
                "class_sampled_ce: class_ids must be different rows of text", BLOCK_K,
            )  # fmt: skip
    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    labels = tl.load(labels_ptr + offs_b, mask=mask_b, other=0).to(tl.int32)  # [BLOCK_B]
    scale = tl.load(logit_scale_ptr).to(tl.float32)
    sign = tl.where(scale < 0, -1.0, 1.0)  # for a negative scale the largest logit has the smallest cosine

    top = tl.full([BLOCK_B], -2.0, tl.float32)  # below every cosine, and finite: 0 · inf is NaN
    exp_sum = tl.zeros([BLOCK_B], tl.float32)
    target = tl.zeros([BLOCK_B], tl.float32)
    found = tl.zeros([BLOCK_B], tl.float32)
    weighted = tl.zeros([BLOCK_B], tl.float32)
    for start_k in range(split * split_size, end_k, BLOCK_K):
        # 1. Cosines of a tile of classes
        # Class offs_k of the tile is at places_k of the sample and in row rows_k of text; the last tile may exceed K.
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        places_k = tl.minimum(offs_k, K - 1)
        rows_k = places_k
        if class_ids_ptr is not None:
            rows_k = tl.load(class_ids_ptr + places_k).to(tl.int32)  # [BLOCK_K]
            rows_k = tl.minimum(tl.maximum(rows_k, 0), C - 1)  # valid until the assertion stops the device
        # [BLOCK_B, BLOCK_K], [BLOCK_B], [BLOCK_K]
        cosine, image_norm, text_norm = cosine_tile(
            image_ptr, text_ptr, image_norm_ptr, text_norm_ptr, tl.minimum(offs_b, B - 1), places_k, rows_k, D,
            stride_image_b, stride_text_k, eps, BLOCK_B, BLOCK_K, BLOCK_D, PRECISION, MEASURE,
        )  # fmt: skip
        if MEASURE:
            if tl.program_id(0) == 0:
                tl.store(text_norm_ptr + offs_k, text_norm, mask=mask_k)  # [BLOCK_K]
            if start_k == 0:
                tl.store(image_norm_ptr + offs_b, image_norm, mask=mask_b)  # [BLOCK_B]
        # 2. Online maximum and sum of exponentials
        cosine = sign * cosine
        # Columns beyond K repeat the last class: the maximum does not change, and the sum excludes them.
        higher = tl.maximum(top, tl.max(cosine, axis=1))  # [BLOCK_B]
        absent = tl.where(mask_k, 0.0, float("-inf"))  # [BLOCK_K]
        terms = tl.exp(sign * scale * (cosine - higher[:, None]) + absent[None, :])  # [BLOCK_B, BLOCK_K]
        exp_sum = exp_sum * tl.exp(sign * scale * (top - higher)) + tl.sum(terms, axis=1)
        top = higher
        # 3. Cosine of the label, and the weighted sum
        is_target = tl.where(mask_k, rows_k, -1)[None, :] == labels[:, None]  # [BLOCK_B, BLOCK_K]
        target += tl.sum(tl.where(is_target, cosine, 0.0), axis=1)
        found += tl.sum(is_target.to(tl.float32), axis=1)
        if SMOOTH:
            weight = mask_k.to(tl.float32)
            if class_weight_ptr is not None:
                weight = tl.load(class_weight_ptr + rows_k, mask=mask_k, other=0.0)  # [BLOCK_K]
            weighted += tl.sum(weight[None, :] * cosine, axis=1)

    # 4. Results, partial[:, split, offs_b]
    partial = partial_ptr + split * B + offs_b  # 32-bit offsets suffice: with many images there are few splits
    tl.store(partial + stride_partial * TOP, top, mask=mask_b)  # [BLOCK_B]
    tl.store(partial + stride_partial * EXP_SUM, exp_sum, mask=mask_b)  # [BLOCK_B]
    tl.store(partial + stride_partial * TARGET, target, mask=mask_b)  # [BLOCK_B]
    tl.store(partial + stride_partial * FOUND, found, mask=mask_b)  # [BLOCK_B]
    if SMOOTH:
        tl.store(partial + stride_partial * WEIGHTED, weighted, mask=mask_b)  # [BLOCK_B]


@triton.jit
def _combine_splits(
    partial_ptr, offs_b, mask_b, B, splits, stride_partial, magnitude, SMOOTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Combine what `_class_sampled_ce_fwd_kernel` stores for BLOCK images, in the order of the splits."""
    # 1. Maximum over the splits
    top = tl.full([BLOCK], -2.0, tl.float32)
    for split in range(0, splits):
        partial = partial_ptr + split * B + offs_b
        top = tl.maximum(top, tl.load(partial + stride_partial * TOP, mask=mask_b, other=-2.0))  # [BLOCK]
    # 2. Sums, rescaled to this maximum
    exp_sum = tl.zeros([BLOCK], tl.float32)
    target = tl.zeros([BLOCK], tl.float32)
    found = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        partial = partial_ptr + split * B + offs_b
        own_top = tl.load(partial + stride_partial * TOP, mask=mask_b, other=-2.0)  # [BLOCK]
        factor = tl.exp(magnitude * (own_top - top))  # [BLOCK]
        exp_sum += factor * tl.load(partial + stride_partial * EXP_SUM, mask=mask_b, other=1.0)  # [BLOCK]
        target += tl.load(partial + stride_partial * TARGET, mask=mask_b, other=0.0)  # [BLOCK]
        found += tl.load(partial + stride_partial * FOUND, mask=mask_b, other=0.0)  # [BLOCK]
        if SMOOTH:
            weighted += tl.load(partial + stride_partial * WEIGHTED, mask=mask_b, other=0.0)  # [BLOCK]
    return top, exp_sum, target, found, weighted


@triton.jit
def _lse(magnitude, top, log_sum):
    """Compute lse_b in fp64: fp32 rounds it by 4e-6 at a scale of 100."""
    return magnitude.to(tl.float64) * top.to(tl.float64) + log_sum.to(tl.float64)


@triton.jit
def _class_sampled_ce_fwd_combine_kernel(
    labels_ptr,
    logit_scale_ptr,
    class_weight_ptr,
    total_weight_ptr,
    partial_ptr,
    loss_ptr,
    lse_ptr,
    denominator_ptr,
    B,
    K,
    C,
    splits,
    stride_partial,
    label_smoothing,
    ignore_index,
    SMOOTH: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """lse_b = |s| · top_b + log(sum_b) over all splits, loss_b, and their sum or mean. One program, images in order."""
    scale = tl.load(logit_scale_ptr).to(tl.float32)  # []
    sign = tl.where(scale < 0, -1.0, 1.0)  # of the cosines in `partial`
    magnitude = sign * scale
    total_weight = 0.0 + K  # a float, as the sum that may replace it
    if total_weight_ptr is not None:
        total_weight = tl.load(total_weight_ptr)  # []

    # 1. lse and loss of BLOCK images at a time
    total = tl.zeros([BLOCK], tl.float64)
    total_target_weight = tl.zeros([BLOCK], tl.float64)
    counted = tl.zeros([BLOCK], tl.int32)
    for start_b in range(0, B, BLOCK):
        offs_b = start_b + tl.arange(0, BLOCK)
        mask_b = offs_b < B
        top, exp_sum, target, found, weighted = _combine_splits(
            partial_ptr, offs_b, mask_b, B, splits, stride_partial, magnitude, SMOOTH, BLOCK
        )  # [BLOCK] each
        labels = tl.load(labels_ptr + offs_b, mask=mask_b, other=0)  # [BLOCK]
        is_counted = mask_b & (labels != ignore_index)
        assert_rows(labels, is_counted, C, "class_sampled_ce: labels must be rows of text")
        tl.device_assert((found == 1) | ~is_counted, "class_sampled_ce: labels must be among class_ids")
        log_sum = tl.log(exp_sum)
        tl.store(lse_ptr + offs_b, _lse(magnitude, top, log_sum), mask=mask_b)  # [BLOCK]
        target_weight = is_counted.to(tl.float32)
        if class_weight_ptr is not None:
            target_weight = tl.load(class_weight_ptr + labels, mask=is_counted & (found == 1), other=0.0)  # [BLOCK]
        # Not lse − z_y, which loses all digits to cancellation if the loss is small.
        loss = target_weight * (magnitude * (top - target) + log_sum)  # [BLOCK]
        if SMOOTH:
            # Σ_k w_k (lse_b − z_bk)
            spread = total_weight * (magnitude * top + log_sum) - magnitude * weighted  # [BLOCK]
            loss = (1 - label_smoothing) * loss + label_smoothing / K * spread
        loss = tl.where(is_counted, loss, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + offs_b, loss, mask=mask_b)  # [BLOCK]
        total += loss.to(tl.float64)
        total_target_weight += target_weight.to(tl.float64)
        counted += is_counted.to(tl.int32)

    # 2. Sum or mean
    denominator = 1.0
    if REDUCTION == "mean":
        denominator = tl.sum(total_target_weight, axis=0).to(tl.float32)
    # Without images, sums of 0 are gradients of 0; images with a weight of 0 have NaN, as in cross_entropy.
    tl.store(denominator_ptr, tl.where(tl.sum(counted, axis=0) == 0, 1.0, denominator))
    if REDUCTION != "none":
        tl.store(loss_ptr, (tl.sum(total, axis=0) / denominator).to(tl.float32))


@triton.jit
def _class_sampled_ce_bwd_logits_kernel(
    d_loss_ptr,
    image_ptr,
    text_ptr,
    labels_ptr,
    logit_scale_ptr,
    class_ids_ptr,
    class_weight_ptr,
    total_weight_ptr,
    lse_ptr,
    image_norm_ptr,
    text_norm_ptr,
    factors_ptr,
    d_scale_ptr,
    B,
    K,
    D,
    stride_image_b,
    stride_text_k,
    stride_d_loss,
    stride_factors,
    label_smoothing,
    ignore_index,
    eps,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """factor_bk = d_z_bk/(|x_b| |t_k|), and Σ d_z_bk · cosine_bk; each only if its pointer is not None.

    d_z_bk = upstream_b · ((1 − ε) · w_y · (p_bk − [k = y]) + ε/K · (W p_bk − w_k))

    upstream_b is d_loss_b, or 1 without d_loss_ptr. One program: a tile of BLOCK_B images and BLOCK_K classes; pointers
    of images point to the first one of a panel.
    """
    # Order programs so that those that run at the same time share rows: GROUP tiles of images per tile of classes.
    tile_b, tile_k = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP)
    # 1. Cosines, recomputed
    offs_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_b, mask_k = offs_b < B, offs_k < K
    rows_b, places_k = tl.minimum(offs_b, B - 1), tl.minimum(offs_k, K - 1)
    rows_k = places_k
    if class_ids_ptr is not None:
        rows_k = tl.load(class_ids_ptr + places_k).to(tl.int32)  # [BLOCK_K]
    # [BLOCK_B, BLOCK_K], [BLOCK_B], [BLOCK_K]
    cosine, image_norm, text_norm = cosine_tile(
        image_ptr, text_ptr, image_norm_ptr, text_norm_ptr, rows_b, places_k, rows_k, D,
        stride_image_b, stride_text_k, eps, BLOCK_B, BLOCK_K, BLOCK_D, PRECISION, MEASURE=False,
    )  # fmt: skip
    # 2. upstream_b · (1 − ε) · w_y and upstream_b · ε/K
    labels = tl.load(labels_ptr + offs_b, mask=mask_b, other=0)  # [BLOCK_B]
    is_counted = mask_b & (labels != ignore_index)
    upstream = is_counted.to(tl.float32)
    if d_loss_ptr is not None:
        upstream = tl.load(d_loss_ptr + offs_b.to(tl.int64) * stride_d_loss, mask=is_counted, other=0.0)  # [BLOCK_B]
    target_factor = (1 - label_smoothing) * upstream  # [BLOCK_B]
    weight = tl.full([BLOCK_K], 1.0, tl.float32)
    total_weight = 0.0 + K  # a float, as the sum that may replace it
    if class_weight_ptr is not None:
        target_factor *= tl.load(class_weight_ptr + labels, mask=is_counted, other=0.0)  # [BLOCK_B]
        weight = tl.load(class_weight_ptr + rows_k)  # [BLOCK_K]
    if total_weight_ptr is not None:
        total_weight = tl.load(total_weight_ptr)  # []
    smoothing_factor = label_smoothing / K * upstream  # [BLOCK_B]

    # 3. Softmax from lse in fp64. The maximum that is subtracted need not be exact: lse/s is near enough.
    scale = tl.load(logit_scale_ptr).to(tl.float32)
    lse = tl.load(lse_ptr + rows_b)  # [BLOCK_B]
    # Near a scale of 0, where lse/s overflows, all logits are 0, and any number is near enough.
    near_0 = tl.abs(scale) < 1e-30
    top = tl.where(near_0, 0.0, lse / tl.where(near_0, 1.0, scale)).to(tl.float32)  # [BLOCK_B]
    log_sum = (lse - scale.to(tl.float64) * top.to(tl.float64)).to(tl.float32)
    p = tl.exp(scale * (cosine - top[:, None]) - log_sum[:, None])  # [BLOCK_B, BLOCK_K]
    # 4. d_z_bk
    is_target = rows_k[None, :] == labels.to(tl.int32)[:, None]  # [BLOCK_B, BLOCK_K]
    miss = p - is_target.to(tl.float32)  # p − 1 for the true class, in fp32
    # [BLOCK_B, BLOCK_K]
    d_logits = target_factor[:, None] * miss + smoothing_factor[:, None] * (total_weight * p - weight[None, :])
    d_logits = tl.where(is_counted[:, None] & mask_k[None, :], d_logits, 0.0)

    # 5. Factors of the matrix products, and the tile's part of d_s
    if factors_ptr is not None:
        factors = d_logits / tl.maximum(image_norm, eps)[:, None] / tl.maximum(text_norm, eps)[None, :]
        factors_row = factors_ptr + offs_b.to(tl.int64)[:, None] * stride_factors
        tl.store(factors_row + offs_k[None, :], factors, mask=mask_b[:, None] & mask_k[None, :])  # [BLOCK_B, BLOCK_K]
    if d_scale_ptr is not None:
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(d_scale_ptr + place, tl.sum(tl.sum(d_logits * cosine, axis=1), axis=0))


# ---- launches of the kernels -----------------------------------------------------------------------------------------


def _launch(*arguments: Any) -> tuple[Tensor, ...]:
    call = _as_read(Forward(*arguments))
    image, text, class_ids, smooth = call.image, call.text, call.class_ids, call.label_smoothing != 0
    B, C, K, device = len(image), len(text), unit_rows.sample_size(text, class_ids), image.device
    # 1. Softmax of each split of the classes
    options = launch_options("class_sampled_ce_fwd", image, B=B)
    b_blocks, tiles = triton.cdiv(B, options["BLOCK_B"]), triton.cdiv(K, options["BLOCK_K"])
    split_tiles = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, b_blocks)))
    splits = triton.cdiv(tiles, split_tiles)
    image_norm, text_norm = unit_rows.norms_for(image, text, class_ids, bool(options["MEASURE"]))  # [B], [K]
    partial = torch.empty(5 if smooth else 4, splits, B, dtype=torch.float32, device=device)  # [planes, splits, B]
    launch(
        _class_sampled_ce_fwd_kernel,
        (b_blocks, splits),
        device=device,
        debug=True,  # compiles the assertions, also below
        **options,
        **cosine_arguments(image, text, image_norm, text_norm),
        labels_ptr=call.labels,
        logit_scale_ptr=call.logit_scale,
        class_ids_ptr=class_ids,
        class_weight_ptr=call.class_weight,
        partial_ptr=partial,
        B=B,
        K=K,
        C=C,
        stride_partial=splits * B,
        SMOOTH=smooth,
        split_size=split_tiles * options["BLOCK_K"],
    )
    # 2. Loss, from the splits
    loss, lse, denominator = _combine(call, partial)
    return loss, lse, image_norm, text_norm, denominator, *_unused_kept(call)


def _combine(call: Forward, partial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, [B] or [], lse [B] in fp64, and the divisor of the summed loss."""
    (_, splits, B), device, reduction = partial.shape, partial.device, REDUCTIONS[call.reduction]
    loss = torch.empty((B,) if reduction == "none" else (), dtype=torch.float32, device=device)
    lse = torch.empty(B, dtype=torch.float64, device=device)
    denominator = torch.empty((), dtype=torch.float32, device=device)
    launch(
        _class_sampled_ce_fwd_combine_kernel,
        (1,),
        device=device,
        debug=True,
        labels_ptr=call.labels,
        logit_scale_ptr=call.logit_scale,
        class_weight_ptr=call.class_weight,
        total_weight_ptr=_total_weight(call),
        partial_ptr=partial,
        loss_ptr=loss,
        lse_ptr=lse,
        denominator_ptr=denominator,
        B=B,
        K=unit_rows.sample_size(call.text, call.class_ids),
        C=len(call.text),
        splits=splits,
        stride_partial=splits * B,
        label_smoothing=call.label_smoothing,
        ignore_index=call.ignore_index,
        SMOOTH=call.label_smoothing != 0,
        REDUCTION=reduction,
        **launch_options("class_sampled_ce_fwd_combine", partial),
    )
    return loss, lse, denominator


def _launch_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _as_read(Backward(*arguments))
    image_sums, text_sums, scale_parts = _launch_sums(call)
    # A single d_loss is a factor of the sums, over the divisor of the mean.
    upstream = () if REDUCTIONS[call.reduction] == "none" else (call.d_loss, call.denominator)
    d_image, d_text, d_logit_scale = (x.new_empty(0) for x in (call.image, call.text, call.logit_scale))
    if call.need_image:
        d_image = unit_rows.through_unit_norm(call.image, None, image_sums, call.logit_scale, *upstream)
    if call.need_text:
        d_text = unit_rows.through_unit_norm(call.text, call.class_ids, text_sums, call.logit_scale, *upstream)
    if call.need_logit_scale:
        d_logit_scale = unit_rows.total_of(scale_parts, torch.empty_like(call.logit_scale), *upstream)
    return d_image, d_text, d_logit_scale


def _launch_sums(call: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """Compute fp32 Σ_k G_bk t_k [B, D], Σ_b G_bk x_b [K, D] (see unit_rows.py), and parts of d_logit_scale."""
    (B, D), K, device = call.image.shape, unit_rows.sample_size(call.text, call.class_ids), call.image.device
    options = launch_options("class_sampled_ce_bwd_logits", call.image, B=B)
    BLOCK_B, BLOCK_K = options["BLOCK_B"], options["BLOCK_K"]
    size = min(triton.cdiv(max(PANEL // K, 1), BLOCK_B) * BLOCK_B, B)  # images of a panel
    image_sums = torch.empty(B if call.need_image else 0, D, dtype=torch.float32, device=device)
    text_sums = torch.empty(0, D, dtype=torch.float32, device=device)
    need_factors = call.need_image or call.need_text
    factors = torch.empty(
        size if need_factors else 0, K, dtype=unit_rows.factors_dtype(call.image.dtype), device=device
    )
    sampled = reference.sampled(call.text, call.class_ids if call.need_image else None)  # [K, D]
    total_weight = _total_weight(call)
    d_scale = torch.empty(0, dtype=torch.float32, device=device)
    if call.need_logit_scale:
        # [panels, tiles]; zeros, because the last panel may have fewer images and then does not write all elements.
        tiles = triton.cdiv(size, BLOCK_B) * triton.cdiv(K, BLOCK_K)
        d_scale = torch.zeros(triton.cdiv(B, size), tiles, dtype=torch.float32, device=device)

    for number, start in enumerate(range(0, B, size)):
        images = slice(start, min(start + size, B))
        panel = factors[: images.stop - start]  # [count, K]
        parts = d_scale[number] if call.need_logit_scale else None  # [tiles]
        _launch_logits(call, images, total_weight, panel if need_factors else None, parts)
        if call.need_image:
            product = contract(panel, sampled)  # [count, K] @ [K, D] -> [count, D]
            if size == B:
                image_sums = product
            else:
                image_sums[images] = product
        if call.need_text:
            product = contract(panel.T, call.image[images])  # [K, count] @ [count, D] -> [K, D]
            text_sums = product if number == 0 else text_sums.add_(product)
    return image_sums, text_sums, d_scale.flatten()


def _launch_logits(
    call: Backward, images: slice, total_weight: Tensor | None, factors: Tensor | None, d_scale: Tensor | None
) -> None:
    """Write the factors [count, K] of a panel of images, and the parts [tiles] of d_logit_scale."""
    count, K = images.stop - images.start, unit_rows.sample_size(call.text, call.class_ids)
    options = launch_options("class_sampled_ce_bwd_logits", call.image, B=len(call.image))
    d_loss = call.d_loss[images] if REDUCTIONS[call.reduction] == "none" else None  # of each image
    launch(
        _class_sampled_ce_bwd_logits_kernel,
        (triton.cdiv(K, options["BLOCK_K"]), triton.cdiv(count, options["BLOCK_B"])),
        device=call.image.device,
        **options,
        **cosine_arguments(call.image[images], call.text, call.image_norm[images], call.text_norm),
        d_loss_ptr=d_loss,
        labels_ptr=call.labels[images],
        logit_scale_ptr=call.logit_scale,
        class_ids_ptr=call.class_ids,
        class_weight_ptr=call.class_weight,
        total_weight_ptr=total_weight,
        lse_ptr=call.lse[images],
        factors_ptr=factors,
        d_scale_ptr=d_scale,
        B=count,
        K=K,
        stride_d_loss=0 if d_loss is None else d_loss.stride(0),
        stride_factors=K,
        label_smoothing=call.label_smoothing,
        ignore_index=call.ignore_index,
    )


def _as_read(call: AnyCall) -> AnyCall:
    """Make the inputs of a call as the kernels read them."""
    return call._replace(
        image=with_contiguous_rows(call.image),
        text=with_contiguous_rows(call.text),
        labels=call.labels.contiguous(),
        class_ids=contiguous_or_none(call.class_ids),
        class_weight=None if call.class_weight is None else call.class_weight.float().contiguous(),
    )


def _total_weight(call: Forward | Backward) -> Tensor | None:
    """Return Σ_k w_k, with smoothing and class weights; None if the kernels need none, or it is K."""
    if call.class_weight is None or call.label_smoothing == 0:
        return None
    return reference.sampled(call.class_weight, call.class_ids).sum()


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def _fallback(*arguments: Any) -> tuple[Tensor, ...]:
    call = Forward(*arguments)
    loss = _reference(call, call.image, call.text, call.logit_scale)
    logits = reference.class_sampled_logits(call.image, call.text, call.logit_scale, call.class_ids)
    lse = dtypes.in_accumulation_dtype(logits).logsumexp(dim=1)  # [B]
    image_norm, text_norm = unit_rows.reference_norms(call.image, call.text, call.class_ids)
    denominator = loss.new_ones(())
    if REDUCTIONS[call.reduction] == "mean":
        weight = image_norm.new_ones(len(call.text)) if call.class_weight is None else call.class_weight.to(loss.dtype)
        ignored = call.labels == call.ignore_index
        denominator = weight[call.labels.masked_fill(ignored, 0)].masked_fill(ignored, 0).sum()
    return loss, lse, image_norm, text_norm, denominator, *_unused_kept(call)


def _fallback_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Backward(*arguments)
    needs = call.need_image, call.need_text, call.need_logit_scale
    inputs = call.image, call.text, call.logit_scale
    return autograd.reference_gradients(functools.partial(_reference, call), inputs, needs, call.d_loss)


def _reference(call: Forward | Backward, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    options = call.class_ids, call.class_weight, call.label_smoothing, call.ignore_index, REDUCTIONS[call.reduction]
    return reference.class_sampled_ce(image, text, call.labels, logit_scale, *options)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = Forward(*arguments)
    B, K = call.image.shape[0], unit_rows.sample_size(call.text, call.class_ids)
    dtype = dtypes.wide_dtype(call.image.dtype)
    loss = call.image.new_empty((B,) if REDUCTIONS[call.reduction] == "none" else (), dtype=dtype)
    lse = call.image.new_empty(B, dtype=dtypes.accumulation_dtype(call.image.device))
    return loss, lse, loss.new_empty(B), loss.new_empty(K), loss.new_empty(()), *_unused_kept(call)


def _unused_kept(call: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate `kept_…`."""
    D, dtype = call.image.shape[1], dtypes.wide_dtype(call.image.dtype)
    B, K = call.image.shape[0], unit_rows.sample_size(call.text, call.class_ids)
    return (
        call.image.new_empty(B if call.keep_image else 0, D, dtype=dtype),
        call.image.new_empty(K if call.keep_text else 0, D, dtype=dtype),
        call.image.new_empty(int(call.keep_logit_scale), dtype=dtypes.accumulation_dtype(call.image.device)),
    )


# ---- registration ----------------------------------------------------------------------------------------------------


def _check(*arguments: Any) -> None:
    call, name = Forward(*arguments), "class_sampled_ce"
    C, labels, ignored = len(call.text), call.labels, call.labels == call.ignore_index
    unit_rows.check_sample(name, call.image, call.text, call.logit_scale, call.class_ids)
    expected = f"rows of text, 0 to {C - 1}, or ignore_index ({call.ignore_index})"
    check_values(name, "labels", labels, ignored | (labels >= 0) & (labels < C), expected)
    if call.class_ids is not None:
        kept = ignored | torch.isin(labels, call.class_ids)
        remedy = "Select the classes so that every label is kept."
        check_values(name, "labels", labels, kept, "among class_ids", remedy)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, (_, *statistics) = Forward(*inputs), output
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(
        call.image, call.text, call.labels, call.logit_scale, *statistics, call.class_ids, call.class_weight
    )
    ctx.options = call.label_smoothing, call.ignore_index, call.reduction


def _backward(ctx: Any, d_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    need_image, need_text, _, need_logit_scale, *_ = ctx.needs_input_grad
    d_image, d_text, d_logit_scale = class_sampled_ce_backward(
        d_loss, *ctx.saved_tensors, *ctx.options, need_image, need_text, need_logit_scale
    )
    return d_image, d_text, None, d_logit_scale


class_sampled_ce = registration.define(
    f"class_sampled_ce({registration.arguments_of(Forward)})"
    " -> (Tensor loss, Tensor lse, Tensor image_norm, Tensor text_norm, Tensor denominator,"
    " Tensor kept_image, Tensor kept_text, Tensor kept_logit_scale)",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
    check=_check,
    backward=autograd.GradientRule(_save, _backward),
    autocast_arguments=2,
)
class_sampled_ce_backward = registration.define(
    f"class_sampled_ce_backward({registration.arguments_of(Backward)})"
    " -> (Tensor d_image, Tensor d_text, Tensor d_logit_scale)",
    fallback=_fallback_backward,
    launch=_launch_backward,
)
