"""The stages of a fused block, each with its backward: norm_1 → in_proj → attention → out_proj → norm_2 → mlp.

Tokens are rows [R, W] of any number of sequences; only `attention` knows where a sequence ends. In the last block it
returns Q query rows, the pooled tokens: then the stages behind it compute Q rows; with separate queries `in_proj`
computes only key and value of all R rows, and attention only Q queries.

Saved for backward, in values per token, with M = 4·W, by the `memory` of a call:

    stage      tensor                                      values   dtype      fast   balanced   min
    norm_1     hidden, the sum of the inputs [R, W]           W      stream     ×        ×        ×
    in_proj    query, key, value [R, 3W]                     3·W     products   ×        ×
    attention  its result [Q, W]                              W      products   ×        ×
    norm_2     mid, the sum before the norm [Q, W]            W      stream     ×        ×
    mlp        inner, the product before its bias [Q, M]     4·W     products   ×
                                                            10·W               10·W     6·W       W

and, but for "min", mean and rstd of both norms and the log-sum-exp of attention: 4 + H numbers. Backward recomputes
the norms and the activation, which are memory-bound, but no matrix product; rotations are undone in backward, and
nothing is saved for them. "balanced", an option of `sk.fuse` alone, repeats the product of W_fc, and "min" every stage
in front of the activation.

The two dtypes differ under autocast alone: the norms write that of the products, and the residual stream keeps its own.
The weights of products are then cast once, by one launch, or in a captured step by their update (`casts.py`), and
their copies are saved as well, 12·W² values; "min" casts them again. Weights that a call computes, those with low-rank
updates or layer scales, are saved in every mode, unless their casts are.

Products and norms without a function of their own are written out in `forward` and `backward`. `NAME_backward` takes
the gradient of the result of NAME and returns that of its input. Gradients of weights are set in `Gradients`. That of
a matrix is a product with the input of its layer. Where a norm or the activation computed that input it is not saved:
the backward of the norm or activation computes it again, and the gradient of the matrix is set behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dtypes import wide_dtype
from ...ops.add_layer_norm import Backward as NormBackward
from ...ops.add_layer_norm import BackwardResults as NormResults
from ...ops.add_layer_norm import add_layer_norm, add_layer_norm_backward
from ...ops.mlp_activation import KINDS, mlp_activation, mlp_activation_backward
from ...ops.mlp_activation import Backward as ActivationBackward
from ...ops.mlp_activation import BackwardResults as ActivationResults
from ...ops.rotary_embedding import rotary_embedding
from ..rows import Hidden, RowsOptions
from .gradients import Gradients
from .weights import ATTENTION_NORMS, BlockSettings, BlockWeights

# ---- both directions -------------------------------------------------------------------------------------------------


def forward(call: BlockCall, inputs: Hidden, record: bool) -> tuple[Hidden, Saved]:
    """Run the stages. Return mid and branch [Q, W], and what backward reads; only inputs of norms unless `record`."""
    saved, inner = forward_to_inner(call, inputs, record)
    active = mlp_act(call, inner)  # [Q, M]
    del inner
    if call.weights.mlp_norm is not None:
        active, _ = norm(call, "mlp_norm", active)
    branch = F.linear(active, call.weights.mlp_out, call.weights.mlp_out_bias)  # [Q, M] @ [M, W] -> [Q, W]
    return Hidden(saved.norm_2.x, branch), saved


def forward_to_inner(call: BlockCall, inputs: Hidden, record: bool) -> tuple[Saved, Tensor]:
    """Run the stages in front of the activation. Return what backward reads, and inner [Q, M], or [Q, 2M] for SwiGLU.

    Each tensor is released once the next stage has read it.
    """
    weights = call.weights
    normed, saved_1 = norm(call, "norm_1", inputs.stream, inputs.branch)  # of hidden = stream + branch, [R, W]
    projected = in_proj(call, normed)  # ([R, 3W],), or ([Q, W], [R, 2W])
    del normed
    if weights.query_norm is None:  # else `attention` rotates, behind the norms of the heads
        projected = rotate(call, projected)
    attended, graph = attention(call, projected, record)  # [Q, W]
    del projected  # the leaves of the graph are the same memory
    attention_branch = F.linear(attended, weights.out_proj, weights.out_proj_bias)  # [Q, W] @ [W, W] -> [Q, W]
    del attended
    normed, saved_2 = norm(call, "norm_2", call.queries(saved_1.x), attention_branch)  # of mid = hidden + it, [Q, W]
    del attention_branch
    inner = normed @ weights.mlp_in.T  # [Q, W] @ [W, M] -> [Q, M], or [Q, 2M] for SwiGLU; the activation adds b_fc
    return Saved(saved_1, saved_2, inner if record else None, graph), inner


def to_save(call: BlockCall, saved: Saved) -> list[Tensor | None]:
    """Tensors that are kept until backward, beside the graph of attention, which has its own; for `restore`."""
    if call.options.memory == "min":
        return [saved.norm_1.x]
    inner = None if call.options.memory == "balanced" else saved.inner
    return [*saved.norm_1, *saved.norm_2, inner]


def restore(call: BlockCall, tensors: Sequence[Tensor], graph: AttentionGraph | None) -> Saved:
    """Return what backward reads, from the tensors of `to_save`: what was not saved is computed again.

    Without the graph of attention, with memory="min" and in a second backward pass, that is everything.
    """
    if graph is None:
        return forward_to_inner(call, Hidden(tensors[0]), record=True)[0]
    saved_1, saved_2, inner = SavedNorm(*tensors[:3]), SavedNorm(*tensors[3:6]), tensors[6]
    if inner is None:  # "balanced"
        inner = norm(call, "norm_2", saved_2.x)[0] @ call.weights.mlp_in.T
    return Saved(saved_1, saved_2, inner, graph)


def backward(
    call: BlockCall, saved: Saved, d_stream: Tensor, d_branch: Tensor, gradients: Gradients
) -> tuple[Tensor, Tensor] | None:
    """Return the gradient of hidden [R, W], given that of the result mid + branch [Q, W]; None if it is not needed.

    Each is one gradient in two dtypes: that of the stream, and that of the branch, which products read. Set those of
    the weights that are needed in `gradients`. Each tensor is released once the next stage has read it.
    """
    weights, graph = call.weights, saved.attention_graph
    assert saved.inner is not None and graph is not None
    # branch = active · W_p + b_p, where active = act(inner + b_fc), or a norm of it
    d_active = d_branch @ weights.mlp_out  # [Q, W] @ [W, M] -> [Q, M]
    if weights.mlp_norm is not None:
        # The statistics of this norm are not saved, since its input is not either.
        _, saved_norm = norm(call, "mlp_norm", mlp_act(call, saved.inner))
        _, d_active, active = norm_backward(call, "mlp_norm", saved_norm, d_active, gradients)
        del saved_norm
        d_inner, _ = mlp_act_backward(call, saved.inner, d_active, gradients)  # [Q, M], or [Q, 2M] for SwiGLU
    else:
        d_inner, active = mlp_act_backward(
            call, saved.inner, d_active, gradients, need_active=gradients.needs("mlp_out")
        )
    del d_active
    gradients.set_product("mlp_out", (d_branch, active))
    del active
    # inner = LN₂(mid) · W_fc
    d_normed = d_inner @ weights.mlp_in  # [Q, M] @ [M, W] -> [Q, W]; 2M for SwiGLU
    d_mid, d_mid_branch, normed = norm_backward(
        call, "norm_2", saved.norm_2, d_normed, gradients, d_stream, biases=("mlp_out_bias", "out_proj_bias")
    )
    del d_normed
    gradients.set_product("mlp_in", (d_inner, normed))
    del d_inner, normed
    # mid = hidden + attended · W_o + b_o
    gradients.set_product("out_proj", (d_mid_branch, graph.result))
    if not gradients.depend_on_attention:
        return None
    d_attended = d_mid_branch @ weights.out_proj  # [Q, W] @ [W, W] -> [Q, W]
    del d_mid_branch
    d_projected = attention_backward(graph, d_attended, gradients)  # ([R, 3W],), or ([Q, W], [R, 2W])
    del d_attended
    if weights.query_norm is None:
        d_projected = rotate(call, d_projected, inverse=True)
    # projected = LN₁(hidden) · W_qkv + b_qkv
    d_normed = in_proj_backward(call, d_projected)  # [R, W]
    # The residual of mid was hidden. If that is all rows, the backward of the norm adds its gradient, else it is added
    # to the query rows below.
    adds = gradients.needs_hidden and call.options.attention.query_rows is None
    d_hidden, d_hidden_branch, normed = norm_backward(
        call, "norm_1", saved.norm_1, d_normed, gradients, d_mid if adds else None, need_x=gradients.needs_hidden
    )
    del d_normed
    set_in_proj(call, d_projected, normed, gradients)
    if not gradients.needs_hidden:
        return None
    if not adds:
        d_hidden = call.add_to_queries(d_hidden, d_mid)
        d_hidden_branch = d_hidden.to(call.dtype)
    return d_hidden, d_hidden_branch


# ---- a call, and what backward reads besides the weights -------------------------------------------------------------


class BlockCall(NamedTuple):
    """One call of a block: R rows of tokens, of which Q are computed behind attention."""

    weights: BlockWeights
    settings: BlockSettings
    options: RowsOptions
    dtype: torch.dtype  # of the matrix products: that of the weights, or of autocast. The residual stream is not cast

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


class SavedNorm(NamedTuple):
    """Input of a norm and the statistics of its rows."""

    x: Tensor  # [rows, W], the sum if the norm adds a residual
    mean: Tensor  # [rows]; [0] for RMSNorm
    rstd: Tensor  # [rows]


@dataclass
class AttentionGraph:
    """Result of attention with its autograd graph, back to the projections and to the weights of its norms."""

    projected: tuple[Tensor, ...]  # leaves of the graph: ([R, 3W],), or query [Q, W] and key_value [R, 2W]
    norms: dict[str, Tensor]  # leaves of the graph: weights of norms, by their fields of `BlockWeights`
    result: Tensor  # [Q, W]


@dataclass
class Saved:
    """Tensors that backward reads besides the weights."""

    norm_1: SavedNorm  # hidden [R, W]
    norm_2: SavedNorm  # mid [Q, W]
    # None if they were not recorded
    inner: Tensor | None  # [Q, M], or [Q, 2M] for SwiGLU
    attention_graph: AttentionGraph | None


# ---- in_proj ---------------------------------------------------------------------------------------------------------


def in_proj(call: BlockCall, normed: Tensor) -> tuple[Tensor, ...]:
    """LN₁(hidden) · W_qkv + b_qkv: query, key and value ([R, 3W],), or ([Q, W], [R, 2W])."""
    weight, bias = call.weights.layer("in_proj")
    if not call.options.attention.separate_queries:
        return (F.linear(normed, weight, bias),)  # [R, W] @ [W, 3W] -> [R, 3W]
    W = normed.shape[1]
    of_query, of_key_value = (None, None) if bias is None else (bias[:W], bias[W:])
    query = F.linear(call.queries(normed), weight[:W], of_query)  # [Q, W] @ [W, W] -> [Q, W]
    return query, F.linear(normed, weight[W:], of_key_value)  # [R, W] @ [W, 2W] -> [R, 2W]


def in_proj_backward(call: BlockCall, d_projected: Sequence[Tensor]) -> Tensor:
    """Gradient of LN₁(hidden), [R, W]."""
    weight = call.weights.in_proj
    if len(d_projected) == 1:
        return d_projected[0] @ weight  # [R, 3W] @ [3W, W] -> [R, W]
    (d_query, d_key_value), W = d_projected, weight.shape[1]
    d_normed = d_key_value @ weight[W:]  # [R, 2W] @ [2W, W] -> [R, W]
    return call.add_product_to_queries(d_normed, d_query, weight[:W])  # [Q, W] @ [W, W] -> [Q, W]


def set_in_proj(call: BlockCall, d_projected: Sequence[Tensor], normed: Tensor, gradients: Gradients) -> None:
    """Set the gradients of W_qkv and b_qkv, given LN₁(hidden), [R, W]."""
    gradients.set_column_sums("in_proj_bias", d_projected)  # [3W]
    if gradients.needs("in_proj"):
        inputs = (normed,) if len(d_projected) == 1 else (call.queries(normed), normed)
        gradients.set_product("in_proj", *zip(d_projected, inputs, strict=True))


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(call: BlockCall, projected: Sequence[Tensor], record: bool) -> tuple[Tensor, AttentionGraph | None]:
    """Attention and its norms, [Q, W], with a graph of their own if recorded."""
    weights = call.weights
    leaves = tuple(x.detach().requires_grad_(record) for x in projected)
    norms = {
        name: x.detach().requires_grad_(record) for name in ATTENTION_NORMS if (x := getattr(weights, name)) is not None
    }
    if norms:  # those that `norm` reads are leaves
        call = call._replace(weights=replace(weights, **norms))
    with torch.set_grad_enabled(record):
        inputs: Sequence[Tensor] = leaves
        if weights.query_norm is not None:
            inputs = rotate(call, _norm_heads(call, leaves))
        result = call.options.attention(*inputs, heads=call.settings.heads)
        if weights.attention_norm is not None:
            result, _ = norm(call, "attention_norm", result)
    return result, AttentionGraph(leaves, norms, result) if record else None


def attention_backward(graph: AttentionGraph, d_attended: Tensor, gradients: Gradients) -> tuple[Tensor, ...]:
    """Gradient of the projections, ([R, 3W],) or ([Q, W], [R, 2W]); set those of its norms. Autograd computes all."""
    d_leaves = torch.autograd.grad(graph.result, (*graph.projected, *graph.norms.values()), d_attended)
    count = len(graph.projected)
    for name, gradient in zip(graph.norms, d_leaves[count:], strict=True):
        gradients.set(name, gradient)
    return d_leaves[:count]


def _norm_heads(call: BlockCall, projected: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Projections with each head of query and key normed."""
    width, heads = call.weights.out_proj.shape[1], call.settings.heads
    query, key, value = (part for x in projected for part in x.split(width, dim=1))  # [Q or R, W] each
    query, key = (
        norm(call, name, x.unflatten(1, (heads, -1)))[0].flatten(1)  # norms of [Q or R, H, E]
        for name, x in (("query_norm", query), ("key_norm", key))
    )
    parts = ((query, key, value),) if len(projected) == 1 else ((query,), (key, value))
    return tuple(torch.cat(x, dim=1) if len(x) > 1 else x[0] for x in parts)


