"""A pre-norm transformer block as one autograd node that saves little for backward.

    hidden = stream + branch of the previous block
    mid = hidden + attention(LN₁(hidden)) · W_o + b_o
    branch = act(LN₂(mid) · W_fc + b_fc) · W_p + b_p

The result is the sum of mid and branch, returned as `Hidden`, so that the norm of the next block adds them.

Options, as some families have them: a norm of each head of query and key (`query_norm`, `key_norm`), rotary position
embeddings of query and key (`Rotary`), a norm of the result of attention and one of the activation (`attention_norm`,
`mlp_norm`), SwiGLU, where W_fc has gate and value side by side, RMSNorm in place of LayerNorm, and no biases.

Saved for backward: hidden; query, key, value, result and log-sum-exp of attention; mid; the product of the MLP before
its bias; about 10·W values per token. Backward recomputes the norms and the activation, which are memory-bound, but no
matrix product; rotations are undone in backward, and nothing is saved for them. Norms within attention save their
inputs. With `recompute_mlp`, the product of the MLP is not saved but repeated: 6·W values per token. With
`save_inputs_only`, only hidden is saved, and backward repeats the forward pass.

Under autocast the weights of products are cast once, by one launch, or in a captured step by their update
(`casts.Casts`), and their copies are saved as well: 24·W² bytes for an MLP of width 4·W. With `save_inputs_only` they
are cast again in backward. The norms write the dtype of the products, and the residual stream keeps its own.

Tokens are rows [R, W] of any number of sequences; only `attention` knows where a sequence ends. With `query_rows` (the
pooled tokens, in the last block), only LN₁ and the projections are computed for all rows; with `separate_queries` only
LN₁, key and value.

A weight W + s · B · A with frozen W (`LowRankFactors`) gets no gradient itself. With y = x (W + s · B · A)ᵀ,

    d_A = s · (d_y B)ᵀ x,   d_B = s · d_yᵀ (x Aᵀ)

are thin products, in place of one as large as the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import casts as kept_casts
from ..ops import launching
from ..ops.add_layer_norm import Gradients, add_layer_norm, add_layer_norm_backward
from ..ops.mlp_activation import KINDS, mlp_activation, mlp_activation_backward
from ..ops.registration import without_autocast
from ..ops.rotary_embedding import rotary_embedding
from ..ops.row_sums import MAX_ROWS, column_sums
from ..reference import at_least_fp32

NORMS = ("norm_1", "norm_2", "query_norm", "key_norm", "attention_norm", "mlp_norm")
ATTENTION_NORMS = tuple(name + suffix for name in NORMS[2:5] for suffix in ("", "_bias"))  # those within attention
SAVED_WIDTHS = 13  # upper bound of the values saved per token, in multiples of W; 11 without SwiGLU and other options
CAST_BYTES = 24  # size of the copies of the weights in 16 bits, in multiples of W²

PRODUCTS = ("in_proj", "in_proj_bias", "out_proj", "out_proj_bias", "fc", "proj", "proj_bias")
"""Fields of `BlockWeights` that are in the dtype of the products. The operators upcast the others."""


class Hidden(NamedTuple):
    """Hidden states as a sum that is not computed yet: the next norm adds it.

    Both terms must have the same gradient up to rounding, as those of a sum: a fused block takes its residual gradient
    from `stream` and that of its product from `branch`.
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


class BlockWeights(NamedTuple):
    """Parameters of a block in order of use. Layer scales are multiplied into W_o, b_o and W_p, b_p.

    A field may be a tuple of the parts of a weight, which are concatenated in each pass. None: the block has none.
    """

    norm_1: Tensor
    norm_1_bias: Tensor | None
    in_proj: Any  # [3W, W]: query, key, value
    in_proj_bias: Any
    out_proj: Tensor
    out_proj_bias: Tensor | None
    norm_2: Tensor
    norm_2_bias: Tensor | None
    fc: Any  # [M, W], or [2M, W] for SwiGLU: gate, value
    fc_bias: Any
    proj: Tensor
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
        """All tensors, in a flat list."""
        return [x for x in self.flat() if x is not None]

    def flat(self) -> list[Any]:
        """Fields in a flat list, with parts one after the other."""
        return [x for field in self for x in (field if isinstance(field, tuple) else (field,))]

    def counts(self) -> list[int]:
        """Number of items of each field in a flat list."""
        return [len(field) if isinstance(field, tuple) else 1 for field in self]


