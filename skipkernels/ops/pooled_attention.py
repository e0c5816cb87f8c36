"""`pooled_attention`: attention of one query per sequence, of the pooled token, over all keys of the sequence.

    weight_n = exp(scale · ⟨q, k_n⟩ − lse)
    out      = Σ_n weight_n v_n

    d_weight_n = ⟨d_out, v_n⟩,   d_score_n = weight_n (d_weight_n − Σ_n weight_n d_weight_n)
    d_q = scale Σ_n d_score_n k_n,   d_k_n = scale d_score_n q,   d_v_n = weight_n d_out

Saved for backward: the inputs and lse, fp64 [B, H].

With one query, time is that of reading keys and values. On a GPU a program computes one head of one sequence.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dtypes, reference
from . import autograd, registration
from .attention import in_one_layout, load_lse, load_rows, store_rows
from .launching import launch, launch_options, tl, triton

MAX_WIDTH = 1024  # a tile has whole rows; wider heads use the fallback


class Backward(NamedTuple):
    """Arguments of the backward operator; its schema is made from them."""

    d_out: Tensor  # [B, H, E]
    query: Tensor  # [B, H, E]
    key: Tensor  # [B, N, H, E]
    value: Tensor  # [B, N, H, E]
    lse: Tensor  # [B, H]
    scale: float
    need_query: bool
    need_key: bool
    need_value: bool

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that have gradients."""
        return self.query, self.key, self.value

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """True where the gradient of an input is needed."""
        return self.need_query, self.need_key, self.need_value


