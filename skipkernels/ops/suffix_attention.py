"""`suffix_attention`: causal attention of many short class suffixes over one prefix that they share, and themselves.

    weight_ij = exp(scale · ⟨q_i, k_j⟩ − lse_i),   j over the prefix, and over the tokens of i's suffix up to i itself
    out_i     = Σ_j weight_ij v_j

    d_score_ij = weight_ij (⟨d_out_i, v_j⟩ − ⟨d_out_i, out_i⟩)
    d_q_i = scale Σ_j d_score_ij k_j,   d_k_j = scale Σ_i d_score_ij q_i,   d_v_j = Σ_i weight_ij d_out_i

The operator takes the suffixes' tokens in a row, [T, H, E], and either `offsets`, [K + 1], or none where all suffixes
have `max_length` tokens: then the padded form [K, S, …] is the same memory. The host never reads the offsets.

Forward also returns lse [T, H] in fp32 (fp64 for fp64); backward gets it, the inputs and the result. Only the gradients
that are asked for are computed, the others come back empty. The gradient of the prefix is a sum over all suffixes, in
an order that the shapes alone decide.

CPU kernel: csrc/suffix_attention.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..reference import packed_suffixes, padded_suffixes
from . import registration


def _weights(query: Tensor, prefix_key: Tensor, suffix_key: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the prefix [K, S, H, P] and over the suffix [K, S, H, S], and lse [K, S, H], in the wide dtype."""
    S, P = query.shape[1], prefix_key.shape[0]
    over_prefix = torch.einsum("kshe,phe->kshp", query, prefix_key)
    over_suffix = torch.einsum("kshe,kjhe->kshj", query, suffix_key)
    hidden = torch.ones(S, S, dtype=torch.bool, device=query.device).triu(1)[:, None]
    scores = torch.cat([scale * over_prefix, (scale * over_suffix).masked_fill(hidden, -math.inf)], dim=-1)
    lse = scores.logsumexp(dim=-1)
    over_prefix, over_suffix = (scores - lse[..., None]).exp().split([P, S], dim=-1)
    return over_prefix, over_suffix, lse


def _padded(tokens: Tensor, offsets: Tensor | None, max_length: int) -> Tensor:
    """[T, …] → [K, S, …], in fp32 or fp64."""
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    return wide.unflatten(0, (-1, max_length)) if offsets is None else padded_suffixes(wide, offsets, max_length)


def _packed(padded: Tensor, offsets: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    tokens = padded.flatten(0, 1) if offsets is None else packed_suffixes(padded, offsets, like.shape[0])
    return tokens.to(dtype).contiguous()


def _serve(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    offsets: Tensor | None,
    max_length: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if offsets is not None and offsets.device.type == "cpu":  # a GPU is not made to wait
        _check_values(offsets, query.shape[0], max_length)
    q, k, v = (_padded(x, offsets, max_length) for x in (query, suffix_key, suffix_value))
    over_prefix, over_suffix, lse = _weights(q, prefix_key.to(q.dtype), k, scale)
    out = torch.einsum("kshp,phe->kshe", over_prefix, prefix_value.to(q.dtype))
    out = out + torch.einsum("kshj,kjhe->kshe", over_suffix, v)
    return _packed(out, offsets, query, query.dtype), _packed(lse, offsets, query, lse.dtype)


def _serve_backward(
    d_out: Tensor,
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    max_length: int,
    scale: float,
    *needs: bool,
) -> tuple[Tensor, ...]:
    need_query, need_prefix_key, need_prefix_value, need_suffix_key, need_suffix_value = needs
    g, q, k, v = (_padded(x, offsets, max_length) for x in (d_out, query, suffix_key, suffix_value))
    prefix_k, prefix_v = prefix_key.to(q.dtype), prefix_value.to(q.dtype)
    over_prefix, over_suffix, _ = _weights(q, prefix_k, k, scale)
    d_prefix, d_suffix = torch.einsum("kshe,phe->kshp", g, prefix_v), torch.einsum("kshe,kjhe->kshj", g, v)
    # Not ⟨d_out, out⟩: out is rounded.
    mean = (over_prefix * d_prefix).sum(dim=-1, keepdim=True) + (over_suffix * d_suffix).sum(dim=-1, keepdim=True)
    d_prefix, d_suffix = scale * over_prefix * (d_prefix - mean), scale * over_suffix * (d_suffix - mean)

    inputs = (query, prefix_key, prefix_value, suffix_key, suffix_value)
    d_query, d_prefix_key, d_prefix_value, d_suffix_key, d_suffix_value = (x.new_empty(0) for x in inputs)
    if need_query:
        d_q = torch.einsum("kshp,phe->kshe", d_prefix, prefix_k) + torch.einsum("kshj,kjhe->kshe", d_suffix, k)
        d_query = _packed(d_q, offsets, query, query.dtype)
    if need_prefix_key:
        d_prefix_key = torch.einsum("kshp,kshe->phe", d_prefix, q).to(query.dtype).contiguous()
    if need_prefix_value:
        d_prefix_value = torch.einsum("kshp,kshe->phe", over_prefix, g).to(query.dtype).contiguous()
    if need_suffix_key:
        d_suffix_key = _packed(torch.einsum("kshj,kshe->kjhe", d_suffix, q), offsets, query, query.dtype)
    if need_suffix_value:
        d_suffix_value = _packed(torch.einsum("kshj,kshe->kjhe", over_suffix, g), offsets, query, query.dtype)
    return d_query, d_prefix_key, d_prefix_value, d_suffix_key, d_suffix_value


def _check_values(offsets: Tensor, T: int, max_length: int) -> None:
    """Refuse what the C++ kernel refuses."""
    first, last = offsets[0].item(), offsets[-1].item()
    if first != 0 or last != T:
        raise ValueError(
            f"suffix_attention: offsets must go from 0 to {T}, the tokens of query; got {first} to {last}."
        )
    lengths = offsets.diff()
    wrong = lengths[(lengths < 0) | (lengths > max_length)]
    if wrong.numel() > 0:
        raise ValueError(
            f"suffix_attention: offsets must rise by 0 to max_length ({max_length}); got a suffix of {wrong[0]} tokens."
        )


def _fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=dtype)


def _fake_backward(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = rest[:5], rest[-5:]
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needs, strict=True))


_INPUTS = "Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor suffix_key, Tensor suffix_value"
_OPTIONS = "Tensor? offsets, SymInt max_length, float scale"

suffix_attention = registration.define(
    f"suffix_attention({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)", serve=_serve, fake=_fake
)
suffix_attention_backward = registration.define(
    f"suffix_attention_backward(Tensor d_out, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool need_query,"
    " bool need_prefix_key, bool need_prefix_value, bool need_suffix_key, bool need_suffix_value)"
    " -> (Tensor d_query, Tensor d_prefix_key, Tensor d_prefix_value, Tensor d_suffix_key, Tensor d_suffix_value)",
    serve=_serve_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *features, offsets, ctx.max_length, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*features, out, lse, offsets)


def _backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 8
    needs = ctx.needs_input_grad[:5]
    gradients = suffix_attention_backward(d_out, *ctx.saved_tensors, ctx.max_length, ctx.scale, *needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None)


registration.differentiate(suffix_attention, _backward, _save)
registration.refuse_double_backward(suffix_attention_backward, instead="skipkernels.reference.suffix_attention")
registration.autocast_features(suffix_attention, features=5)
