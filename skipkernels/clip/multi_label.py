"""Sigmoid loss over the selected classes, for images with any number of labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..parallel import ClassParallel, gather_rows, sharded_sigmoid_loss
from ..selection import classes_at_ranks
from .classes import refuse_loss_options
from .output import SkipOutput
from .sharded_step import at_least_one, padded, sizes_of

if TYPE_CHECKING:
    from .training import Training


def sigmoid_loss(
    clip: Training, x: Tensor, labels: Tensor, max_labels: int, logit_bias: Tensor | float | None
) -> SkipOutput:
    """Loss of images with labels [B, C]; see `SkipCLIP.sigmoid_loss`."""
    if clip._parallel is not None and clip.training:
        return _sharded_step(clip, clip._parallel, x, labels, max_labels, logit_bias)
    _check(clip, x, labels, max_labels)
    bias = _bias(clip, logit_bias)
    labels = labels != 0  # [B, C]
    if clip.training:
        image = clip._image_encoder.encode(x)  # [B, D]
        class_ids = _select(clip, image, labels, max_labels)  # [K]
        text = clip._text_encoder.encode(class_ids)  # [K, D]
    else:
        image = clip._image_encoder.encode(x)
        class_ids = torch.arange(clip._num_classes, device=image.device)
        text = clip._embeddings_of_all(image)
    logits = functional.class_sampled_logits(image, text, clip.model.logit_scale.exp())
    logits = logits + bias
    targets = labels.index_select(1, class_ids)  # [B, K]
    return SkipOutput(F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype)), logits, class_ids, targets)


def _sharded_step(
    clip: Training, parallel: ClassParallel, x: Tensor, labels: Tensor, max_labels: int, logit_bias: Any
) -> SkipOutput:
    """Run a training step with the images of all processes; collective."""
    x, labels, images = padded(x, labels)
    _check(clip, x, labels, max_labels)
    bias = _bias(clip, logit_bias)
    own_image = clip._image_encoder.encode(x)[:images]
    labels, group = labels[:images] != 0, parallel.group  # [b, C]
    # 1. The image embeddings of all processes, [B, D]
    sizes, _ = sizes_of(parallel, images, f"sigmoid_loss with max_labels={max_labels}", x.device, clip.sampler)
    image = gather_rows(own_image.detach() if parallel.replicated else own_image, sizes, group)
    # 2. The same selection on every process: labels of any image score +∞
    with torch.no_grad():
        is_label = labels.any(dim=0).byte()  # [C]
        dist.all_reduce(is_label, dist.ReduceOp.MAX, group=group)
        ranks = clip.sampler.draw_on(x.device, parallel.num_classes, len(image) * max_labels)
        scores = parallel.gather_classes(clip._scores(image))
        class_ids = classes_at_ranks(scores.masked_fill(is_label.bool(), math.inf), ranks)  # [K]
    # 3. Loss of own images with all K classes, or of all images with the own K_r classes
    scale, elements, own_targets = clip.model.logit_scale.exp(), len(image) * len(class_ids), labels[:, class_ids]
    if parallel.replicated:
        image, targets, text = own_image, own_targets, clip._text_encoder.encode(class_ids)
    else:
        positions = (class_ids % parallel.size == parallel.rank).nonzero().flatten()
        targets = gather_rows(own_targets.byte(), sizes, group)[:, positions]
        text = clip._text_encoder.encode(at_least_one(parallel.ids_of_held(class_ids[positions])))
    loss = sharded_sigmoid_loss(image, text, targets, bias, scale, elements, group)
    return SkipOutput(loss, None, class_ids, own_targets)


@torch.no_grad()
def _select(clip: Training, image: Tensor, labels: Tensor, max_labels: int) -> Tensor:
    """Class ids [K] of a step: every label of the batch, then by score. K does not depend on the labels."""
    ranks = clip.sampler.draw_on(image.device, labels.shape[1], len(image) * max_labels)
    return classes_at_ranks(clip._scores(image).masked_fill(labels.any(dim=0), math.inf), ranks)


def _check(clip: Training, x: Any, labels: Any, max_labels: int) -> None:
    refuse_loss_options("SkipCLIP.sigmoid_loss", clip.label_smoothing, clip.class_weight)
    clip._check_batch(x)
    _check_labels(labels, x, clip._num_classes, max_labels)
    if clip.training:
        clip._check_draw(len(x) * max_labels)


def _bias(clip: Training, logit_bias: Any) -> Tensor | float:
    """Bias of the logits, by default that of the model."""
    if logit_bias is None:
        bias = getattr(clip.model, "logit_bias", None)
        logit_bias = 0.0 if bias is None else bias
    number = isinstance(logit_bias, (int, float)) and not isinstance(logit_bias, bool)
    if not number and not (isinstance(logit_bias, Tensor) and logit_bias.numel() == 1):
        found = list(logit_bias.shape) if isinstance(logit_bias, Tensor) else repr(logit_bias)
        raise ValueError(f"SkipCLIP.sigmoid_loss: logit_bias must be a number or a tensor of one element; got {found}.")
    return logit_bias.reshape(()) if isinstance(logit_bias, Tensor) else logit_bias  # transformers' has one dimension


def _check_labels(labels: Any, x: Tensor, classes: int, max_labels: int) -> None:
    """Raise unless labels are [B, C]; their values are checked on the CPU only."""
    name, shape = "SkipCLIP.sigmoid_loss", (len(x), classes)
    if not isinstance(max_labels, int) or max_labels < 1:
        raise ValueError(f"{name}: max_labels must be a whole number, at least 1; got {max_labels!r}.")
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: labels must be a tensor [B, C] of 0 and 1; got {type(labels).__name__}.")
    if labels.shape != shape or labels.is_complex():
        raise ValueError(
            f"{name}: labels must be [B={shape[0]}, C={classes}], 1 where an image has a class; got {labels.dtype} "
            f"{list(labels.shape)}. For one class id per image call clip(x, labels)."
        )
    if labels.device != x.device:
        raise ValueError(f"{name}: labels must be on {x.device}, where x is; got {labels.device}.")
    if labels.device.type != "cpu":
        return
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"{name}: labels must be 0 or 1; got {labels.min().item()} to {labels.max().item()}.")
    most = int(labels.count_nonzero(dim=1).max())
    if most > max_labels:
        raise ValueError(f"{name}: an image has {most} labels, more than max_labels={max_labels}. Raise max_labels.")
