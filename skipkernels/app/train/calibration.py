"""Temperature scaling: probabilities that agree with the accuracy on held-out images."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

_BOUNDS = (math.log(0.01), math.log(100.0))  # range of log T
_GOLDEN = (math.sqrt(5) - 1) / 2
_STEPS = 60  # the interval shrinks by 0.618 in each, to 3e-13 of its length
_TOLERANCE = 1e-6  # closer than this to a bound, the minimum is beyond it


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
    wide, labels = logits.double(), labels.to(logits.device)
    smoothing = 2 / (len(wide) + 2)

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(wide / math.exp(log_temperature), labels, label_smoothing=smoothing).item()

    low, high = _BOUNDS
    for _ in range(_STEPS):  # golden-section search; both points are evaluated again, for simplicity
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    found = (low + high) / 2
    at_bound = min(found - _BOUNDS[0], _BOUNDS[1] - found) < _TOLERANCE
    return None if at_bound else math.exp(found)
