"""Layers for `kernelize`. They have no state: their `forward` replaces that of a layer, in training too."""

import torch
from torch import Tensor, nn

from . import functional

__all__ = ["GELU", "GELUTanh", "LayerNorm", "QuickGELU"]


class QuickGELU(nn.Module):
    """x · σ(1.702 x), for `QuickGELUActivation` of transformers and `QuickGELU` of open_clip; only x is saved."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """Activation of x [..., W] in its dtype, computed in fp32."""
        return functional.mlp_activation(x, None, "quick_gelu")


class GELU(nn.Module):
    """x · Φ(x)."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """Activation of x [..., W] in its dtype, computed in fp32."""
        return functional.mlp_activation(x, None, "gelu")


class GELUTanh(nn.Module):
    """The tanh approximation of x · Φ(x)."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """Activation of x [..., W] in its dtype, computed in fp32."""
        return functional.mlp_activation(x, None, "gelu_tanh")


class LayerNorm(nn.Module):
    """For `torch.nn.LayerNorm` over the last dimension, with weight and bias; statistics in fp32."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        """Normalised input [..., W] in its dtype."""
        if self.bias is None or self.weight.ndim != 1:
            return torch.nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return functional.add_layer_norm(input, None, self.weight, self.bias, self.eps)[1]
