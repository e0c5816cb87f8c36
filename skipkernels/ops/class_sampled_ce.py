"""`class_sampled_ce`: cross-entropy of images against a sample of the rows of a class bank.

    z_bk   = s · ⟨x_b/|x_b|, t_k/|t_k|⟩
    loss_b = (1 − ε) · w_y · (lse_b − z_by) + ε/K · Σ_k w_k · (lse_b − z_bk),   lse_b = log Σ_k exp(z_bk)

Forward also returns what backward needs besides the inputs: lse [B], in fp64 (fp32 would round it by 4e-6 at a scale of
100, and every probability with it), the lengths of the rows, [B] and [K], and what the sum of the losses was divided
by. Backward computes the logits again, a bounded panel at a time; it computes only the gradients that are asked for,
the others come back empty.

On the CPU a matrix product costs more than anything else, and one of four is saved if the gradients are computed while
the logits are there: with `keep_…`, which a mean or a sum allows, forward returns the gradients of the unit rows, up to
the factors logit_scale and d_loss, in fp32 [B, D] and [K, D] (fp64 for fp64), and backward only takes them through the
unit norm. What is not kept comes back empty.

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
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    class_ids: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    keep_image: bool,
    keep_text: bool,
    keep_logit_scale: bool,
) -> tuple[Tensor, ...]:
    if image.device.type == "cpu":  # a GPU is not made to wait: there a bad label ends in a device-side assertion
        _check_values(labels, text.shape[0], logit_scale, class_ids, ignore_index)
    options = class_ids, class_weight, label_smoothing, ignore_index, reduction
    loss = reference.class_sampled_ce(image, text, labels, logit_scale, *options)
    lse = reference.class_sampled_logits(image, text, logit_scale, class_ids).double().logsumexp(dim=1)
    rows = text if class_ids is None else text.index_select(0, class_ids)
    image_norm, text_norm = (torch.linalg.vector_norm(x, dim=1, dtype=loss.dtype) for x in (image, rows))
    denominator = loss.new_ones(())
    if reduction == "mean":
        weight = image_norm.new_ones(text.shape[0]) if class_weight is None else class_weight.to(loss.dtype)
        ignored = labels == ignore_index
        denominator = weight[labels.masked_fill(ignored, 0)].masked_fill(ignored, 0).sum()
    keep = keep_image, keep_text, keep_logit_scale
    saved = image, text, labels, logit_scale, lse, image_norm, text_norm, denominator
    return loss, *saved[4:], *_unit_gradients(torch.ones_like(loss), *saved, *options, *keep)


def _unit_gradients(
    d_loss: Tensor,
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    lse: Tensor,
    image_norm: Tensor,
    text_norm: Tensor,
    denominator: Tensor,
    class_ids: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    need_image: bool,
    need_text: bool,
    need_logit_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the unit rows, up to the factor logit_scale, and of the scale, in fp64."""
    wide, C = image_norm.dtype, text.shape[0]
    rows = torch.arange(C, device=text.device) if class_ids is None else class_ids
    K = rows.shape[0]
    place = rows.new_zeros(C).scatter(0, rows, torch.arange(K, device=rows.device))
    ignored = labels == ignore_index
    target = place[labels.masked_fill(ignored, 0)]
    weight = text_norm.new_ones(K) if class_weight is None else class_weight.to(wide)[rows]

    # d_z = up · ((1 − ε) · w_y · (p − [k = y]) + ε/K · (W p − w_k)),   W = Σ_k w_k
    upstream = (d_loss / denominator).expand(labels.shape).masked_fill(ignored, 0)
    hit = (1 - label_smoothing) * upstream * weight[target]
    spread = label_smoothing / K * upstream
    unit_image = image.to(wide) / image_norm.clamp_min(reference.UNIT_NORM_EPS)[:, None]
    unit_text = text.to(wide)[rows] / text_norm.clamp_min(reference.UNIT_NORM_EPS)[:, None]
    cosine, scale = unit_image @ unit_text.T, logit_scale.reshape(()).to(wide)
    probability = (scale * cosine - lse[:, None]).exp().to(wide)
    d_logits = (hit + spread * weight.sum())[:, None] * probability - spread[:, None] * weight
    d_logits.scatter_add_(1, target[:, None], -hit[:, None])
    return (
        d_logits @ unit_text if need_image else image_norm.new_empty(0, image.shape[1]),
        d_logits.T @ unit_image if need_text else image_norm.new_empty(0, image.shape[1]),
        (d_logits * cosine).sum(dtype=torch.float64).view(1) if need_logit_scale else lse.new_empty(0),
    )


