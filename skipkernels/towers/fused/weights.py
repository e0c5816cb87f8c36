"""Weights and settings of a fused block, and the copies of weights that its products read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

NORMS = ("norm_1", "norm_2", "query_norm", "key_norm", "attention_norm", "mlp_norm")
ATTENTION_NORMS = tuple(name + suffix for name in NORMS[2:5] for suffix in ("", "_bias"))  # those within attention

PRODUCTS = ("in_proj", "in_proj_bias", "out_proj", "out_proj_bias", "fc", "proj", "proj_bias")
"""Fields of `BlockWeights` that are in the dtype of the products. The operators upcast the others."""


class Hidden(NamedTuple):
    """Hidden states as a sum that is not computed yet: the next norm adds it.

    Both terms must have the same gradient up to rounding, as those of a sum: a fused block takes its residual gradient
    from `stream` and that of its product from `branch`. (A NamedTuple, since hooks of FSDP2 look for tensors in it.)
    """

    stream: Tensor
    branch: Tensor | None = None

    def sum(self) -> Tensor:
        """Compute the sum in the dtype of the stream."""
        return self.stream if self.branch is None else (self.stream + self.branch).to(self.stream.dtype)

    def map(self, function: Callable[[Tensor], Tensor]) -> Hidden:
        """Apply a view or a selection of rows to both terms."""
        return Hidden(function(self.stream), None if self.branch is None else function(self.branch))


class Rotary(NamedTuple):
    """Rotary position embeddings of the tokens of a sequence, see `functional.rotary_embedding`."""

    cos: Tensor  # [tokens, E/2]; 1 for a token without a position, such as the class token
    sin: Tensor  # [tokens, E/2]
    interleaved: bool


@dataclass(frozen=True)
class LowRankFactors:
    """Low-rank update s · B · A that is part of a weight; one with frozen W has a list of them as `low_rank`."""

    part: int  # Part of the rows of the weight; 0, or 1 and 2 for key and value in a packed projection
    scale: float
    down: Tensor  # A, [rank, in]
    up: Tensor  # B, [out, rank]


@dataclass(eq=False)
class BlockWeights:
    """Parameters of a block in order of use. Layer scales are multiplied into W_o, b_o and W_p, b_p.

    A field may be a tuple of the parts of a weight, which `prepare` concatenates in each pass. None: the block has
    none.
    """

    norm_1: Tensor  # [W], as other norms and biases of this width
    norm_1_bias: Tensor | None
    in_proj: Any  # [3W, W]: query, key, value
    in_proj_bias: Any  # [3W]
    out_proj: Tensor  # [W, W]
    out_proj_bias: Tensor | None
    norm_2: Tensor
    norm_2_bias: Tensor | None
    fc: Any  # [M, W], or [2M, W] for SwiGLU: gate, value
    fc_bias: Any
    proj: Tensor  # [W, M]
    proj_bias: Tensor | None
    query_norm: Tensor | None = None  # [E]
    query_norm_bias: Tensor | None = None
    key_norm: Tensor | None = None  # [E]
    key_norm_bias: Tensor | None = None
    attention_norm: Tensor | None = None  # [W]
    attention_norm_bias: Tensor | None = None
    mlp_norm: Tensor | None = None  # [M]
    mlp_norm_bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors in order, parts one after the other."""
        return [x for field in vars(self).values() for x in parts_of(field) if x is not None]

    def low_rank_updates(self) -> dict[str, list[LowRankFactors]]:
        """Low-rank updates by field; those of the parts of a field as parts of one weight."""
        found: dict[str, list[LowRankFactors]] = {}
        for name, field in vars(self).items():
            for offset, part in enumerate(parts_of(field)):
                for update in getattr(part, "low_rank", ()):
                    found.setdefault(name, []).append(replace(update, part=update.part + offset))
        return found


@dataclass(frozen=True)
class FusableBlock:
    """Weights and settings of the caller's block."""

    weights: BlockWeights
    activation: str  # Name of the activation in `functional.mlp_activation`
    eps: tuple[float, ...]  # Epsilons of the norms, in the order of `NORMS`
    heads: int  # H
    rms: bool = False  # The norms are RMSNorms


@dataclass(frozen=True)
class BlockSettings:
    """Settings of one call of a fused block."""

    # packed query, key and value [R, 3W] → [R, W], heads and scale included; plain differentiable code. With
    # `query_rows` it returns these rows, [Q, W].
    attention: Callable[..., Tensor]
    activation: str  # Name of the activation in `functional.mlp_activation`
    eps: tuple[float, ...]  # Epsilons of the norms, in the order of `NORMS`
    # Dtype of the matrix products: that of the weights, or of autocast. The residual stream is not cast.
    dtype: torch.dtype
    save_inputs_only: bool = False  # Save only hidden for backward
    # With `query_rows`, compute queries for these rows only; `attention` is then (query [Q, W], key_value [R, 2W]) →
    # [Q, W]
    separate_queries: bool = False
    recompute_mlp: bool = False  # Don't save the product of the MLP for backward
    heads: int = 1  # H; for rotations and norms of heads
    rotary: Rotary | None = None
    rms: bool = False  # The norms are RMSNorms


@dataclass(frozen=True)
class BlockCall:
    """One call of a block, as its stages read it: R rows of tokens, of which Q are computed behind the projections."""

    settings: BlockSettings
    weights: BlockWeights  # prepared: each field is one tensor
    query_rows: Tensor | slice | None  # int64 [Q] without duplicates, or a slice; None: all rows, Q = R

    def rows(self, x: Tensor) -> Tensor:
        """Rows [Q, …] of a tensor [R, …]; a view for a slice."""
        if self.query_rows is None:
            return x
        return x[self.query_rows] if isinstance(self.query_rows, slice) else x.index_select(0, self.query_rows)

    def add_to_rows(self, x: Tensor, values: Tensor) -> Tensor:
        """Add values [Q, …] to these rows of a tensor [R, …], in place."""
        if isinstance(self.query_rows, Tensor):
            return x.index_add_(0, self.query_rows, values)
        self.rows(x).add_(values)
        return x


def parts_of(weight: Any) -> tuple[Any, ...]:
    """Parts of a field of `BlockWeights`."""
    return weight if isinstance(weight, tuple) else (weight,)


def prepare(weights: BlockWeights, dtype: torch.dtype, casts: dict[str, Tensor] | None = None) -> BlockWeights:
    """Join weights in parts, and cast those of products to their dtype: all by one launch, or take these casts.

    The casts that a captured step keeps are not made again.
    """
    from ... import casts as kept_casts  # importing the towers does not need them

    if isinstance(weights.fc_bias, tuple):
        weights = replace(weights, fc_bias=torch.cat(weights.fc_bias))
    if casts:
        return replace(weights, **casts)
    copies: dict[str, Tensor] = {}
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name in PRODUCTS:
        weight = getattr(weights, name)
        parts = parts_of(weight)
        if weight is None or (len(parts) == 1 and weight.dtype == dtype):
            continue
        kept = None if kept_casts.active is None else kept_casts.active.of_product(parts, dtype)
        if kept is None:
            lengths = [len(part) for part in parts]
            kept = parts[0].new_empty(sum(lengths), *parts[0].shape[1:], dtype=dtype)
            targets += kept.split(lengths)
            sources += parts
        copies[name] = kept
    if sources:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
    return replace(weights, **copies) if copies else weights
