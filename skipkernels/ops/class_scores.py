"""`class_scores`: the score by which classes are selected for a batch.

    score_c = max_b ⟨x_b/|x_b|, p_c⟩,   score_c = +∞ where c is the label of an image

One pass over the prototypes; the [B, C] cosines are never written. Not differentiable. CPU kernel:
csrc/class_scores.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import registration


def _serve(image: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    C = prototypes.shape[0]
    if labels.device.type == "cpu" and (labels.amin() < 0 or labels.amax() >= C):
        raise ValueError(f"class_scores: labels must be rows of prototypes, 0 to {C - 1}; got {labels.tolist()}.")
    return reference.class_scores(image, prototypes, labels)


def _fake(image: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    return image.new_empty(prototypes.shape[0], dtype=dtype)


class_scores = registration.define(
    "class_scores(Tensor image, Tensor prototypes, Tensor labels) -> Tensor scores", serve=_serve, fake=_fake
)
registration.not_differentiable(class_scores)
registration.autocast_features(class_scores, features=2)
