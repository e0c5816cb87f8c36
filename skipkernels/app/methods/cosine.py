"""Logits that are cosines of images and classes, at the scale of a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or `dtype` if it is wider: the dtype of logits, and of weights that a method adds to a model."""
    return torch.promote_types(dtype, torch.float32)


def cosine_logits(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Logits [B, C] of images over classes, computed as in `SkipCLIP.predict`.

        z_bc = exp(logit_scale) · ⟨x_b/|x_b|, t_c⟩

    `image` x [B, D] may have any norm; `text` t [C, D] has unit norm; `logit_scale`, [] or [1], gets no gradient.
    """
    with torch.autocast(image.device.type, enabled=False):  # bf16 logits at a scale of 100 are half a unit apart
        return logit_scale.detach().exp().to(text.dtype) * F.normalize(image.to(text.dtype), dim=-1) @ text.T
