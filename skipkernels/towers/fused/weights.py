"""Weights and settings of a fused block: read from the modules of a family, and prepared for the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import casts


@dataclass(eq=False, kw_only=True)
class BlockWeights:
    """Parameters of a block in order of use, as its stages read them; None where it has none.

    Those of products are in the dtype of the products. Layer scales are multiplied into W_o, b_o and W_p, b_p.
    """

    norm_1: Tensor  # [W]
    norm_1_bias: Tensor | None = None
    in_proj: Tensor  # [3W, W]: query, key, value
    in_proj_bias: Tensor | None = None
    query_norm: Tensor | None = None  # [E]
    query_norm_bias: Tensor | None = None
    key_norm: Tensor | None = None  # [E]
    key_norm_bias: Tensor | None = None
    attention_norm: Tensor | None = None  # [W]
    attention_norm_bias: Tensor | None = None
    out_proj: Tensor  # [W, W]
    out_proj_bias: Tensor | None = None
    norm_2: Tensor  # [W]
    norm_2_bias: Tensor | None = None
    mlp_in: Tensor  # [M, W]; [2M, W] for SwiGLU: gate, value
    mlp_in_bias: Tensor | None = None
    mlp_norm: Tensor | None = None  # [M]
    mlp_norm_bias: Tensor | None = None
    mlp_out: Tensor  # [W, M]
    mlp_out_bias: Tensor | None = None

    def layer(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a layer that the block has."""
        return getattr(self, name), getattr(self, f"{name}_bias")


# What a family reads: weights by their fields in `BlockWeights`, or in parts of equal height, one below the other.
# Parts are joined in each pass and not here: what autograd saves is then the caller's parameters, and no copy of them.
GivenWeights = dict[str, Tensor]
PARTS = {"in_proj": ("query", "key", "value"), "mlp_in": ("mlp_gate", "mlp_value")}
PARTS |= {f"{name}_bias": tuple(f"{part}_bias" for part in parts) for name, parts in PARTS.items()}
_WHOLE = {part: name for name, parts in PARTS.items() for part in parts}

# Fields that products read. The operators upcast the others: that of the activation adds mlp_in_bias.
_OF_PRODUCTS = ("in_proj", "in_proj_bias", "out_proj", "out_proj_bias", "mlp_in", "mlp_out", "mlp_out_bias")

# Norms within attention: autograd computes their gradients.
ATTENTION_NORMS = tuple(f"{name}_norm{end}" for name in ("query", "key", "attention") for end in ("", "_bias"))


class BlockSettings(NamedTuple):
    """Settings of a block."""

    activation: str  # Name of the activation in `functional.mlp_activation`
    eps: Mapping[str, float]  # Epsilon of each norm, by its field in `BlockWeights`
    heads: int  # H
    rms: bool = False  # The norms are RMSNorms


# ---- reading of modules, for the families ----------------------------------------------------------------------------


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


# ---- what the stages read --------------------------------------------------------------------------------------------


def field_of(name: str) -> str:
    """Field of `BlockWeights` that a given weight is, or is a part of."""
    return _WHOLE.get(name, name)


@torch.no_grad()
def prepare(given: Mapping[str, Tensor], dtype: torch.dtype) -> BlockWeights:
    """Join weights in parts, and cast those of products to their dtype, all by one launch.

    A captured step, and the eager ones before its capture, take the casts that their update renews (`casts.py`).
    """
    parts_of: dict[str, list[Tensor]] = {}
    for name, x in given.items():
        parts_of.setdefault(field_of(name), []).append(x)
    weights: dict[str, Tensor] = {}
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name, parts in parts_of.items():
        wanted = dtype if name in _OF_PRODUCTS else parts[0].dtype
        if len(parts) == 1 and parts[0].dtype == wanted:
            weights[name] = parts[0]
            continue
        joint = casts.of_product(parts, wanted)
        if joint is None:
            lengths = [len(part) for part in parts]
            joint = parts[0].new_empty(sum(lengths), *parts[0].shape[1:], dtype=wanted)
            targets += joint.split(lengths)
            sources += parts
        weights[name] = joint
    if sources:
        torch._foreach_copy_(targets, sources)
    return BlockWeights(**weights)