def rotate(call: BlockCall, projected: Sequence[Tensor], *, inverse: bool = False) -> tuple[Tensor, ...]:
    """Rotate the heads of query and key in projections; `inverse` maps gradients of the rotated ones to the others."""
    if call.options.rotary is None:
        return tuple(projected)
    (cos, sin, interleaved), heads = call.options.rotary, call.settings.heads
    wide = wide_dtype(projected[0].dtype)
    cos, sin = cos.to(wide), sin.to(wide)
    if len(projected) == 1:  # query and key are the first 2H heads
        return (rotary_embedding(projected[0], cos, sin, 2 * heads, interleaved, inverse),)
    (query, key_value), query_rows = projected, call.options.attention.query_rows
    assert query_rows is not None
    if isinstance(query_rows, slice):  # the same token of each sequence
        first = (query_rows.start or 0) % len(cos)
        of_queries = cos[first : first + 1], sin[first : first + 1]
    else:
        positions = query_rows % len(cos)
        of_queries = cos[positions], sin[positions]  # [n, E/2]
    return (
        rotary_embedding(query, *of_queries, heads, interleaved, inverse),
        rotary_embedding(key_value, cos, sin, heads, interleaved, inverse),
    )


# ---- mlp -------------------------------------------------------------------------------------------------------------


