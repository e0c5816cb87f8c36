"""A pre-norm transformer block as one autograd node that saves little for backward.

    hidden = stream + branch of the previous block
    mid = hidden + attention(LN₁(hidden)) · W_o + b_o
    branch = act(LN₂(mid) · W_fc + b_fc) · W_p + b_p

The result is the sum of mid and branch, returned as `Hidden`, so that the norm of the next block adds them.

Saved for backward: hidden; query, key, value, result and log-sum-exp of attention; mid; the product of the MLP before
its bias; about 10·W values per token. Backward recomputes the norms and the activation, which are memory-bound, but no
matrix product. With `recompute_mlp`, the product of the MLP is not saved but repeated: 6·W values per token. With
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
from ..ops.row_sums import MAX_ROWS, column_sums, folded_norm_gradients

SAVED_WIDTHS = 11  # upper bound of the values saved per token, in multiples of W, for an MLP of width 4·W
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


class BlockWeights(NamedTuple):
    """Parameters of a block in order of use. Layer scales are multiplied into W_o, b_o and W_p, b_p."""

    norm_1: Tensor
    norm_1_bias: Tensor
    in_proj: Any  # [3W, W]: query, key, value; or a tuple of the three, concatenated in each pass
    in_proj_bias: Any
    out_proj: Tensor
    out_proj_bias: Tensor
    norm_2: Tensor
    norm_2_bias: Tensor
    fc: Tensor
    fc_bias: Tensor
    proj: Tensor
    proj_bias: Tensor

    def tensors(self) -> list[Tensor]:
        """All tensors, in a flat list."""
        return [x for field in self for x in (field if isinstance(field, tuple) else (field,))]

    def map(self, function: Callable[[Tensor], Tensor]) -> BlockWeights:
        """Apply a function to every tensor."""
        mapped: Any = (tuple(map(function, x)) if isinstance(x, tuple) else function(x) for x in self)
        return BlockWeights(*mapped)


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
    eps: tuple[float, float]  # Epsilons of the two norms
    heads: int  # H


class BlockSettings(NamedTuple):
    """Settings of one call of a fused block."""

    # packed query, key and value [R, 3W] → [R, W], heads and scale included; plain differentiable code. With
    # `query_rows` it returns these rows, [Q, W].
    attention: Callable[..., Tensor]
    activation: str  # Name of the activation in `functional.mlp_activation`
    eps: tuple[float, float]  # Epsilons of the two norms
    # Dtype of the matrix products: that of the weights, or of autocast. The residual stream is not cast.
    dtype: torch.dtype
    save_inputs_only: bool = False  # Save only hidden for backward
    # With `query_rows`, compute queries for these rows only; `attention` is then (query [Q, W], key_value [R, 2W]) →
    # [Q, W]
    separate_queries: bool = False
    recompute_mlp: bool = False  # Don't save the product of the MLP for backward


@torch.compiler.disable  # the node holds an autograd graph, which would cause graph breaks
def fused_block(
    settings: BlockSettings, hidden: Hidden, weights: BlockWeights, query_rows: Tensor | slice | None = None
) -> Hidden:
    """Run one block over rows [R, W], or those of `query_rows`: int64 [Q], without duplicates, or a slice.

    `weights` are in the dtype of the stream; products run in `settings.dtype`, which is the dtype of the branches.
    """
    flat, updates = weights.tensors(), _low_rank(weights)
    inputs = [x for x in hidden if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *flat)):
        flat = [x.detach() if hasattr(x, "low_rank") else x for x in flat]
        factors = [x for _, update in updates for x in (update.down, update.up)]
        layout = [(name, update.part, update.scale) for name, update in updates]
        return Hidden(*_FusedBlock.apply(settings, *hidden, query_rows, layout, *flat, *factors))
    with without_autocast(hidden.stream.device):
        return Hidden(*_forward(settings, hidden, query_rows, _cast(settings, flat), record=False).out)


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
    """Attention with the graph from its result back to the projections."""

    projected: tuple[Tensor, ...]
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


def _attention(settings: BlockSettings, projected: Sequence[Tensor], record: bool) -> _Attention:
    leaves = tuple(x.detach().requires_grad_(record) for x in projected)
    with torch.set_grad_enabled(record):
        return _Attention(leaves, settings.attention(*leaves))


def _forward(
    settings: BlockSettings, inputs: Hidden, query_rows: Tensor | slice | None, weights: BlockWeights, record: bool
) -> _Forward:
    # Q rows with `query_rows`, else Q = R; M is the width of the MLP.
    # 1. hidden = stream + branch, and LN₁: [R, W]
    norm_1 = weights.norm_1, weights.norm_1_bias, settings.eps[0], settings.dtype
    hidden, normed, *statistics_1 = add_layer_norm(*inputs, *norm_1)
    if inputs.branch is None:
        hidden = inputs.stream
    residual = hidden if query_rows is None else _rows(hidden, query_rows)  # [Q, W]
    # 2. Projections: [R, 3W], or query [Q, W] and key_value [R, 2W]
    if query_rows is None or not settings.separate_queries:
        projected: tuple[Tensor, ...] = (F.linear(normed, weights.in_proj, weights.in_proj_bias),)
    else:
        W = hidden.shape[1]
        query = F.linear(_rows(normed, query_rows), weights.in_proj[:W], weights.in_proj_bias[:W])
        projected = query, F.linear(normed, weights.in_proj[W:], weights.in_proj_bias[W:])
        del query
    del normed
    # 3. Attention, with its own graph if recorded: [Q, W]
    attention = _attention(settings, projected, record)
    del projected
    branch = F.linear(attention.result.detach(), weights.out_proj, weights.out_proj_bias)
    recorded = attention if record else None
    del attention
    # 4. mid = residual + branch, and LN₂: [Q, W]
    norm_2 = weights.norm_2, weights.norm_2_bias, settings.eps[1], settings.dtype
    mid, normed, *statistics_2 = add_layer_norm(residual, branch, *norm_2)
    del branch
    # 5. MLP: [Q, W] @ [W, M] -> [Q, M], activation, [Q, M] @ [M, W] -> [Q, W]
    inner = normed @ weights.fc.T
    del normed
    saved = _Saved(mid, inner, *statistics_1, *statistics_2) if record else None
    active = mlp_activation(inner, weights.fc_bias, KINDS.index(settings.activation))
    del inner
    return _Forward((mid, F.linear(active, weights.proj, weights.proj_bias)), hidden, recorded, saved)


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: BlockSettings,
        stream: Tensor,
        branch: Tensor | None,
        query_rows: Tensor | slice | None,
        layout: Sequence[tuple[str, int, float]],
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        record, count = not settings.save_inputs_only, len(tensors) - 2 * len(layout)
        flat, factors = tensors[:count], tensors[count:]
        with without_autocast(stream.device):
            weights = _cast(settings, flat)
            out, hidden, attention, saved = _forward(settings, Hidden(stream, branch), query_rows, weights, record)
        projected = attention.projected if attention else ()
        casts = [getattr(weights, name) for name in PRODUCTS] if record and _dtype(flat) != settings.dtype else []
        ctx.settings, ctx.attention, ctx.has_branch, ctx.layout = settings, attention, branch is not None, layout
        ctx.counts = len(flat), len(factors), len(casts), len(projected)
        # Computed weights (updated, scaled) would be saved beside their casts, although backward reads only the casts.
        spared = [bool(casts) and x.dim() == 2 and not isinstance(x, torch.nn.Parameter) for x in flat]
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
        query_rows = ctx.query_rows or saved_rows
        flat, factors, casts, projected, saved = _split(rest, *ctx.counts)
        needs_hidden, needed = any(ctx.needs_input_grad[1:3]), ctx.needs_input_grad[5 : 5 + len(flat)]
        pairs = zip(ctx.layout, factors[::2], factors[1::2], strict=True)
        updates = [(name, LowRankFactors(part, scale, down, up)) for (name, part, scale), down, up in pairs]
        d_factors: list[Tensor] = [x.new_empty(0) for x in factors]
        attention, ctx.attention = ctx.attention, None  # frees its graph; a second backward records another
        # 1. The forward pass: saved, or repeated from the inputs
        with without_autocast(hidden.device):
            weights = _cast(settings, flat, casts)
            recorded: tuple[_Attention | None, _Saved | None]
            if saved:
                restored = _Saved(*saved)
                if settings.recompute_mlp:
                    restored = restored._replace(inner=_mlp_product(settings, restored.mid, weights))
                recorded = attention or _attention(settings, projected, record=True), restored
            else:
                recorded = _forward(settings, Hidden(hidden), query_rows, weights, record=True)[2:]
            # 2. Gradients, by the name of the weight
            needs = BlockWeights(*_join_qkv(needed, any))
            d_hidden, gradients = _backward(
                settings, (d_mid, d_branch), hidden, query_rows, weights, *recorded, needs_hidden, needs,
                _dtype(flat), updates, d_factors,
            )  # fmt: skip
        # 3. In the order of the arguments; those of joined projections [3W, …] are cut into query, key and value
        d_flat: list[Tensor | None] = [gradients.get(name) for name in BlockWeights._fields]
        if len(flat) > len(d_flat):
            qkv = ([None] * 3 if x is None else x.chunk(3) for x in d_flat[2:4])
            d_flat[2:4] = [part for parts in qkv for part in parts]
        d_weights = (
            None if x is None or not need else x.to(weight.dtype)
            for x, weight, need in zip(d_flat, flat, needed, strict=True)
        )
        d_stream, d_input = d_hidden
        d_updates = (d.to(x.dtype) for d, x in zip(d_factors, factors, strict=True))
        return None, d_stream, d_input if ctx.has_branch else None, None, None, *d_weights, *d_updates


def _mlp_product(settings: BlockSettings, mid: Tensor, weights: BlockWeights) -> Tensor:
    """LN₂(mid) · W_fc, [Q, W] @ [W, M] -> [Q, M]."""
    _, normed, *_ = add_layer_norm(mid, None, weights.norm_2, weights.norm_2_bias, settings.eps[1], settings.dtype)
    return normed @ weights.fc.T


def _split(items: Sequence[Tensor], *counts: int) -> Iterator[Sequence[Tensor]]:
    """Yield parts of `counts` items, and the rest."""
    for count in counts:
        yield items[:count]
        items = items[count:]
    yield items


def _dtype(flat: Sequence[Tensor]) -> torch.dtype:
    """Dtype of the matrices of a block; its vectors may have another."""
    return flat[BlockWeights._fields.index("proj") - len(BlockWeights._fields)].dtype


def _join_qkv(flat: Sequence[Any], join: Callable[[Sequence[Any]], Any]) -> Sequence[Any]:
    """Fields of `BlockWeights`, with separate projections of query, key and value joined."""
    if len(flat) == len(BlockWeights._fields):
        return flat
    return (*flat[:2], join(flat[2:5]), join(flat[5:8]), *flat[8:])


def _cast(settings: BlockSettings, flat: Sequence[Tensor], casts: Sequence[Tensor] = ()) -> BlockWeights:
    """Weights with those of products in the dtype of the products: `casts`, else cast and joined by one launch.

    In a step that keeps casts they are not cast again.
    """
    weights = BlockWeights(*_join_qkv(flat, tuple))
    copies = dict(zip(PRODUCTS, casts, strict=False))
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name in () if casts else PRODUCTS:
        weight = getattr(weights, name)
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
        dtype, widths = matrices[0].dtype if matrices[0].is_cpu else self.dtype, [x.shape[1] for x in matrices]
        self.gradients[name] = out = matrices[0].new_empty(sum(widths), dtype=dtype)
        for x, part in zip(matrices, out.split(widths), strict=True):
            torch.sum(x, 0, dtype=dtype, out=part)

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
    # 1. MLP: d_branch [Q, W] @ W_p [W, M] -> [Q, M]; recomputes act(…) [Q, M] and gives d_inner [Q, M]
    d_inner, d_fc_bias, active, partial = mlp_activation_backward(
        d_branch @ weights.proj, inner, weights.fc_bias, KINDS.index(settings.activation),
        True, needs.fc_bias, "proj" in needed, sums.partial,
    )  # fmt: skip
    sums.add(partial, fc_bias=d_fc_bias)
    add_weight("proj", d_branch, active)
    del active
    # 2. LN₂: d_inner [Q, M] @ W_fc [M, W] -> [Q, W]; recomputes the norm, and gives d_mid = d_stream + …
    d_norm = Gradients(
        *add_layer_norm_backward(
            d_inner @ weights.fc, d_stream, mid, mean_2, rstd_2, weights.norm_2,
            weights.norm_2_bias if "fc" in needed else None, True, needs.norm_2, needs.norm_2_bias,
            needs.out_proj_bias or needs.proj_bias, sums.partial, cast,
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
    if not needs_hidden and not any(needs[:4]) and "in_proj" not in updated:
        sums.finish()
        return d_hidden, gradients
    # 4. Attention by autograd: [Q, W] -> ([R, 3W],), or ([Q, W], [R, 2W]) with separate queries
    d_projected = torch.autograd.grad(attention.result, attention.projected, upstream @ weights.out_proj)
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
        norm = weights.norm_1, weights.norm_1_bias, settings.eps[0], settings.dtype
        add_in_proj_factors(add_layer_norm(hidden, None, *norm)[1])
    if not needs_hidden and not any(needs[:4]):
        sums.finish()
        return d_hidden, gradients
    if not needs_hidden:
        # The first block above the cut needs no gradient of its tokens. Since LN₁(hidden) = x̂ · γ + β, the gradients of
        # γ and β follow from that of the projection's weights, which saves a product as large as the projection.
        sums.finish()
        _, unit, *_ = add_layer_norm(hidden, None, None, None, settings.eps[0], settings.dtype)  # x̂, [R, W]
        gradients["in_proj"], norm_sums = folded_norm_gradients(
            weights.in_proj, in_proj_gradient(unit), gradients["in_proj_bias"], weights.norm_1, weights.norm_1_bias
        )
        totals = column_sums([norm_sums], norm_sums.dtype)  # [2W]
        gradients["norm_1"], gradients["norm_1_bias"] = totals.chunk(2)
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
            False, sums.partial, cast if query_rows is None else None,
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
