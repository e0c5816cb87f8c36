"""Losses of the images of all processes: each process computes its share from the texts that it encodes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from .. import functional
from .class_parallel import OwnSelection
from .gathers import gather_shares


def sharded_cross_entropy(
    image: Tensor,
    text: Tensor,
    selection: OwnSelection,
    logit_scale: Tensor,
    group: dist.ProcessGroup,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy [] of the images of all processes over the selected classes of all; collective.

        loss_b = (1 − ε) · w_y · (lse_b − target_b) + ε/K · (lse_b · Σ_k w_k − smooth_b),
        lse_b = log Σ_r exp(lse_rb),   target_b = Σ_r target_rb,   smooth_b = Σ_r Σ_k w_k · z_bk over k of process r

    This is the loss of `functional.class_sampled_ce`. Sums over processes are in the order of ranks, so that every
    process has the same loss to the bit. Gradients are W times the share of this process, see `gather_shares`.

    `image` [B, D] are those of all processes; `text` [K_r, D] those of the selected classes of this process, any one
    row if K_r = 0; `class_weight` w is [K].
    """
    # 1. Own part: log-sum-exp and logit of the label of each image over the own classes, [B] each
    none = selection.class_ids if len(selection.class_ids) == 0 else None
    shares = list(functional.class_sampled_lse(image, text, selection.labels, logit_scale, class_ids=none))
    if label_smoothing > 0:
        every = image.new_ones(selection.kept) if class_weight is None else class_weight
        own_weight = every[selection.positions]
        shares.append(_weighted_logits(image, text[: len(own_weight)], own_weight, logit_scale))
    # 2. Parts of all processes in the order of ranks; then the losses of all images, [B]
    lse, target, *smooth = gather_shares(torch.stack(shares), group).unbind(1)  # [W, B] each
    lse = lse.logsumexp(0)
    loss = lse - target.sum(0)
    if class_weight is not None:
        loss = class_weight[selection.targets] * loss
    for share in smooth:
        weights = 1.0 if class_weight is None else class_weight.mean()
        loss = (1 - label_smoothing) * loss
        loss = loss + label_smoothing * (lse * weights - share.sum(0) / selection.kept)
    total = len(loss) if class_weight is None else class_weight[selection.targets].sum()
    return (loss.sum() / total).to(_dtype(image))


def replicated_cross_entropy(
    image: Tensor,
    text: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    group: dist.ProcessGroup,
    total: Tensor | int,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of `sharded_cross_entropy`, from one message of one number; each process has all embeddings; collective.

    `image` [b, D] are those of this process, b may be 0; `text` [K, D] of all selected classes; `targets` [b] positions
    in `text`; `total` is the divisor of the mean: all images, or the sum of the weights of their labels.
    """
    if len(image) == 0:
        share = (image.sum() + text[:0].sum()) * logit_scale
    else:
        share = functional.class_sampled_ce(
            image,
            text,
            targets,
            logit_scale,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
    return (_sum_over_processes(share, group) / total).to(_dtype(image))


def sharded_contrastive_loss(
    image: Tensor, text: Tensor, own: Tensor, logit_scale: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Symmetric contrastive loss [] of the pairs of all processes, see `functional.contrastive_loss`; collective.

    `image` [B, D] are those of all processes; `text` [n, D] the captions that this process encodes, of the pairs `own`
    [n], ascending; any one row if n = 0. Images to texts is a cross-entropy over texts that are shared out. Texts to
    images needs no message of text embeddings, since each process has the gathered images.
    """
    pairs, labels = torch.arange(len(image), device=image.device), own.new_full((len(image),), -1)
    labels[own] = torch.arange(len(own), device=image.device)
    selection = OwnSelection(own, labels, own, pairs, len(pairs))
    image_to_text = sharded_cross_entropy(image, text, selection, logit_scale, group)
    if len(own) == 0:
        share = (image[:0].sum() + text[:0].sum()) * logit_scale
    else:
        share = functional.class_sampled_ce(text, image, own, logit_scale, reduction="sum")
    return (image_to_text + (_sum_over_processes(share, group) / len(pairs)).to(_dtype(image))) / 2


def sharded_binary_cross_entropy(
    image: Tensor, text: Tensor, targets: Tensor, bias: Tensor | float, scale: Tensor, elements: int, group: Any
) -> Tensor:
    """Mean binary cross-entropy [] of images and classes; each process has a part of the pairs; collective.

    `image` [b, D]; `text` [k, D], any one row if k = 0; `targets` bool [b, k]; `elements` is the number of pairs of all
    processes.
    """
    if targets.numel() == 0:
        share = (image[:0].sum() + text[:0].sum()) * scale + 0.0 * bias
    else:
        logits = functional.class_sampled_logits(image, text, scale) + bias
        share = binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return (_sum_over_processes(share, group) / elements).to(_dtype(image))


def _sum_over_processes(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of one number of each process, in fp64 and in the order of ranks; see `gather_shares`."""
    return gather_shares(share.double(), group).sum()


def _dtype(image: Tensor) -> torch.dtype:
    return torch.float64 if image.dtype == torch.float64 else torch.float32


def _weighted_logits(image: Tensor, text: Tensor, weight: Tensor, logit_scale: Tensor) -> Tensor:
    """Σ_k w_k z_bk, [B] fp64, as one product with a weighted sum of texts."""
    with torch.autocast(image.device.type, enabled=False):
        image, text = normalize(image.double(), dim=1), normalize(text.double(), dim=1)
        return logit_scale * (image @ (weight.double() @ text))
