"""GD, gradient dependence: over how many classes the gradient of an image's loss is spread.

The loss of an image of class y is −log p_y, p the softmax over all C classes of s·⟨x̂, t̂_c⟩, with x̂ and t̂_c the
unit-norm image and text embeddings. Its gradient at t̂_c is (p_c − y_c)·s·x̂, y_c being 1 for the true class and 0 for
the others, of norm s·|p_c − y_c|. What the text encoder gets is the gradient at its own output t_c, of any length:
t̂_c = t_c / ‖t_c‖ lets through what is at right angles to t_c, divided by its length, so that

    g_c = ‖∂loss/∂t_c‖ = s·|p_c − y_c|·√(1 − ⟨x̂, t̂_c⟩²) / ‖t_c‖

Classes are put in the order of CSkip: the true one, then by falling similarity. The share of a rank is g_c / Σg of the
class that stands there, averaged over images. As Σ_{c≠y} p_c = 1 − p_y, the true class has about half of the gradient
(half, but for the root and the length); the question is how many others the second half needs.

Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509; the closed form is worked out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import InputError
from ...selection import RankSampler

_CHUNK = 1024  # images whose [images, C] numbers are in memory at once


class Kept(NamedTuple):
    """What a setting of CSkip keeps: m classes always, K of C a step, and this share of the gradient."""

    always: int
    expected: int
    share: float


@dataclass(frozen=True)
class GradientSpread:
    """GD: the share of the gradient by rank.

    Attributes:
        share: [C] fp64, sums to 1; rank 0 is the true class.
        images: Images that it is the mean of.
    """

    share: Tensor
    images: int

    @property
    def cumulative(self) -> Tensor:
        """[C] fp64: the share of the first ranks together; the last is 1."""
        return self.share.cumsum(0)

    def ranks_for(self, share: float) -> int:
        """The least number of first ranks that have this share of the gradient.

        >>> GradientSpread(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), 1).ranks_for(0.75)
        2
        """
        enough = self.cumulative >= share - 1e-9  # sums round
        return int(enough.int().argmax()) + 1 if enough.any() else len(self.share)

    def kept(self, *, keep_ratio: float, max_keep: int, decay: float, batch_size: int = 1) -> Kept:
        """What CSkip keeps of the gradient: the first m ranks, and a rank behind them with its probability q.

        The q are those of the published policy; drawing an exact number follows them roughly. Ranks are those of one
        image, where CSkip ranks by the best score of a batch: for batches of one class they are nearly the same.

        Args:
            keep_ratio: Share of classes that always stay (up to 1), or their number.
            max_keep: Most classes that always stay.
            decay: λ of the tail.
            batch_size: Images of a step, each of which may need a class of its own.

        Raises:
            InputError: If one is out of its range.

        >>> spread = GradientSpread(torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64), 1)
        >>> spread.kept(keep_ratio=0.5, max_keep=50, decay=0.3)
        Kept(always=2, expected=3, share=0.9)
        """
        try:
            sampler = RankSampler(keep_ratio, max_keep, decay)
        except ValueError as error:
            raise InputError(str(error)) from error
        always, tail = sampler.plan(len(self.share), batch_size)
        share = self.share[:always].sum() + (self.share[always:] * tail).sum()
        return Kept(always, sampler.expected_keep(len(self.share), batch_size), share.item())


def gradient_norms(cosine: Tensor, length: Tensor, labels: Tensor, logit_scale: float) -> Tensor:
    """g [B, C], the norm of the gradient of each image's loss at each class's text embedding, in closed form.

    Args:
        cosine: [B, C] fp64, ⟨x̂, t̂_c⟩.
        length: [C] fp64, ‖t_c‖ of the text embeddings as the text encoder gives them.
        labels: [B] int64 in [0, C).
        logit_scale: s.

    Source: the head of this file.
    """
    probability = (logit_scale * cosine).softmax(dim=1)
    others = probability.scatter(1, labels[:, None], 0.0)
    # 1 − p_y from the others: subtracting from 1 would leave nothing of a small difference.
    residual = others.scatter(1, labels[:, None], others.sum(dim=1, keepdim=True))
    return logit_scale * residual * (1 - cosine.square()).clamp_min(0.0).sqrt() / length


def gradient_spread(image: Tensor, text: Tensor, labels: Tensor, logit_scale: float) -> GradientSpread:
    """GD of some images, from embeddings.

    Args:
        image: [B, D] floating, of any length.
        text: [C, D] floating, as the text encoder gives them, before they are brought to unit norm.
        labels: [B] int64 in [0, C), classes of the images.
        logit_scale: s, by which cosines are multiplied: `model.logit_scale.exp().item()`.

    Raises:
        InputError: If shapes or labels don't fit, there are fewer than two classes, or no image has a gradient.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509; the closed form is in the head of this file.

    Example:
        >>> text = torch.eye(3)
        >>> spread = gradient_spread(text[:1] + 0.1, text, torch.tensor([0]), 10.0)
        >>> [round(share, 2) for share in spread.share.tolist()]
        [0.11, 0.44, 0.44]
    """
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise InputError(
            f"gradient_spread: image must be [B, D] and text [C, D]; got {list(image.shape)} and {list(text.shape)}. "
            "Embed both with the same model."
        )
    if len(text) < 2:
        raise InputError(f"gradient_spread: text must be of two classes or more; got {len(text)}. One has no gradient.")
    if labels.shape != image.shape[:1] or labels.dtype != torch.int64 or len(labels) == 0:
        raise InputError(
            f"gradient_spread: labels must be int64 [B={len(image)}], B ≥ 1; got {labels.dtype} {list(labels.shape)}."
        )
    if not (0 <= int(labels.min()) and int(labels.max()) < len(text)):
        raise InputError(
            f"gradient_spread: labels must be in [0, C={len(text)}); got {int(labels.min())} to {int(labels.max())}."
        )
    total, count = torch.zeros(len(text), dtype=torch.float64, device=text.device), 0
    length, unit_text = text.double().norm(dim=1), F.normalize(text.double(), dim=1)
    for some_images, some_labels in zip(image.split(_CHUNK), labels.split(_CHUNK), strict=True):
        cosine = F.normalize(some_images.double(), dim=1) @ unit_text.T
        norms = gradient_norms(cosine, length, some_labels, logit_scale)
        order = cosine.scatter(1, some_labels[:, None], torch.inf).argsort(dim=1, descending=True, stable=True)
        ranked = norms.gather(1, order)
        sums = ranked.sum(dim=1, keepdim=True)
        there = sums.squeeze(1) > 0  # not so where p_y is 1 to the last digit
        total += (ranked[there] / sums[there]).sum(dim=0)
        count += int(there.sum())
    if count == 0:
        raise InputError("gradient_spread: no image has a gradient: every loss is 0. Take images that are harder.")
    return GradientSpread((total / count).cpu(), count)
