"""A pre-norm transformer block as one autograd node, which keeps little for backward.

    mid = hidden + attention(LN₁(hidden)) · W_o + b_o
    out = mid + act(LN₂(mid) · W_fc + b_fc) · W_p + b_p

Kept are hidden, what attention keeps (query, key, value, its result and log-sum-exp), mid, and the MLP before its bias:
ten widths a token. The norms and the activation are computed again in backward, which costs a pass over memory each and
no matrix product. With `minimal` only hidden is kept, and backward begins with the forward pass.

Tokens are rows, [R, W], of however many sequences; only `attend` knows where one ends. Where it answers for fewer rows
than there are (the pooled token of the last block), the rest of the block runs for those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.add_layer_norm import add_layer_norm, add_layer_norm_backward
from ..ops.mlp_activation import KINDS, mlp_activation, mlp_activation_backward

KEPT = 11  # widths a token that a block keeps, and its own input: an MLP of four widths
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Weights(NamedTuple):
    """Parameters of a block, in the order of the computation. A layer scale is multiplied into W_o, b_o or W_p, b_p."""

    norm_1: Tensor
    norm_1_bias: Tensor
    in_proj: Any  # [3W, W]: query, key, value; or a tuple of these three, which are put together for each pass
    in_proj_bias: Any
    out_proj: Tensor
    out_proj_bias: Tensor
    norm_2: Tensor
    norm_2_bias: Tensor
    fc: Tensor
    fc_bias: Tensor
    proj: Tensor
    proj_bias: Tensor


def flattened(weights: Weights) -> list[Tensor]:
    """All tensors of a block, query, key and value projection apart if they are."""
    return [x for field in weights for x in (field if isinstance(field, tuple) else (field,))]


class Parts(NamedTuple):
    """What is read off the caller's block.

    Attributes:
        weights: Its parameters.
        kind: Activation, as in `functional.mlp_activation`.
        eps: Of the two norms.
        heads: H, number of attention heads.
    """

    weights: Weights
    kind: str
    eps: tuple[float, float]
    heads: int


class Spec(NamedTuple):
    """What a block computes, besides its weights.

    Attributes:
        attend: (query [Q, W], key [R, W], value [R, W]) → [Q, W], heads and scale included; plain differentiable code.
        kind: Activation, as in `functional.mlp_activation`.
        eps: Of the two norms.
        dtype: Of the matrix products: that of the weights, or what autocast wants. The residual stream keeps its own.
        minimal: Keep hidden alone.
    """

    attend: Attend
    kind: str
    eps: tuple[float, float]
    dtype: torch.dtype
    minimal: bool = False


@torch.compiler.disable  # the node holds a graph of its own, which a compiler would cut to pieces
def run_block(spec: Spec, hidden: Tensor, weights: Weights, rows: Tensor | None = None) -> Tensor:
    """One block over tokens.

    Args:
        spec: What is computed.
        hidden: [R, W].
        weights: Of the block, in the dtype of `hidden`; products are done in `spec.dtype`.
        rows: int64 [Q], the tokens whose result is wanted, none of them twice; all by default.

    Returns:
        [Q, W] in the dtype of `hidden`.
    """
    flat = flattened(weights)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, *flat)):
        return _Block.apply(spec, hidden, rows, *flat)
    with torch.autocast(hidden.device.type, enabled=False):
        return _forward(spec, hidden, rows, _cast(spec, flat), record=False)[0]


class _Attention(NamedTuple):
    """Attention with the graph from its result back to query, key and value."""

    projected: tuple[Tensor, ...]
    result: Tensor


def _attention(spec: Spec, projected: Sequence[Tensor], record: bool) -> _Attention:
    leaves = tuple(x.detach().requires_grad_(record) for x in projected)
    with torch.set_grad_enabled(record):
        return _Attention(leaves, spec.attend(*leaves))


def _forward(
    spec: Spec, hidden: Tensor, rows: Tensor | None, w: Weights, record: bool
) -> tuple[Tensor, _Attention | None, list[Tensor]]:
    """The result, attention, what else `_backward` reads. Unless recorded, all but the result is freed on the way."""
    _, normed, *statistics = add_layer_norm(hidden, None, w.norm_1, w.norm_1_bias, spec.eps[0])
    normed = normed.to(spec.dtype)
    if rows is None:
        residual, projected = hidden, F.linear(normed, w.in_proj, w.in_proj_bias).chunk(3, dim=1)
    else:
        W = hidden.shape[1]
        query = F.linear(normed[rows], w.in_proj[:W], w.in_proj_bias[:W])
        key_value = F.linear(normed, w.in_proj[W:], w.in_proj_bias[W:])
        residual, projected = hidden[rows], (query, *key_value.chunk(2, dim=1))
        del query, key_value
    del normed
    attention = _attention(spec, projected, record)
    del projected
    branch = F.linear(attention.result.detach(), w.out_proj, w.out_proj_bias).to(hidden.dtype)
    recorded = attention if record else None
    del attention
    mid, normed, *more = add_layer_norm(residual, branch, w.norm_2, w.norm_2_bias, spec.eps[1])
    del branch
    inner = normed.to(spec.dtype) @ w.fc.T
    del normed
    kept = [mid, inner, *statistics, *more] if record else []
    active = mlp_activation(inner, w.fc_bias, KINDS.index(spec.kind))
    del inner
    return mid + F.linear(active, w.proj, w.proj_bias), recorded, kept


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, hidden: Tensor, rows: Tensor | None, *weights: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            out, attention, kept = _forward(spec, hidden, rows, _cast(spec, weights), record=not spec.minimal)
        ctx.spec, ctx.attention, ctx.count = spec, attention, len(weights)
        ctx.save_for_backward(hidden, rows, *weights, *(attention.projected if attention else ()), *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        spec: Spec = ctx.spec
        hidden, rows, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.count], rest[ctx.count :]
        need_hidden, needed = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        needs = Weights(*_joined(needed, any))
        with torch.autocast(hidden.device.type, enabled=False):
            cast = _cast(spec, weights)
            attention, ctx.attention = ctx.attention, None  # its graph is freed here; a second backward makes another
            if not kept:
                _, attention, kept = _forward(spec, hidden, rows, cast, record=True)
            else:
                attention, kept = attention or _attention(spec, kept[:3], record=True), kept[3:]
            d_hidden, gradients = _backward(spec, d_out, hidden, rows, cast, attention, kept, need_hidden, needs)
        if len(weights) > len(gradients):
            thirds = (None if g is None else g.chunk(3) for g in gradients[2:4])
            gradients = (*gradients[:2], *(part for third in thirds for part in third or [None] * 3), *gradients[4:])
        wanted = (
            None if g is None or not need else g.to(x.dtype)
            for g, x, need in zip(gradients, weights, needed, strict=True)
        )
        return None, d_hidden if need_hidden else None, None, *wanted


def _joined(flat: Sequence[Any], join: Callable[[Sequence[Any]], Any]) -> Sequence[Any]:
    """The fields of `Weights`, whether query, key and value came as one or as three."""
    if len(flat) == len(Weights._fields):
        return flat
    return (*flat[:2], join(flat[2:5]), join(flat[5:8]), *flat[8:])


def _cast(spec: Spec, flat: Sequence[Tensor]) -> Weights:
    """Weights of the products in their dtype; norms and the bias of the activation are the operators' to widen."""
    w = Weights(*_joined(flat, lambda third: torch.cat(list(third))))
    names = ("in_proj", "in_proj_bias", "out_proj", "out_proj_bias", "fc", "proj", "proj_bias")
    return w._replace(**{name: getattr(w, name).to(spec.dtype) for name in names})


