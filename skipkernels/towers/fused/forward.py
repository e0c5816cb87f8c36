"""Forward pass of a fused block, in stages: norm_1 → in_proj → attention → out_proj → norm_2 → mlp.

Tokens are rows [R, W] of any number of sequences; only `attention` knows where a sequence ends. With `query_rows` (the
pooled tokens, in the last block), only `norm_1` and `in_proj` compute all R rows, and the other stages Q rows; with
`separate_queries` `in_proj` computes only key and value of all rows.

Saved for backward, in values per token, with M = 4·W, by the `memory` of a call:

    stage      tensor                                      values   fast   balanced   min
    norm_1     hidden, the sum of the inputs [R, W]           W      ×        ×        ×
    in_proj    query, key, value [R, 3W]                     3·W     ×        ×
    attention  its result [Q, W]                              W      ×        ×
    norm_2     mid, the sum before the norm [Q, W]            W      ×        ×
    mlp        inner, the product before its bias [Q, M]     4·W     ×
                                                            10·W    10·W     6·W       W

and mean and rstd of both norms and the log-sum-exp of attention: 4 + H numbers. Backward recomputes the norms and the
activation, which are memory-bound, but no matrix product; rotations are undone in backward, and nothing is saved for
them. "balanced" repeats the product of W_fc, and "min" this forward pass.

Under autocast the weights of products are cast once, by one launch, or in a captured step by their update
(`casts.Casts`), and their copies are saved as well, 24·W² bytes; "min" casts them again. The norms write the dtype of
the products, and the residual stream keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.add_layer_norm import add_layer_norm
from ...ops.mlp_activation import KINDS, mlp_activation
from ...ops.rotary_embedding import rotary_embedding
from .records import ATTENTION_NORMS, NORMS, BlockCall, Hidden

# Values saved per token by which `memory="auto"` decides, in multiples of W: the 10 of the table, and 3 for norms of
# heads: attention reads a copy of query, key and value, normed, and saves it beside those of `in_proj`. SwiGLU with
# M = 4·W adds 4, which are not counted: "auto" leaves half of the free memory.
SAVED_WIDTHS = 13
CAST_BYTES = 24  # size of the copies of the weights in 16 bits, in multiples of W²: (3 + 1 + 4 + 4) · W² · 2 bytes


def saved_bytes(hidden: Tensor) -> int:
    """Bytes that a block over hidden states [..., W] saves for backward at most, with memory="fast"."""
    saved = hidden.numel() * hidden.element_size() * SAVED_WIDTHS
    if torch.is_autocast_enabled(hidden.device.type):
        saved += CAST_BYTES * hidden.shape[-1] ** 2
    return saved


@dataclass
class SavedNorm:
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
    projected: tuple[Tensor, ...]  # ([R, 3W],), or query [Q, W] and key_value [R, 2W]
    attention_graph: AttentionGraph | None  # None: attention is repeated
    norm_2: SavedNorm  # mid [Q, W]
    inner: Tensor | None  # [Q, M], or [Q, 2M] for SwiGLU. None: the product is repeated


class Result(NamedTuple):
    """Result of a forward pass."""

    out: Hidden  # mid and branch, [Q, W]
    hidden: Tensor  # sum of the inputs, [R, W]
    saved: Saved | None  # if recorded


def forward(call: BlockCall, inputs: Hidden, record: bool) -> Result:
    """Run the stages, and record what `backward` reads. Each tensor is released once the next stage has read it."""
    normed, saved_1 = norm_1(call, inputs)  # [R, W]
    projected = in_proj(call, normed)  # ([R, 3W],), or ([Q, W], [R, 2W])
    del normed
    projected = rotation(call, projected)
    result, graph = attention(call, projected, record)  # [Q, W]
    projected = graph.projected if graph else ()
    branch = out_proj(call, result)  # [Q, W]
    del result
    normed, saved_2 = norm_2(call, saved_1.x, branch)  # [Q, W]
    del branch
    inner = mlp_in(call, normed)  # [Q, M], or [Q, 2M] for SwiGLU
    del normed
    active = mlp_act(call, inner)  # [Q, M]
    saved = Saved(saved_1, projected, graph, saved_2, inner) if record else None
    del inner
    active = mlp_norm(call, active)
    return Result(Hidden(saved_2.x, mlp_out(call, active)), saved_1.x, saved)


def norm_1(call: BlockCall, inputs: Hidden) -> tuple[Tensor, SavedNorm]:
    """hidden = stream + branch, and LN₁(hidden), [R, W]."""
    return norm(call, "norm_1", inputs.stream, inputs.branch)


def in_proj(call: BlockCall, normed: Tensor) -> tuple[Tensor, ...]:
    """LN₁(hidden) · W_qkv + b_qkv: query, key and value ([R, 3W],), or ([Q, W], [R, 2W])."""
    weight, bias = call.weights.in_proj, call.weights.in_proj_bias
    if call.how.query_rows is None or not call.how.separate_queries:
        return (F.linear(normed, weight, bias),)  # [R, W] @ [W, 3W] -> [R, 3W]
    W = normed.shape[1]
    of_query, of_key_value = (None, None) if bias is None else (bias[:W], bias[W:])
    query = F.linear(call.queries(normed), weight[:W], of_query)  # [Q, W] @ [W, W] -> [Q, W]
    return query, F.linear(normed, weight[W:], of_key_value)  # [R, W] @ [W, 2W] -> [R, 2W]


def rotation(call: BlockCall, projected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rotate query and key, unless their norms come first: then `attention` does."""
    return projected if call.weights.query_norm is not None else rotate(call, projected)


