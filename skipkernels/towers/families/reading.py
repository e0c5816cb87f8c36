"""Functions by which families of blocks read weights and settings from the modules of a block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def weight_and_bias(layer: Any, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, multiplied by the layer scale [W] that follows it, if there is one.

    They are attributes, as the layer reads them: a bias may be a parameter, a buffer, or a view of a flat parameter.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)  # RMSNorm has none
    if scale is None:
        return weight, bias
    return scale[:, None] * weight, None if bias is None else scale * bias


def joint_weight_and_bias(*layers: Any) -> tuple[Any, Any]:
    """Weights and biases of layers side by side; zeros for a bias that one of them lacks."""
    weights, biases = zip(*map(weight_and_bias, layers), strict=True)
    if all(bias is None for bias in biases):
        return weights, None
    return weights, tuple(
        w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)
    )


def layer_scale(module: Any) -> Tensor | None:
    """Factors [W] of a module that scales a branch; None for an identity."""
    return None if module is None or isinstance(module, nn.Identity) else module.gamma


def activation(module: nn.Module, names: Mapping[type, str]) -> str:
    """Name of an activation in `functional.mlp_activation`; `names` by type, if its options do not change it."""
    if getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    kind = type(module)
    if kind not in names and kind.__name__ == "QuickGELU":  # each package has one of its own
        return "quick_gelu"
    if kind not in names:
        known = ", ".join(sorted(set(names.values())))
        raise TypeError(f"fused block: the activation must be one of {known}; got a {kind.__name__}.")
    return names[kind]
