"""Weights of a fused block: read from the modules of a family, and prepared for the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import casts as casts_of_step

NORMS = ("norm_1", "norm_2", "query_norm", "key_norm", "attention_norm", "mlp_norm")

Weight = Tensor | tuple[Tensor, ...]  # A tuple has the parts of a weight, one below the other


@dataclass(eq=False)
class BlockWeights:
    """Parameters of a block, in order of use but for optional norms; None where it has none.

    Layer scales are multiplied into W_o, b_o and W_p, b_p.
    """

    norm_1: Tensor  # [W]
    norm_1_bias: Tensor | None
    in_proj: Weight  # [3W, W]: query, key, value
    in_proj_bias: Weight | None
    out_proj: Tensor  # [W, W]
    out_proj_bias: Tensor | None
    norm_2: Tensor  # [W]
    norm_2_bias: Tensor | None
    mlp_in: Weight  # [M, W]; [2M, W] for SwiGLU
    mlp_in_bias: Weight | None
    mlp_out: Tensor  # [W, M]
    mlp_out_bias: Tensor | None
    query_norm: Tensor | None = None  # [E]
    query_norm_bias: Tensor | None = None
    key_norm: Tensor | None = None  # [E]
    key_norm_bias: Tensor | None = None
    attention_norm: Tensor | None = None  # [W]
    attention_norm_bias: Tensor | None = None
    mlp_norm: Tensor | None = None  # [M]
    mlp_norm_bias: Tensor | None = None

    def parts(self) -> dict[str, tuple[Tensor, ...]]:
        """Return the parts of each weight that is not None, by its name."""
        return {name: x if isinstance(x, tuple) else (x,) for name, x in vars(self).items() if x is not None}

    def named_parts(self) -> tuple[list[str], list[Tensor]]:
        """Return the parts of all weights in order, each with the name of its weight; for `from_parts`."""
        named = [(name, part) for name, parts in self.parts().items() for part in parts]
        return [name for name, _ in named], [part for _, part in named]

    @classmethod
    def from_parts(cls, names: Sequence[str], parts: Sequence[Tensor]) -> BlockWeights:
        """Return the weights with these parts, and None where there are none."""
        found: dict[str, list[Tensor]] = {}
        for name, part in zip(names, parts, strict=True):
            found.setdefault(name, []).append(part)
        weights: dict[str, Any] = dict.fromkeys(x.name for x in fields(cls))
        return cls(**weights | {name: tuple(x) if len(x) > 1 else x[0] for name, x in found.items()})


class BlockSettings(NamedTuple):
    """Settings of a block."""

    activation: str  # Name of the activation in `functional.mlp_activation`
    eps: tuple[float, ...]  # Epsilons of the norms, in the order of `NORMS`
    heads: int  # H
    rms: bool = False  # The norms are RMSNorms


# ---- reading of modules, for the families ----------------------------------------------------------------------------


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


# ---- what the stages read --------------------------------------------------------------------------------------------

# Fields of `BlockWeights` that products read, in the dtype of the products. The operators upcast the others: that of
# the activation adds mlp_in_bias.
CAST_FIELDS = ("in_proj", "in_proj_bias", "out_proj", "out_proj_bias", "mlp_in", "mlp_out", "mlp_out_bias")


class PreparedWeights(BlockWeights):
    """Weights as the stages read them: each is one tensor, and those of products have the dtype of products.

    The fields are those of `BlockWeights`; the annotations say which are no tuples here.
    """

    in_proj: Tensor
    in_proj_bias: Tensor | None
    mlp_in: Tensor
    mlp_in_bias: Tensor | None


@torch.no_grad()
def prepare(weights: BlockWeights, dtype: torch.dtype) -> PreparedWeights:
    """Join weights in parts, and cast those of products to their dtype, all by one launch.

    A captured step, and the eager ones before its capture, take the casts that their update renews (`casts.active`).
    """
    prepared: dict[str, Any] = dict(vars(weights))
    if isinstance(weights.mlp_in_bias, tuple):
        prepared["mlp_in_bias"] = torch.cat(weights.mlp_in_bias)
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name, parts in weights.parts().items():
        if name not in CAST_FIELDS or (len(parts) == 1 and parts[0].dtype == dtype):
            continue
        cast = None if casts_of_step.active is None else casts_of_step.active.of_product(parts, dtype)
        if cast is None:
            lengths = [len(part) for part in parts]
            cast = parts[0].new_empty(sum(lengths), *parts[0].shape[1:], dtype=dtype)
            targets += cast.split(lengths)
            sources += parts
        prepared[name] = cast
    if sources:
        torch._foreach_copy_(targets, sources)
    return PreparedWeights(**prepared)