def attention(call: BlockCall, projected: Sequence[Tensor], record: bool) -> tuple[Tensor, AttentionGraph | None]:
    """Attention and its norms, [Q, W], with a graph of their own if recorded."""
    weights = call.weights
    leaves = tuple(x.detach().requires_grad_(record) for x in projected)
    norms = {
        name: x.detach().requires_grad_(record) for name in ATTENTION_NORMS if (x := getattr(weights, name)) is not None
    }
    if norms:
        call = call._replace(weights=replace(weights, **norms))
    with torch.set_grad_enabled(record):
        inputs: Sequence[Tensor] = leaves
        if weights.query_norm is not None:
            inputs = rotate(call, _norm_heads(call, leaves))
        result = call.how.attend(*inputs, heads=call.block.heads)
        if weights.attention_norm is not None:
            result, _ = norm(call, "attention_norm", result)
    return result, AttentionGraph(leaves, norms, result) if record else None


def out_proj(call: BlockCall, result: Tensor) -> Tensor:
    """attention · W_o + b_o, [Q, W] @ [W, W] -> [Q, W]."""
    return F.linear(result.detach(), call.weights.out_proj, call.weights.out_proj_bias)


def norm_2(call: BlockCall, hidden: Tensor, branch: Tensor) -> tuple[Tensor, SavedNorm]:
    """mid = hidden + branch, and LN₂(mid), [Q, W]."""
    return norm(call, "norm_2", call.queries(hidden), branch)


def mlp_in(call: BlockCall, normed: Tensor) -> Tensor:
    """LN₂(mid) · W_fc, [Q, W] @ [W, M] -> [Q, M], or [Q, 2M] for SwiGLU."""
    return normed @ call.weights.fc.T


def mlp_act(call: BlockCall, inner: Tensor) -> Tensor:
    """act(inner + b_fc), [Q, M]."""
    return mlp_activation(inner, call.weights.fc_bias, KINDS.index(call.block.activation))


def mlp_norm(call: BlockCall, active: Tensor) -> Tensor:
    """Norm of the activation [Q, M], if the block has one."""
    return active if call.weights.mlp_norm is None else norm(call, "mlp_norm", active)[0]


def mlp_out(call: BlockCall, active: Tensor) -> Tensor:
    """active · W_p + b_p, [Q, M] @ [M, W] -> [Q, W]."""
    return F.linear(active, call.weights.proj, call.weights.proj_bias)


# ---- parts of stages -------------------------------------------------------------------------------------------------


def norm(call: BlockCall, name: str, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, SavedNorm]:
    """Norm `name` of x + residual, in the dtype of the products."""
    weight, bias = getattr(call.weights, name), getattr(call.weights, f"{name}_bias")
    eps = call.block.eps[NORMS.index(name)]
    total, normed, mean, rstd = add_layer_norm(x, residual, weight, bias, eps, call.dtype, call.block.rms)
    return normed, SavedNorm(x if residual is None else total, mean, rstd)


def _norm_heads(call: BlockCall, projected: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Projections with each head of query and key normed."""
    width, heads = call.weights.out_proj.shape[1], call.block.heads
    query, key, value = (part for x in projected for part in x.split(width, dim=1))  # [Q or R, W] each
    query, key = (
        norm(call, name, x.unflatten(1, (heads, -1)))[0].flatten(1)  # norms of [Q or R, H, E]
        for name, x in (("query_norm", query), ("key_norm", key))
    )
    parts = ((query, key, value),) if len(projected) == 1 else ((query,), (key, value))
    return tuple(torch.cat(x, dim=1) if len(x) > 1 else x[0] for x in parts)


def rotate(call: BlockCall, projected: Sequence[Tensor], *, inverse: bool = False) -> tuple[Tensor, ...]:
    """Rotate the heads of query and key in projections; `inverse` maps gradients of the rotated ones to the others."""
    if call.how.rotary is None:
        return tuple(projected)
    (cos, sin, interleaved), heads = call.how.rotary, call.block.heads
    wide = torch.promote_types(projected[0].dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    if len(projected) == 1:  # query and key are the first 2H heads
        return (rotary_embedding(projected[0], cos, sin, 2 * heads, interleaved, inverse),)
    query, key_value = projected  # a pooled query is the first token of its sequence
    return (
        rotary_embedding(query, cos[:1], sin[:1], heads, interleaved, inverse),
        rotary_embedding(key_value, cos, sin, heads, interleaved, inverse),
    )