def _backward(
    spec: Spec,
    d_out: Tensor,
    hidden: Tensor,
    rows: Tensor | None,
    w: Weights,
    attention: _Attention,
    kept: list[Tensor],
    need_hidden: bool,
    needs: Any,
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    mid, inner, mean_1, rstd_1, mean_2, rstd_2 = kept
    d_hidden: Tensor | None = None
    d_in_proj: Tensor | None = None
    upstream = d_out.to(spec.dtype)
    # MLP
    active = mlp_activation(inner, w.fc_bias, KINDS.index(spec.kind))
    d_proj, d_proj_bias = _weight_gradient(upstream, active, needs.proj, needs.proj_bias)
    del active
    wanted = KINDS.index(spec.kind), True, needs.fc_bias
    d_inner, d_fc_bias = mlp_activation_backward(upstream @ w.proj, inner, w.fc_bias, *wanted)
    d_fc = None
    if needs.fc:
        _, normed, *_ = add_layer_norm(mid, None, w.norm_2, w.norm_2_bias, spec.eps[1])
        d_fc = d_inner.T @ normed.to(spec.dtype)
        del normed
    d_normed = (d_inner @ w.fc).to(hidden.dtype)
    del d_inner
    d_mid, d_norm_2, d_norm_2_bias = add_layer_norm_backward(
        d_normed, d_out, mid, mean_2, rstd_2, w.norm_2, True, needs.norm_2, needs.norm_2_bias
    )
    # Attention
    upstream = d_mid.to(spec.dtype)
    d_out_proj, d_out_proj_bias = _weight_gradient(
        upstream, attention.result.detach(), needs.out_proj, needs.out_proj_bias
    )
    d_projected = torch.autograd.grad(attention.result, attention.projected, upstream @ w.out_proj)
    if rows is not None:
        d_query, d_key_value = d_projected[0], torch.cat(d_projected[1:], dim=1)
    else:
        d_all = torch.cat(d_projected, dim=1)
    del d_projected

    def against(inputs: Tensor) -> Tensor:
        """Σ over tokens of the gradient of query, key and value times inputs, [3W, W]."""
        if rows is None:
            return d_all.T @ inputs
        return torch.cat([d_query.T @ inputs[rows], d_key_value.T @ inputs])

    d_in_proj_bias = d_all.sum(dim=0) if rows is None else torch.cat([d_query.sum(dim=0), d_key_value.sum(dim=0)])
    if not need_hidden:
        # The first block above the cut: the norm's own gradients follow from that of the weights behind it, since
        # LN₁(hidden) = x̂ · γ + β and no token's gradient is wanted. That saves a product as large as the projection.
        _, unit, *_ = add_layer_norm(hidden, None, torch.ones_like(w.norm_1), torch.zeros_like(w.norm_1), spec.eps[0])
        wide = mean_1.dtype
        against_unit, d_bias = against(unit.to(spec.dtype)).to(wide), d_in_proj_bias.to(wide)
        d_norm_1, d_norm_1_bias = (w.in_proj * against_unit).sum(dim=0), d_bias @ w.in_proj.to(wide)
        d_in_proj = torch.addcmul(d_bias[:, None] * w.norm_1_bias.to(wide), against_unit, w.norm_1.to(wide))
    else:
        _, normed, *_ = add_layer_norm(hidden, None, w.norm_1, w.norm_1_bias, spec.eps[0])
        d_in_proj = against(normed.to(spec.dtype)) if needs.in_proj else None
        del normed
        if rows is None:
            d_normed = d_all @ w.in_proj
        else:
            W = hidden.shape[1]
            d_normed = d_key_value @ w.in_proj[W:]
            d_normed[rows] += d_query @ w.in_proj[:W]
            d_mid = torch.zeros_like(hidden).index_copy_(0, rows, d_mid)
        d_hidden, d_norm_1, d_norm_1_bias = add_layer_norm_backward(
            d_normed.to(hidden.dtype), d_mid, hidden, mean_1, rstd_1, w.norm_1, True, needs.norm_1, needs.norm_1_bias
        )
    return d_hidden, (
        d_norm_1, d_norm_1_bias, d_in_proj, d_in_proj_bias, d_out_proj, d_out_proj_bias,
        d_norm_2, d_norm_2_bias, d_fc, d_fc_bias, d_proj, d_proj_bias,
    )  # fmt: skip


def _weight_gradient(
    upstream: Tensor, inputs: Tensor, need: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    return upstream.T @ inputs if need else None, upstream.sum(dim=0) if need_bias else None
