"""Cross-entropy of all images over the classes of all processes, from two or three numbers of each image."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

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

    Args:
        image: [B, D] image embeddings of all processes.
        text: [K_r, D] text embeddings of the selected classes of this process; any one row if K_r = 0.
        selection: These classes, and the labels.
        logit_scale: Factor of the cosines.
        group: The processes.
        class_weight: [K] weights w of all selected classes; by default 1.
        label_smoothing: ε.
    """
    none = selection.class_ids if len(selection.class_ids) == 0 else None
    shares = list(functional.class_sampled_lse(image, text, selection.labels, logit_scale, class_ids=none))
    if label_smoothing > 0:
        every = image.new_ones(selection.kept) if class_weight is None else class_weight
        own_weight = every[selection.positions]
        shares.append(_weighted_logits(image, text[: len(own_weight)], own_weight, logit_scale))
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
    return (loss.sum() / total).to(torch.float64 if image.dtype == torch.float64 else torch.float32)


def _weighted_logits(image: Tensor, text: Tensor, weight: Tensor, logit_scale: Tensor) -> Tensor:
    """Σ_k w_k z_bk, [B] fp64, as one product with a weighted sum of texts."""
    with torch.autocast(image.device.type, enabled=False):
        image, text = normalize(image.double(), dim=1), normalize(text.double(), dim=1)
        return logit_scale * (image @ (weight.double() @ text))
