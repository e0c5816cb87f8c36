"""`class_sampled_logits`: scaled cosines of images and a sample of the rows of a class bank.

    z_bk = s · ⟨x_b/|x_b|, t_k/|t_k|⟩

The logits are fp32 (fp64 for fp64). Saved for backward: the inputs and the norms of the rows, [B] and [K]. The gradient
of the scale, Σ d_z_bk · cosine_bk, recomputes the cosines.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dtypes, reference
from . import autograd, registration, unit_rows
from .assertions import assert_different_rows
from .launching import contiguous_or_none, launch, launch_options, tl, triton, with_contiguous_rows
from .unit_rows import contract, cosine_arguments, cosine_tile


class Backward(NamedTuple):
    """Arguments of the backward operator; its schema is made from them."""

    d_logits: Tensor  # [B, K]
    image: Tensor  # [B, D]
    text: Tensor  # [C, D]
    logit_scale: Tensor  # []
    image_norm: Tensor  # [B]
    text_norm: Tensor  # [K]
    class_ids: Tensor | None  # [K]
    need_image: bool
    need_text: bool
    need_logit_scale: bool


@triton.jit
def _class_sampled_logits_fwd_kernel(
    image_ptr,
    text_ptr,
    logit_scale_ptr,
    class_ids_ptr,
    image_norm_ptr,
    text_norm_ptr,
    logits_ptr,
    B,
    K,
    C,
    D,
    stride_image_b,
    stride_text_k,
    eps,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """z_bk = s · cosine_bk, with MEASURE also the norms. One program: a tile of BLOCK_B images and BLOCK_K classes."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b, mask_k = offs_b < B, offs_k < K
    places_k = tl.minimum(offs_k, K - 1)
    rows_k = places_k
    if class_ids_ptr is not None:
        if tl.program_id(1) == 0:
            begin = tl.program_id(0) * BLOCK_K
            assert_different_rows(
                class_ids_ptr, begin, tl.minimum(begin + BLOCK_K, K), K, C,
                "class_sampled_logits: class_ids must be different rows of text", BLOCK_K,
            )  # fmt: skip
        rows_k = tl.load(class_ids_ptr + places_k).to(tl.int32)  # [BLOCK_K]
        rows_k = tl.minimum(tl.maximum(rows_k, 0), C - 1)  # valid until the assertion stops the device
    # 1. Cosines and norms
    # [BLOCK_B, BLOCK_K], [BLOCK_B], [BLOCK_K]
    cosine, image_norm, text_norm = cosine_tile(
        image_ptr, text_ptr, image_norm_ptr, text_norm_ptr, tl.minimum(offs_b, B - 1), places_k, rows_k, D,
        stride_image_b, stride_text_k, eps, BLOCK_B, BLOCK_K, BLOCK_D, PRECISION, MEASURE,
    )  # fmt: skip
    if MEASURE:
        if tl.program_id(1) == 0:
            tl.store(text_norm_ptr + offs_k, text_norm, mask=mask_k)  # [BLOCK_K]
        if tl.program_id(0) == 0:
            tl.store(image_norm_ptr + offs_b, image_norm, mask=mask_b)  # [BLOCK_B]
    # 2. Logits
    logits = tl.load(logit_scale_ptr).to(tl.float32) * cosine  # [BLOCK_B, BLOCK_K]
    logits_row = logits_ptr + offs_b.to(tl.int64)[:, None] * K
    tl.store(logits_row + offs_k[None, :], logits, mask=mask_b[:, None] & mask_k[None, :])  # [BLOCK_B, BLOCK_K]


# ---- launches of the kernels -----------------------------------------------------------------------------------------


