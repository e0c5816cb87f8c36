"""Reading of the weights and settings of a block, for the families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def weights_of(name: str, layer: Any, scale: Tensor | None = None) -> dict[str, Any]:
    """Weight and bias of a layer, as the fields `name` and `name_bias` of `BlockWeights`.

    They are multiplied by the layer scale [W] that follows the layer, if there is one. They are attributes, as the
    layer reads them: a bias may be a parameter, a buffer, or a view of a flat parameter.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)  # RMSNorm has none
    if scale is not None:
        weight, bias = scale[:, None] * weight, None if bias is None else scale * bias
    return {name: weight, f"{name}_bias": bias}


def joint_weights_of(name: str, *layers: Any) -> dict[str, Any]:
    """Weights and biases of layers side by side, as these fields; zeros for a bias that one of them lacks."""
    weights, biases = tuple(layer.weight for layer in layers), [getattr(layer, "bias", None) for layer in layers]
    if all(bias is None for bias in biases):
        return {name: weights, f"{name}_bias": None}
    filled = (w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True))
    return {name: weights, f"{name}_bias": tuple(filled)}


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
