"""Gradient dependence (GD): distribution over classes of the gradient of an image's loss.

The loss of an image of class y is −log p_y, with p the softmax over all C classes of s·⟨x̂, t̂_c⟩, and x̂ and t̂_c the
unit-norm image and text embeddings. Its gradient with respect to t̂_c is (p_c − y_c)·s·x̂, where y_c is 1 for the true
class and 0 otherwise; its norm is s·|p_c − y_c|. The text encoder receives the gradient with respect to its output t_c,
before normalization: t̂_c = t_c / ‖t_c‖ keeps the part orthogonal to t_c and divides it by ‖t_c‖, so

    g_c = ‖∂loss/∂t_c‖ = s·|p_c − y_c|·√(1 − ⟨x̂, t̂_c⟩²) / ‖t_c‖

Classes are ranked as in CSkip: the true class first, then by decreasing similarity. The share of a rank is g_c / Σg of
the class at that rank, averaged over images. As Σ_{c≠y} p_c = 1 − p_y, the true class has about half of the gradient;
GD shows how many other classes share the second half.

Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509; the closed form is derived here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import InputError
from ...selection import RankSampler

_CHUNK = 1024  # images per [images, C] matrix


class KeptClasses(NamedTuple):
    """Classes that a setting of CSkip keeps.

    Attributes:
        always: Classes kept in every step, m.
        expected: Classes kept per step, K.
        share: Expected share of the gradient of the kept classes.
    """

    always: int
    expected: int
    share: float


@dataclass(frozen=True)
class GradientDependence:
    """Share of the gradient by rank.

    Attributes:
        share: [C] fp64, sums to 1; rank 0 is the true class.
        images: Number of images averaged over.
    """

    share: Tensor
    images: int

    @property
    def cumulative(self) -> Tensor:
        """Cumulative share, [C] fp64; the last entry is 1."""
        return self.share.cumsum(0)

    def ranks_for(self, share: float) -> int:
        """Return the smallest number of first ranks that together have this share of the gradient.

        >>> GradientDependence(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), 1).ranks_for(0.75)
        2
        """
        enough = self.cumulative >= share - 1e-9  # rounding of the sum
        return int(enough.int().argmax()) + 1 if enough.any() else len(self.share)

    def kept(
        self, *, keep_ratio: float, max_keep: int, decay: float, batch_size: int = 1, max_tail: int | None = None
    ) -> KeptClasses:
        """Return the classes that CSkip keeps: the first m ranks, and each later rank with its probability q.

        The probabilities q are those of the published policy; a draw of an exact number of classes approximates them.
        Ranks here are per image, whereas CSkip ranks by the best score in the batch. For batches of one class the two
        are nearly equal.

        Args:
            keep_ratio: Share of the classes to keep in every step (up to 1), or their number (above 1).
            max_keep: Largest number of classes kept in every step.
            decay: λ of the tail.
            batch_size: Images per step. Each may be of a different class, which must be kept.
            max_tail: Bound on the expected number of classes of the tail; default none.

        Raises:
            InputError: If a value is out of range.

        >>> dependence = GradientDependence(torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64), 1)
        >>> dependence.kept(keep_ratio=0.5, max_keep=50, decay=0.3)
        KeptClasses(always=2, expected=3, share=0.9)
        """
        try:
            sampler = RankSampler(keep_ratio, max_keep, decay, max_tail=max_tail)
        except ValueError as error:
            raise InputError(str(error)) from error
        always, tail = sampler.plan(len(self.share), batch_size)
        share = self.share[:always].sum() + (self.share[always:] * tail).sum()
        return KeptClasses(always, sampler.expected_keep(len(self.share), batch_size), share.item())


def gradient_norms(cosine: Tensor, length: Tensor, labels: Tensor, logit_scale: float) -> Tensor:
    """Norms g_c of the gradient of each image's loss with respect to each text embedding, [B, C] fp64.

    The formula is in the module's docstring.

    Args:
        cosine: ⟨x̂, t̂_c⟩, [B, C] fp64.
        length: ‖t_c‖ of the text encoder's outputs, [C] fp64.
        labels: [B] int64 in [0, C).
        logit_scale: s.
    """
    probability = (logit_scale * cosine).softmax(dim=1)
    others = probability.scatter(1, labels[:, None], 0.0)
    # The sum over the other classes, not 1 − p_y, which cancels to 0 where p_y is close to 1.
    residual = others.scatter(1, labels[:, None], others.sum(dim=1, keepdim=True))
    return logit_scale * residual * (1 - cosine.square()).clamp_min(0.0).sqrt() / length


def measure_gradient_dependence(image: Tensor, text: Tensor, labels: Tensor, logit_scale: float) -> GradientDependence:
    """Compute GD from the embeddings of images and classes.

    The formula is in the module's docstring.

    Args:
        image: Image embeddings of any norm, [B, D] floating point.
        text: Outputs of the text encoder before normalization, [C, D] floating point.
        labels: Classes of the images, [B] int64 in [0, C).
        logit_scale: s, the factor of the cosines: `model.logit_scale.exp().item()`.

    Raises:
        InputError: If shapes or labels are invalid, there are fewer than two classes, or no image has a gradient.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509.

    Example:
        >>> text = torch.eye(3)
        >>> dependence = measure_gradient_dependence(text[:1] + 0.1, text, torch.tensor([0]), 10.0)
        >>> [round(share, 2) for share in dependence.share.tolist()]
        [0.11, 0.44, 0.44]
    """
    name = "measure_gradient_dependence"
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise InputError(
            f"{name}: image must be [B, D] and text [C, D]; got {list(image.shape)} and {list(text.shape)}. Embed both "
            "with the same model."
        )
    if len(text) < 2:
        raise InputError(f"{name}: text must have at least two classes; got {len(text)}. One class has no gradient.")
    if labels.shape != image.shape[:1] or labels.dtype != torch.int64 or len(labels) == 0:
        raise InputError(
            f"{name}: labels must be int64 [B={len(image)}], B ≥ 1; got {labels.dtype} {list(labels.shape)}."
        )
    if not (0 <= int(labels.min()) and int(labels.max()) < len(text)):
        raise InputError(
            f"{name}: labels must be in [0, C={len(text)}); got {int(labels.min())} to {int(labels.max())}."
        )
    total, count = torch.zeros(len(text), dtype=torch.float64, device=text.device), 0
    length, unit_text = text.double().norm(dim=1), F.normalize(text.double(), dim=1)
    for some_images, some_labels in zip(image.split(_CHUNK), labels.split(_CHUNK), strict=True):
        cosine = F.normalize(some_images.double(), dim=1) @ unit_text.T
        norms = gradient_norms(cosine, length, some_labels, logit_scale)
        order = cosine.scatter(1, some_labels[:, None], torch.inf).argsort(dim=1, descending=True, stable=True)
        ranked = norms.gather(1, order)
        sums = ranked.sum(dim=1, keepdim=True)
        has_gradient = sums.squeeze(1) > 0  # False where p_y rounds to 1
        total += (ranked[has_gradient] / sums[has_gradient]).sum(dim=0)
        count += int(has_gradient.sum())
    if count == 0:
        raise InputError(f"{name}: no image has a gradient: every loss is 0. Use harder images.")
    return GradientDependence((total / count).cpu(), count)
