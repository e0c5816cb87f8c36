"""Records of a fused block: hidden states, its weights and settings, a call of it, and what that saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...options import FusedMemory
from ..attention import BlockAttention

NORMS = ("norm_1", "norm_2", "query_norm", "key_norm", "attention_norm", "mlp_norm")

Weight = Tensor | tuple[Tensor, ...]  # A tuple has the parts of a weight, one below the other


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


# ---- the block -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class BlockWeights:
    """Parameters of a block in order of use; None where it has none.

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
        found: dict[str, Any] = {x.name: [] for x in fields(cls)}
        for name, part in zip(names, parts, strict=True):
            found[name].append(part)
        return cls(**{name: tuple(x) if len(x) > 1 else x[0] if x else None for name, x in found.items()})


class PreparedWeights(BlockWeights):
    """Weights as the stages read them: the same fields, each one tensor, those of products in the dtype of products."""

    in_proj: Tensor
    in_proj_bias: Tensor | None
    mlp_in: Tensor
    mlp_in_bias: Tensor | None


class BlockSettings(NamedTuple):
    """Settings of a block."""

    activation: str  # Name of the activation in `functional.mlp_activation`
    eps: tuple[float, ...]  # Epsilons of the norms, in the order of `NORMS`
    heads: int  # H
    rms: bool = False  # The norms are RMSNorms


# ---- a call ----------------------------------------------------------------------------------------------------------


class Rotary(NamedTuple):
    """Rotary position embeddings of the tokens of a sequence, see `functional.rotary_embedding`."""

    cos: Tensor  # [tokens, E/2]; 1 for a token without a position, such as the class token
    sin: Tensor  # [tokens, E/2]
    interleaved: bool


class RowsOptions(NamedTuple):
    """Second argument of a fused block that is called with rows, `block(hidden, options)`; the first is a `Hidden`."""

    attention: BlockAttention
    memory: FusedMemory = "fast"  # What is saved for backward; table in `stages.py`
    rotary: Rotary | None = None  # Of sequences of equal length, the query rows being the first of each


class BlockCall(NamedTuple):
    """One call of a block: R rows of tokens, of which Q are computed behind attention."""

    settings: BlockSettings
    options: RowsOptions
    weights: PreparedWeights
    # Dtype of the matrix products: that of the weights, or of autocast. The residual stream is not cast.
    dtype: torch.dtype

    def queries(self, x: Tensor) -> Tensor:
        """Select the query rows [Q, …] of a tensor [R, …]; a view for a slice."""
        query_rows = self.options.attention.query_rows
        if query_rows is None:
            return x
        return x[query_rows] if isinstance(query_rows, slice) else x.index_select(0, query_rows)

    def add_to_queries(self, x: Tensor, values: Tensor) -> Tensor:
        """Add values [Q, …] to the query rows of a tensor [R, …], in place."""
        query_rows = self.options.attention.query_rows
        if isinstance(query_rows, Tensor):
            return x.index_add_(0, query_rows, values)
        self.queries(x).add_(values)
        return x

    def add_product_to_queries(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Add left · right [Q, …] to the query rows of a tensor [R, …], in place; to a slice by the product itself."""
        if not isinstance(self.options.attention.query_rows, slice):
            return self.add_to_queries(x, left @ right)
        rows = self.queries(x)
        torch.addmm(rows, left, right, out=rows)
        return x


# ---- what backward reads besides the weights ------------------------------------------------------------------------


class SavedNorm(NamedTuple):
    """Input of a norm and the statistics of its rows."""

    x: Tensor  # [rows, W], the sum if the norm adds a residual
    mean: Tensor  # [rows]; [0] for RMSNorm
    rstd: Tensor  # [rows]


@dataclass
class AttentionGraph:
    """Result of attention with its autograd graph, back to the projections and to the weights of its norms."""

    projected: tuple[Tensor, ...]  # leaves of the graph: ([R, 3W],), or query [Q, W] and key_value [R, 2W]
    norms: dict[str, Tensor]  # leaves of the graph, by their fields of `BlockWeights`
    result: Tensor  # [Q, W]


@dataclass
class Saved:
    """Tensors that backward reads besides the weights."""

    norm_1: SavedNorm  # hidden [R, W]
    norm_2: SavedNorm  # mid [Q, W]
    # None if they were not recorded
    inner: Tensor | None  # [Q, M], or [Q, 2M] for SwiGLU
    attention_graph: AttentionGraph | None
