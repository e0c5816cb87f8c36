"""Logistic regression that is drawn to the texts of the classes, or to zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_shape, warn_caller
from ...dtypes import wide_dtype
from .checks import check_labels, check_positive, unit_rows
from .head import Head
from .logistic import ITERATIONS, Fit, logistic_regression

TOLERANCE = 1e-7
"""Largest distance of Δ, in units of a text embedding, from the minimum."""
CANDIDATES = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties of `anchored_l2`."""
WITHOUT_PAIRS = 0.01
"""Penalty if no class has two images: none can be held out to choose it."""
_RANKED = 1e-3  # as TOLERANCE, for losses that are only compared


def anchored_probe(image: Tensor, labels: Tensor, text: Tensor, scale: float | Tensor, l2: float) -> Head:
    """Fit a logistic regression with weights that start at, and are drawn to, the text embeddings of the classes.

        min over Δ of  Σ_i −log softmax(s x_i (T + Δ)ᵀ)[label_i]  +  l2 · s²/2 · |Δ|²

    x and T are normalized. Δ is zero for classes without images: they keep their text, as do new classes. The objective
    is l2-strongly convex in sΔ, so that the norm of its gradient bounds the distance from the minimum: L-BFGS, in fp64,
    ends where it proves |Δ − Δ*| ≤ `TOLERANCE`. If 1000 iterations do not suffice, a UserWarning has the bound.

    Args:
        image: x, [n, D], of any norm and floating dtype.
        labels: Classes, [n].
        text: T, [C, D].
        scale: s, the exponential of `logit_scale`.
        l2: Penalty, such as that of `anchored_l2`.

    Source: the objective of CLAP (Silva-Rodríguez et al., "A Closer Look at the Few-Shot Adaptation of Large
    Vision-Language Models", CVPR 2024, arXiv 2312.12730) with one penalty for all classes, solved to the minimum.
    LP++ (Huang et al., CVPR 2024, arXiv 2404.02285) also adds the text embedding to the weight, with a learned factor
    for each class and no penalty.
    """
    regression = _drawn_to_text("anchored_probe", image, labels, text, scale)
    fit, dtype = regression.solved(l2), wide_dtype(image.dtype)
    factor = torch.tensor(regression.scale, dtype=dtype, device=image.device)
    return Head(fit.weight.to(dtype), fit.bias.to(dtype), factor)


def anchored_l2(image: Tensor, labels: Tensor, text: Tensor, scale: float | Tensor) -> float:
    """Choose the penalty of `anchored_probe` by two-fold cross-validation, on embeddings of the model before tuning.

    The embeddings of a tuned model fit its training images, so that every penalty would appear perfect. The first half
    of the images of each class, in the given order, is one fold: similar neighbours stay together. A class with one
    image trains in both folds and is never held out: held out, it would have no training image, which favours the
    texts. `CANDIDATES` are tried from the largest to the smallest, until two in a row have a higher loss than one
    before. The best accuracy over both folds is chosen, of equal ones the lower loss. If no class has two images, the
    result is `WITHOUT_PAIRS`.
    """
    return _drawn_to_text("anchored_l2", image, labels, text, scale).best_l2()


def linear_probe(image: Tensor, labels: Tensor, classes: int, scale: float | Tensor, l2: float) -> Head:
    """Fit a logistic regression that uses no texts: `anchored_probe` with T = 0, and a bias without penalty.

    A UserWarning says if 1000 iterations do not suffice.

    Args:
        image: x, [n, D], of any norm and floating dtype.
        labels: Classes, [n].
        classes: C.
        scale: The exponential of `logit_scale`. It only sets the unit of `TOLERANCE`.
        l2: Penalty, such as that of `probe_l2`.

    Source: Radford et al., CLIP, ICML 2021, arXiv 2103.00020, appendix A.3; here on normalized embeddings.
    """
    fit, dtype = _drawn_to_zero("linear_probe", image, labels, classes, scale).solved(l2), wide_dtype(image.dtype)
    bias = fit.bias.masked_fill(labels.bincount(minlength=classes) == 0, -torch.inf)
    return Head(fit.weight.to(dtype), bias.to(dtype))


