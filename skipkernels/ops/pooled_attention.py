"""`pooled_attention`: one query per sequence, that of the pooled token, against all keys of the sequence.

    weight_n = exp(scale · ⟨q, k_n⟩ − lse),   n < length
    out      = Σ_n weight_n v_n

    d_score_n = weight_n (⟨d_out, v_n⟩ − ⟨d_out, out⟩)
    d_q = scale Σ_n d_score_n k_n,   d_k_n = scale d_score_n q,   d_v_n = weight_n d_out

Forward also returns lse [B, H] in fp32 (fp64 for fp64); backward gets it, the inputs and the result. Only the gradients
that are asked for are computed, the others come back empty. Those of keys and values past the length are zero.

CPU kernel: csrc/pooled_attention.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import registration


def _weights(query: Tensor, key: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention [B, H, N] and lse [B, H], in fp32 or fp64."""
    scores = scale * torch.einsum("bhe,bnhe->bhn", query, key)
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None], -math.inf)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp(), lse


def _wide(key: Tensor, value: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values in fp32 or fp64, zero where no key counts, and where that is, [B, N]."""
    key, value = (x if x.dtype == torch.float64 else x.float() for x in (key, value))
    if lengths is None:
        return key, value, None
    hidden = torch.arange(key.shape[1], device=key.device) >= lengths[:, None]
    return *(x.masked_fill(hidden[:, :, None, None], 0) for x in (key, value)), hidden  # type: ignore[return-value]


def _serve(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    if lengths is not None and lengths.device.type == "cpu":  # a GPU is not made to wait
        wrong = lengths[(lengths < 1) | (lengths > key.shape[1])]
        if wrong.numel() > 0:
            raise ValueError(f"pooled_attention: lengths must be 1 to N={key.shape[1]}; got {wrong[0]}.")
    k, v, hidden = _wide(key, value, lengths)
    weight, lse = _weights(query.to(k.dtype), k, hidden, scale)
    return torch.einsum("bhn,bnhe->bhe", weight, v).to(query.dtype).contiguous(), lse


def _serve_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    k, v, hidden = _wide(key, value, lengths)
    q, g = query.to(k.dtype), d_out.to(k.dtype)
    weight, _ = _weights(q, k, hidden, scale)
    d_weight = torch.einsum("bhe,bnhe->bhn", g, v)
    # Not ⟨d_out, out⟩: out is rounded.
    d_score = scale * weight * (d_weight - (weight * d_weight).sum(dim=-1, keepdim=True))
    d_query, d_key, d_value = (x.new_empty(0) for x in (query, key, value))
    if need_query:
        d_query = torch.einsum("bhn,bnhe->bhe", d_score, k).to(query.dtype).contiguous()
    if need_key:
        d_key = torch.einsum("bhn,bhe->bnhe", d_score, q).to(query.dtype).contiguous()
    if need_value:
        d_value = torch.einsum("bhn,bhe->bnhe", weight, g).to(query.dtype).contiguous()
    return d_query, d_key, d_value


def _fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=dtype)


def _fake_backward(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = rest[:3], rest[-3:]
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needs, strict=True))


pooled_attention = registration.define(
    "pooled_attention(Tensor query, Tensor key, Tensor value, Tensor? lengths, float scale)"
    " -> (Tensor out, Tensor lse)",
    serve=_serve,
    fake=_fake,
)
pooled_attention_backward = registration.define(
    "pooled_attention_backward(Tensor d_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    " Tensor? lengths, float scale, bool need_query, bool need_key, bool need_value)"
    " -> (Tensor d_query, Tensor d_key, Tensor d_value)",
    serve=_serve_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, lengths, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, out, lse, lengths)


def _backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:3]
    gradients = pooled_attention_backward(d_out, *ctx.saved_tensors, ctx.scale, *needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None)


registration.differentiate(pooled_attention, _backward, _save)
registration.refuse_double_backward(pooled_attention_backward, instead="skipkernels.reference.pooled_attention")
registration.autocast_features(pooled_attention, features=3)
