"""Sigmoid loss over the selected classes, for images with any number of labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..selection import classes_at_ranks
from .classes import refuse_loss_options
from .output import SkipOutput

if TYPE_CHECKING:
    from .skip_clip import SkipCLIP


def sigmoid_loss(
    clip: SkipCLIP, x: Tensor, labels: Tensor, max_labels: int, logit_bias: Tensor | float | None
) -> SkipOutput:
    """Loss of images with labels [B, C]; see `SkipCLIP.sigmoid_loss`."""
    refuse_loss_options("SkipCLIP.sigmoid_loss", clip.label_smoothing, clip.class_weight)
    clip._check_batch(x)
    classes = len(clip.prototypes)
    _check_labels(labels, x, classes, max_labels)
    if logit_bias is None:
        bias = getattr(clip.model, "logit_bias", None)
        logit_bias = 0.0 if bias is None else bias
    number = isinstance(logit_bias, (int, float)) and not isinstance(logit_bias, bool)
    if not number and not (isinstance(logit_bias, Tensor) and logit_bias.numel() == 1):
        found = list(logit_bias.shape) if isinstance(logit_bias, Tensor) else repr(logit_bias)
        raise ValueError(f"SkipCLIP.sigmoid_loss: logit_bias must be a number or a tensor of one element; got {found}.")
    if isinstance(logit_bias, Tensor):
        logit_bias = logit_bias.reshape(())  # transformers' has one dimension
    labels = labels != 0
    if clip.training:
        clip._check_draw(len(x) * max_labels)
        image = clip._image_encoder.encode(x)
        class_ids = _select(clip, image, labels, max_labels)
        text = clip._text_encoder.encode(class_ids)
    else:
        image = clip._image_encoder.encode(x)
        class_ids = torch.arange(classes, device=image.device)
        text = (
            clip._text_encoder.encode(class_ids)
            if torch.is_grad_enabled()
            else clip._class_embeddings().to(image.dtype)
        )
    logits = functional.class_sampled_logits(image, text, clip.model.logit_scale.exp())
    logits = logits + logit_bias
    targets = labels.index_select(1, class_ids)
    return SkipOutput(F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype)), logits, class_ids, targets)


@torch.no_grad()
def _select(clip: SkipCLIP, image: Tensor, labels: Tensor, max_labels: int) -> Tensor:
    """Class ids [K] of a step: every label of the batch, then by score. K does not depend on the labels."""
    ranks = clip.sampler.draw_on(image.device, labels.shape[1], len(image) * max_labels)
    return classes_at_ranks(clip._scores(image).masked_fill(labels.any(dim=0), math.inf), ranks)


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
