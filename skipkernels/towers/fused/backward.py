"""Backward pass of a fused block, in the stages of `forward`, from the last to the first.

Stage `d_NAME` takes the gradient of the result of NAME and returns that of its input; those of its vectors (biases,
norms) it sets in `gradients`. `backward` sets those of matrices: each is a product with the input of its layer. Inputs
that a norm or the activation has computed are not saved, but recomputed by the backward of that norm or activation,
which returns them as well: the gradient of W_p follows `d_mlp_act`, that of W_fc `d_norm_2`, and that of W_qkv
`d_norm_1`.

Shapes are as in `forward`: Q rows behind the projections, R before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.add_layer_norm import NormArguments, NormResults, add_layer_norm, add_layer_norm_backward
from ...ops.mlp_activation import KINDS, mlp_activation_backward
from ...ops.mlp_activation import Needs as ActivationNeeds
from ...reference import at_least_fp32
from . import forward
from .forward import AttentionGraph, Saved, SavedNorm
from .gradients import NORM_1_AND_IN_PROJ, Gradients, joint_product
from .records import BlockCall, Hidden

# The layer that reads a norm: the gradient of its weight reads the norm, too.
LAYER_AFTER = {"norm_1": "in_proj", "norm_2": "fc"}
# Biases that are added to the sum behind a norm and to its input, with their gradients in `NormResults`.
BIASES_AROUND = {"norm_2": {"proj_bias": "d_hidden_sum", "out_proj_bias": "d_x_sum"}}


def recompute(call: BlockCall, saved: Saved) -> Saved:
    """Repeat what was not saved: the product of the MLP; attention, in a second backward pass."""
    inner = saved.inner
    if inner is None:
        inner = forward.mlp_in(call, forward.norm(call, "norm_2", saved.norm_2.x)[0])
    graph = saved.attention_graph or forward.attention(call, saved.projected, record=True)[1]
    return replace(saved, inner=inner, attention_graph=graph)


def backward(call: BlockCall, saved: Saved, d_out: Hidden, gradients: Gradients) -> Hidden | None:
    """Return the gradients of the inputs [R, W], given those of mid and branch [Q, W]; None if they are not needed.

    Set those of the weights that are needed in `gradients`. Each tensor is released once the next stage has read it.
    """
    needed = gradients.needed
    assert saved.inner is not None and saved.attention_graph is not None and d_out.branch is not None
    d_active = d_mlp_out(call, d_out.branch)  # [Q, M]
    d_active, mlp_normed = d_mlp_norm(call, saved.inner, d_active, gradients)
    d_inner, active = d_mlp_act(call, saved.inner, d_active, gradients)  # [Q, M], or [Q, 2M] for SwiGLU
    del d_active
    inputs = active if mlp_normed is None else mlp_normed  # of W_p
    if inputs is not None:
        gradients.set_product("proj", (d_out.branch, inputs))
    del active, mlp_normed, inputs
    d_normed = d_mlp_in(call, d_inner)  # [Q, W]
    d_mid, d_branch, normed = d_norm_2(call, saved.norm_2, d_normed, d_out.stream, gradients)
    del d_normed
    if normed is not None:
        gradients.set_product("fc", (d_inner, normed))
    del d_inner, normed
    gradients.set_product("out_proj", (d_branch, saved.attention_graph.result.detach()))
    if not needed.of_attention:
        return None
    d_result = d_out_proj(call, d_branch)  # [Q, W]
    del d_branch
    d_projected = d_attention(saved.attention_graph, d_result, gradients)  # ([R, 3W],), or ([Q, W], [R, 2W])
    del d_result
    d_projected = d_rotation(call, d_projected)
    if not needed.hidden:
        d_in_proj_and_norm_1(call, saved.norm_1.x, d_projected, gradients)
        return None
    d_normed = d_in_proj(call, d_projected, gradients)  # [R, W]
    d_stream, d_branch, normed = d_norm_1(call, saved.norm_1, d_normed, d_mid, gradients)
    del d_normed
    if normed is not None:
        gradients.set_product("in_proj", *_pairs(call, d_projected, normed))
    return Hidden(d_stream, d_branch)


def d_norm_1(
    call: BlockCall, saved: SavedNorm, d_normed: Tensor, d_mid: Tensor, gradients: Gradients
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of stream and branch [R, W], with that of the residual [Q, W]; return also LN₁(hidden), if needed."""
    if call.how.query_rows is None:
        return _norm(call, "norm_1", saved, d_normed, d_mid, gradients)
    found = _norm(call, "norm_1", saved, d_normed, None, gradients)
    d_stream = call.add_to_queries(found.d_x, d_mid)
    return d_stream, d_stream.to(call.dtype), found.normed


