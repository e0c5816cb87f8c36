"""Modules of exports that classify the embeddings of a plain CLIP, and the lines of a model card that do the same."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

COSINE_CODE = 'logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ head["class_embeddings"].T'


class CosineHead(nn.Module):
    """Image embeddings [B, D] of any norm → logits exp(logit_scale) · ⟨x̂_b, t̂_c⟩ [B, C], and x̂ [B, D]."""

    def __init__(self, class_embeddings: Tensor, logit_scale: Tensor):
        super().__init__()
        self.register_buffer("class_embeddings", class_embeddings)
        self.register_buffer("scale", logit_scale.detach().float().exp(), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits and the embeddings."""
        embedding = F.normalize(image, dim=-1)
        return self.scale * embedding @ self.class_embeddings.T, embedding  # type: ignore[operator]


AFFINE_CODE = 'logits = F.normalize(image, dim=-1) @ head["weight"].T + head["bias"]'
"""Code of `AffineHead`, as a `head_code`."""


class AffineHead(nn.Module):
    """Image embeddings x [B, D] of any norm → logits ⟨weight_c, x̂_b⟩ + bias_c [B, C], and x̂ [B, D]."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits and the embeddings."""
        embedding = F.normalize(image, dim=-1)
        return F.linear(embedding, self.weight, self.bias), embedding  # type: ignore[arg-type]