class LowRankFactors(NamedTuple):
    """Low-rank update s · B · A that is part of a weight; one with frozen W has a list of them as `low_rank`."""

    part: int  # Part of the rows of the weight; 0, or 1 and 2 for key and value in a packed projection
    scale: float
    down: Tensor  # A, [rank, in]
    up: Tensor  # B, [out, rank]


class FusableBlock(NamedTuple):
    """Weights and settings of the caller's block."""

    weights: BlockWeights
    activation: str  # Name of the activation in `functional.mlp_activation`
    eps: tuple[float, ...]  # Epsilons of the norms, in the order of `BlockWeights`
    heads: int  # H
    rms: bool = False  # The norms are RMSNorms


class BlockSettings(NamedTuple):
    """Settings of one call of a fused block."""

    # packed query, key and value [R, 3W] → [R, W], heads and scale included; plain differentiable code. With
    # `query_rows` it returns these rows, [Q, W].
    attention: Callable[..., Tensor]
    activation: str  # Name of the activation in `functional.mlp_activation`
    eps: tuple[float, ...]  # Epsilons of the norms, in the order of `BlockWeights`
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


@torch.compiler.disable  # the node holds an autograd graph, which would cause graph breaks
def fused_block(
    settings: BlockSettings, hidden: Hidden, weights: BlockWeights, query_rows: Tensor | slice | None = None
) -> Hidden:
    """Run one block over rows [R, W], or those of `query_rows`: int64 [Q], without duplicates, or a slice.

    `weights` are in the dtype of the stream; products run in `settings.dtype`, which is the dtype of the branches.
    """
    flat, counts, updates = weights.flat(), weights.counts(), _low_rank(weights)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*hidden, *flat)):
        flat = [x.detach() if hasattr(x, "low_rank") else x for x in flat]
        factors = [x for _, update in updates for x in (update.down, update.up)]
        layout = [(name, update.part, update.scale) for name, update in updates]
        return Hidden(*_FusedBlock.apply(settings, *hidden, query_rows, counts, layout, *flat, *factors))
    with without_autocast(hidden.stream.device):
        return Hidden(*_forward(settings, hidden, query_rows, _cast(settings, flat, counts), record=False).out)


