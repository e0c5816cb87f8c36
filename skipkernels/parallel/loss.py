"""Cross-entropy of all images over the classes of all processes, from [B, 2] numbers of each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import functional
from .gathers import gather_shares


def sharded_cross_entropy(
    image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, group: dist.ProcessGroup, class_ids: Tensor | None
) -> Tensor:
    """Mean cross-entropy [] of the images of all processes over the selected classes of all; collective.

        loss = 1/B · Σ_b (log Σ_r exp(lse_rb) − Σ_r target_rb)

    The sums are in the order of ranks, so that every process has the same loss to the bit. Gradients are W times the
    share of this process, see `gather_shares`.

    Args:
        image: [B, D] image embeddings of all processes.
        text: [n, D] text embeddings of classes of this process.
        labels: [B] int64, rows of `text`, or −1 if another process owns the class.
        logit_scale: Factor of the cosines.
        group: The processes.
        class_ids: [K_r] int64, rows of `text` that are selected, none if K_r = 0; None for all.
    """
    lse, target = _class_sampled_lse(image, text, labels, logit_scale, class_ids=class_ids)
    lse, target = gather_shares(torch.stack([lse, target]), group).unbind(1)  # [W, B]
    loss = (lse.logsumexp(0) - target.sum(0)).mean()
    return loss.to(torch.float64 if image.dtype == torch.float64 else torch.float32)


def _class_sampled_lse(
    image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor, *, class_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [B] of the logits of the sampled classes, and the logit [B] of the label or 0, in fp64."""
    logits = functional.class_sampled_logits(image, text, logit_scale).double()
    sampled = logits if class_ids is None else logits[:, class_ids]
    target = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return sampled.logsumexp(1), torch.where(labels >= 0, target, 0.0)
