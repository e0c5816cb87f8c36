"""`class_sampled_lse`: log-sum-exp over the classes of one process, and the logit of the label, for each image.

    z_bk     = s · ⟨x_b/|x_b|, t_k/|t_k|⟩
    lse_b    = log Σ_k exp(z_bk),   target_b = z_by, or 0 if another process has the class of the label
    d_z_bk   = d_lse_b · exp(z_bk − lse_b) + d_target_b · [k = y]

Both results are fp64, see `functional.class_sampled_lse`. Saved for backward: the inputs, lse [B], the norms of the
rows, [B] and [K]. On a GPU only the kernel that combines the splits differs from those of `class_sampled_ce`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import registration
from .class_sampled_ce import (
    BLOCK_COMBINE,
    REDUCTIONS,
    Needs,
    Options,
    Saved,
    check_sample,
    combine_splits,
    launch_gradients,
    launch_splits,
    lse_of,
)
from .launching import launch, tl, triton
from .unit_rows import reference_norms

ELSEWHERE = -1  # label of a class of another process
NO_LABEL = -2  # ignore_index that no label equals: every image has a log-sum-exp


@triton.jit
def _class_sampled_lse_fwd_combine_kernel(
    labels_ptr,
    logit_scale_ptr,
    class_ids_ptr,
    partial_ptr,
    lse_ptr,
    target_ptr,
    B,
    K,
    C,
    splits,
    stride_partial,
    ELSEWHERE: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """lse_b = |s| · top_b + log(sum_b) over all splits, and z_by. One program: BLOCK images and BLOCK class ids."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_b = offs < B
    scale = tl.load(logit_scale_ptr).to(tl.float32)
    magnitude = tl.abs(scale)
    # 1. Range of class_ids
    if class_ids_ptr is not None:
        ids = tl.load(class_ids_ptr + offs, mask=offs < K, other=0)  # [BLOCK]
        tl.device_assert((ids >= 0) & (ids < C), "class_sampled_lse: class_ids must be rows of text")
    # 2. Combine the splits
    top, exp_sum, target, found, _ = combine_splits(
        partial_ptr, offs, mask_b, B, splits, stride_partial, magnitude, SMOOTH, BLOCK
    )  # [BLOCK] each
    # 3. lse_b and z_by in fp64
    labels = tl.load(labels_ptr + offs, mask=mask_b, other=ELSEWHERE)  # [BLOCK]
    tl.device_assert(
        ((labels >= 0) & (labels < C) & (found == 1)) | (labels == ELSEWHERE),
        "class_sampled_lse: labels must be rows of text and among class_ids, which have no duplicates, or -1",
    )
    target = tl.where(labels == ELSEWHERE, 0.0, target)
    tl.store(lse_ptr + offs, lse_of(magnitude, top, tl.log(exp_sum)), mask=mask_b)  # [BLOCK]
    tl.store(target_ptr + offs, magnitude.to(tl.float64) * target.to(tl.float64), mask=mask_b)  # [BLOCK]


def _options(class_ids: Tensor | None) -> Options:
    return Options(class_ids, None, 0.0, NO_LABEL, REDUCTIONS.index("none"))


def _launch(
    image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, class_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image_norm, text_norm, arguments = launch_splits(image, text, labels, logit_scale, _options(class_ids))
    del arguments["class_weight_ptr"], arguments["total_weight_ptr"]
    B, K, device = arguments["B"], arguments["K"], image.device
    lse, target = (torch.empty(B, dtype=torch.float64, device=device) for _ in range(2))
    launch(
        _class_sampled_lse_fwd_combine_kernel,
        (triton.cdiv(B if class_ids is None else max(B, K), BLOCK_COMBINE),),
        device=device,
        num_warps=4,
        debug=True,
        **arguments,
        lse_ptr=lse,
        target_ptr=target,
        ELSEWHERE=ELSEWHERE,
    )
    return lse, target, image_norm, text_norm


def _launch_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved, (d_lse, d_target, class_ids) = Saved(*arguments[:7]), arguments[7:10]
    return launch_gradients(d_lse, d_target, saved, _options(class_ids), Needs(*arguments[10:]))


def check(image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, class_ids: Tensor | None) -> None:
    """Raise ValueError for values that the C++ kernel refuses."""
    meaning = "a class of another process"
    check_sample("class_sampled_lse", text, labels, logit_scale, class_ids, ELSEWHERE, meaning)


def _fallback(
    image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, class_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, target = reference.class_sampled_lse(image, text, labels, logit_scale, class_ids)
    image_norm, text_norm = reference_norms(image, text, class_ids)
    return lse, target, image_norm, text_norm


def _fallback_backward(*arguments: Any) -> tuple[Tensor, ...]:
    image, text, labels, logit_scale, _, _, _, d_lse, d_target, class_ids, *needs = arguments

    def forward(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        return torch.stack(reference.class_sampled_lse(image, text, labels, logit_scale, class_ids))

    upstream = torch.stack([d_lse, d_target])
    return registration.reference_gradients(forward, (image, text, logit_scale), needs, upstream)


def _fake(
    image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, class_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, K = image.shape[0], (text if class_ids is None else class_ids).shape[0]
    dtype = torch.promote_types(image.dtype, torch.float32)
    lse, target = (image.new_empty(B, dtype=reference.accumulation_dtype(image.device)) for _ in range(2))
    return lse, target, image.new_empty(B, dtype=dtype), image.new_empty(K, dtype=dtype)


def _fake_backward(image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return registration.gradients_like((image, text, logit_scale), rest[-3:])


class_sampled_lse = registration.define(
    "class_sampled_lse(Tensor image, Tensor text, Tensor labels, Tensor logit_scale, Tensor? class_ids)"
    " -> (Tensor lse, Tensor target, Tensor image_norm, Tensor text_norm)",
    fallback=_fallback,
    launch=_launch,
    check=check,
    fake=_fake,
)
# The image first: its dtype chooses the implementation, and upstream gradients are fp64.
class_sampled_lse_backward = registration.define(
    "class_sampled_lse_backward(Tensor image, Tensor text, Tensor labels, Tensor logit_scale,"
    " Tensor lse, Tensor image_norm, Tensor text_norm, Tensor d_lse, Tensor d_target, Tensor? class_ids,"
    " bool need_image, bool need_text, bool need_logit_scale)"
    " -> (Tensor d_image, Tensor d_text, Tensor d_logit_scale)",
    fallback=_fallback_backward,
    launch=_launch_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, labels, logit_scale, class_ids = inputs
    lse, _, *norms = output
    ctx.mark_non_differentiable(*norms)
    ctx.set_materialize_grads(False)  # those of the norms would be memory and launches
    ctx.save_for_backward(image, text, labels, logit_scale, lse, *norms, class_ids)


def _backward(ctx: Any, d_lse: Tensor | None, d_target: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_lse is None and d_target is None:
        return ()
    *saved, class_ids = ctx.saved_tensors
    upstream = [torch.zeros_like(saved[4]) if x is None else x for x in (d_lse, d_target)]
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    d_image, d_text, d_logit_scale = class_sampled_lse_backward(*saved, *upstream, class_ids, *needs)
    return d_image, d_text, None, d_logit_scale


registration.differentiate(class_sampled_lse, _backward, _save)
registration.refuse_double_backward(class_sampled_lse_backward, instead="skipkernels.reference.class_sampled_lse")
registration.autocast_features(class_sampled_lse, features=2)