def _rows(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Some rows of a tensor; a view for a slice."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _add_to_rows(x: Tensor, rows: Tensor | slice, values: Tensor) -> Tensor:
    """Add to some rows of a tensor in place."""
    if isinstance(rows, slice):
        x[rows].add_(values)
        return x
    return x.index_add_(0, rows, values)


def _low_rank(weights: BlockWeights) -> list[tuple[str, LowRankFactors]]:
    """Low-rank updates of weights, each with the field that it is part of; those of q, k and v as parts of one."""
    return [
        (name, update._replace(part=update.part + offset))
        for name, field in zip(weights._fields, weights, strict=True)
        for offset, weight in enumerate(field if isinstance(field, tuple) else (field,))
        for update in getattr(weight, "low_rank", ())
    ]


class _Attention(NamedTuple):
    """Attention with the graph from its result back to the projections and to the weights of its norms."""

    projected: tuple[Tensor, ...]
    norms: dict[str, Tensor]
    result: Tensor


class _Saved(NamedTuple):
    """Tensors saved for backward, besides the sum of the inputs and the projections."""

    mid: Tensor
    inner: Tensor
    mean_1: Tensor
    rstd_1: Tensor
    mean_2: Tensor
    rstd_2: Tensor


class _Forward(NamedTuple):
    """Results of a forward pass: mid and branch, the sum of the inputs, and what `_backward` needs if recorded."""

    out: tuple[Tensor, Tensor]
    hidden: Tensor
    attention: _Attention | None
    saved: _Saved | None


def _norm(
    settings: BlockSettings, weights: BlockWeights, name: str, x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x + residual, its norm `name` of the block, and the statistics of each row, as `add_layer_norm`."""
    weight, bias, eps = getattr(weights, name), getattr(weights, f"{name}_bias"), settings.eps[NORMS.index(name)]
    return add_layer_norm(x, residual, weight, bias, eps, settings.dtype, settings.rms)


def _rotate(settings: BlockSettings, projected: Sequence[Tensor], inverse: bool = False) -> tuple[Tensor, ...]:
    """Rotate the heads of query and key in projections; `inverse` maps gradients of the rotated ones to the others."""
    if settings.rotary is None:
        return tuple(projected)
    cos, sin, interleaved = settings.rotary
    cos, sin = (x.to(torch.promote_types(projected[0].dtype, torch.float32)) for x in (cos, sin))
    rotated = 1 if len(projected) > 1 else 2  # parts of W columns in front of each result: query, key
    of_query = (cos[:1], sin[:1]) if len(projected) > 1 else (cos, sin)  # a pooled query is the first token
    tables = (of_query, (cos, sin))
    return tuple(
        rotary_embedding(x, *table, rotated * settings.heads, interleaved, inverse)
        for x, table in zip(projected, tables, strict=False)
    )


def _attention(settings: BlockSettings, projected: Sequence[Tensor], weights: BlockWeights, record: bool) -> _Attention:
    """Attention of rotated projections, or of projections before the norms of the heads, and its norm."""
    leaves = tuple(x.detach().requires_grad_(record) for x in projected)
    norms = {
        name: x.detach().requires_grad_(record) for name in ATTENTION_NORMS if (x := getattr(weights, name)) is not None
    }
    if not norms:
        with torch.set_grad_enabled(record):
            return _Attention(leaves, norms, settings.attention(*leaves))
    weights = weights._replace(**norms)
    with torch.set_grad_enabled(record):
        inputs: Sequence[Tensor] = leaves
        if weights.query_norm is not None:
            inputs = _rotate(settings, _norm_heads(settings, weights, leaves))
        result = settings.attention(*inputs)
        if weights.attention_norm is not None:
            result = _norm(settings, weights, "attention_norm", result)[1]
    return _Attention(leaves, norms, result)


def _norm_heads(settings: BlockSettings, weights: BlockWeights, projected: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Projections with each head of query and key normed."""
    width = weights.out_proj.shape[1]
    query, key, value = (part for x in projected for part in x.split(width, dim=1))  # [Q or R, W] each
    query, key = (
        _norm(settings, weights, name, x.unflatten(1, (settings.heads, -1)))[1].flatten(1)
        for name, x in (("query_norm", query), ("key_norm", key))
    )
    parts = ((query, key, value),) if len(projected) == 1 else ((query,), (key, value))
    return tuple(torch.cat(x, dim=1) if len(x) > 1 else x[0] for x in parts)


def _forward(
    settings: BlockSettings, inputs: Hidden, query_rows: Tensor | slice | None, weights: BlockWeights, record: bool
) -> _Forward:
    # Q rows with `query_rows`, else Q = R; M is the width of the MLP.
    # 1. hidden = stream + branch, and LN₁: [R, W]
    hidden, normed, *statistics_1 = _norm(settings, weights, "norm_1", *inputs)
    if inputs.branch is None:
        hidden = inputs.stream
    residual = hidden if query_rows is None else _rows(hidden, query_rows)  # [Q, W]
    # 2. Projections: [R, 3W], or query [Q, W] and key_value [R, 2W]
    if query_rows is None or not settings.separate_queries:
        projected: tuple[Tensor, ...] = (F.linear(normed, weights.in_proj, weights.in_proj_bias),)
    else:
        W, bias = hidden.shape[1], weights.in_proj_bias
        of_query, of_key_value = (None, None) if bias is None else (bias[:W], bias[W:])
        query = F.linear(_rows(normed, query_rows), weights.in_proj[:W], of_query)
        projected = query, F.linear(normed, weights.in_proj[W:], of_key_value)
        del query
    del normed
    # 3. Attention, with its own graph if recorded: [Q, W]
    if weights.query_norm is None:
        projected = _rotate(settings, projected)
    attention = _attention(settings, projected, weights, record)
    del projected
    branch = F.linear(attention.result.detach(), weights.out_proj, weights.out_proj_bias)
    recorded = attention if record else None
    del attention
    # 4. mid = residual + branch, and LN₂: [Q, W]
    mid, normed, *statistics_2 = _norm(settings, weights, "norm_2", residual, branch)
    del branch
    # 5. MLP: [Q, W] @ [W, M] -> [Q, M], or [Q, 2M] for SwiGLU; activation [Q, M], its norm, [Q, M] @ [M, W] -> [Q, W]
    inner = normed @ weights.fc.T
    del normed
    saved = _Saved(mid, inner, *statistics_1, *statistics_2) if record else None
    active = mlp_activation(inner, weights.fc_bias, KINDS.index(settings.activation))
    del inner
    if weights.mlp_norm is not None:
        active = _norm(settings, weights, "mlp_norm", active)[1]
    return _Forward((mid, F.linear(active, weights.proj, weights.proj_bias)), hidden, recorded, saved)


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: BlockSettings,
        stream: Tensor,
        branch: Tensor | None,
        query_rows: Tensor | slice | None,
        counts: Sequence[int],
        layout: Sequence[tuple[str, int, float]],
        *tensors: Any,
    ) -> tuple[Tensor, Tensor]:
        record, count = not settings.save_inputs_only, len(tensors) - 2 * len(layout)
        flat, factors = tensors[:count], tensors[count:]
        with without_autocast(stream.device):
            weights = _cast(settings, flat, counts)
            out, hidden, attention, saved = _forward(settings, Hidden(stream, branch), query_rows, weights, record)
        projected = attention.projected if attention else ()
        is_cast = record and _dtype(flat, counts) != settings.dtype
        casts = [getattr(weights, name) for name in PRODUCTS] if is_cast else []
        ctx.settings, ctx.attention, ctx.has_branch = settings, attention, branch is not None
        ctx.layout, ctx.field_counts = layout, counts
        ctx.counts = len(flat), len(factors), len(casts), len(projected)
        # Computed weights (updated, scaled) would be saved beside their casts, although backward reads only the casts.
        spared = [is_cast and getattr(x, "ndim", 0) == 2 and not isinstance(x, torch.nn.Parameter) for x in flat]
        kept = [x.new_empty(0) if spare else x for x, spare in zip(flat, spared, strict=True)]
        if saved and settings.recompute_mlp:
            saved = saved._replace(inner=saved.inner.new_empty(0))
        ctx.query_rows = query_rows if isinstance(query_rows, slice) else None
        ctx.save_for_backward(
            hidden, None if ctx.query_rows else query_rows, *kept, *factors, *casts, *projected, *(saved or ())
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_mid: Tensor, d_branch: Tensor) -> tuple[Tensor | None, ...]:
        settings: BlockSettings = ctx.settings
        hidden, saved_rows, *rest = ctx.saved_tensors
        query_rows, counts = ctx.query_rows or saved_rows, ctx.field_counts
        flat, factors, casts, projected, saved = _split(rest, *ctx.counts)
        needs_hidden, needed = any(ctx.needs_input_grad[1:3]), ctx.needs_input_grad[6 : 6 + len(flat)]
        pairs = zip(ctx.layout, factors[::2], factors[1::2], strict=True)
        updates = [(name, LowRankFactors(part, scale, down, up)) for (name, part, scale), down, up in pairs]
        d_factors: list[Tensor] = [x.new_empty(0) for x in factors]
        attention, ctx.attention = ctx.attention, None  # frees its graph; a second backward records another
        # 1. The forward pass: saved, or repeated from the inputs
        with without_autocast(hidden.device):
            weights = _cast(settings, flat, counts, casts)
            recorded: tuple[_Attention | None, _Saved | None]
            if saved:
                restored = _Saved(*saved)
                if settings.recompute_mlp:
                    restored = restored._replace(inner=_mlp_product(settings, restored.mid, weights))
                recorded = attention or _attention(settings, projected, weights, record=True), restored
            else:
                recorded = _forward(settings, Hidden(hidden), query_rows, weights, record=True)[2:]
            # 2. Gradients, by the name of the weight
            needs = BlockWeights(*_join(needed, counts, any))
            d_hidden, gradients = _backward(
                settings, (d_mid, d_branch), hidden, query_rows, weights, *recorded, needs_hidden, needs,
                _dtype(flat, counts), updates, d_factors,
            )  # fmt: skip
        # 3. In the order of the arguments; those of joined weights are cut into their parts, of equal size
        d_flat: list[Tensor | None] = []
        for name, count in zip(BlockWeights._fields, counts, strict=True):
            gradient = gradients.get(name)
            d_flat += [None] * count if gradient is None else gradient.chunk(count)
        d_weights = (
            None if x is None or not need else x.to(weight.dtype)
            for x, weight, need in zip(d_flat, flat, needed, strict=True)
        )
        d_stream, d_input = d_hidden
        d_updates = (d.to(x.dtype) for d, x in zip(d_factors, factors, strict=True))
        return None, d_stream, d_input if ctx.has_branch else None, None, None, None, *d_weights, *d_updates


def _mlp_product(settings: BlockSettings, mid: Tensor, weights: BlockWeights) -> Tensor:
    """LN₂(mid) · W_fc, [Q, W] @ [W, M] -> [Q, M]."""
    return _norm(settings, weights, "norm_2", mid)[1] @ weights.fc.T


def _split(items: Sequence[Tensor], *counts: int) -> Iterator[Sequence[Tensor]]:
    """Yield parts of `counts` items, and the rest."""
    for count in counts:
        yield items[:count]
        items = items[count:]
    yield items


def _dtype(flat: Sequence[Any], counts: Sequence[int]) -> torch.dtype:
    """Dtype of the matrices of a block; its vectors may have another."""
    return flat[sum(counts[: BlockWeights._fields.index("proj")])].dtype


def _join(flat: Sequence[Any], counts: Sequence[int], join: Callable[[Sequence[Any]], Any]) -> list[Any]:
    """Fields of `BlockWeights` from a flat list, with the parts of a field joined."""
    items = iter(flat)
    return [next(items) if n == 1 else join([next(items) for _ in range(n)]) for n in counts]


def _cast(
    settings: BlockSettings, flat: Sequence[Any], counts: Sequence[int], casts: Sequence[Tensor | None] = ()
) -> BlockWeights:
    """Weights with those of products in the dtype of the products: `casts`, else cast and joined by one launch.

    In a step that keeps casts they are not cast again.
    """
    weights = BlockWeights(*_join(flat, counts, tuple))
    if isinstance(weights.fc_bias, tuple):
        weights = weights._replace(fc_bias=torch.cat(weights.fc_bias))
    copies: dict[str, Any] = dict(zip(PRODUCTS, casts, strict=False))
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name in () if casts else PRODUCTS:
        weight = getattr(weights, name)
        if weight is None:
            continue
        parts = weight if isinstance(weight, tuple) else (weight,)
        if len(parts) > 1 or weight.dtype != settings.dtype:
            kept = None if kept_casts.active is None else kept_casts.active.of_product(parts, settings.dtype)
            if kept is not None:
                copies[name] = kept
                continue
            lengths = [len(part) for part in parts]
            copies[name] = parts[0].new_empty(sum(lengths), *parts[0].shape[1:], dtype=settings.dtype)
            targets += copies[name].split(lengths)
            sources += parts
    if sources:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
    return weights._replace(**copies)


@functools.cache
def _products_widen(device_type: str) -> bool:
    """True if a product of 16-bit matrices can be written in fp32."""
    try:
        one = torch.ones(8, 8, dtype=torch.bfloat16, device=device_type)
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


def _product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which `_product` writes a product of tensors like `x`."""
    is_16_bit = x.dtype in (torch.bfloat16, torch.float16)
    return dtype if is_16_bit and dtype == torch.float32 and _products_widen(x.device.type) else x.dtype


def _product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left · right, in `dtype` if the device can write it without another launch, else in the dtype of both."""
    if _product_dtype(left, dtype) == left.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=dtype, out=out)


