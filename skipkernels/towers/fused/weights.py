"""Weights of a fused block: as a family reads them, and as the stages do."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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


def field_of(name: str) -> str:
    """Return the field of `BlockWeights` to which a given weight belongs."""
    return _WHOLE.get(name, name)


def split_into_parts(values: dict[str, Tensor], given: Container[str]) -> None:
    """Add the parts of those fields in `values` that are given in parts."""
    for name, parts in PARTS.items():
        if name in values and parts[0] in given:
            values |= zip(parts, values[name].chunk(len(parts)), strict=True)


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


@torch.no_grad()
def join_and_cast(given: Mapping[str, Tensor], dtype: torch.dtype) -> BlockWeights:
    """Return the weights as given, but with parts joined, and those of products in their dtype; one launch copies all.

    A captured step, and the eager ones before its capture, take the casts that their update renews (`casts.py`).
    """
    parts_of: dict[str, list[Tensor]] = {}
    for name, x in given.items():
        parts_of.setdefault(field_of(name), []).append(x)
    weights: dict[str, Tensor] = {}
    copies: list[tuple[Tensor, Tensor]] = []  # target and source
    for name, parts in parts_of.items():
        wanted = dtype if name in _OF_PRODUCTS else parts[0].dtype
        if len(parts) == 1 and parts[0].dtype == wanted:
            weights[name] = parts[0]
            continue
        joint = casts.active_joint_cast(parts, wanted)
        if joint is None:
            lengths = [len(part) for part in parts]
            joint = parts[0].new_empty(sum(lengths), *parts[0].shape[1:], dtype=wanted)
            copies += zip(joint.split(lengths), parts, strict=True)
        weights[name] = joint
    if copies:
        torch._foreach_copy_([target for target, _ in copies], [source for _, source in copies])
    return BlockWeights(**weights)
