"""Linear discriminant analysis of embeddings, alone and together with the texts of the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_shape
from ...dtypes import in_accumulation_dtype, wide_dtype
from .checks import check_labels, check_positive, unit_rows
from .head import Head

SHRINKAGE = 0.3
"""Part of the covariance that is a multiple of the identity."""
_LOGITS = 1 << 22  # at a time, in fp64 32 MiB


@torch.no_grad()
def gaussian_head(image: Tensor, labels: Tensor, classes: int, shrinkage: float = SHRINKAGE) -> Head:
    """Classify by Gaussians with a mean μ_c for each class and one covariance Σ, in closed form.

        weight_c = Σ⁻¹ μ_c,   bias_c = −½ ⟨μ_c, weight_c⟩ + log(n_c/n)
        Σ = (1 − shrinkage) S + shrinkage · tr(S)/D · I,   S = 1/n Σ_i (x_i − μ_label)(x_i − μ_label)ᵀ

    x is normalized. If no class has two different images, S is zero and Σ is the identity: the class with the nearest
    mean. A class without images has weight 0 and bias −inf. Equals scikit-learn's `LinearDiscriminantAnalysis` with
    `solver="lsqr"`. The largest matrices are [n, D], [C, D] and [D, D].

    Args:
        image: x, [n, D], of any norm and floating dtype.
        labels: Classes, [n].
        classes: C.
        shrinkage: Above 0, at most 1.

    Source: GDA (Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", ICLR 2024, arXiv
    2402.04087), which takes equal priors: see `balanced`.
    """
    function = "gaussian_head"
    if not 0 < shrinkage <= 1:
        raise ValueError(f"{function}: shrinkage must be above 0 and at most 1; got {shrinkage}.")
    x = unit_rows(function, "image", image)
    check_shape(function, "labels", labels, ("image", image), n=len(image))
    check_labels(function, labels, classes)
    counts = labels.bincount(minlength=classes).to(x)  # [C]
    mean = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x) / counts.clamp(min=1)[:, None]
    centred = x - mean[labels]
    covariance = centred.T @ centred / len(x)  # [D, D]
    variance = covariance.diagonal().mean()
    if variance <= torch.finfo(x.dtype).eps ** 1.5:  # equal images differ from their mean by rounding
        covariance, variance = torch.zeros_like(covariance), torch.ones_like(variance)
        shrinkage = 1.0
    covariance = (1 - shrinkage) * covariance
    covariance.diagonal().add_(shrinkage * variance)
    weight = torch.cholesky_solve(mean.T, torch.linalg.cholesky(covariance)).T
    bias = -(mean * weight).sum(dim=1) / 2 + (counts / len(x)).log()
    dtype = wide_dtype(image.dtype)
    return Head(weight.to(dtype), bias.to(dtype))


@torch.no_grad()
def with_text(
    head: Head, image: Tensor, labels: Tensor, text: Tensor, scale: float | Tensor, alpha: float = 1.0
) -> Head:
    """Add a Gaussian head to the logits of the texts; classes without images have those of the texts alone.

        z = scale · x Tᵀ + alpha · σ_text/σ_head · (head − mean of the head over the classes with images) − γ

    σ is the standard deviation over the classes with images, in the root mean square over the images. Both parts then
    have equal weight at alpha = 1. γ sets the mean, over the images, of the highest logit among the other classes with
    images to that of the texts: without it, classes with images would win over those without. Mean and γ change no
    comparison of classes with images.

    Args:
        head: Result of `gaussian_head`.
        image: Its images x, [n, D].
        labels: Their classes, [n].
        text: T, [C, D].
        scale: The exponential of `logit_scale`.
        alpha: Weight of the head, such as that of the best accuracy on validation images.
    """
    function = "with_text"
    classes, width = head.weight.shape
    check_shape(function, "text", text, ("head.weight", head.weight), C=classes, D=width)
    check_shape(function, "image", image, ("head.weight", head.weight), n=None, D=width)
    check_shape(function, "labels", labels, ("image", image), n=len(image))
    check_labels(function, labels, classes)
    check_positive(function, scale=float(scale), alpha=alpha)
    x, unit_text = unit_rows(function, "image", image), unit_rows(function, "text", text)
    of_text = Head.of_text(unit_text, scale)
    has_images = head.bias.isfinite()  # [C]

    # 1. Scale the head, less its mean, to the spread of the texts.
    augmented = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    moment = augmented.T @ augmented / len(x)  # [D + 1, D + 1]
    text_spread = _spread(_centred_rows(of_text, has_images), moment)
    rows = _centred_rows(head, has_images)
    spread = _spread(rows, moment)
    weight, bias = of_text.weight.clone(), of_text.bias.clone()
    if spread > 0:  # 0 with a single class
        rows = alpha * text_spread / spread * rows
        weight[has_images] += rows[:, :-1]
        bias[has_images] += rows[:, -1]
        # 2. Subtract γ.
        highest = _highest_of_others(Head(weight, bias), has_images, x, labels)
        bias[has_images] -= highest - _highest_of_others(of_text, has_images, x, labels)
    return Head(weight.to(head.weight), bias.to(head.bias), head.bias.new_tensor(float(scale)))


def _centred_rows(head: Head, classes: Tensor) -> Tensor:
    """Rows (weight, bias) of some classes, less their mean, [C', D + 1]."""
    rows = in_accumulation_dtype(torch.cat([head.weight, head.bias[:, None]], dim=1)[classes])
    return rows - rows.mean(dim=0)


def _spread(rows: Tensor, moment: Tensor) -> Tensor:
    """Standard deviation σ over the classes of the logits of centred rows, in the root mean square over the images."""
    return ((rows.T @ rows * moment).sum() / len(rows)).sqrt()


def _highest_of_others(head: Head, has_images: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Mean over the images of the highest logit of a class with images that is not the own one."""
    head = Head(head.weight, head.bias.masked_fill(~has_images, -torch.inf))
    rows = max(1, _LOGITS // len(head.weight))
    highest = []
    for images, own in zip(x.split(rows), labels.split(rows), strict=True):
        others = head.logits(images).scatter(1, own[:, None], -torch.inf)  # [rows, C]
        highest.append(others.amax(dim=1))
    return torch.cat(highest).mean()
