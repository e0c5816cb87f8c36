"""Probabilities that agree with the accuracy on held-out images, and thresholds on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...dtypes import in_accumulation_dtype

WANTED = (("accuracy", 90.0), ("accuracy", 95.0), ("accuracy", 99.0), ("coverage", 95.0))
"""Accuracies, and shares of images that are kept, in per cent, for which thresholds are found."""
_NONE_QUANTILE = 0.05  # of the energies of held-out images
_BOUNDS = (math.log(0.01), math.log(100.0))  # range of log T
_POINTS, _ROUNDS = 33, 3  # each round searches between the neighbours of the best point: to 0.11 % of T


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Fit the temperature T that minimises the cross-entropy of softmax(logits / T).

        min over T of  −Σ_i Σ_c y_ic · log softmax_c(z_i / T),   y_ic = 1 − ε (C − 1)/C for the label, else ε / C

    The loss is convex in 1/T. The smoothing of targets ε = 2 / (n + 2), after Platt, keeps the minimum above T = 0 if
    every image is classified correctly.

    Args:
        logits: Logits [n, C] of held-out images.
        labels: int64 [n].

    Returns:
        float | None: T, from 0.01 to 100; 1 for a single class, since its probability does not depend on T. None if the
            minimum is beyond this range, as for logits that do not depend on the class of an image.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599. Platt,
    "Probabilistic Outputs for Support Vector Machines", 1999.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[20.0, 0.0]]).repeat(100, 1)  # certain, and right in 75 of 100
        >>> round(fit_temperature(logits, torch.tensor([0] * 75 + [1] * 25)), 1)  # 20 / T ≈ log(75 / 25), but for ε
        18.6
    """
    if logits.shape[1] == 1:
        return 1.0
    wide, labels = in_accumulation_dtype(logits), labels.to(logits.device)
    smoothing = 2 / (len(wide) + 2)

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(wide / math.exp(log_temperature), labels, label_smoothing=smoothing).item()

    low, high = _BOUNDS
    for _ in range(_ROUNDS):
        points = np.linspace(low, high, _POINTS).tolist()
        best = min(range(_POINTS), key=lambda place: loss(points[place]))
        low, high = points[max(best - 1, 0)], points[min(best + 1, _POINTS - 1)]
    return None if points[best] in _BOUNDS else math.exp(points[best])


def fit_none_logit(logits: Tensor, temperature: float | None) -> float:
    """Return the logit of "none of these": the 5 % quantile of the energy logsumexp(z / T) of held-out images.

    At this energy, "none of these" is as probable as all classes together.
    """
    return (in_accumulation_dtype(logits) / (temperature or 1.0)).logsumexp(dim=1).quantile(_NONE_QUANTILE).item()


def class_probabilities(logits: Tensor, temperature: float | None, none_logit: float | None) -> Tensor:
    """Probabilities [n, C] of the classes, with "none of these" as one more class if it has a logit b.

        p_c = exp(z_c / T) / (exp(b) + Σ_j exp(z_j / T)) = softmax_c(z / T) · σ(E − b),   E = logsumexp(z / T)

    σ(E − b) is small for images that resemble no class, of which the softmax may be near 1.

    Args:
        logits: Logits z [n, C].
        temperature: T; None is 1.
        none_logit: b; None is −∞, the softmax over the classes.

    Source: the energy is that of Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, arXiv
    2010.03759.

    Example:
        >>> import torch
        >>> class_probabilities(torch.zeros(1, 2), None, none_logit=0.0).tolist()
        [[0.3333333432674408, 0.3333333432674408]]
    """
    scaled = logits.float() / (temperature or 1.0)
    if none_logit is None:
        return scaled.softmax(dim=1)
    none = scaled.new_full((len(scaled), 1), none_logit)
    return torch.cat([scaled, none], dim=1).softmax(dim=1)[:, :-1]


def find_thresholds(probabilities: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Find the thresholds of `WANTED`: the smallest that reaches an accuracy, the largest that keeps a share of images.

    An image is kept if its largest probability is at least the threshold, a multiple of 0.01.

    Args:
        probabilities: Probabilities [n, C] of held-out images.
        labels: int64 [n].

    Returns:
        list[dict[str, Any]]: For each of `WANTED`, "wanted", "target", "threshold", "coverage" (share of the images
            that is kept) and "accuracy" (of those), in per cent. The last three are None if the target is not reached.

    Source: Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017, arXiv 1705.08500.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
        >>> find_thresholds(probabilities, torch.tensor([0, 0, 1, 1]))[0]
        {'wanted': 'accuracy', 'target': 90.0, 'threshold': 0.61, 'coverage': 75.0, 'accuracy': 100.0}
    """
    best, classes = probabilities.max(dim=1)
    correct = classes == labels.to(classes.device)
    points: list[dict[str, Any]] = []
    for threshold in (n / 100 for n in range(101)):
        kept = best >= threshold
        if kept.any():
            parts = {"coverage": kept, "accuracy": correct[kept]}
            shares = {name: round(100 * in_accumulation_dtype(part).mean().item(), 4) for name, part in parts.items()}
            points.append({"threshold": threshold, **shares})
    rows = []
    for wanted, target in WANTED:
        reached = [point for point in points if point[wanted] >= target]
        place = 0 if wanted == "accuracy" else -1
        point = reached[place] if reached else dict.fromkeys(("threshold", "coverage", "accuracy"))
        rows.append({"wanted": wanted, "target": target, **point})
    return rows


def calibrate(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fit the temperature and the logit of "none of these", and find thresholds; arguments as for `fit_temperature`.

    Returns:
        Fields of a `Description`, and the result of `find_thresholds`.
    """
    temperature = fit_temperature(logits, labels)
    none_logit = fit_none_logit(logits, temperature)
    fields = {"temperature": temperature, "none_logit": none_logit, "calibration_images": len(labels)}
    return fields, find_thresholds(class_probabilities(logits, temperature, none_logit), labels)
