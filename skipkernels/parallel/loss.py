"""Losses over the images of all processes; each process computes its share from the texts that it encodes.

A process without such a text has the row of another in `text`, so that every parameter has a gradient; its share is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from .. import functional
from ..dtypes import wide_dtype, widened
from .gathers import filled, gather_shares


class OwnColumns(NamedTuple):
    """Columns of the logits [B, K] that one process computes: selected classes, or captions."""

    positions: Tensor  # [K_r] int64, of its columns among all, ascending
    targets: Tensor  # [B] int64, positions of the labels among all columns
    number: int  # K


def sharded_cross_entropy(
    image: Tensor,
    text: Tensor,
    own: OwnColumns,
    logit_scale: Tensor,
    group: dist.ProcessGroup,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy [] of the images of all processes over the selected classes of all; collective.

    The loss of `functional.class_sampled_ce`: its log-sum-exp, the label's logit z_by and the sum of w_k · z_bk are
    combined from those of the processes, in the order of ranks, so that the loss is bitwise equal on all. Gradients
    are multiplied by the number of processes, as `gather_shares` explains. The logits [B, K_r] of this process are
    in memory, in fp64: their differences nearly cancel.

    `image` is [B, D], images of all processes; `text` [K_r, D], selected classes of this process; `class_weight` [K],
    w of all selected classes.
    """
    # 1. Share of this process: log-sum-exp over its classes, and logit of the label or 0, [B] each
    logits = widened(functional.class_sampled_logits(image, text, logit_scale))
    logits = logits[:, : len(own.positions)]  # [B, K_r]: no column of `text` if K_r = 0
    labels = _places_of(own.positions, own.number)[own.targets]  # [K] -> [B]
    target = pad(logits, (1, 0)).gather(1, labels[:, None] + 1)  # column 0 is for the label −1
    shares = [logits.logsumexp(1), target.squeeze(1)]
    if label_smoothing > 0:
        all_weights = image.new_ones(own.number) if class_weight is None else class_weight  # [K]
        shares.append(logits @ widened(all_weights[own.positions]))
    # 2. Shares of all processes, [processes, B] each, combined into the loss of each image, [B]
    lse, target, *smooth = gather_shares(torch.stack(shares), group).unbind(1)
    lse = lse.logsumexp(0)
    loss = lse - target.sum(0)
    if class_weight is not None:
        loss = class_weight[own.targets] * loss
    if label_smoothing > 0:
        mean_weight = 1.0 if class_weight is None else class_weight.mean()
        loss = (1 - label_smoothing) * loss
        loss = loss + label_smoothing * (lse * mean_weight - smooth[0].sum(0) / own.number)
    # 3. Mean, weighted by the class of each image
    total = len(loss) if class_weight is None else class_weight[own.targets].sum()
    return (loss.sum() / total).to(wide_dtype(image.dtype))


def sharded_contrastive_loss(
    image: Tensor, text: Tensor, own: Tensor, logit_scale: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Symmetric contrastive loss [] of the pairs of all processes, see `functional.contrastive_loss`; collective.

    `image` is [B, D], images of all processes; `text` [n, D], captions that this process encodes; `own` [n], their
    pairs, ascending. Text embeddings are not sent: image to text is the cross-entropy of all images over the captions
    of all processes, and for text to image each process has all images.
    """
    B = len(image)
    columns = OwnColumns(own, torch.arange(B, device=image.device), B)
    image_to_text = sharded_cross_entropy(image, text, columns, logit_scale, group)
    (pair_of_text,) = filled(own)
    share = functional.class_sampled_ce(text, image, pair_of_text, logit_scale, reduction="sum")
    text_to_image = (_sum_over_processes(_of_own(share, own), group) / B).to(wide_dtype(image.dtype))
    return (image_to_text + text_to_image) / 2


def sharded_pairwise_sigmoid_loss(
    image: Tensor, text: Tensor, own: Tensor, logit_scale: Tensor, logit_bias: Tensor | float, group: dist.ProcessGroup
) -> Tensor:
    """Sigmoid loss [] of the pairs of all processes, see `functional.pairwise_sigmoid_loss`; collective.

    The arguments are those of `sharded_contrastive_loss`: each process compares its captions with all images.
    """
    share = functional.pairwise_sigmoid(image, text, _places_of(own, len(image)), logit_scale, logit_bias)
    return (_sum_over_processes(_of_own(share, own), group) / len(image)).to(wide_dtype(image.dtype))


def sharded_binary_cross_entropy(
    image: Tensor,
    text: Tensor,
    targets: Tensor,
    bias: Tensor | float,
    logit_scale: Tensor,
    elements: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """Mean binary cross-entropy [] of images and classes; each process has a part of their pairs; collective.

    `image` is [b, D]; `text` [k, D]; `targets` [b, k], 0 or 1; `elements` the number of pairs of all processes.
    """
    logits = functional.class_sampled_logits(image, text, logit_scale)[:, : targets.shape[1]] + bias
    share = binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return (_sum_over_processes(share, group) / elements).to(wide_dtype(image.dtype))


def _places_of(positions: Tensor, number: int) -> Tensor:
    """Place [number] of each column among those of this process, −1 if another process has it."""
    places = positions.new_full((number,), -1)
    places[positions] = torch.arange(len(positions), device=positions.device)
    return places


def _of_own(share: Tensor, own: Tensor) -> Tensor:
    """Return the share of own texts: 0, with gradients of zeros, if there are none."""
    return share if len(own) else 0.0 * share


def _sum_over_processes(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum one number of each process, widened, in the order of ranks; see `gather_shares`."""
    return gather_shares(widened(share), group).sum()