def mlp_act(call: BlockCall, inner: Tensor) -> Tensor:
    """act(inner + b_fc), [Q, M]."""
    return mlp_activation(inner, call.weights.mlp_in_bias, KINDS.index(call.settings.activation))


def mlp_act_backward(
    call: BlockCall, inner: Tensor, d_active: Tensor, gradients: Gradients, *, need_active: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradient of inner, [Q, M] or [Q, 2M]; set that of b_fc. Return also act(inner + b_fc), empty if not needed."""
    bias, kind = call.weights.mlp_in_bias, KINDS.index(call.settings.activation)
    arguments = ActivationBackward(
        d_active,
        inner,
        bias,
        kind,
        need_x=True,
        need_bias=gradients.needs("mlp_in_bias"),
        need_out=need_active,
        partial=gradients.partial,
    )
    found = ActivationResults(*mlp_activation_backward(*arguments))
    gradients.set_sums({"mlp_in_bias": found.d_bias}, found.partial_sums)
    return found.d_x, found.out


# ---- norms -----------------------------------------------------------------------------------------------------------


def norm(call: BlockCall, name: str, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, SavedNorm]:
    """Norm `name` of x + residual, in the dtype of the products."""
    (weight, bias), eps = call.weights.layer(name), call.settings.eps[name]
    total, normed, mean, rstd = add_layer_norm(x, residual, weight, bias, eps, call.dtype, call.settings.rms)
    return normed, SavedNorm(x if residual is None else total, mean, rstd)


_MULTIPLIED_BY = {"norm_1": "in_proj", "norm_2": "mlp_in", "mlp_norm": "mlp_out"}


def norm_backward(
    call: BlockCall,
    name: str,
    saved: SavedNorm,
    d_normed: Tensor,
    gradients: Gradients,
    d_residual: Tensor | None = None,
    *,
    biases: tuple[str, ...] = (),
    need_x: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the input of a norm, d_x = d_residual + …, and d_x in the dtype of the products; set its weights'.

    With a residual the input was the sum of stream and branch, and d_x is the gradient of both. The third result is the
    norm, computed again, if the gradient of the weight that it is multiplied by needs it; else an empty tensor.
    Gradients of the two `biases` are the column sums of d_residual and of d_x.
    """
    (weight, bias), bias_name = call.weights.layer(name), f"{name}_bias"
    need_sums, need_weights = gradients.needs(*biases), gradients.needs(name, bias_name)
    has_cast = d_residual is not None and call.dtype != saved.x.dtype
    arguments = NormBackward(
        d_normed,
        d_residual,
        saved.x,
        saved.mean,
        saved.rstd,
        weight,
        bias,
        need_x=need_x,
        need_weight=gradients.needs(name),
        need_bias=gradients.needs(bias_name),
        need_sums=need_sums,
        partial=gradients.partial and (need_weights or need_sums),
        cast=call.dtype if has_cast else None,
        need_normed=gradients.needs(_MULTIPLIED_BY[name]),
        rms=call.settings.rms,
    )
    found = NormResults(*add_layer_norm_backward(*arguments))
    sums = {name: found.d_weight, bias_name: found.d_bias}  # in the order of the columns of `partial_sums`
    if need_sums:
        sums |= zip(biases, (found.d_hidden_sum, found.d_x_sum), strict=True)
    gradients.set_sums(sums, found.partial_sums)
    return found.d_x, found.d_x_cast if has_cast else found.d_x, found.normed
