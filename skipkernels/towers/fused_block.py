"""A pre-norm transformer block as one autograd node that saves little for backward.

    mid = hidden + attention(LN₁(hidden)) · W_o + b_o
    out = mid + act(LN₂(mid) · W_fc + b_fc) · W_p + b_p

Saved for backward: hidden; query, key, value, result and log-sum-exp of attention; mid; the product of the MLP before
its bias; about 10·W values per token. Backward recomputes the norms and the activation, which are memory-bound, but no
matrix product. With `save_inputs_only`, only hidden is saved, and backward repeats the forward pass.

Tokens are rows [R, W] of any number of sequences; only `attention` knows where a sequence ends. With `query_rows` (the
pooled tokens, in the last block), only LN₁ and the projections are computed for all rows; with `separate_queries` only
LN₁, key and value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.add_layer_norm import add_layer_norm, add_layer_norm_backward
from ..ops.mlp_activation import KINDS, mlp_activation, mlp_activation_backward

SAVED_WIDTHS = 11  # upper bound of the values saved per token, in multiples of W, for an MLP of width 4·W


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


class FusableBlock(NamedTuple):
    """Weights and settings of the caller's block.

    Attributes:
        weights: Parameters.
        activation: Name of the activation in `functional.mlp_activation`.
        eps: Epsilons of the two norms.
        heads: H, number of attention heads.
    """

    weights: BlockWeights
    activation: str
    eps: tuple[float, float]
    heads: int


class BlockSettings(NamedTuple):
    """Settings of one call of a fused block.

    Attributes:
        attention: packed query, key and value [R, 3W] → [R, W], heads and scale included; plain differentiable code.
            With `query_rows` it returns these rows, [Q, W].
        activation: Name of the activation in `functional.mlp_activation`.
        eps: Epsilons of the two norms.
        dtype: Dtype of the matrix products: that of the weights, or of autocast. The residual stream is not cast.
        save_inputs_only: Save only hidden for backward.
        separate_queries: With `query_rows`, compute queries for these rows only; `attention` is then
            (query [Q, W], key_value [R, 2W]) → [Q, W].
    """

    attention: Callable[..., Tensor]
    activation: str
    eps: tuple[float, float]
    dtype: torch.dtype
    save_inputs_only: bool = False
    separate_queries: bool = False


@torch.compiler.disable  # the node holds an autograd graph, which would cause graph breaks
def fused_block(
    settings: BlockSettings, hidden: Tensor, weights: BlockWeights, query_rows: Tensor | None = None
) -> Tensor:
    """Run one block over rows.

    Args:
        settings: Settings of this call.
        hidden: [R, W].
        weights: Weights of the block, in the dtype of `hidden`; products run in `settings.dtype`.
        query_rows: int64 [Q], rows to compute, without duplicates; default: all.

    Returns:
        [Q, W] in the dtype of `hidden`.
    """
    flat = weights.tensors()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, *flat)):
        return _FusedBlock.apply(settings, hidden, query_rows, *flat)
    with torch.autocast(hidden.device.type, enabled=False):
        return _forward(settings, hidden, query_rows, _cast(settings, flat), record=False)[0]


class _Attention(NamedTuple):
    """Attention with the graph from its result back to the projections."""

    projected: tuple[Tensor, ...]
    result: Tensor


def _attention(settings: BlockSettings, projected: Sequence[Tensor], record: bool) -> _Attention:
    leaves = tuple(x.detach().requires_grad_(record) for x in projected)
    with torch.set_grad_enabled(record):
        return _Attention(leaves, settings.attention(*leaves))


def _forward(
    settings: BlockSettings, hidden: Tensor, query_rows: Tensor | None, weights: BlockWeights, record: bool
) -> tuple[Tensor, _Attention | None, list[Tensor]]:
    """Return the result and, if `record`, attention and the tensors saved for `_backward`."""
    _, normed, *statistics_1 = add_layer_norm(hidden, None, weights.norm_1, weights.norm_1_bias, settings.eps[0])
    normed = normed.to(settings.dtype)
    residual = hidden if query_rows is None else hidden[query_rows]
    if query_rows is None or not settings.separate_queries:
        projected: tuple[Tensor, ...] = (F.linear(normed, weights.in_proj, weights.in_proj_bias),)
    else:
        W = hidden.shape[1]
        query = F.linear(normed[query_rows], weights.in_proj[:W], weights.in_proj_bias[:W])
        projected = query, F.linear(normed, weights.in_proj[W:], weights.in_proj_bias[W:])
        del query
    del normed
    attention = _attention(settings, projected, record)
    del projected
    branch = F.linear(attention.result.detach(), weights.out_proj, weights.out_proj_bias).to(hidden.dtype)
    recorded = attention if record else None
    del attention
    mid, normed, *statistics_2 = add_layer_norm(residual, branch, weights.norm_2, weights.norm_2_bias, settings.eps[1])
    del branch
    inner = normed.to(settings.dtype) @ weights.fc.T
    del normed
    saved = [mid, inner, *statistics_1, *statistics_2] if record else []
    active = mlp_activation(inner, weights.fc_bias, KINDS.index(settings.activation))
    del inner
    return mid + F.linear(active, weights.proj, weights.proj_bias), recorded, saved


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: BlockSettings, hidden: Tensor, query_rows: Tensor | None, *weights: Tensor
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            out, attention, saved = _forward(
                settings, hidden, query_rows, _cast(settings, weights), record=not settings.save_inputs_only
            )
        ctx.settings, ctx.attention, ctx.count = settings, attention, len(weights)
        ctx.save_for_backward(hidden, query_rows, *weights, *(attention.projected if attention else ()), *saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        settings: BlockSettings = ctx.settings
        hidden, query_rows, *rest = ctx.saved_tensors
        weights, saved = rest[: ctx.count], rest[ctx.count :]
        needs_hidden, needed = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        needs = BlockWeights(*_join_qkv(needed, any))
        with torch.autocast(hidden.device.type, enabled=False):
            cast = _cast(settings, weights)
            attention, ctx.attention = ctx.attention, None  # frees its graph; a second backward records another
            if not saved:
                _, attention, saved = _forward(settings, hidden, query_rows, cast, record=True)
            else:
                *projected, mid, inner, mean_1, rstd_1, mean_2, rstd_2 = saved
                attention = attention or _attention(settings, projected, record=True)
                saved = [mid, inner, mean_1, rstd_1, mean_2, rstd_2]
            d_hidden, gradients = _backward(
                settings, d_out, hidden, query_rows, cast, attention, saved, needs_hidden, needs
            )
        if len(weights) > len(gradients):
            qkv = (None if g is None else g.chunk(3) for g in gradients[2:4])
            gradients = (*gradients[:2], *(part for parts in qkv for part in parts or [None] * 3), *gradients[4:])
        d_weights = (
            None if g is None or not need else g.to(x.dtype)
            for g, x, need in zip(gradients, weights, needed, strict=True)
        )
        return None, d_hidden if needs_hidden else None, None, *d_weights


def _join_qkv(flat: Sequence[Any], join: Callable[[Sequence[Any]], Any]) -> Sequence[Any]:
    """Fields of `BlockWeights`, with separate projections of query, key and value joined."""
    if len(flat) == len(BlockWeights._fields):
        return flat
    return (*flat[:2], join(flat[2:5]), join(flat[5:8]), *flat[8:])


def _cast(settings: BlockSettings, flat: Sequence[Tensor]) -> BlockWeights:
    """Cast the weights of matrix products; the operators upcast norm parameters and the activation bias."""
    weights = BlockWeights(*_join_qkv(flat, lambda qkv: torch.cat(list(qkv))))
    names = ("in_proj", "in_proj_bias", "out_proj", "out_proj_bias", "fc", "proj", "proj_bias")
    return weights._replace(**{name: getattr(weights, name).to(settings.dtype) for name in names})


def _backward(
    settings: BlockSettings,
    d_out: Tensor,
    hidden: Tensor,
    query_rows: Tensor | None,
    weights: BlockWeights,
    attention: _Attention,
    saved: list[Tensor],
    needs_hidden: bool,
    needs: Any,
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    mid, inner, mean_1, rstd_1, mean_2, rstd_2 = saved
    d_hidden: Tensor | None = None
    d_in_proj: Tensor | None = None
    upstream = d_out.to(settings.dtype)
    # MLP
    active = mlp_activation(inner, weights.fc_bias, KINDS.index(settings.activation))
    d_proj, d_proj_bias = _weight_gradient(upstream, active, needs.proj, needs.proj_bias)
    del active
    d_inner, d_fc_bias = mlp_activation_backward(
        upstream @ weights.proj, inner, weights.fc_bias, KINDS.index(settings.activation), True, needs.fc_bias
    )
    d_fc = None
    if needs.fc:
        _, normed, *_ = add_layer_norm(mid, None, weights.norm_2, weights.norm_2_bias, settings.eps[1])
        d_fc = d_inner.T @ normed.to(settings.dtype)
        del normed
    d_normed = (d_inner @ weights.fc).to(hidden.dtype)
    del d_inner
    d_mid, d_norm_2, d_norm_2_bias = add_layer_norm_backward(
        d_normed, d_out, mid, mean_2, rstd_2, weights.norm_2, True, needs.norm_2, needs.norm_2_bias
    )
    # Attention
    upstream = d_mid.to(settings.dtype)
    d_out_proj, d_out_proj_bias = _weight_gradient(
        upstream, attention.result.detach(), needs.out_proj, needs.out_proj_bias
    )
    d_projected = torch.autograd.grad(attention.result, attention.projected, upstream @ weights.out_proj)
    separate = len(d_projected) > 1

    def in_proj_gradient(inputs: Tensor) -> Tensor:
        """Gradient of query, key and value, transposed, times `inputs`, [3W, W]."""
        if not separate:
            return d_projected[0].T @ inputs
        return torch.cat([d_projected[0].T @ inputs[query_rows], d_projected[1].T @ inputs])

    d_in_proj_bias = torch.cat([x.sum(dim=0) for x in d_projected]) if separate else d_projected[0].sum(dim=0)
    if not needs_hidden:
        # The first block above the cut needs no gradient of its tokens. Since LN₁(hidden) = x̂ · γ + β, the gradients of
        # γ and β follow from that of the projection's weights, which saves a product as large as the projection.
        ones, zeros = torch.ones_like(weights.norm_1), torch.zeros_like(weights.norm_1)
        _, unit, *_ = add_layer_norm(hidden, None, ones, zeros, settings.eps[0])
        wide = mean_1.dtype
        unit_gradient, d_bias = in_proj_gradient(unit.to(settings.dtype)).to(wide), d_in_proj_bias.to(wide)
        d_norm_1, d_norm_1_bias = (weights.in_proj * unit_gradient).sum(dim=0), d_bias @ weights.in_proj.to(wide)
        d_in_proj = torch.addcmul(
            d_bias[:, None] * weights.norm_1_bias.to(wide), unit_gradient, weights.norm_1.to(wide)
        )
    else:
        _, normed, *_ = add_layer_norm(hidden, None, weights.norm_1, weights.norm_1_bias, settings.eps[0])
        d_in_proj = in_proj_gradient(normed.to(settings.dtype)) if needs.in_proj else None
        del normed
        if separate:
            W = hidden.shape[1]
            d_normed = d_projected[1] @ weights.in_proj[W:]
            d_normed[query_rows] += d_projected[0] @ weights.in_proj[:W]
        else:
            d_normed = d_projected[0] @ weights.in_proj
        if query_rows is not None:
            d_mid = torch.zeros_like(hidden).index_copy_(0, query_rows, d_mid)
        d_hidden, d_norm_1, d_norm_1_bias = add_layer_norm_backward(
            d_normed.to(hidden.dtype),
            d_mid,
            hidden,
            mean_1,
            rstd_1,
            weights.norm_1,
            True,
            needs.norm_1,
            needs.norm_1_bias,
        )
    return d_hidden, (
        d_norm_1, d_norm_1_bias, d_in_proj, d_in_proj_bias, d_out_proj, d_out_proj_bias,
        d_norm_2, d_norm_2_bias, d_fc, d_fc_bias, d_proj, d_proj_bias,
    )  # fmt: skip


def _weight_gradient(
    upstream: Tensor, inputs: Tensor, need: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    return upstream.T @ inputs if need else None, upstream.sum(dim=0) if need_bias else None