def _sums_together(device: torch.device) -> bool:
    """True if the gradients of all vectors are completed by one launch; on a CPU each operator completes its own."""
    return device.type != "cpu" and launching.installed


class _Sums:
    """Gradients of vectors, which are sums over rows; with `partial` all are completed by one launch."""

    def __init__(self, gradients: dict[str, Tensor], dtype: torch.dtype, partial: bool) -> None:
        self.gradients, self.dtype, self.partial = gradients, dtype, partial
        self.pending: list[Tensor] = []
        self.names: list[str] = []  # fields of `BlockWeights`, in the order of the pending columns
        self.widths: list[int] = []

    def add(self, sums: Tensor, **totals: Tensor) -> None:
        """Add the results of an operator: partial sums of vectors of equal width side by side, or else the totals."""
        if sums.numel() == 0:
            self.gradients |= {name: total for name, total in totals.items() if total.numel() > 0}
        else:
            self._defer(list(totals), [sums])

    def add_columns(self, name: str, matrices: Sequence[Tensor]) -> None:
        """Add the column sums of one or more matrices, side by side."""
        if self.partial and len(matrices[-1]) <= MAX_ROWS:
            return self._defer([name], matrices)
        # On a CPU a sum in another dtype would convert all rows first.
        dtype = matrices[0].dtype if matrices[0].is_cpu else self.dtype
        sums = [x.sum(0, dtype=dtype) for x in matrices]  # `out=` has no batching rule
        self.gradients[name] = torch.cat(sums) if len(sums) > 1 else sums[0]

    def _defer(self, names: list[str], matrices: Sequence[Tensor]) -> None:
        width = sum(x.shape[1] for x in matrices)
        self.pending += matrices
        self.names += names
        self.widths += [width // len(names)] * len(names)

    def finish(self) -> None:
        if self.pending:
            totals = column_sums(self.pending, self.dtype).split(self.widths)
            self.gradients |= dict(zip(self.names, totals, strict=True))


def _backward(
    settings: BlockSettings,
    d_out: tuple[Tensor, Tensor],
    hidden: Tensor,
    query_rows: Tensor | slice | None,
    weights: BlockWeights,
    attention: _Attention | None,
    saved: _Saved | None,
    needs_hidden: bool,
    needs: Any,
    dtype: torch.dtype,
    updates: Sequence[tuple[str, LowRankFactors]],
    d_factors: list[Tensor],
) -> tuple[tuple[Tensor | None, Tensor | None], dict[str, Tensor]]:
    """Return the gradients of the sum of the inputs, in the dtypes of stream and products, and of weights by name.

    Gradients of weights may be in `dtype` or in that of the products, and more than needed; of A and B in `d_factors`.
    """
    assert attention is not None and saved is not None
    mid, inner, mean_1, rstd_1, mean_2, rstd_2 = saved
    W, cast = hidden.shape[1], None if settings.dtype == hidden.dtype else settings.dtype
    d_stream, d_branch = d_out
    d_hidden: tuple[Tensor | None, Tensor | None] = None, None
    gradients: dict[str, Tensor] = {}
    sums_dtype = max(dtype, weights.norm_1.dtype, key=lambda x: x.itemsize)  # norms may be fp32 beside fp16 matrices
    sums = _Sums(gradients, sums_dtype, partial=_sums_together(hidden.device))
    updated = {name for name, _ in updates}
    needed = updated | {name for name, need in zip(BlockWeights._fields, needs, strict=True) if need}

    def add_weight(name: str, d_out: Tensor, inputs: Tensor) -> None:
        """Add the gradient of a weight, and of the factors of its update."""
        if getattr(needs, name):
            gradients[name] = _product(d_out.T, inputs, dtype)
        add_factors(name, d_out, inputs)

    def add_factors(name: str, d_out: Tensor, inputs: Tensor, first: int = 0) -> None:
        """Add the gradients of the factors of a weight; `d_out` has the parts of the weight from `first` on."""
        for index, (field, (part, scale, down, up)) in enumerate(updates):
            start = (part - first) * len(up)
            if field == name and 0 <= start < d_out.shape[1]:
                d_part = d_out[:, start : start + len(up)]
                d_thin = d_part @ (scale * up).to(d_part.dtype)  # [R, rank]
                thin = inputs @ (scale * down).to(inputs.dtype).T  # [R, rank]
                d_factors[2 * index] = _product(d_thin.T, inputs, down.dtype)
                d_factors[2 * index + 1] = _product(d_part.T, thin, up.dtype)

    # Shapes as in `_forward`: Q rows behind the projections, R before them.
    # 1. MLP: d_branch [Q, W] @ W_p [W, M] -> [Q, M]; recomputes act(…) [Q, M] and gives d_inner [Q, M] or [Q, 2M]
    d_active, kind = d_branch @ weights.proj, KINDS.index(settings.activation)
    if weights.mlp_norm is not None:
        plain = mlp_activation(inner, weights.fc_bias, kind)
        _, active, *statistics = _norm(settings, weights, "mlp_norm", plain)
        add_weight("proj", d_branch, active)
        d_norm = Gradients(
            *add_layer_norm_backward(
                d_active, None, plain, *statistics, weights.mlp_norm, None, True, needs.mlp_norm, needs.mlp_norm_bias,
                False, sums.partial, None,
            )
        )  # fmt: skip
        sums.add(d_norm.sums, mlp_norm=d_norm.d_weight, mlp_norm_bias=d_norm.d_bias)
        d_active = d_norm.d_x
        del plain, d_norm
    needs_active = weights.mlp_norm is None and "proj" in needed
    d_inner, d_fc_bias, active, partial = mlp_activation_backward(
        d_active, inner, weights.fc_bias, kind, True, needs.fc_bias, needs_active, sums.partial
    )
    del d_active
    sums.add(partial, fc_bias=d_fc_bias)
    if needs_active:
        add_weight("proj", d_branch, active)
    del active
    # 2. LN₂: d_inner [Q, M] @ W_fc [M, W] -> [Q, W]; recomputes the norm, and gives d_mid = d_stream + …
    d_norm = Gradients(
        *add_layer_norm_backward(
            d_inner @ weights.fc, d_stream, mid, mean_2, rstd_2, weights.norm_2,
            weights.norm_2_bias if "fc" in needed else None, True, needs.norm_2, needs.norm_2_bias,
            needs.out_proj_bias or needs.proj_bias, sums.partial, cast, "fc" in needed,
        )
    )  # fmt: skip
    d_mid, upstream = d_norm.d_x, d_norm.d_x if cast is None else d_norm.d_x_cast
    sums_2 = {"norm_2": d_norm.d_weight, "norm_2_bias": d_norm.d_bias}
    if needs.out_proj_bias or needs.proj_bias:
        sums_2 |= {"proj_bias": d_norm.d_hidden_sum, "out_proj_bias": d_norm.d_x_sum}
    sums.add(d_norm.sums, **sums_2)
    add_weight("fc", d_inner, d_norm.normed)
    del d_inner, d_norm
    # 3. Output projection: d_W_o = upstream.T [W, Q] @ result [Q, W]
    add_weight("out_proj", upstream, attention.result.detach())
    needs_norms = any(getattr(needs, name) for name in attention.norms)
    if not needs_hidden and not any(needs[:4]) and "in_proj" not in updated and not needs_norms:
        sums.finish()
        return d_hidden, gradients
    # 4. Attention and its norms by autograd: [Q, W] -> ([R, 3W],), or ([Q, W], [R, 2W]) with separate queries
    leaves = (*attention.projected, *attention.norms.values())
    d_projected = torch.autograd.grad(attention.result, leaves, upstream @ weights.out_proj)
    gradients |= zip(attention.norms, d_projected[len(attention.projected) :], strict=True)
    d_projected = d_projected[: len(attention.projected)]
    if weights.query_norm is None:
        d_projected = _rotate(settings, d_projected, inverse=True)
    del upstream

    def in_proj_gradient(inputs: Tensor) -> Tensor:
        """Gradient of query, key and value, transposed, times `inputs`, [3W, W]."""
        if len(d_projected) == 1:
            return _product(d_projected[0].T, inputs, dtype)
        assert query_rows is not None
        out = inputs.new_empty(3 * W, W, dtype=_product_dtype(inputs, dtype))
        _product(d_projected[0].T, _rows(inputs, query_rows), dtype, out=out[:W])
        _product(d_projected[1].T, inputs, dtype, out=out[W:])
        return out

    def add_in_proj_factors(inputs: Tensor) -> None:
        """Add the gradients of the factors of query, key and value."""
        if len(d_projected) > 1:
            assert query_rows is not None
            add_factors("in_proj", d_projected[0], _rows(inputs, query_rows))
        add_factors("in_proj", d_projected[-1], inputs, first=len(d_projected) - 1)

    # 5. Biases [3W]; also the rest if no gradient of hidden is needed, as in the first block above the cut
    if needs.in_proj_bias or (not needs_hidden and any(needs[:4])):
        sums.add_columns("in_proj_bias", d_projected)
    if not needs_hidden and "in_proj" in updated:
        add_in_proj_factors(_norm(settings, weights, "norm_1", hidden)[1])
    if not needs_hidden and not any(needs[:4]):
        sums.finish()
        return d_hidden, gradients
    if not needs_hidden:
        # The first block above the cut needs no gradient of its tokens. Since LN₁(hidden) = x̂ · γ + β, the gradients of
        # γ and β follow from G = d_qkvᵀ x̂, which saves a product as large as the projection:
        # d_W = G · γ + d_b ⊗ β,   d_γ = Σ_n W_n · G_n,   d_β = Σ_n d_b_n W_n
        sums.finish()
        unit = add_layer_norm(hidden, None, None, None, settings.eps[0], settings.dtype, settings.rms)[1]  # x̂, [R, W]
        unit_gradient = at_least_fp32(in_proj_gradient(unit))  # G, [3W, W]
        gradients["norm_1"] = (weights.in_proj * unit_gradient).sum(0)
        gradients["in_proj"] = unit_gradient * weights.norm_1
        if weights.norm_1_bias is not None:
            d_bias = at_least_fp32(gradients["in_proj_bias"])  # [3W]
            gradients["norm_1_bias"] = d_bias @ weights.in_proj.to(d_bias.dtype)
            gradients["in_proj"].addcmul_(d_bias[:, None], weights.norm_1_bias)
        return d_hidden, gradients
    # 6. Input projections: [R, 3W] @ [3W, W] -> [R, W]; queries are added at their rows
    if len(d_projected) > 1:
        d_normed = d_projected[1] @ weights.in_proj[W:]
        if isinstance(query_rows, slice):
            d_rows = d_normed[query_rows]
            torch.addmm(d_rows, d_projected[0], weights.in_proj[:W], out=d_rows)
        else:
            assert query_rows is not None
            d_normed.index_add_(0, query_rows, d_projected[0] @ weights.in_proj[:W])
    else:
        d_normed = d_projected[0] @ weights.in_proj
    # 7. LN₁: [R, W] -> d_hidden [R, W], with the gradient of the residual, d_mid, at its rows
    d_norm = Gradients(
        *add_layer_norm_backward(
            d_normed, d_mid if query_rows is None else None, hidden, mean_1, rstd_1, weights.norm_1,
            weights.norm_1_bias if "in_proj" in needed else None, True, needs.norm_1, needs.norm_1_bias,
            False, sums.partial, cast if query_rows is None else None, "in_proj" in needed,
        )
    )  # fmt: skip
    del d_normed
    sums.add(d_norm.sums, norm_1=d_norm.d_weight, norm_1_bias=d_norm.d_bias)
    sums.finish()
    if query_rows is None:
        d_hidden = d_norm.d_x, d_norm.d_x if cast is None else d_norm.d_x_cast
    else:
        d_rows = _add_to_rows(d_norm.d_x, query_rows, d_mid)
        d_hidden = d_rows, d_rows.to(settings.dtype)
    # 8. Weights of the projections: [3W, R] @ [R, W] -> [3W, W]
    if needs.in_proj:
        gradients["in_proj"] = in_proj_gradient(d_norm.normed)
    if "in_proj" in updated:
        add_in_proj_factors(d_norm.normed)
    return d_hidden, gradients
