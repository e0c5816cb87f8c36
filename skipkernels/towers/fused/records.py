"""Records of a fused block: its weights, its settings and a call of it; and the casts of weights for products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...options import FusedMemory

NORMS = ("norm_1", "norm_2", "query_norm", "key_norm", "attention_norm", "mlp_norm")
# Norms within attention: autograd computes their gradients.
ATTENTION_NORMS = tuple(f"{name}{suffix}" for name in ("query_norm", "key_norm", "attention_norm")
                        for suffix in ("", "_bias"))  # fmt: skip
# Fields of `BlockWeights` that products read, in the dtype of the products. The operators upcast the others: fc_bias is
# added by that of the activation.
CAST_FIELDS = ("in_proj", "in_proj_bias", "out_proj", "out_proj_bias", "fc", "proj", "proj_bias")

Weight = Tensor | tuple[Tensor, ...]  # A tuple has the parts of a weight, one below the other: see `prepare`


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


# ---- the block -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRankFactors:
    """Low-rank update s · B · A that is part of a weight."""

    part: int  # Part of the rows of the weight; 0, or 1 and 2 for key and value in a packed projection
    scale: float
    down: Tensor  # A, [rank, in]
    up: Tensor  # B, [out, rank]


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
    fc: Weight  # [M, W]; [2M, W] for SwiGLU
    fc_bias: Weight | None
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

    def parts(self) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Yield each field that is not None, with the parts of its weight."""
        for name, weight in vars(self).items():
            if weight is not None:
                yield name, weight if isinstance(weight, tuple) else (weight,)

    def tensors(self) -> list[Tensor]:
        """All tensors in order, parts one after the other."""
        return [x for _, parts in self.parts() for x in parts]

    def low_rank_updates(self) -> dict[str, list[LowRankFactors]]:
        """Low-rank updates by field; those of the parts of a field as parts of one weight.

        `towers/low_rank.py` attaches them as `low_rank` to the sum of a frozen weight and its update.
        """
        found: dict[str, list[LowRankFactors]] = {}
        for name, parts in self.parts():
            for offset, part in enumerate(parts):
                for update in getattr(part, "low_rank", ()):
                    found.setdefault(name, []).append(replace(update, part=update.part + offset))
        return found


class PreparedWeights(BlockWeights):
    """Weights as the stages read them: each is one tensor, those of `CAST_FIELDS` in the dtype of the products.

    The fields are those of `BlockWeights`; those below can't be tuples.
    """

    in_proj: Tensor
    in_proj_bias: Tensor | None
    fc: Tensor
    fc_bias: Tensor | None


@dataclass(frozen=True)
class BlockReading:
    """Weights and settings of the caller's block, as they are read from it in each call."""

    weights: BlockWeights
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


class BlockAttention(Protocol):
    """Attention of a block, scale included, in plain differentiable code.

    It knows which rows are a sequence and what they see. `projected` is the packed query, key and value [R, 3W] of each
    row, or with `separate_queries` two tensors, query [Q, W] and key and value [R, 2W].
    """

    def __call__(self, *projected: Tensor, heads: int) -> Tensor:
        """Return [R, W], or [Q, W] in a call with `query_rows`."""


class RowsCall(NamedTuple):
    """Second argument of a fused block that is called with rows, `block(hidden, how)`; the first is a `Hidden`.

    The last block of a tower returns Q of its R rows, those of the pooled tokens:

        query_rows   separate_queries   queries projected   `attend` returns
        None         False              of all R rows       R rows
        given        True               of Q rows           Q rows: one token of each sequence
        given        False              of all R rows       Q rows, a selection: suffixes are attended to by one kernel
    """

    attend: BlockAttention
    memory: FusedMemory = "fast"  # What is saved for backward; table in `forward.py`
    query_rows: Tensor | slice | None = None  # int64 [Q] without duplicates, or a slice; None: all rows, Q = R
    separate_queries: bool = False
    rotary: Rotary | None = None  # Of sequences of equal length, the query rows being the first of each


class BlockCall(NamedTuple):
    """One call of a block, as its stages read it: R rows of tokens, of which Q are computed behind the projections."""

    block: BlockReading
    how: RowsCall
    weights: PreparedWeights  # Those of the block
    # Dtype of the matrix products: that of the weights, or of autocast. The residual stream is not cast.
    dtype: torch.dtype

    def queries(self, x: Tensor) -> Tensor:
        """Select the query rows [Q, …] of a tensor [R, …]; a view for a slice."""
        query_rows = self.how.query_rows
        if query_rows is None:
            return x
        return x[query_rows] if isinstance(query_rows, slice) else x.index_select(0, query_rows)

    def add_to_queries(self, x: Tensor, values: Tensor) -> Tensor:
        """Add values [Q, …] to the query rows of a tensor [R, …], in place."""
        if isinstance(self.how.query_rows, Tensor):
            return x.index_add_(0, self.how.query_rows, values)
        self.queries(x).add_(values)
        return x


# ---- copies of weights -----------------------------------------------------------------------------------------------


def prepare(
    weights: BlockWeights, dtype: torch.dtype, saved_casts: Mapping[str, Tensor | None] | None = None
) -> PreparedWeights:
    """Join weights in parts, and cast those of products to their dtype, all by one launch.

    Casts are not made again if forward has saved them for backward, or if a captured step keeps them.
    """
    from ... import casts as casts_of_step  # importing the towers does not need them

    fields: dict[str, Any] = dict(vars(weights))
    if isinstance(weights.fc_bias, tuple):
        fields["fc_bias"] = torch.cat(weights.fc_bias)
    if saved_casts:
        return PreparedWeights(**{**fields, **saved_casts})
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name, parts in weights.parts():
        if name not in CAST_FIELDS or (len(parts) == 1 and parts[0].dtype == dtype):
            continue
        # `active` is set only during a graphed step.
        cast = None if casts_of_step.active is None else casts_of_step.active.of_product(parts, dtype)
        if cast is None:
            lengths = [len(part) for part in parts]
            cast = parts[0].new_empty(sum(lengths), *parts[0].shape[1:], dtype=dtype)
            targets += cast.split(lengths)
            sources += parts
        fields[name] = cast
    if sources:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
    return PreparedWeights(**fields)
