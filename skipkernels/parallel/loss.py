"""Losses over the images of all processes; each process computes its share from the texts that it encodes.

A process without such a text has the row of another in `text`, so that every parameter has a gradient; its share is 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from .. import functional
from ..clip.step import LossOptions
from ..dtypes import in_accumulation_dtype, wide_dtype
from .gathers import filled, gather_shares


def sharded_cross_entropy(
    image: Tensor,
    text: Tensor,
    positions: Tensor,
    class_ids: Tensor,
    targets: Tensor,
    scale: Tensor,
    options: LossOptions,
    group: dist.ProcessGroup,
) -> Tensor:
    """Mean cross-entropy [] of the images of all processes over the selected classes of all; collective.

    The loss of `clip.step.cross_entropy`: its log-sum-exp, the label's logit z_by and the sum of w_k · z_bk are
    combined from those of the processes, in the order of ranks, so that the loss is bitwise equal on all. Gradients
    are multiplied by the number of processes, as `gather_shares` explains. The logits [B, K_r] of this process are
    in memory, in fp64: their differences nearly cancel.

    `image` is [B, D], images of all processes; `text` [K_r, D], selected classes of this process, and `positions`
    [K_r], ascending, their places among `class_ids` [K], those of all; `targets` [B] are the places of the labels.
    """
    weight = None if options.class_weight is None else options.class_weight[class_ids]  # [K]
    of_label = None if weight is None else weight[targets]  # [B]
    smoothing, K = options.label_smoothing, len(class_ids)
    # 1. Share of this process: log-sum-exp over its classes, and logit of the label or 0, [B] each
    logits = in_accumulation_dtype(functional.class_sampled_logits(image, text, scale))
    logits = logits[:, : len(positions)]  # [B, K_r]: no column of `text` if K_r = 0
    columns = _own_columns(positions, K)[targets]  # [B]
    target = pad(logits, (1, 0)).gather(1, columns[:, None] + 1)  # column 0 is for the label −1
    shares = [logits.logsumexp(1), target.squeeze(1)]
    if smoothing > 0:
        every_weight = image.new_ones(K) if weight is None else weight
        shares.append(logits @ in_accumulation_dtype(every_weight[positions]))
    # 2. Shares of all processes, [W, B] each, combined into the loss of each image, [B]
    lse, target, *smooth = gather_shares(torch.stack(shares), group).unbind(1)
    lse = lse.logsumexp(0)
    loss = lse - target.sum(0)
    if of_label is not None:
        loss = of_label * loss
    if smoothing > 0:
        mean_weight = 1.0 if weight is None else weight.mean()
        loss = (1 - smoothing) * loss + smoothing * (lse * mean_weight - smooth[0].sum(0) / K)
    # 3. Mean, weighted by the class of each image
    total = len(loss) if of_label is None else of_label.sum()
    return (loss.sum() / total).to(wide_dtype(image.dtype))


def sharded_contrastive_loss(
    image: Tensor, text: Tensor, positions: Tensor, scale: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Symmetric contrastive loss [] of the pairs of all processes, see `functional.contrastive_loss`; collective.

    `image` is [B, D], images of all processes; `text` [n, D], captions that this process encodes, and `positions` [n],
    ascending, their pairs. Text embeddings are not sent: image to text is the cross-entropy of all images over the
    captions of all processes, and for text to image each process has all images.
    """
    B = len(image)
    pairs = torch.arange(B, device=image.device)  # a class and its label for each
    image_to_text = sharded_cross_entropy(image, text, positions, pairs, pairs, scale, LossOptions(), group)
    (image_of_text,) = filled(positions)
    share = functional.class_sampled_ce(text, image, image_of_text, scale, reduction="sum")
    text_to_image = (_sum_over_processes(_of_own(share, positions), group) / B).to(wide_dtype(image.dtype))
    return (image_to_text + text_to_image) / 2


def sharded_pairwise_sigmoid_loss(
    image: Tensor, text: Tensor, positions: Tensor, scale: Tensor, bias: Tensor | float, group: dist.ProcessGroup
) -> Tensor:
    """Sigmoid loss [] of the pairs of all processes, see `functional.pairwise_sigmoid_loss`; collective.

    The arguments are those of `sharded_contrastive_loss`: each process compares its captions with all images.
    """
    share = functional.pairwise_sigmoid(image, text, _own_columns(positions, len(image)), scale, bias)
    return (_sum_over_processes(_of_own(share, positions), group) / len(image)).to(wide_dtype(image.dtype))


def sharded_binary_cross_entropy(
    image: Tensor,
    text: Tensor,
    targets: Tensor,
    scale: Tensor,
    bias: Tensor | float,
    elements: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """Mean binary cross-entropy [] of images and classes, of which each process has some; collective.

    `image` is [B, D], images of all processes; `text` [K_r, D], selected classes of this process; `targets` [B, K_r], 0
    or 1; `elements` is B · K, of the selected classes of all.
    """
    logits = functional.class_sampled_logits(image, text, scale)[:, : targets.shape[1]] + bias
    share = binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return (_sum_over_processes(share, group) / elements).to(wide_dtype(image.dtype))


def _own_columns(positions: Tensor, K: int) -> Tensor:
    """Row of `text` [K] of each text of all processes, −1 if another process has it."""
    columns = positions.new_full((K,), -1)
    columns[positions] = torch.arange(len(positions), device=positions.device)
    return columns


def _of_own(share: Tensor, positions: Tensor) -> Tensor:
    """Return the share of own texts: 0, with gradients of zeros, if there are none."""
    return share if len(positions) else 0.0 * share


def _sum_over_processes(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum one number of each process in the order of ranks; see `gather_shares`."""
    return gather_shares(in_accumulation_dtype(share), group).sum()
