"""`class_sampled_ce`: cross-entropy of images against a sample of the rows of a class bank.

    z_bk   = s · ⟨x_b/|x_b|, t_k/|t_k|⟩
    loss_b = (1 − ε) · w_y · (lse_b − z_by) + ε/K · Σ_k w_k · (lse_b − z_bk),   lse_b = log Σ_k exp(z_bk)

Forward also returns what backward needs besides the inputs: lse [B], in fp64 (fp32 would round it by 4e-6 at a scale of
100, and every probability with it), and the lengths of the rows, [B] and [K]. Backward computes the logits again, a
bounded panel at a time; it computes only the gradients that are asked for, the others come back empty.

CPU kernel: csrc/class_sampled_ce.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import registration

# What follows image, text, labels and logit_scale in both schemas.
_OPTIONS = "Tensor? class_ids, Tensor? class_weight, float label_smoothing, int ignore_index, str reduction"


def _serve(
    image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, class_ids: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, ignore_index, _ = options
    if image.device.type == "cpu":  # a GPU is not made to wait: there a bad label ends in a device-side assertion
        _check_values(labels, text.shape[0], logit_scale, class_ids, ignore_index)
    loss = reference.class_sampled_ce(image, text, labels, logit_scale, class_ids, *options)
    lse = reference.class_sampled_logits(image, text, logit_scale, class_ids).double().logsumexp(dim=1)
    rows = text if class_ids is None else text.index_select(0, class_ids)
    image_norm, text_norm = (torch.linalg.vector_norm(x, dim=1, dtype=loss.dtype) for x in (image, rows))
    return loss, lse, image_norm, text_norm


def _serve_backward(
    d_loss: Tensor,
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    lse: Tensor,
    image_norm: Tensor,
    text_norm: Tensor,
    class_ids: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    need_image: bool,
    need_text: bool,
    need_logit_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, C = image_norm.dtype, text.shape[0]
    rows = torch.arange(C, device=text.device) if class_ids is None else class_ids
    K = rows.shape[0]
    place = rows.new_zeros(C).scatter(0, rows, torch.arange(K, device=rows.device))
    ignored = labels == ignore_index
    target = place[labels.masked_fill(ignored, 0)]
    weight = text_norm.new_ones(K) if class_weight is None else class_weight.to(wide)[rows]
    target_weight = weight[target].masked_fill(ignored, 0)

    # d_z = up · ((1 − ε) · w_y · (p − [k = y]) + ε/K · (W p − w_k)),   W = Σ_k w_k
    upstream = d_loss / target_weight.sum() if reduction == "mean" else d_loss
    upstream = upstream.expand(labels.shape).masked_fill(ignored, 0)
    hit = (1 - label_smoothing) * upstream * target_weight
    spread = label_smoothing / K * upstream
    unit_image = image.to(wide) / image_norm.clamp_min(reference.UNIT_NORM_EPS)[:, None]
    unit_text = text.to(wide)[rows] / text_norm.clamp_min(reference.UNIT_NORM_EPS)[:, None]
    cosine, scale = unit_image @ unit_text.T, logit_scale.reshape(()).to(wide)
    probability = (scale * cosine - lse[:, None]).exp().to(wide)
    d_logits = (hit + spread * weight.sum())[:, None] * probability - spread[:, None] * weight
    d_logits.scatter_add_(1, target[:, None], -hit[:, None])

    d_image, d_text, d_logit_scale = _nothing(image), _nothing(text), _nothing(logit_scale)
    if need_image:
        d_image = _through_unit_norm(scale * (d_logits @ unit_text), unit_image, image_norm).to(image.dtype)
    if need_text:
        d_rows = _through_unit_norm(scale * (d_logits.T @ unit_image), unit_text, text_norm)
        d_text = torch.zeros_like(text, memory_format=torch.contiguous_format)
        d_text[rows] = d_rows.to(text.dtype)
    if need_logit_scale:
        d_logit_scale = (d_logits * cosine).sum().to(logit_scale.dtype).reshape(logit_scale.shape)
    return d_image, d_text, d_logit_scale


def _through_unit_norm(d_unit: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """d_x = (d_unit − unit · ⟨unit, d_unit⟩)/|x|; a row shorter than eps was divided by a constant: d_unit/eps."""
    norm = norm[:, None]
    along = (unit * d_unit).sum(dim=1, keepdim=True).masked_fill(norm < reference.UNIT_NORM_EPS, 0)
    return (d_unit - unit * along) / norm.clamp_min(reference.UNIT_NORM_EPS)


def _nothing(like: Tensor) -> Tensor:
    """Stands for a gradient that nobody needs: an operator must return a tensor."""
    return like.new_empty((0, like.shape[1]) if like.dim() == 2 else (0,))


def _check_values(labels: Tensor, C: int, logit_scale: Tensor, class_ids: Tensor | None, ignore_index: int) -> None:
    """Refuse what the C++ kernel refuses."""
    name = "class_sampled_cross_entropy"
    if not logit_scale.isfinite().item():
        raise ValueError(f"{name}: logit_scale must be finite; got {logit_scale.item()}.")
    if class_ids is not None:
        if class_ids.amin() < 0 or class_ids.amax() >= C:
            raise ValueError(f"{name}: class_ids must be rows of text, 0 to {C - 1}; got {class_ids.tolist()}.")
        if class_ids.unique().numel() != class_ids.numel():
            raise ValueError(f"{name}: class_ids must have no duplicates; got {class_ids.tolist()}.")
    labels = labels[labels != ignore_index]
    wrong = labels[(labels < 0) | (labels >= C)]
    if wrong.numel() > 0:
        raise ValueError(
            f"{name}: labels must be rows of text, 0 to {C - 1}, or ignore_index ({ignore_index}); got {wrong[0]}."
        )
    if class_ids is not None:
        absent = labels[~torch.isin(labels, class_ids)]
        if absent.numel() > 0:
            raise ValueError(
                f"{name}: labels must be among class_ids; got {absent[0]}. "
                "Select the classes so that every label is kept."
            )


def _fake(
    image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, class_ids: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, reduction = options
    B, K = image.shape[0], (text if class_ids is None else class_ids).shape[0]
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    loss = image.new_empty((B,) if reduction == "none" else (), dtype=dtype)
    return loss, loss.new_empty(B, dtype=torch.float64), loss.new_empty(B), loss.new_empty(K)


def _fake_backward(
    d_loss: Tensor, image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    inputs, needs = (image, text, logit_scale), rest[-3:]
    return tuple(x.new_empty(x.shape) if need else _nothing(x) for x, need in zip(inputs, needs, strict=True))


class_sampled_ce = registration.define(
    f"class_sampled_ce(Tensor image, Tensor text, Tensor labels, Tensor logit_scale, {_OPTIONS})"
    " -> (Tensor loss, Tensor lse, Tensor image_norm, Tensor text_norm)",
    serve=_serve,
    fake=_fake,
)
class_sampled_ce_backward = registration.define(
    "class_sampled_ce_backward(Tensor d_loss, Tensor image, Tensor text, Tensor labels, Tensor logit_scale,"
    f" Tensor lse, Tensor image_norm, Tensor text_norm, {_OPTIONS},"
    " bool need_image, bool need_text, bool need_logit_scale)"
    " -> (Tensor d_image, Tensor d_text, Tensor d_logit_scale)",
    serve=_serve_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, labels, logit_scale, class_ids, class_weight, *ctx.options = inputs
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image, text, labels, logit_scale, *statistics, class_ids, class_weight)


def _backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    d_image = d_text = d_logit_scale = None
    if d_loss is not None:
        gradients = class_sampled_ce_backward(d_loss, *ctx.saved_tensors, *ctx.options, *needs)
        d_image, d_text, d_logit_scale = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return d_image, d_text, None, d_logit_scale, None, None, None, None, None


registration.differentiate(class_sampled_ce, _backward, _save)
registration.refuse_double_backward(class_sampled_ce_backward, instead="skipkernels.reference.class_sampled_ce")
registration.autocast_features(class_sampled_ce, features=2)