def d_in_proj(call: BlockCall, d_projected: Sequence[Tensor], gradients: Gradients) -> Tensor:
    """Gradient of LN₁(hidden), [R, W]; set that of b_qkv. That of W_qkv follows `d_norm_1`, which computes LN₁."""
    weight = call.weights.in_proj
    if gradients.needed.any_of("in_proj_bias"):
        gradients.set_column_sums("in_proj_bias", d_projected)  # [3W]
    if len(d_projected) == 1:
        return d_projected[0] @ weight  # [R, 3W] @ [3W, W] -> [R, W]
    (d_query, d_key_value), W = d_projected, weight.shape[1]
    d_normed = d_key_value @ weight[W:]  # [R, 2W] @ [2W, W] -> [R, W]
    if isinstance(call.how.query_rows, slice):
        # The query rows are a view of d_normed: one product that adds to it in place, d_normed[rows] += d_query W_q.
        d_rows = call.queries(d_normed)
        torch.addmm(d_rows, d_query, weight[:W], out=d_rows)  # [Q, W] + [Q, W] @ [W, W]
        return d_normed
    return call.add_to_queries(d_normed, d_query @ weight[:W])  # [Q, W] @ [W, W] -> [Q, W]


def d_in_proj_and_norm_1(call: BlockCall, hidden: Tensor, d_projected: Sequence[Tensor], gradients: Gradients) -> None:
    """Set the gradients of W_qkv, b_qkv and LN₁ if none of hidden is needed, as in the first block above the cut.

    Since LN₁(hidden) = x̂ · γ + β, they follow from G = d_qkvᵀ x̂, which saves a product as large as the projection:

        d_W = G · γ + d_b ⊗ β,   d_γ = Σ_n W_n · G_n,   d_β = Σ_n d_b_n W_n,   n the rows of W = W_qkv, [3W, W]
    """
    weights, block = call.weights, call.block
    if "in_proj" in gradients.needed.updates:
        normed, _ = forward.norm(call, "norm_1", hidden)
        gradients.set_factors("in_proj", *_pairs(call, d_projected, normed))
    if not gradients.needed.any_of(*NORM_1_AND_IN_PROJ):
        return
    gradients.set_column_sums("in_proj_bias", d_projected)  # d_b, [3W]
    gradients.complete()  # d_b is read below
    unit = add_layer_norm(hidden, None, None, None, block.eps[0], call.dtype, block.rms)[1]  # x̂, [R, W]
    unit_gradient = at_least_fp32(joint_product(_pairs(call, d_projected, unit), gradients.dtype))  # G, [3W, W]
    d_weight = unit_gradient * weights.norm_1  # [3W, W]
    gradients.set("norm_1", (weights.in_proj * unit_gradient).sum(0))  # [W]
    if weights.norm_1_bias is not None:
        d_bias = at_least_fp32(gradients.weights["in_proj_bias"])[:, None]  # [3W, 1]
        gradients.set("norm_1_bias", (weights.in_proj * d_bias).sum(0))  # [W]
        d_weight.addcmul_(d_bias, weights.norm_1_bias)
    gradients.set("in_proj", d_weight)


