"""Checks of the arguments of `pair_loss` and `sigmoid_loss`."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_device, check_range
from ..clip import SkipCLIP, check_clip
from ..clip.checks import check_vocabulary, described
from ..towers.modes import updates_statistics

PairLoss = Literal["softmax", "sigmoid"]


def check_pair_loss(
    clip: SkipCLIP, pixel_values: Any, captions: Any, loss: str, logit_bias: Any, chunk: Any
) -> Tensor | float | None:
    """Check the arguments of `pair_loss`; return the bias of the logits, None for a softmax, which depends on none."""
    name = "pair_loss"
    _refuse_loss_options(name, clip)
    check_choice(name, "loss", loss, PairLoss)
    if loss == "softmax" and logit_bias is not None:
        raise ValueError(f'{name}: logit_bias is for loss="sigmoid"; a softmax does not depend on it.')
    bias = _bias_of(name, clip, logit_bias) if loss == "sigmoid" else None
    clip.check_inputs(pixel_values)
    _check_captions(captions, len(pixel_values), clip.num_classes, clip.texts.tower.vocabulary)
    if chunk is not None:
        _check_chunk(chunk, pixel_values, clip)
    return bias


def check_sigmoid_loss(
    clip: SkipCLIP, pixel_values: Any, labels: Any, max_labels: Any, logit_bias: Any
) -> Tensor | float:
    """Check the arguments of `sigmoid_loss`; return the bias of the logits."""
    _refuse_loss_options("sigmoid_loss", clip)
    clip.check_inputs(pixel_values)
    _check_many_labels(labels, pixel_values, clip.num_classes, max_labels)
    return _bias_of("sigmoid_loss", clip, logit_bias)


def check_texts(function: str, clip: Any) -> None:
    """Raise a TypeError unless clip is a SkipCLIP with the texts of all its classes."""
    check_clip(function, clip)
    if len(clip.prototypes) != clip.num_classes:
        raise TypeError(
            f"pairs.{function}: clip must have the texts of all {clip.num_classes} classes; got {type(clip).__name__} "
            f"with {len(clip.prototypes)} of them. Call parallel.{function}."
        )


# ---- parts -----------------------------------------------------------------------------------------------------------


def _bias_of(function: str, clip: SkipCLIP, logit_bias: Any) -> Tensor | float:
    """Bias of the logits, by default that of the model."""
    if logit_bias is None:
        bias = getattr(clip.model, "logit_bias", None)
        logit_bias = 0.0 if bias is None else bias
    if isinstance(logit_bias, Tensor) and logit_bias.numel() == 1:
        return logit_bias.reshape(())  # that of transformers has one dimension
    if not isinstance(logit_bias, (int, float)) or isinstance(logit_bias, bool) or not math.isfinite(logit_bias):
        found = list(logit_bias.shape) if isinstance(logit_bias, Tensor) else repr(logit_bias)
        raise ValueError(f"{function}: logit_bias must be a finite number or a tensor of one element; got {found}.")
    return logit_bias


def _refuse_loss_options(function: str, clip: SkipCLIP) -> None:
    """Raise a ValueError if an option of the cross-entropy is set."""
    options = {"label_smoothing": clip.label_smoothing > 0, "class_weight": clip.class_weight is not None}
    for name, given in options.items():
        if given:
            raise ValueError(
                f"{function}: {name} of SkipCLIP is an option of the cross-entropy of clip(pixel_values, labels), and "
                "has no meaning for this loss. Make SkipCLIP without it."
            )


def _check_many_labels(labels: Any, batch: Tensor, num_classes: int, max_labels: int) -> None:
    """Raise unless labels are [B, C] of 0 and 1, with at most `max_labels` per image."""
    name, shape = "sigmoid_loss", (len(batch), num_classes)
    if isinstance(max_labels, bool) or not isinstance(max_labels, int) or max_labels < 1:
        raise ValueError(f"{name}: max_labels must be a whole number, at least 1; got {max_labels!r}.")
    if not isinstance(labels, Tensor) or labels.shape != shape or labels.is_complex():
        raise ValueError(
            f"{name}: labels must be a tensor [B={shape[0]}, C={num_classes}], 1 where an image has a class; got "
            f"{described(labels)}. For one class id per image call clip(pixel_values, labels)."
        )
    check_device(name, "labels", labels, ("pixel_values", batch))
    if labels.device.type == "cpu":
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError(f"{name}: labels must be 0 or 1; got {labels.min().item()} to {labels.max().item()}.")
        most = int(labels.count_nonzero(dim=1).max())
        if most > max_labels:
            raise ValueError(f"{name}: max_labels must be at least {most}, the labels of an image; got {max_labels}.")


def _check_captions(captions: Any, batch_size: int, num_classes: int, vocabulary: int | None) -> None:
    """Raise unless captions are ids [B] or tokens [B, L]."""
    valid = isinstance(captions, Tensor) and captions.dtype in (torch.int64, torch.int32) and captions.ndim in (1, 2)
    if not valid or len(captions) != batch_size or captions.numel() == 0:
        raise ValueError(
            f"pair_loss: captions must be int64 or int32, ids [B={batch_size}] or tokens [B={batch_size}, L], one "
            f"caption for each image; got {described(captions)}. Tokenise texts with the model's own tokenizer."
        )
    if captions.device.type == "cpu" and captions.ndim == 2:
        check_vocabulary("pair_loss", "captions", captions, vocabulary)
    elif captions.device.type == "cpu":
        remedy = "Ids are rows of the tokens of SkipCLIP. Pass tokens [B, L] for other captions."
        check_range("pair_loss", "captions", captions, num_classes, remedy)


def _check_chunk(chunk: Any, pixel_values: Tensor, clip: SkipCLIP) -> None:
    """Raise unless a batch can be encoded in chunks."""
    name = "pair_loss"
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"{name}: chunk must be a whole number of pairs, at least 1, or None; got {chunk!r}.")
    if pixel_values.requires_grad:
        raise ValueError(f"{name}: with chunk, pixel_values get no gradient; got some that require grad. Detach them.")
    parts = (*clip.images.tower.upper_parts(), *clip.texts.tower.upper_parts())
    if any(updates_statistics(part) for part in parts if isinstance(part, nn.Module)):
        raise ValueError(
            f"{name}: chunk must be None, since batch norms above the cut are in training mode, and would use the "
            "statistics of a chunk. Raise skip_layers, or call eval() of these modules."
        )