def probe_l2(image: Tensor, labels: Tensor, classes: int, scale: float | Tensor) -> float:
    """Choose the penalty of `linear_probe` as `anchored_l2` does that of `anchored_probe`."""
    return _drawn_to_zero("probe_l2", image, labels, classes, scale).best_l2()


class _Regression(NamedTuple):
    """Logistic regression of checked input."""

    function: str  # for messages
    image: Tensor  # [n, D], unit norm
    labels: Tensor  # [n]
    anchor: Tensor  # [C, D], to which the weight is drawn
    scale: float
    bias: bool = False

    def solved(self, l2: float) -> Fit:
        """Return the minimum; warn unless its gradient is below that of `TOLERANCE`."""
        check_positive(self.function, l2=l2)
        tolerance = TOLERANCE * l2 * self.scale
        fit = logistic_regression(self.image, self.labels, self.anchor, l2, tolerance=tolerance, bias=self.bias)
        if not fit.gradient <= tolerance:
            warn_caller(
                f"{self.function}: after {ITERATIONS} iterations the gradient / (l2 · scale) is "
                f"{fit.gradient / (l2 * self.scale):.1e}; expected at most {TOLERANCE:.0e}. Use a larger l2."
            )
        return fit

    def best_l2(self) -> float:
        """Choose a penalty; see `anchored_l2`."""
        fold = halves(self.labels)
        if not (fold >= 0).any():
            return WITHOUT_PAIRS
        weights = [self.anchor, self.anchor]
        tried: dict[float, tuple[int, float]] = {}
        for l2 in sorted(CANDIDATES, reverse=True):
            tried[l2] = self._score(l2, fold, weights)
            losses = [-log_likelihood for _, log_likelihood in tried.values()]
            if min(losses[-2:]) > min(losses):
                break
        return max(tried, key=lambda penalty: tried[penalty])

    def _score(self, l2: float, fold: Tensor, weights: list[Tensor]) -> tuple[int, float]:
        """Return the number of correct images, and their log-likelihood, each by a fit without its fold.

        The fits start from `weights`, and replace them.
        """
        correct, log_likelihood = 0, 0.0
        for number, start in enumerate(weights):
            held_out = fold == number
            fit = logistic_regression(
                self.image[~held_out],
                self.labels[~held_out],
                self.anchor,
                l2,
                tolerance=_RANKED * l2 * self.scale,
                bias=self.bias,
                start=start,
            )
            weights[number] = fit.weight
            logits, target = self.image[held_out] @ fit.weight.T + fit.bias, self.labels[held_out]
            correct += int((logits.argmax(dim=1) == target).sum())
            log_likelihood -= torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        return correct, log_likelihood


def _drawn_to_text(function: str, image: Tensor, labels: Tensor, text: Tensor, scale: float | Tensor) -> _Regression:
    """Check the input of a regression that is drawn to texts [C, D]."""
    zero = _drawn_to_zero(function, image, labels, len(text), scale)
    unit_text = unit_rows(function, "text", text)
    check_shape(function, "text", text, ("image", image), C=None, D=image.shape[1])
    return zero._replace(anchor=zero.scale * unit_text, bias=False)


def _drawn_to_zero(function: str, image: Tensor, labels: Tensor, classes: int, scale: float | Tensor) -> _Regression:
    """Check the input of a regression that uses no texts, and has a bias."""
    x, scale = unit_rows(function, "image", image), float(scale)
    check_shape(function, "labels", labels, ("image", image), n=len(image))
    check_labels(function, labels, classes)
    check_positive(function, scale=scale)
    return _Regression(function, x, labels, x.new_zeros(classes, x.shape[1]), scale, bias=True)


def halves(labels: Tensor) -> Tensor:
    """Half 0 or 1 of the images of each class, in the given order, [n]; −1 for the image of a class with one."""
    counts = labels.bincount()
    return torch.where(counts[labels] == 1, -1, (2 * ranks(labels) >= counts[labels]).long())


def ranks(labels: Tensor) -> Tensor:
    """Number of earlier images of the same class, of each image, [n].

    >>> ranks(torch.tensor([1, 0, 1, 1])).tolist()
    [0, 0, 1, 2]
    """
    order, counts = labels.argsort(stable=True), labels.bincount()
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    return rank