def d_rotation(call: BlockCall, d_projected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradient of query and key before their rotation, unless `attention` has rotated them."""
    return d_projected if call.weights.query_norm is not None else forward.rotate(call, d_projected, inverse=True)


def d_attention(saved: AttentionGraph, d_result: Tensor, gradients: Gradients) -> tuple[Tensor, ...]:
    """Gradient of the projections, ([R, 3W],) or ([Q, W], [R, 2W]), and of the norms of attention, by autograd."""
    d_leaves = torch.autograd.grad(saved.result, (*saved.projected, *saved.norms.values()), d_result)
    count = len(saved.projected)
    for name, d_norm in zip(saved.norms, d_leaves[count:], strict=True):
        gradients.set(name, d_norm)
    return d_leaves[:count]


def d_out_proj(call: BlockCall, d_branch: Tensor) -> Tensor:
    """Gradient of the result of attention, [Q, W] @ [W, W] -> [Q, W]."""
    return d_branch @ call.weights.out_proj


def d_norm_2(
    call: BlockCall, saved: SavedNorm, d_normed: Tensor, d_stream: Tensor, gradients: Gradients
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of mid [Q, W], as those of its two terms; return also LN₂(mid), if needed."""
    return _norm(call, "norm_2", saved, d_normed, d_stream, gradients)


def d_mlp_in(call: BlockCall, d_inner: Tensor) -> Tensor:
    """Gradient of LN₂(mid), [Q, M] @ [M, W] -> [Q, W]; 2M for SwiGLU."""
    return d_inner @ call.weights.fc


def d_mlp_act(call: BlockCall, inner: Tensor, d_active: Tensor, gradients: Gradients) -> tuple[Tensor, Tensor | None]:
    """Gradient of the product, [Q, M] or [Q, 2M]; return also the activation [Q, M], if W_p reads it and needs it."""
    needs = ActivationNeeds(
        x=True,
        bias=gradients.needed.any_of("fc_bias"),
        out=gradients.needed.input_of("proj") and call.weights.mlp_norm is None,
        partial=gradients.pending.partial,
    )
    kind = KINDS.index(call.block.activation)
    d_inner, d_bias, active, partial_sums = mlp_activation_backward(d_active, inner, call.weights.fc_bias, kind, *needs)
    gradients.set_vectors(_computed(partial_sums), fc_bias=_computed(d_bias))
    return d_inner, active if needs.out else None


def d_mlp_norm(call: BlockCall, inner: Tensor, d_active: Tensor, gradients: Gradients) -> tuple[Tensor, Tensor | None]:
    """Gradient of the activation [Q, M], and its norm, which W_p reads; as given, and None, in a block without one."""
    if call.weights.mlp_norm is None:
        return d_active, None
    normed, saved = forward.norm(call, "mlp_norm", forward.mlp_act(call, inner))
    return _norm(call, "mlp_norm", saved, d_active, None, gradients).d_x, normed


def d_mlp_out(call: BlockCall, d_branch: Tensor) -> Tensor:
    """Gradient of the activation or its norm, [Q, W] @ [W, M] -> [Q, M]."""
    return d_branch @ call.weights.proj


# ---- parts of stages -------------------------------------------------------------------------------------------------


class NormGradients(NamedTuple):
    """Gradient of the input of a norm, and the norm, if a gradient reads it."""

    d_x: Tensor
    d_x_cast: Tensor  # d_x in the dtype of the products, if a residual gradient was added; else the same as d_x
    normed: Tensor | None


def _norm(
    call: BlockCall,
    name: str,
    saved: SavedNorm,
    d_normed: Tensor,
    d_residual: Tensor | None,
    gradients: Gradients,
) -> NormGradients:
    """Gradient of the input of a norm, d_x = d_residual + …; set those of its weights, and of the biases around it.

    A sum of stream and branch was the input if there is a residual: d_x is then the gradient of both, of the branch in
    the dtype of the products.
    """
    needed, dtype = gradients.needed, call.dtype
    weight, bias = getattr(call.weights, name), getattr(call.weights, f"{name}_bias")
    biases = BIASES_AROUND.get(name, {})
    need_normed = name in LAYER_AFTER and needed.input_of(LAYER_AFTER[name])
    casts = d_residual is not None and dtype != saved.x.dtype
    arguments = NormArguments(
        d_normed,
        d_residual,
        saved.x,
        saved.mean,
        saved.rstd,
        weight,
        bias if need_normed else None,
        need_x=True,
        need_weight=needed.any_of(name),
        need_bias=needed.any_of(f"{name}_bias"),
        need_sums=needed.any_of(*biases),
        partial=gradients.pending.partial,
        cast=dtype if casts else None,
        need_normed=need_normed,
    )
    found = NormResults(*add_layer_norm_backward(*arguments))
    totals = {name: found.d_weight, f"{name}_bias": found.d_bias}
    if arguments.need_sums:
        totals |= {bias: getattr(found, result) for bias, result in biases.items()}
    gradients.set_vectors(_computed(found.partial_sums), **{x: _computed(total) for x, total in totals.items()})
    return NormGradients(found.d_x, found.d_x_cast if casts else found.d_x, found.normed if need_normed else None)


def _computed(result: Tensor) -> Tensor | None:
    """Return a result of an operator, or None for an empty one: it was not asked for, or is left as partial sums."""
    return result if result.numel() > 0 else None


def _pairs(call: BlockCall, d_projected: Sequence[Tensor], inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """Gradients of projections, each with the rows [R, W] or [Q, W] that it was computed from."""
    if len(d_projected) == 1:
        return [(d_projected[0], inputs)]
    d_query, d_key_value = d_projected
    return [(d_query, call.queries(inputs)), (d_key_value, inputs)]
