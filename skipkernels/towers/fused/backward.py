"""Backward pass of a fused block, in the stages of `forward`, from the last to the first.

A stage takes the gradient of its result, returns that of its input, and adds those of its vectors. The gradient of a
weight is a product with the input of its layer. Inputs that a norm or the activation has computed are not saved, but
recomputed by the backward of that norm or activation: the gradient of W_p follows `mlp_act`, that of W_fc `norm_2`, and
that of W_qkv `norm_1`.

Shapes are as in `forward`: Q rows behind the projections, R before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...ops import add_layer_norm as norms
from ...ops import mlp_activation as activations
from ...ops.add_layer_norm import add_layer_norm, add_layer_norm_backward
from ...ops.mlp_activation import KINDS, mlp_activation_backward
from ...reference import at_least_fp32
from . import forward
from .forward import AttentionGraph, Saved, SavedNorm
from .gradients import NORM_1_AND_IN_PROJ, Gradients, joint_product
from .weights import BlockCall, Hidden

PRODUCT_AFTER = {"norm_1": "in_proj", "norm_2": "fc"}  # the layer that reads a norm


def recompute(call: BlockCall, saved: Saved) -> Saved:
    """Repeat what was not saved: the product of the MLP; attention, in a second backward pass."""
    inner = saved.inner
    if inner is None:
        inner = forward.mlp_in(call, forward.norm(call, "norm_2", saved.norm_2.x)[0])
    graph = saved.attention or forward.attention(call, saved.projected, record=True)[1]
    return replace(saved, inner=inner, attention=graph)


def backward(call: BlockCall, saved: Saved, d_out: Hidden, gradients: Gradients) -> None:
    """Add the gradients that are needed of the inputs and weights to `gradients`, given those of mid and branch.

    Each tensor is released once the next stage has read it.
    """
    assert saved.inner is not None and saved.attention is not None and d_out.branch is not None
    d_active = mlp_out(call, d_out.branch)  # [Q, M]
    d_active, active = mlp_norm(call, saved.inner, d_active, gradients)
    d_inner, active = mlp_act(call, saved.inner, d_active, active, gradients)
    del d_active
    gradients.add_product("proj", (d_out.branch, active))
    del active
    d_normed = mlp_in(call, d_inner)  # [Q, W]
    d_mid, d_branch, normed = norm_2(call, saved.norm_2, d_normed, d_out.stream, gradients)
    del d_normed
    gradients.add_product("fc", (d_inner, normed))
    del d_inner, normed
    gradients.add_product("out_proj", (d_branch, saved.attention.result.detach()))
    if not gradients.needed.of_attention:
        return
    d_result = out_proj(call, d_branch)  # [Q, W]
    del d_branch
    d_projected = attention(saved.attention, d_result, gradients)  # ([R, 3W],), or ([Q, W], [R, 2W])
    del d_result
    d_projected = rotation(call, d_projected)
    if not gradients.needed.inputs:
        in_proj_and_norm_1(call, saved.norm_1.x, d_projected, gradients)
        return
    d_normed = in_proj(call, d_projected, gradients)  # [R, W]
    normed = norm_1(call, saved.norm_1, d_normed, d_mid, gradients)
    del d_normed
    if gradients.needed.product("in_proj"):  # else normed is empty
        gradients.add_product("in_proj", *_pairs(call, d_projected, normed))


def norm_1(call: BlockCall, saved: SavedNorm, d_normed: Tensor, d_mid: Tensor, gradients: Gradients) -> Tensor:
    """Gradients of stream and branch [R, W], with that of the residual [Q, W]; return LN₁(hidden), if needed."""
    all_rows = call.query_rows is None
    found = _norm(call, "norm_1", saved, d_normed, d_mid if all_rows else None, gradients, cast=all_rows)
    if all_rows:
        gradients.stream, gradients.branch = found.d_x, _cast(call, found)
    else:
        gradients.stream = call.add_to_rows(found.d_x, d_mid)
        gradients.branch = gradients.stream.to(call.settings.dtype)
    return found.normed


def in_proj(call: BlockCall, d_projected: Sequence[Tensor], gradients: Gradients) -> Tensor:
    """Gradient of the bias; return that of LN₁(hidden), [R, W]."""
    weight = call.weights.in_proj
    if gradients.needed.any_of("in_proj_bias"):
        gradients.add_column_sums("in_proj_bias", d_projected)  # [3W]
    if len(d_projected) == 1:
        return d_projected[0] @ weight  # [R, 3W] @ [3W, W] -> [R, W]
    (d_query, d_key_value), W = d_projected, weight.shape[1]
    d_normed = d_key_value @ weight[W:]  # [R, 2W] @ [2W, W] -> [R, W]
    if isinstance(call.query_rows, slice):
        d_rows = d_normed[call.query_rows]
        torch.addmm(d_rows, d_query, weight[:W], out=d_rows)  # + [Q, W] @ [W, W], without a copy
        return d_normed
    return call.add_to_rows(d_normed, d_query @ weight[:W])  # [Q, W] @ [W, W] -> [Q, W]


def in_proj_and_norm_1(call: BlockCall, hidden: Tensor, d_projected: Sequence[Tensor], gradients: Gradients) -> None:
    """Gradients of W_qkv, b_qkv and LN₁ if none of hidden is needed, as in the first block above the cut.

    Since LN₁(hidden) = x̂ · γ + β, they follow from G = d_qkvᵀ x̂, which saves a product as large as the projection:

        d_W = G · γ + d_b ⊗ β,   d_γ = Σ_n W_n · G_n,   d_β = Σ_n d_b_n W_n
    """
    needed, weights, settings, found = gradients.needed, call.weights, call.settings, gradients.weights
    if "in_proj" in needed.updates:
        normed, _ = forward.norm(call, "norm_1", hidden)
        gradients.add_factors("in_proj", *_pairs(call, d_projected, normed))
    if not needed.any_of(*NORM_1_AND_IN_PROJ):
        return
    gradients.add_column_sums("in_proj_bias", d_projected)  # d_b, [3W]
    gradients.complete()  # d_b is read below
    unit = add_layer_norm(hidden, None, None, None, settings.eps[0], settings.dtype, settings.rms)[1]  # x̂, [R, W]
    unit_gradient = at_least_fp32(joint_product(_pairs(call, d_projected, unit), gradients.dtype))  # G, [3W, W]
    found["norm_1"] = (weights.in_proj * unit_gradient).sum(0)
    found["in_proj"] = unit_gradient * weights.norm_1
    if weights.norm_1_bias is not None:
        d_bias = at_least_fp32(found["in_proj_bias"])
        found["norm_1_bias"] = (weights.in_proj * d_bias[:, None]).sum(0)  # [W]
        found["in_proj"].addcmul_(d_bias[:, None], weights.norm_1_bias)


def rotation(call: BlockCall, d_projected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradient of query and key before their rotation, unless `attention` has rotated them."""
    return d_projected if call.weights.query_norm is not None else forward.rotate(call, d_projected, inverse=True)