@triton.jit
def _pooled_attention_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    N,
    H,
    E,
    stride_query_b,
    stride_query_h,
    stride_key_b,
    stride_key_n,
    stride_key_h,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out = Σ_n exp(s_n − lse) v_n,   lse = log Σ_n exp(s_n),   s_n = scale · ⟨q, k_n⟩.

    One program: one head of one sequence; a loop over its keys with a running maximum and sum.
    """
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    key_ptr += b * stride_key_b + head * stride_key_h
    value_ptr += b * stride_key_b + head * stride_key_h
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    # 1. Query of the head
    query = tl.load(query_ptr + b * stride_query_b + head * stride_query_h + offs_e, mask=mask_e, other=0.0)
    query = query.to(tl.float32)  # [BLOCK_E]
    # 2. Online maximum, sum and weighted values
    top = float("-inf")
    total = 0.0
    out = tl.zeros([BLOCK_E], tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        key = load_rows(key_ptr, offs_n, mask_n, stride_key_n, E, BLOCK_E)  # [BLOCK_N, BLOCK_E]
        value = load_rows(value_ptr, offs_n, mask_n, stride_key_n, E, BLOCK_E)  # [BLOCK_N, BLOCK_E]
        score = scale * tl.sum(query[None, :] * key.to(tl.float32), axis=1)  # [BLOCK_N]
        score = tl.where(mask_n, score, float("-inf"))  # [BLOCK_N]
        higher = tl.maximum(top, tl.max(score, axis=0))
        weight = tl.exp(score - higher)  # [BLOCK_N]
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weight, axis=0)
        out = out * shrink + tl.sum(weight[:, None] * value.to(tl.float32), axis=0)  # [BLOCK_E]
        top = higher
    # 3. Divide by the sum; lse in fp64
    of_head = b * H + head
    tl.store(out_ptr + of_head * E + offs_e, (out / total).to(out_ptr.dtype.element_ty), mask=mask_e)  # [BLOCK_E]
    tl.store(lse_ptr + of_head, tl.log(total).to(tl.float64) + top)  # []


@triton.jit
def _pooled_attention_bwd_kernel(
    d_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    lse_ptr,
    d_query_ptr,
    d_key_ptr,
    d_value_ptr,
    N,
    H,
    E,
    stride_d_out_b,
    stride_d_out_h,
    stride_query_b,
    stride_query_h,
    stride_key_b,
    stride_key_n,
    stride_key_h,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NEED_QUERY: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
):
    """d_q = scale Σ_n d_score_n k_n,   d_k_n = scale d_score_n q,   d_v_n = weight_n d_out.

    One program: one head of one sequence; a loop over its keys for the mean of d_weight, then one for the gradients.
    """
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    key_ptr += b * stride_key_b + head * stride_key_h
    value_ptr += b * stride_key_b + head * stride_key_h
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    of_head = b * H + head
    # 1. Query and d_out of the head
    query = tl.load(query_ptr + b * stride_query_b + head * stride_query_h + offs_e, mask=mask_e, other=0.0)
    query = query.to(tl.float32)  # [BLOCK_E]
    d_out = tl.load(d_out_ptr + b * stride_d_out_b + head * stride_d_out_h + offs_e, mask=mask_e, other=0.0)
    d_out = d_out.to(tl.float32)  # [BLOCK_E]
    # 2. mean = Σ_n weight_n d_weight_n
    mean = 0.0
    lse, exp_rest = load_lse(lse_ptr, of_head, True)  # [] each
    if NEED_QUERY or NEED_KEY:
        # Not ⟨d_out, out⟩: if one key has nearly all the weight, the rounding of `out` is more than the gradient.
        total = 0.0
        for start_n in range(0, N, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            key = load_rows(key_ptr, offs_n, mask_n, stride_key_n, E, BLOCK_E)  # [BLOCK_N, BLOCK_E]
            value = load_rows(value_ptr, offs_n, mask_n, stride_key_n, E, BLOCK_E)  # [BLOCK_N, BLOCK_E]
            score = scale * tl.sum(query[None, :] * key.to(tl.float32), axis=1)  # [BLOCK_N]
            weight = exp_rest * tl.exp(tl.where(mask_n, score, float("-inf")) - lse)  # [BLOCK_N]
            d_weight = tl.sum(d_out[None, :] * value.to(tl.float32), axis=1)  # [BLOCK_N]
            mean += tl.sum(weight * d_weight, axis=0)
            total += tl.sum(weight, axis=0)
        mean /= total  # total is 1 up to rounding
    # 3. Gradients
    gradient = (b * N * H + head) * E
    d_query = tl.zeros([BLOCK_E], tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        key = load_rows(key_ptr, offs_n, mask_n, stride_key_n, E, BLOCK_E).to(tl.float32)  # [BLOCK_N, BLOCK_E]
        score = scale * tl.sum(query[None, :] * key, axis=1)  # [BLOCK_N]
        weight = exp_rest * tl.exp(tl.where(mask_n, score, float("-inf")) - lse)  # [BLOCK_N]
        if NEED_VALUE:
            d_value = weight[:, None] * d_out[None, :]  # [BLOCK_N, BLOCK_E]
            store_rows(d_value_ptr + gradient, d_value, offs_n, mask_n, H * E, E, BLOCK_E)  # [BLOCK_N, BLOCK_E]
        if NEED_QUERY or NEED_KEY:
            value = load_rows(value_ptr, offs_n, mask_n, stride_key_n, E, BLOCK_E)  # [BLOCK_N, BLOCK_E]
            d_score = weight * (tl.sum(d_out[None, :] * value.to(tl.float32), axis=1) - mean)  # [BLOCK_N]
            d_query += tl.sum(d_score[:, None] * key, axis=0)  # [BLOCK_E]
            if NEED_KEY:
                d_key = scale * d_score[:, None] * query[None, :]  # [BLOCK_N, BLOCK_E]
                store_rows(d_key_ptr + gradient, d_key, offs_n, mask_n, H * E, E, BLOCK_E)  # [BLOCK_N, BLOCK_E]
    if NEED_QUERY:
        d_query = (scale * d_query).to(d_query_ptr.dtype.element_ty)
        tl.store(d_query_ptr + of_head * E + offs_e, d_query, mask=mask_e)  # [BLOCK_E]


# ---- launches of the kernels -----------------------------------------------------------------------------------------


def _launch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, E = query.shape
    if E > MAX_WIDTH:
        return NotImplemented
    out, lse = query.new_empty(query.shape), query.new_empty((B, H), dtype=torch.float64)  # [B, H, E], [B, H]
    launch(
        _pooled_attention_fwd_kernel,
        (B, H),
        **_arguments(query, key, value, scale),
        **launch_options("pooled_attention_fwd", key, E=E),
        out_ptr=out,
        lse_ptr=lse,
    )
    return out, lse


def _launch_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Backward(*arguments)
    B, H, E = call.query.shape
    if E > MAX_WIDTH:
        return NotImplemented
    d_query, d_key, d_value = autograd.gradients_like(call.inputs, call.needs)
    (d_out,) = in_one_layout(call.d_out)
    launch(
        _pooled_attention_bwd_kernel,
        (B, H),
        **_arguments(*call.inputs, call.scale),
        **launch_options("pooled_attention_bwd", call.key, E=E),
        d_out_ptr=d_out,
        stride_d_out_b=d_out.stride(0),
        stride_d_out_h=d_out.stride(1),
        lse_ptr=call.lse,
        d_query_ptr=d_query,
        d_key_ptr=d_key,
        d_value_ptr=d_value,
        NEED_QUERY=call.need_query,
        NEED_KEY=call.need_key,
        NEED_VALUE=call.need_value,
    )
    return d_query, d_key, d_value


def _arguments(query: Tensor, key: Tensor, value: Tensor, scale: float) -> dict[str, Any]:
    (query,), (key, value) = in_one_layout(query), in_one_layout(key, value)
    return dict(
        device=query.device,
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        N=key.shape[1],
        H=query.shape[1],
        E=query.shape[2],
        stride_query_b=query.stride(0),
        stride_query_h=query.stride(1),
        stride_key_b=key.stride(0),
        stride_key_n=key.stride(1),
        stride_key_h=key.stride(2),
        scale=scale,
        BLOCK_E=triton.next_power_of_2(query.shape[2]),
    )


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def _fallback(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = reference.pooled_attention_and_lse(query, key, value, scale)
    return out.contiguous(), lse.contiguous()


def _fallback_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Backward(*arguments)
    function = functools.partial(reference.pooled_attention, scale=call.scale)
    return autograd.reference_gradients(function, call.inputs, call.needs, call.d_out)


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    lse_dtype = dtypes.accumulation_dtype(query.device)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=lse_dtype)


# ---- registration ----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, lse)


def _backward(ctx: Any, d_out: Tensor, _: None) -> tuple[Tensor, ...]:
    query, key, value, lse = ctx.saved_tensors
    call = Backward(d_out, query, key, value, lse, ctx.scale, *ctx.needs_input_grad[:3])
    return pooled_attention_backward(*call)


pooled_attention = registration.define(
    "pooled_attention(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor out, Tensor lse)",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
    fallback_note=f"fp64, heads of more than {MAX_WIDTH}",
    backward=autograd.GradientRule(_save, _backward),
    autocast_arguments=3,
)
pooled_attention_backward = registration.define(
    f"pooled_attention_backward({registration.arguments_of(Backward)})"
    " -> (Tensor d_query, Tensor d_key, Tensor d_value)",
    fallback=_fallback_backward,
    launch=_launch_backward,
)
