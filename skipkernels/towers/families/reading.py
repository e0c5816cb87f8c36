"""Weights and settings of a fused block, read from its modules; the families share these functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..fused.weights import PARTS, GivenWeights


def weights_of(name: str, layer: Any, scale: Tensor | None = None) -> GivenWeights:
    """Weight and bias of a layer, as `name` and `name_bias`.

    They are multiplied by the layer scale [W] that follows the layer, if there is one. They are attributes, as the
    layer reads them: a bias may be a parameter, a buffer, or a view of a flat parameter.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)  # RMSNorm has none
    if scale is not None:
        weight, bias = scale[:, None] * weight, None if bias is None else scale * bias
    return {name: weight} if bias is None else {name: weight, f"{name}_bias": bias}


def weights_of_parts(name: str, layers: Sequence[Any]) -> GivenWeights:
    """Weights and biases of layers that are the parts of a field; zeros for a bias that one of them lacks."""
    found: GivenWeights = {}
    for part, layer in zip(PARTS[name], layers, strict=True):
        found |= weights_of(part, layer)
    if len(found) > len(layers):  # some have a bias
        found = {f"{part}_bias": found[part].new_zeros(len(found[part])) for part in PARTS[name]} | found
    return found


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
