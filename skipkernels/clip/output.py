"""Result of a step of SkipCLIP."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SkipOutput(NamedTuple):
    """Result of a step.

    Attributes:
        loss: [], mean cross-entropy over the batch, weighted if SkipCLIP has class weights; of `sigmoid_loss`, the mean
            over images and classes.
        logits: [B, K]; in training [B, 0] unless `return_logits` or from `sigmoid_loss`.
        class_ids: [K] int64, ascending, the kept classes; in evaluation all classes, K = C.
        targets: [B] int64, positions of the labels in `class_ids`; of `sigmoid_loss` bool [B, K],
            the labels themselves.
    """

    loss: Tensor
    logits: Tensor
    class_ids: Tensor
    targets: Tensor