def attention(saved: AttentionGraph, d_result: Tensor, gradients: Gradients) -> tuple[Tensor, ...]:
    """Gradient of the projections, ([R, 3W],) or ([Q, W], [R, 2W]), and of the norms of attention, by autograd."""
    d_leaves = torch.autograd.grad(saved.result, (*saved.projected, *saved.norms.values()), d_result)
    count = len(saved.projected)
    gradients.weights |= zip(saved.norms, d_leaves[count:], strict=True)
    return d_leaves[:count]


def out_proj(call: BlockCall, d_branch: Tensor) -> Tensor:
    """Gradient of the result of attention, [Q, W] @ [W, W] -> [Q, W]."""
    return d_branch @ call.weights.out_proj


def norm_2(
    call: BlockCall, saved: SavedNorm, d_normed: Tensor, d_stream: Tensor, gradients: Gradients
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of mid [Q, W], also as that of the branch of attention, and LN₂(mid), if needed.

    The biases b_p and b_o are added to the stream behind and before the norm: their gradients are sums of d_stream and
    of d_mid.
    """
    biases = ("proj_bias", "out_proj_bias")
    found = _norm(call, "norm_2", saved, d_normed, d_stream, gradients, cast=True, biases=biases)
    return found.d_x, _cast(call, found), found.normed


def mlp_in(call: BlockCall, d_inner: Tensor) -> Tensor:
    """Gradient of LN₂(mid), [Q, M] @ [M, W] -> [Q, W]; 2M for SwiGLU."""
    return d_inner @ call.weights.fc


def mlp_act(
    call: BlockCall, inner: Tensor, d_active: Tensor, active: Tensor | None, gradients: Gradients
) -> tuple[Tensor, Tensor]:
    """Gradient of the product [Q, M] or [Q, 2M] and of its bias; return also the input of W_p [Q, M], if needed."""
    needed = gradients.needed
    needs = activations.Needs(
        x=True,
        bias=needed.any_of("fc_bias"),
        out=active is None and needed.product("proj"),
        partial=gradients.sums.partial,
    )
    kind = KINDS.index(call.settings.activation)
    d_inner, d_bias, recomputed, sums = mlp_activation_backward(d_active, inner, call.weights.fc_bias, kind, *needs)
    gradients.add_sums(sums, fc_bias=d_bias)
    return d_inner, recomputed if active is None else active


def mlp_norm(call: BlockCall, inner: Tensor, d_active: Tensor, gradients: Gradients) -> tuple[Tensor, Tensor | None]:
    """Gradient of the activation [Q, M] and its norm; both as they are given, and None, without a norm."""
    if call.weights.mlp_norm is None:
        return d_active, None
    active, saved = forward.norm(call, "mlp_norm", forward.mlp_act(call, inner))
    return _norm(call, "mlp_norm", saved, d_active, None, gradients).d_x, active


def mlp_out(call: BlockCall, d_branch: Tensor) -> Tensor:
    """Gradient of the activation or its norm, [Q, W] @ [W, M] -> [Q, M]."""
    return d_branch @ call.weights.proj


# ---- parts of stages -------------------------------------------------------------------------------------------------


def _norm(
    call: BlockCall,
    name: str,
    saved: SavedNorm,
    d_normed: Tensor,
    d_residual: Tensor | None,
    gradients: Gradients,
    cast: bool = False,
    biases: tuple[str, ...] = (),
) -> norms.Gradients:
    """Gradients of a norm of x, d_x = d_residual + …, and with `cast` in the dtype of the products, too.

    Add those of its weights, and of `biases`, which are the sums of d_residual and d_x.
    """
    needed, weights, dtype = gradients.needed, call.weights, call.settings.dtype
    normed = name in PRODUCT_AFTER and needed.product(PRODUCT_AFTER[name])
    sums = needed.any_of(*biases)
    weight, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
    arguments = norms.Backward(
        d_normed,
        d_residual,
        saved.x,
        saved.mean,
        saved.rstd,
        weight,
        bias if normed else None,
        need_x=True,
        need_weight=needed.any_of(name),
        need_bias=needed.any_of(f"{name}_bias"),
        need_sums=sums,
        partial=gradients.sums.partial,
        cast=dtype if cast and dtype != saved.x.dtype else None,
        need_normed=normed,
    )
    found = norms.Gradients(*add_layer_norm_backward(*arguments))
    totals = {name: found.d_weight, f"{name}_bias": found.d_bias}
    if sums:
        totals |= zip(biases, (found.d_hidden_sum, found.d_x_sum), strict=True)
    gradients.add_sums(found.sums, **totals)
    return found


def _cast(call: BlockCall, found: norms.Gradients) -> Tensor:
    """d_x of a norm in the dtype of the products."""
    return found.d_x if found.d_x.dtype == call.settings.dtype else found.d_x_cast


def _pairs(call: BlockCall, d_projected: Sequence[Tensor], inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """Gradients of projections, each with the rows [R, W] or [Q, W] that it was computed from."""
    if len(d_projected) == 1:
        return [(d_projected[0], inputs)]
    d_query, d_key_value = d_projected
    return [(d_query, call.rows(inputs)), (d_key_value, inputs)]