def _serve_backward(
    d_loss: Tensor,
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    lse: Tensor,
    image_norm: Tensor,
    text_norm: Tensor,
    denominator: Tensor,
    kept_image: Tensor,
    kept_text: Tensor,
    kept_logit_scale: Tensor,
    class_ids: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = need_image, need_text, need_logit_scale = rest[-3:]
    kept = kept_image, kept_text, kept_logit_scale
    factor = d_loss
    if any(need and x.numel() == 0 for need, x in zip(needs, kept, strict=True)):
        saved = image, text, labels, logit_scale, lse, image_norm, text_norm, denominator
        kept = _unit_gradients(d_loss, *saved, class_ids, *rest)
        factor = torch.ones_like(denominator)
    scale = logit_scale.reshape(()).to(image_norm.dtype)
    d_image, d_text, d_logit_scale = _nothing(image), _nothing(text), _nothing(logit_scale)
    if need_image:
        d_image = _through_unit_norm(factor * scale * kept[0], image, image_norm)
    if need_text:
        rows = text if class_ids is None else text[class_ids]
        d_rows = _through_unit_norm(factor * scale * kept[1], rows, text_norm)
        d_text = d_rows if class_ids is None else torch.zeros_like(text, memory_format=torch.contiguous_format)
        if class_ids is not None:
            d_text[class_ids] = d_rows
    if need_logit_scale:
        d_logit_scale = (factor * kept[2]).to(logit_scale.dtype).reshape(logit_scale.shape)
    return d_image, d_text, d_logit_scale


def _through_unit_norm(d_unit: Tensor, rows: Tensor, norm: Tensor) -> Tensor:
    """d_x = (d_unit − unit · ⟨unit, d_unit⟩)/|x|; a row shorter than eps was divided by a constant: d_unit/eps."""
    norm = norm[:, None]
    length = norm.clamp_min(reference.UNIT_NORM_EPS)
    unit = rows.to(norm.dtype) / length
    along = (unit * d_unit).sum(dim=1, keepdim=True).masked_fill(norm < reference.UNIT_NORM_EPS, 0)
    return ((d_unit - unit * along) / length).to(rows.dtype)


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
) -> tuple[Tensor, ...]:
    *_, reduction, keep_image, keep_text, keep_logit_scale = options
    (B, D), K = image.shape, (text if class_ids is None else class_ids).shape[0]
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    loss = image.new_empty((B,) if reduction == "none" else (), dtype=dtype)
    lse = image.new_empty(B, dtype=torch.float64)
    kept = loss.new_empty(B * keep_image, D), loss.new_empty(K * keep_text, D), lse.new_empty(int(keep_logit_scale))
    return loss, lse, loss.new_empty(B), loss.new_empty(K), loss.new_empty(()), *kept


def _fake_backward(
    d_loss: Tensor, image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    inputs, needs = (image, text, logit_scale), rest[-3:]
    return tuple(x.new_empty(x.shape) if need else _nothing(x) for x, need in zip(inputs, needs, strict=True))


class_sampled_ce = registration.define(
    f"class_sampled_ce(Tensor image, Tensor text, Tensor labels, Tensor logit_scale, {_OPTIONS},"
    " bool keep_image, bool keep_text, bool keep_logit_scale)"
    " -> (Tensor loss, Tensor lse, Tensor image_norm, Tensor text_norm, Tensor denominator,"
    " Tensor kept_image, Tensor kept_text, Tensor kept_logit_scale)",
    serve=_serve,
    fake=_fake,
)
class_sampled_ce_backward = registration.define(
    "class_sampled_ce_backward(Tensor d_loss, Tensor image, Tensor text, Tensor labels, Tensor logit_scale,"
    " Tensor lse, Tensor image_norm, Tensor text_norm, Tensor denominator,"
    f" Tensor kept_image, Tensor kept_text, Tensor kept_logit_scale, {_OPTIONS},"
    " bool need_image, bool need_text, bool need_logit_scale)"
    " -> (Tensor d_image, Tensor d_text, Tensor d_logit_scale)",
    serve=_serve_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, labels, logit_scale, class_ids, class_weight, *options = inputs
    ctx.options = options[:3]
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
    return d_image, d_text, None, d_logit_scale, *[None] * 8


registration.differentiate(class_sampled_ce, _backward, _save)
registration.refuse_double_backward(class_sampled_ce_backward, instead="skipkernels.reference.class_sampled_ce")
registration.autocast_features(class_sampled_ce, features=2)
