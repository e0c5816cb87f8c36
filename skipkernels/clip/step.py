"""The training step of Skip Tuning, as a function of its parts; and the comparison with all classes, in evaluation.

`SkipCLIP.forward` calls it, and a CUDA graph captures it with other `Texts` and another `Sampler` (`graphs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..dtypes import without_autocast


def step(
    image: Tensor,
    labels: Tensor,
    texts: Texts,
    sampler: Sampler,
    scale: Tensor,
    options: LossOptions,
    return_logits: bool = False,
) -> SkipOutput:
    """Select classes for image embeddings [B, D] and labels [B] or [B, C], embed these alone, and compute the loss."""
    scores = texts.scores(image, labels)  # [C]: highest cosine with an image, +∞ for labels
    class_ids, targets = sampler.select(scores, labels)  # [K], [B]; of labels [B, C] their columns [B, K]
    text = texts.encode(class_ids)  # [K, D], with gradient if texts train
    return cross_entropy(image, text, class_ids, targets, scale, options, return_logits)


def compare_with_all(image: Tensor, labels: Tensor, text: Tensor, scale: Tensor, options: LossOptions) -> SkipOutput:
    """Compare image embeddings [B, D], of labels [B] or [B, C], with all classes [C, D], in the dtype of `predict`."""
    class_ids = torch.arange(len(text), device=image.device)
    image = image.to(torch.promote_types(image.dtype, text.dtype))  # those of a kept evaluation are at least fp32
    with without_autocast(image.device):
        return cross_entropy(image, text, class_ids, labels, scale, options, return_logits=True)


def cross_entropy(
    image: Tensor,
    text: Tensor,
    class_ids: Tensor,
    targets: Tensor,
    scale: Tensor,
    options: LossOptions,
    return_logits: bool = False,
) -> SkipOutput:
    """Cross-entropy of images [B, D] over classes [K, D]; targets are positions [B] or probabilities [B, K].

    Rows have any norm: the operators divide by it.
    """
    text = text.to(image.dtype)  # texts that do not train are at least fp32
    weight = None if options.class_weight is None else options.class_weight.index_select(0, class_ids)
    if targets.ndim == 1 and not return_logits:  # the logits are not computed
        loss = functional.class_sampled_ce(
            image, text, targets, scale, class_weight=weight, label_smoothing=options.label_smoothing
        )
        return SkipOutput(loss, None, class_ids, targets)
    logits = functional.class_sampled_logits(image, text, scale)
    weight = None if weight is None else weight.to(logits.dtype)
    expected = targets if targets.ndim == 1 else targets.to(logits.dtype)
    loss = F.cross_entropy(logits, expected, weight, label_smoothing=options.label_smoothing)
    return SkipOutput(loss, logits, class_ids, targets)


class SkipOutput(NamedTuple):
    """Result of a step.

    Attributes:
        loss: [], mean cross-entropy over the batch, weighted if SkipCLIP has class weights.
        logits: [B, K]; in training None, except with `return_logits` and for soft labels.
        class_ids: [K] int64, ascending, the kept classes; in evaluation all classes, K = C.
        targets: [B] int64, positions of the labels in `class_ids`; of soft labels the labels themselves, [B, K].
    """

    loss: Tensor
    logits: Tensor | None
    class_ids: Tensor
    targets: Tensor


# ---- what a step takes -----------------------------------------------------------------------------------------------


class Texts(Protocol):
    """Texts of the classes, such as `ClassTexts`."""

    def scores(self, image: Tensor, labels: Tensor) -> Tensor:
        """Highest cosine [C] of each class with image embeddings [B, D], +∞ for labels [B] or [B, C]."""

    def encode(self, class_ids: Tensor) -> Tensor:
        """Class ids [K] to embeddings [K, D], with gradient if texts train."""


class Sampler(Protocol):
    """Selection of the classes of a step, such as `RankSampler`."""

    def select(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [C] and labels [B] to the kept classes [K], and the positions of the labels among them [B].

        Labels [B, C] to the kept classes [K], and the columns of these classes [B, K].
        """


@dataclass(frozen=True)
class LossOptions:
    """Options of the cross-entropy."""

    label_smoothing: float = 0.0
    class_weight: Tensor | None = None  # [C]