def _launch(
    image: Tensor, text: Tensor, logit_scale: Tensor, class_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    image, text = with_contiguous_rows(image), with_contiguous_rows(text)
    class_ids = contiguous_or_none(class_ids)
    B, K, device = image.shape[0], unit_rows.sample_size(text, class_ids), image.device
    options = launch_options("class_sampled_logits_fwd", image, B=B)
    image_norm, text_norm = unit_rows.norms_for(image, text, class_ids, bool(options["MEASURE"]))
    logits = torch.empty(B, K, dtype=torch.float32, device=device)
    launch(
        _class_sampled_logits_fwd_kernel,
        (triton.cdiv(K, options["BLOCK_K"]), triton.cdiv(B, options["BLOCK_B"])),
        device=device,
        debug=True,  # compiles the assertions
        **options,
        **cosine_arguments(image, text, image_norm, text_norm),
        logit_scale_ptr=logit_scale,
        class_ids_ptr=class_ids,
        logits_ptr=logits,
        B=B,
        K=K,
        C=text.shape[0],
    )
    return logits, image_norm, text_norm


def _launch_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Backward(*arguments)
    image, text, logit_scale = with_contiguous_rows(call.image), with_contiguous_rows(call.text), call.logit_scale
    class_ids = contiguous_or_none(call.class_ids)
    d_image, d_text, d_logit_scale = (x.new_empty(0) for x in (image, text, logit_scale))
    if call.need_image or call.need_text:
        image_norm, text_norm = (x.clamp_min(reference.UNIT_NORM_EPS) for x in (call.image_norm, call.text_norm))
        factors = call.d_logits / image_norm[:, None] / text_norm  # [B, K]
        factors = factors.to(unit_rows.factors_dtype(image.dtype))
        if call.need_image:
            # [B, K] @ [K, D] -> [B, D]
            sums = contract(factors, reference.sampled(text, class_ids))
            d_image = unit_rows.through_unit_norm(image, None, sums, logit_scale)
        if call.need_text:
            # [K, B] @ [B, D] -> [K, D]
            d_text = unit_rows.through_unit_norm(text, class_ids, contract(factors.T, image), logit_scale)
    if call.need_logit_scale:
        cosine, *_ = _launch(image, text, torch.ones_like(logit_scale), class_ids)
        d_logit_scale = _d_logit_scale(call.d_logits, cosine, logit_scale)
    return d_image, d_text, d_logit_scale


def _d_logit_scale(d_logits: Tensor, cosine: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute Σ d_z_bk · cosine_bk in fp64 if the device has it, since the terms cancel."""
    total = (d_logits * cosine).sum(dtype=dtypes.accumulation_dtype(cosine.device))
    return total.to(logit_scale.dtype).reshape(logit_scale.shape)


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def _fallback(
    image: Tensor, text: Tensor, logit_scale: Tensor, class_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits = reference.class_sampled_logits(image, text, logit_scale, class_ids)
    image_norm, text_norm = unit_rows.reference_norms(image, text, class_ids)
    return logits, image_norm, text_norm


def _fallback_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Backward(*arguments)
    d_image, d_text = autograd.reference_gradients(
        lambda image, text: reference.class_sampled_logits(image, text, call.logit_scale, call.class_ids),
        (call.image, call.text),
        (call.need_image, call.need_text),
        call.d_logits,
    )
    d_logit_scale = call.logit_scale.new_empty(0)
    if call.need_logit_scale:  # autograd of the reference sums in fp32
        cosine = reference.class_sampled_logits(call.image, call.text, 1.0, call.class_ids)
        d_logit_scale = _d_logit_scale(call.d_logits, cosine, call.logit_scale)
    return d_image, d_text, d_logit_scale


def _fake(image: Tensor, text: Tensor, logit_scale: Tensor, class_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    B, K = image.shape[0], unit_rows.sample_size(text, class_ids)
    logits = image.new_empty(B, K, dtype=dtypes.wide_dtype(image.dtype))
    return logits, logits.new_empty(B), logits.new_empty(K)


# ---- registration ----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, logit_scale, class_ids = inputs
    _, image_norm, text_norm = output
    ctx.mark_non_differentiable(image_norm, text_norm)
    ctx.save_for_backward(image, text, logit_scale, image_norm, text_norm, class_ids)


def _backward(ctx: Any, d_logits: Tensor, *_: None) -> tuple[Tensor, ...]:
    return class_sampled_logits_backward(d_logits, *ctx.saved_tensors, *ctx.needs_input_grad[:3])


class_sampled_logits = registration.define(
    "class_sampled_logits(Tensor image, Tensor text, Tensor logit_scale, Tensor? class_ids)"
    " -> (Tensor logits, Tensor image_norm, Tensor text_norm)",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
    check=functools.partial(unit_rows.check_sample, "class_sampled_logits"),
    backward=autograd.GradientRule(_save, _backward),
    autocast_arguments=2,
)
class_sampled_logits_backward = registration.define(
    f"class_sampled_logits_backward({registration.arguments_of(Backward)})"
    " -> (Tensor d_image, Tensor d_text, Tensor d_logit_scale)",
    fallback=_fallback_backward,
    launch=_launch_backward,
)
