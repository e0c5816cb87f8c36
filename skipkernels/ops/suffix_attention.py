"""`suffix_attention`: causal attention of many short class suffixes over a shared prefix and over themselves.

    weight_ij = exp(scale · ⟨q_i, k_j⟩ − lse_i),   j in the prefix, and in the suffix of i up to i
    out_i     = Σ_j weight_ij v_j

    d_weight_ij = ⟨d_out_i, v_j⟩,   d_score_ij = weight_ij (d_weight_ij − mean_i),   mean_i = Σ_j weight_ij d_weight_ij
    d_q_i = scale Σ_j d_score_ij k_j,   d_k_j = scale Σ_i d_score_ij q_i,   d_v_j = Σ_i weight_ij d_out_i

The operator takes packed tokens of the suffixes, [T, H, E], and `offsets`, [K + 1], or None if all suffixes have
`max_length` tokens: the padded form [K, S, …] is then the same memory. The host does not read the offsets.

Forward also returns lse [T, H] in fp64. Saved for backward: the inputs, the result and lse. Gradients that are not
needed are empty. The gradient of the prefix is a sum over all suffixes, in an order that depends only on the shapes.

On a GPU a tile has whole suffixes, up to BLOCK_T tokens: attention over themselves is causal and block-diagonal, over
the prefix it is dense. Backward has a kernel each for mean_i, for queries, for keys and values of suffixes, and for
those of the prefix, which sums over a chunk of tokens; another adds the chunks. Reference:
`reference.suffix_attention`. CPU kernel: csrc/suffix_attention.cpp.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import registration
from .attention import BYTES_E, in_one_layout, load_lse, load_rows, products, store_rows
from .launching import dot_precision, launch, tl, triton
from .row_sums import sum_in_order

# Tokens of a tile: the first that holds the longest suffix. Longer suffixes use the fallback.
TILES = (32, 64)
WARPS = 4
WARPS_SUFFIX = {32: 4, 64: 8}  # gradient of the suffixes, by tile
BLOCK_P = 16  # prefix tokens per iteration; the prefix of a prompt has 5 to 8
# Gradient of the prefix: tokens per iteration, warps, tokens per program, largest number of chunks of tokens.
BLOCK_T_PREFIX, WARPS_PREFIX, CHUNK, MAX_CHUNKS = 16, 2, 256, 128
BLOCK_CHUNKS, BLOCK_SUM = 16, 128  # sum over chunks: chunks per iteration, numbers per program


@triton.jit
def _tile_of_suffixes(tile, offsets_ptr, K, max_length, BLOCK_T: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """Compute the first token and the end of a tile, and the start of the suffix of each of its tokens, [BLOCK_T]."""
    suffixes = BLOCK_T // max_length
    first = tile.to(tl.int64) * suffixes
    last = tl.minimum(first + suffixes, K)
    offs = tl.arange(0, BLOCK_T)
    if HAS_OFFSETS:
        begin = tl.load(offsets_ptr + first)
        end = tl.load(offsets_ptr + last)
        starts = (tl.load(offsets_ptr + first + offs, mask=first + offs < last, other=begin) - begin).to(tl.int32)
        started = starts[None, :] <= offs[:, None]
        start = tl.max(tl.where(started, starts[None, :], 0), axis=1)
    else:
        begin = first * max_length
        end = last * max_length
        start = offs - offs % max_length
    return begin, end, start


@triton.jit
def _visible(start, BLOCK_T: tl.constexpr):
    """Compute the attention mask of a tile, [BLOCK_T, BLOCK_T]: tokens of the same suffix up to the query.

    Past the end a token attends to itself, so that no row of the softmax is empty.
    """
    offs = tl.arange(0, BLOCK_T)
    return (start[:, None] <= offs[None, :]) & (offs[None, :] <= offs[:, None])


@triton.jit
def _suffix_attention_fwd_kernel(
    query_ptr,
    prefix_key_ptr,
    prefix_value_ptr,
    suffix_key_ptr,
    suffix_value_ptr,
    offsets_ptr,
    out_ptr,
    lse_ptr,
    K,
    P,
    H,
    E,
    max_length,
    stride_suffix_t,
    stride_suffix_h,
    stride_prefix_p,
    stride_prefix_h,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_i = Σ_j exp(s_ij − lse_i) v_j,   lse_i = log Σ_j exp(s_ij),   s_ij = scale · ⟨q_i, k_j⟩.

    One program: one head of a tile of suffixes. It computes the scores of suffixes; lse in a loop over the prefix with
    a running maximum and sum; the result, BLOCK_E numbers at a time, with recomputed scores of the prefix.
    """
    head = tl.program_id(1).to(tl.int64)
    query_ptr += head * stride_suffix_h
    prefix_key_ptr += head * stride_prefix_h
    prefix_value_ptr += head * stride_prefix_h
    suffix_key_ptr += head * stride_suffix_h
    suffix_value_ptr += head * stride_suffix_h
    begin, end, start = _tile_of_suffixes(tl.program_id(0), offsets_ptr, K, max_length, BLOCK_T, HAS_OFFSETS)
    offs_t = begin + tl.arange(0, BLOCK_T)
    mask_t = offs_t < end

    score = scale * products(
        query_ptr, offs_t, mask_t, stride_suffix_t, suffix_key_ptr, offs_t, mask_t, stride_suffix_t,
        E, BLOCK_T, BLOCK_T, BLOCK_E, PRECISION,
    )  # fmt: skip
    score = tl.where(_visible(start, BLOCK_T), score, float("-inf"))  # [BLOCK_T, BLOCK_T]
    top = tl.max(score, axis=1)
    total = tl.sum(tl.exp(score - top[:, None]), axis=1)
    for start_p in range(0, P, BLOCK_P):
        offs_p = start_p + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        over_prefix = scale * products(
            query_ptr, offs_t, mask_t, stride_suffix_t, prefix_key_ptr, offs_p, mask_p, stride_prefix_p,
            E, BLOCK_T, BLOCK_P, BLOCK_E, PRECISION,
        )  # fmt: skip
        over_prefix = tl.where(mask_p[None, :], over_prefix, float("-inf"))  # [BLOCK_T, BLOCK_P]
        higher = tl.maximum(top, tl.max(over_prefix, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(over_prefix - higher[:, None]), axis=1)
        top = higher
    tl.store(lse_ptr + offs_t * H + head, tl.log(total).to(tl.float64) + top, mask=mask_t)

    weight = tl.exp(score - top[:, None]).to(suffix_value_ptr.dtype.element_ty)
    for start_e in range(0, E, BLOCK_E):
        value = load_rows(suffix_value_ptr, offs_t, mask_t, stride_suffix_t, start_e, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
        out = tl.dot(weight, value, input_precision=PRECISION)
        for start_p in range(0, P, BLOCK_P):
            offs_p = start_p + tl.arange(0, BLOCK_P)
            mask_p = offs_p < P
            over_prefix = scale * products(
                query_ptr, offs_t, mask_t, stride_suffix_t, prefix_key_ptr, offs_p, mask_p, stride_prefix_p,
                E, BLOCK_T, BLOCK_P, BLOCK_E, PRECISION,
            )  # fmt: skip
            over_prefix = tl.exp(tl.where(mask_p[None, :], over_prefix, float("-inf")) - top[:, None])
            prefix_value = load_rows(prefix_value_ptr, offs_p, mask_p, stride_prefix_p, start_e, E, BLOCK_E)
            out = tl.dot(over_prefix.to(prefix_value.dtype), prefix_value, out, input_precision=PRECISION)
        store_rows(out_ptr + head * E, out / total[:, None], offs_t, mask_t, H * E, start_e, E, BLOCK_E)


@triton.jit
def _suffix_attention_bwd_mean_kernel(
    d_out_ptr,
    query_ptr,
    prefix_key_ptr,
    prefix_value_ptr,
    suffix_key_ptr,
    suffix_value_ptr,
    offsets_ptr,
    lse_ptr,
    mean_ptr,
    K,
    P,
    H,
    E,
    max_length,
    stride_d_out_t,
    stride_d_out_h,
    stride_suffix_t,
    stride_suffix_h,
    stride_prefix_p,
    stride_prefix_h,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """mean_i = Σ_j weight_ij d_weight_ij.

    One program: one head of a tile of suffixes; a loop over the prefix. Not ⟨d_out_i, out_i⟩: if one key has nearly all
    the weight, the rounding of `out` is more than the gradient of the scores.
    """
    head = tl.program_id(1).to(tl.int64)
    d_out_ptr += head * stride_d_out_h
    query_ptr += head * stride_suffix_h
    prefix_key_ptr += head * stride_prefix_h
    prefix_value_ptr += head * stride_prefix_h
    suffix_key_ptr += head * stride_suffix_h
    suffix_value_ptr += head * stride_suffix_h
    begin, end, start = _tile_of_suffixes(tl.program_id(0), offsets_ptr, K, max_length, BLOCK_T, HAS_OFFSETS)
    offs_t = begin + tl.arange(0, BLOCK_T)
    mask_t = offs_t < end
    lse, exp_rest = load_lse(lse_ptr + head, offs_t * H, mask_t)
    mean = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for start_p in range(0, P, BLOCK_P):
        offs_p = start_p + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        over_prefix = scale * products(
            query_ptr, offs_t, mask_t, stride_suffix_t, prefix_key_ptr, offs_p, mask_p, stride_prefix_p,
            E, BLOCK_T, BLOCK_P, BLOCK_E, PRECISION,
        )  # fmt: skip
        over_prefix = tl.exp(tl.where(mask_p[None, :], over_prefix, float("-inf")) - lse[:, None])
        over_prefix *= exp_rest[:, None]
        d_over_prefix = products(
            d_out_ptr, offs_t, mask_t, stride_d_out_t, prefix_value_ptr, offs_p, mask_p, stride_prefix_p,
            E, BLOCK_T, BLOCK_P, BLOCK_E, PRECISION,
        )  # fmt: skip
        mean += tl.sum(over_prefix * d_over_prefix, axis=1)
        total += tl.sum(over_prefix, axis=1)
    score = scale * products(
        query_ptr, offs_t, mask_t, stride_suffix_t, suffix_key_ptr, offs_t, mask_t, stride_suffix_t,
        E, BLOCK_T, BLOCK_T, BLOCK_E, PRECISION,
    )  # fmt: skip
    weight = tl.exp(tl.where(_visible(start, BLOCK_T), score, float("-inf")) - lse[:, None]) * exp_rest[:, None]
    d_weight = products(
        d_out_ptr, offs_t, mask_t, stride_d_out_t, suffix_value_ptr, offs_t, mask_t, stride_suffix_t,
        E, BLOCK_T, BLOCK_T, BLOCK_E, PRECISION,
    )  # fmt: skip
    mean += tl.sum(weight * d_weight, axis=1)
    total += tl.sum(weight, axis=1)
    mean /= tl.where(mask_t, total, 1.0)
    tl.store(mean_ptr + head + offs_t * H, mean, mask=mask_t)


@triton.jit
def _suffix_attention_bwd_query_kernel(
    d_out_ptr,
    query_ptr,
    prefix_key_ptr,
    prefix_value_ptr,
    suffix_key_ptr,
    suffix_value_ptr,
    offsets_ptr,
    lse_ptr,
    mean_ptr,
    d_query_ptr,
    K,
    P,
    H,
    E,
    max_length,
    stride_d_out_t,
    stride_d_out_h,
    stride_suffix_t,
    stride_suffix_h,
    stride_prefix_p,
    stride_prefix_h,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_q_i = scale Σ_j d_score_ij k_j.

    One program: one head of a tile of suffixes. It computes the d_scores of suffixes, then the result, BLOCK_E numbers
    at a time, with a loop over the prefix.
    """
    head = tl.program_id(1).to(tl.int64)
    d_out_ptr += head * stride_d_out_h
    query_ptr += head * stride_suffix_h
    prefix_key_ptr += head * stride_prefix_h
    prefix_value_ptr += head * stride_prefix_h
    suffix_key_ptr += head * stride_suffix_h
    suffix_value_ptr += head * stride_suffix_h
    begin, end, start = _tile_of_suffixes(tl.program_id(0), offsets_ptr, K, max_length, BLOCK_T, HAS_OFFSETS)
    offs_t = begin + tl.arange(0, BLOCK_T)
    mask_t = offs_t < end
    lse, exp_rest = load_lse(lse_ptr + head, offs_t * H, mask_t)
    mean = tl.load(mean_ptr + head + offs_t * H, mask=mask_t, other=0.0)
    score = scale * products(
        query_ptr, offs_t, mask_t, stride_suffix_t, suffix_key_ptr, offs_t, mask_t, stride_suffix_t,
        E, BLOCK_T, BLOCK_T, BLOCK_E, PRECISION,
    )  # fmt: skip
    weight = tl.exp(tl.where(_visible(start, BLOCK_T), score, float("-inf")) - lse[:, None]) * exp_rest[:, None]
    d_weight = products(
        d_out_ptr, offs_t, mask_t, stride_d_out_t, suffix_value_ptr, offs_t, mask_t, stride_suffix_t,
        E, BLOCK_T, BLOCK_T, BLOCK_E, PRECISION,
    )  # fmt: skip
    d_score = (weight * (d_weight - mean[:, None])).to(suffix_key_ptr.dtype.element_ty)
    for start_e in range(0, E, BLOCK_E):
        key = load_rows(suffix_key_ptr, offs_t, mask_t, stride_suffix_t, start_e, E, BLOCK_E)
        d_query = tl.dot(d_score, key, input_precision=PRECISION)
        for start_p in range(0, P, BLOCK_P):
            offs_p = start_p + tl.arange(0, BLOCK_P)
            mask_p = offs_p < P
            over_prefix = scale * products(
                query_ptr, offs_t, mask_t, stride_suffix_t, prefix_key_ptr, offs_p, mask_p, stride_prefix_p,
                E, BLOCK_T, BLOCK_P, BLOCK_E, PRECISION,
            )  # fmt: skip
            over_prefix = tl.exp(tl.where(mask_p[None, :], over_prefix, float("-inf")) - lse[:, None])
            over_prefix *= exp_rest[:, None]
            d_over_prefix = products(
                d_out_ptr, offs_t, mask_t, stride_d_out_t, prefix_value_ptr, offs_p, mask_p, stride_prefix_p,
                E, BLOCK_T, BLOCK_P, BLOCK_E, PRECISION,
            )  # fmt: skip
            d_over_prefix = over_prefix * (d_over_prefix - mean[:, None])
            prefix_key = load_rows(prefix_key_ptr, offs_p, mask_p, stride_prefix_p, start_e, E, BLOCK_E)
            d_query = tl.dot(d_over_prefix.to(prefix_key.dtype), prefix_key, d_query, input_precision=PRECISION)
        store_rows(d_query_ptr + head * E, scale * d_query, offs_t, mask_t, H * E, start_e, E, BLOCK_E)


@triton.jit
def _suffix_attention_bwd_suffix_kernel(
    d_out_ptr,
    query_ptr,
    suffix_key_ptr,
    suffix_value_ptr,
    offsets_ptr,
    lse_ptr,
    mean_ptr,
    d_key_ptr,
    d_value_ptr,
    K,
    H,
    E,
    max_length,
    stride_d_out_t,
    stride_d_out_h,
    stride_suffix_t,
    stride_suffix_h,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Suffixes: d_k_j = scale Σ_i d_score_ij q_i, d_v_j = Σ_i weight_ij d_out_i.

    One program: one head of a tile of suffixes, which has all queries that attend to these keys. It computes weights
    and d_scores, then the results, BLOCK_E numbers at a time.
    """
    head = tl.program_id(1).to(tl.int64)
    d_out_ptr += head * stride_d_out_h
    query_ptr += head * stride_suffix_h
    suffix_key_ptr += head * stride_suffix_h
    suffix_value_ptr += head * stride_suffix_h
    begin, end, start = _tile_of_suffixes(tl.program_id(0), offsets_ptr, K, max_length, BLOCK_T, HAS_OFFSETS)
    offs_t = begin + tl.arange(0, BLOCK_T)
    mask_t = offs_t < end
    lse, exp_rest = load_lse(lse_ptr + head, offs_t * H, mask_t)
    score = scale * products(
        query_ptr, offs_t, mask_t, stride_suffix_t, suffix_key_ptr, offs_t, mask_t, stride_suffix_t,
        E, BLOCK_T, BLOCK_T, BLOCK_E, PRECISION,
    )  # fmt: skip
    weight = tl.exp(tl.where(_visible(start, BLOCK_T), score, float("-inf")) - lse[:, None]) * exp_rest[:, None]
    if NEED_VALUE:
        factor = tl.trans(weight.to(suffix_value_ptr.dtype.element_ty))
        for start_e in range(0, E, BLOCK_E):
            d_out = load_rows(d_out_ptr, offs_t, mask_t, stride_d_out_t, start_e, E, BLOCK_E)
            d_value = tl.dot(factor, d_out, input_precision=PRECISION)
            store_rows(d_value_ptr + head * E, d_value, offs_t, mask_t, H * E, start_e, E, BLOCK_E)
    if NEED_KEY:
        d_weight = products(
            d_out_ptr, offs_t, mask_t, stride_d_out_t, suffix_value_ptr, offs_t, mask_t, stride_suffix_t,
            E, BLOCK_T, BLOCK_T, BLOCK_E, PRECISION,
        )  # fmt: skip
        mean = tl.load(mean_ptr + head + offs_t * H, mask=mask_t, other=0.0)
        d_score = weight * (d_weight - mean[:, None])
        factor = tl.trans(d_score.to(suffix_key_ptr.dtype.element_ty))
        for start_e in range(0, E, BLOCK_E):
            query = load_rows(query_ptr, offs_t, mask_t, stride_suffix_t, start_e, E, BLOCK_E)
            d_key = scale * tl.dot(factor, query, input_precision=PRECISION)
            store_rows(d_key_ptr + head * E, d_key, offs_t, mask_t, H * E, start_e, E, BLOCK_E)


@triton.jit
def _suffix_attention_bwd_prefix_kernel(
    d_out_ptr,
    query_ptr,
    prefix_key_ptr,
    prefix_value_ptr,
    lse_ptr,
    mean_ptr,
    d_key_ptr,
    d_value_ptr,
    T,
    P,
    H,
    E,
    chunk,
    stride_d_out_t,
    stride_d_out_h,
    stride_suffix_t,
    stride_suffix_h,
    stride_prefix_p,
    stride_prefix_h,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Prefix: d_k_j = scale Σ_i d_score_ij q_i, d_v_j = Σ_i weight_ij d_out_i, over a chunk of the tokens.

    One program: BLOCK_E numbers of one head of BLOCK_P prefix tokens; a loop over the tokens of a chunk. All tokens
    attend to the prefix: the offsets are not needed. d_key and d_value are [chunks, P, H, E].
    """
    head = tl.program_id(1).to(tl.int64)
    d_out_ptr += head * stride_d_out_h
    query_ptr += head * stride_suffix_h
    prefix_key_ptr += head * stride_prefix_h
    prefix_value_ptr += head * stride_prefix_h
    blocks_e = tl.cdiv(E, BLOCK_E)
    start_e = tl.program_id(2) % blocks_e * BLOCK_E
    offs_p = tl.program_id(2) // blocks_e * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    begin = tl.program_id(0).to(tl.int64) * chunk
    tokens = tl.minimum(T - begin, chunk).to(tl.int32)
    d_key = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    d_value = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    for start_t in range(0, tokens, BLOCK_T):
        offs = start_t + tl.arange(0, BLOCK_T)
        offs_t, mask_t = begin + offs, offs < tokens
        lse, exp_rest = load_lse(lse_ptr + head, offs_t * H, mask_t)
        score = scale * products(
            prefix_key_ptr, offs_p, mask_p, stride_prefix_p, query_ptr, offs_t, mask_t, stride_suffix_t,
            E, BLOCK_P, BLOCK_T, BLOCK_E, PRECISION,
        )  # fmt: skip
        weight = tl.exp(score - lse[None, :]) * exp_rest[None, :]  # [BLOCK_P, BLOCK_T]
        if NEED_VALUE:
            d_out = load_rows(d_out_ptr, offs_t, mask_t, stride_d_out_t, start_e, E, BLOCK_E)
            d_value = tl.dot(weight.to(d_out.dtype), d_out, d_value, input_precision=PRECISION)
        if NEED_KEY:
            d_weight = products(
                prefix_value_ptr, offs_p, mask_p, stride_prefix_p, d_out_ptr, offs_t, mask_t, stride_d_out_t,
                E, BLOCK_P, BLOCK_T, BLOCK_E, PRECISION,
            )  # fmt: skip
            mean = tl.load(mean_ptr + head + offs_t * H, mask=mask_t, other=0.0)
            query = load_rows(query_ptr, offs_t, mask_t, stride_suffix_t, start_e, E, BLOCK_E)
            d_score = weight * (d_weight - mean[None, :])
            d_key = tl.dot(d_score.to(query.dtype), query, d_key, input_precision=PRECISION)
    of_chunk = (tl.program_id(0).to(tl.int64) * P * H + head) * E
    if NEED_KEY:
        store_rows(d_key_ptr + of_chunk, scale * d_key, offs_p, mask_p, H * E, start_e, E, BLOCK_E)
    if NEED_VALUE:
        store_rows(d_value_ptr + of_chunk, d_value, offs_p, mask_p, H * E, start_e, E, BLOCK_E)


@triton.jit
def _suffix_attention_bwd_sum_kernel(
    partial_ptr, out_ptr, chunks, N, BLOCK_CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out_n = Σ_c partial_cn. One program: BLOCK_N numbers; a loop over the chunks."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = sum_in_order(partial_ptr, chunks, offs_n, N, BLOCK_CHUNKS, BLOCK_N)
    tl.store(out_ptr + offs_n, total.to(out_ptr.dtype.element_ty), mask=offs_n < N)


def _launch(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    offsets: Tensor | None,
    max_length: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    inputs = (query, prefix_key, prefix_value, suffix_key, suffix_value)
    T, H, _ = query.shape
    if max_length > TILES[-1]:
        return _fallback(*inputs, offsets, max_length, scale)
    out, lse = query.new_empty(query.shape), query.new_empty((T, H), dtype=torch.float64)
    query, suffix_key, suffix_value = in_one_layout(query, suffix_key, suffix_value)
    prefix_key, prefix_value = in_one_layout(prefix_key, prefix_value)
    packing = _packing(T, offsets, max_length)
    launch(
        _suffix_attention_fwd_kernel,
        (triton.cdiv(packing["K"], packing["BLOCK_T"] // max_length), H),
        num_warps=WARPS,
        **_arguments(query, scale),
        **_prefix_arguments(prefix_key, prefix_value),
        **packing,
        suffix_key_ptr=suffix_key,
        suffix_value_ptr=suffix_value,
        out_ptr=out,
        lse_ptr=lse,
    )
    return out, lse


def _launch_backward(
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
    inputs = (query, prefix_key, prefix_value, suffix_key, suffix_value)
    T, H, E = query.shape
    P = prefix_key.shape[0]
    if max_length > TILES[-1]:
        return _fallback_backward(d_out, *inputs, out, lse, offsets, max_length, scale, *needs)
    need_query, need_prefix_key, need_prefix_value, need_suffix_key, need_suffix_value = needs
    gradients = d_query, d_prefix_key, d_prefix_value, d_suffix_key, d_suffix_value = registration.gradients_like(
        inputs, needs
    )
    (d_out,) = in_one_layout(d_out)
    query, suffix_key, suffix_value = in_one_layout(query, suffix_key, suffix_value)
    prefix_key, prefix_value = in_one_layout(prefix_key, prefix_value)
    shared = _arguments(query, scale) | dict(
        d_out_ptr=d_out,
        stride_d_out_t=d_out.stride(0),
        stride_d_out_h=d_out.stride(1),
        lse_ptr=lse,
        mean_ptr=lse.new_empty(lse.shape, dtype=torch.float32),
    )
    prefix = _prefix_arguments(prefix_key, prefix_value)
    packing = _packing(T, offsets, max_length)
    tiles = triton.cdiv(packing["K"], packing["BLOCK_T"] // max_length)
    if need_query or need_prefix_key or need_suffix_key:
        launch(
            _suffix_attention_bwd_mean_kernel,
            (tiles, H),
            num_warps=WARPS,
            **shared,
            **packing,
            **prefix,
            suffix_key_ptr=suffix_key,
            suffix_value_ptr=suffix_value,
        )
    if need_query:
        launch(
            _suffix_attention_bwd_query_kernel,
            (tiles, H),
            num_warps=WARPS,
            **shared,
            **packing,
            **prefix,
            suffix_key_ptr=suffix_key,
            suffix_value_ptr=suffix_value,
            d_query_ptr=d_query,
        )
    if need_suffix_key or need_suffix_value:
        launch(
            _suffix_attention_bwd_suffix_kernel,
            (tiles, H),
            num_warps=WARPS_SUFFIX[packing["BLOCK_T"]],
            **shared,
            **packing,
            suffix_key_ptr=suffix_key,
            suffix_value_ptr=suffix_value,
            d_key_ptr=d_suffix_key,
            d_value_ptr=d_suffix_value,
            NEED_KEY=need_suffix_key,
            NEED_VALUE=need_suffix_value,
        )
    if need_prefix_key or need_prefix_value:
        chunk = max(CHUNK, triton.cdiv(T, MAX_CHUNKS))
        chunks = triton.cdiv(T, chunk)
        totals = (d_prefix_key, d_prefix_value)
        # With one chunk the kernel writes the result.
        sums = [x if chunks == 1 else x.new_empty((chunks, *x.shape), dtype=torch.float32) for x in totals]
        launch(
            _suffix_attention_bwd_prefix_kernel,
            (chunks, H, triton.cdiv(P, BLOCK_P) * triton.cdiv(E, shared["BLOCK_E"])),
            num_warps=WARPS_PREFIX,
            **shared,
            **prefix,
            d_key_ptr=sums[0],
            d_value_ptr=sums[1],
            T=T,
            chunk=chunk,
            BLOCK_T=BLOCK_T_PREFIX,
            NEED_KEY=need_prefix_key,
            NEED_VALUE=need_prefix_value,
        )
        for partial, total in zip(sums, totals, strict=True) if chunks > 1 else ():
            launch(
                _suffix_attention_bwd_sum_kernel,
                (triton.cdiv(total.numel(), BLOCK_SUM),),
                device=query.device,
                num_warps=WARPS,
                num_stages=1,
                partial_ptr=partial,
                out_ptr=total,
                chunks=chunks,
                N=total.numel(),
                BLOCK_CHUNKS=BLOCK_CHUNKS,
                BLOCK_N=BLOCK_SUM,
            )
    return gradients


def _packing(T: int, offsets: Tensor | None, max_length: int) -> dict[str, Any]:
    """Arguments about tiles and packing."""
    block_t = next(tile for tile in TILES if max_length <= tile)
    return dict(
        offsets_ptr=offsets,
        K=T // max_length if offsets is None else offsets.shape[0] - 1,
        max_length=max_length,
        BLOCK_T=block_t,
        HAS_OFFSETS=offsets is not None,
    )


def _arguments(query: Tensor, scale: float) -> dict[str, Any]:
    """Arguments of all kernels except the sum; query, suffix_key and suffix_value have equal strides."""
    _, H, E = query.shape
    return dict(
        device=query.device,
        num_stages=1,
        query_ptr=query,
        H=H,
        E=E,
        stride_suffix_t=query.stride(0),
        stride_suffix_h=query.stride(1),
        scale=scale,
        BLOCK_E=BYTES_E // query.element_size(),
        PRECISION=dot_precision(query.dtype, query.device),
    )


def _prefix_arguments(prefix_key: Tensor, prefix_value: Tensor) -> dict[str, Any]:
    """Arguments about the prefix; its key and value have equal strides."""
    return dict(
        prefix_key_ptr=prefix_key,
        prefix_value_ptr=prefix_value,
        P=prefix_key.shape[0],
        stride_prefix_p=prefix_key.stride(0),
        stride_prefix_h=prefix_key.stride(1),
        BLOCK_P=BLOCK_P,
    )


def _check(query: Tensor, *rest: Any) -> None:
    *_, offsets, max_length, _ = rest
    if offsets is None:
        return
    T, first, last = query.shape[0], offsets[0].item(), offsets[-1].item()
    if first != 0 or last != T:
        raise ValueError(
            f"suffix_attention: offsets must go from 0 to {T}, the tokens of query; got {first} to {last}."
        )
    lengths = offsets.diff()
    if (wrong := lengths[(lengths < 0) | (lengths > max_length)]).numel() > 0:
        raise ValueError(
            f"suffix_attention: offsets must rise by 0 to max_length ({max_length}); got a suffix of {wrong[0]} tokens."
        )


def _fallback(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    offsets: Tensor | None,
    max_length: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    T = query.shape[0]
    if offsets is None:
        offsets = torch.arange(0, T + 1, max_length, device=query.device)
    inputs = (query, prefix_key, prefix_value, suffix_key, suffix_value)
    out, lse = reference.suffix_attention_and_lse(*inputs, scale, offsets, max_length)
    return out.contiguous(), lse.contiguous()


def _fallback_backward(
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
    if offsets is None:
        offsets = torch.arange(0, query.shape[0] + 1, max_length, device=query.device)

    return registration.reference_gradients(
        functools.partial(reference.suffix_attention, scale=scale, offsets=offsets, max_length=max_length),
        (query, prefix_key, prefix_value, suffix_key, suffix_value),
        needs,
        d_out,
    )


def _fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float64)


def _fake_backward(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return registration.gradients_like(rest[:5], rest[-5:])


_INPUTS = "Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor suffix_key, Tensor suffix_value"
_OPTIONS = "Tensor? offsets, SymInt max_length, float scale"

suffix_attention = registration.define(
    f"suffix_attention({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
    check=_check,
    fallback_cases=f"fp64, suffixes of more than {TILES[-1]} tokens",
)
suffix_attention_backward = registration.define(
    f"suffix_attention_backward(Tensor d_out, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool need_query,"
    " bool need_prefix_key, bool need_prefix_value, bool need_suffix_key, bool need_suffix_value)"
    " -> (Tensor d_query, Tensor d_prefix_key, Tensor d_prefix_value, Tensor d_suffix_key, Tensor d_suffix_value)",
    fallback=_fallback_backward,
    fake=_fake_backward,
    launch=_launch_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *features, offsets, ctx.max_length, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*features, out, lse, offsets)


def _backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor, ...]:
    if d_out is None:
        return ()
    needs = ctx.needs_input_grad[:5]
    return suffix_attention_backward(d_out, *ctx.saved_tensors, ctx.max_length, ctx.scale, *needs)


registration.differentiate(suffix_attention, _backward, _save)
registration.refuse_double_backward(suffix_attention_backward, instead="skipkernels.reference.suffix_attention")
registration.autocast_features(suffix_attention, features=5)
