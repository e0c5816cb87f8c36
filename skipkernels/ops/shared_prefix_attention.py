"""`shared_prefix_attention`: causal attention over prompts with a shared prefix, which is computed once.

    weight_ij = exp(scale · ⟨q_i, k_j⟩ − lse_i),   j in the sequence of i up to i; for a suffix also in the prefix
    out_i     = Σ_j weight_ij v_j

    d_weight_ij = ⟨d_out_i, v_j⟩,   d_score_ij = weight_ij (d_weight_ij − mean_i),   mean_i = Σ_j weight_ij d_weight_ij
    d_q_i = scale Σ_j d_score_ij k_j,   d_k_j = scale Σ_i d_score_ij q_i,   d_v_j = Σ_i weight_ij d_out_i

Rows of packed, [R, 3W], are query, key and value of a token side by side: first P tokens of the prefix, then the
suffixes. `offsets`, [K + 1], or None if all suffixes have `max_length` tokens, counts from the end of the prefix. The
host does not read the offsets, so rows may follow the last suffix: out, lse and d_packed are 0 there.

Saved for backward: packed and lse, fp64 [R, H]. The gradient of the prefix is a sum over all sequences, in an order
that depends only on the shapes.

On a GPU a tile is BLOCK_T rows: a part of the prefix, whole suffixes, or a part of a longer suffix. Attention within a
tile is causal and block-diagonal; over the prefix, and over the tiles of the same sequence in front of it, it is dense.
In backward a tile computes the gradients of its rows and a partial gradient of the prefix; a second kernel adds these.
If a sequence may be longer than a tile, a third computes the gradients of its keys and values, which need too many
registers in the first.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dtypes, reference
from ..checks import check_values
from . import autograd, registration
from .attention import load_lse, load_rows, products, store_rows
from .launching import (
    contiguous_or_none,
    dot_precision,
    launch,
    launch_options,
    tl,
    triton,
    with_contiguous_rows,
)

MAX_E = 128  # widest head: a tile holds whole heads


class Options(NamedTuple):
    """Options of forward and backward, in the order of their schemas."""

    heads: int  # H
    prefix_length: int  # P
    offsets: Tensor | None  # [K + 1]
    max_length: int  # tokens of the longest suffix, or more
    scale: float


_OPTIONS = "SymInt heads, SymInt prefix_length, Tensor? offsets, SymInt max_length, float scale"


@triton.jit
def _tile(tile, offsets_ptr, P, K, max_length, BLOCK_T: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """Return the rows of a tile and its sequences, the prefix tokens in front, and the start of each row's suffix."""
    # 1. Suffixes of the tile, from `first` to before `last`
    prefix_tiles = tl.cdiv(P, BLOCK_T)
    in_prefix = tile < prefix_tiles
    tiles_of_suffix = tl.cdiv(max_length, BLOCK_T)
    suffixes = tl.maximum(BLOCK_T // max_length, 1)
    tile_behind = tl.maximum(tile - prefix_tiles, 0)
    first = tile_behind // tiles_of_suffix * suffixes
    last = tl.minimum(first + suffixes, K)
    offs = tl.arange(0, BLOCK_T)
    if HAS_OFFSETS:
        seq_begin = tl.load(offsets_ptr + first).to(tl.int32)
        seq_end = tl.load(offsets_ptr + last).to(tl.int32)
        starts = tl.load(offsets_ptr + first + offs, mask=first + offs < last, other=0).to(tl.int32) - seq_begin
        starts = tl.maximum(starts, 0)  # [BLOCK_T], 0 behind the last suffix
        # Largest start at or before each row, over axis 1 of [BLOCK_T, BLOCK_T]
        start = tl.max(tl.where(starts[None, :] <= offs[:, None], starts[None, :], 0), axis=1)  # [BLOCK_T]
    else:
        seq_begin = first * max_length
        seq_end = last * max_length
        start = offs - offs % max_length  # [BLOCK_T]
    # 2. Rows of the tile and of its sequences, which may be the prefix
    seq_begin = tl.where(in_prefix, 0, P + seq_begin)
    seq_end = tl.where(in_prefix, P, P + seq_end)
    start = tl.where(in_prefix, 0, start)
    begin = seq_begin + tl.where(in_prefix, tile, tile_behind % tiles_of_suffix) * BLOCK_T
    begin = tl.minimum(begin, seq_end)
    end = tl.minimum(begin + BLOCK_T, seq_end)
    # start: [BLOCK_T], counted from begin
    return begin, end, seq_begin, seq_end, tl.where(in_prefix, 0, P), start


@triton.jit
def _assert_offsets(tile, offsets_ptr, K, tokens, max_length, BLOCK_T: tl.constexpr):
    """Fail unless a share of the suffixes has 0 to max_length tokens each, and they go from 0 to at most `tokens`."""
    offs_k = tile * BLOCK_T + tl.arange(0, BLOCK_T)  # a tile has at most BLOCK_T suffixes
    mask_k = offs_k < K
    begin = tl.load(offsets_ptr + offs_k, mask=mask_k, other=0)  # [BLOCK_T]
    end = tl.load(offsets_ptr + offs_k + 1, mask=mask_k, other=0)  # [BLOCK_T]
    valid = (begin <= end) & (end - begin <= max_length) & (end <= tokens) & ((begin == 0) | (offs_k > 0))
    tl.device_assert(
        valid | ~mask_k, "shared_prefix_attention: offsets must go from 0 to at most R - P, by 0 to max_length"
    )


@triton.jit
def _visible(offs_i, offs_j, first):
    """Compute the attention mask of queries [BLOCK_I] and keys [BLOCK_J]: first_i ≤ j ≤ i."""
    # One unsigned comparison: masks of two take more scalar registers than gfx942 has.
    return (offs_i[:, None] - offs_j[None, :]).to(tl.uint32) <= (offs_i - first).to(tl.uint32)[:, None]


@triton.jit
def _rows_in_front(offs, before, seq_begin):
    """Rows of the keys number `offs` in front of a tile: those of the prefix, then those of its sequence."""
    return tl.where(offs < before, offs, offs + (seq_begin - before))  # [BLOCK_P]


@triton.jit
def _scores(
    query_ptr,
    offs_i,
    mask_i,
    offs_j,
    mask_j,
    visible,
    W,
    stride_packed_r,
    scale,
    E: tl.constexpr,
    CHUNK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute s_ij = scale · ⟨q_i, k_j⟩, [BLOCK_I, BLOCK_J]; −∞ where not visible."""
    product = products(
        query_ptr, offs_i, mask_i, stride_packed_r, query_ptr + W, offs_j, mask_j, stride_packed_r,
        E, CHUNK_E, PRECISION,
    )  # fmt: skip
    # [BLOCK_I, BLOCK_J]
    return tl.where(visible, scale * product, float("-inf"))


@triton.jit
def _weights(
    d_out_ptr,
    query_ptr,
    offs_i,
    mask_i,
    offs_j,
    mask_j,
    visible,
    lse,
    exp_rest,
    W,
    stride_d_out_r,
    stride_packed_r,
    scale,
    E: tl.constexpr,
    CHUNK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute weight_ij = exp(s_ij − lse_i), see `load_lse`, and d_weight_ij = ⟨d_out_i, v_j⟩, [BLOCK_I, BLOCK_J]."""
    score = _scores(
        query_ptr, offs_i, mask_i, offs_j, mask_j, visible, W, stride_packed_r, scale,
        E, CHUNK_E, PRECISION,
    )  # fmt: skip
    d_weight = products(
        d_out_ptr, offs_i, mask_i, stride_d_out_r, query_ptr + 2 * W, offs_j, mask_j, stride_packed_r,
        E, CHUNK_E, PRECISION,
    )  # fmt: skip
    return tl.exp(score - lse[:, None]) * exp_rest[:, None], d_weight


@triton.jit
def _shared_prefix_attention_fwd_kernel(
    packed_ptr,
    offsets_ptr,
    out_ptr,
    lse_ptr,
    R,
    K,
    P,
    H,
    max_length,
    stride_packed_r,
    scale,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK_E: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_i = Σ_j exp(s_ij − lse_i) v_j,   lse_i = log Σ_j exp(s_ij),   s_ij = scale · ⟨q_i, k_j⟩.

    One program: one head of a tile, and a share of the rows behind the last suffix.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    W = H * E
    query_ptr = packed_ptr + head * E
    value_ptr = query_ptr + 2 * W
    out_ptr += head * E
    lse_ptr += head
    if HAS_OFFSETS:
        if head == 0:
            _assert_offsets(tile, offsets_ptr, K, R - P, max_length, BLOCK_T)
    # 1. Keys of the tile
    begin, end, seq_begin, seq_end, before, start = _tile(tile, offsets_ptr, P, K, max_length, BLOCK_T, HAS_OFFSETS)
    offs_t = begin + tl.arange(0, BLOCK_T)
    mask_t = offs_t < end
    # [BLOCK_T, E] @ [E, BLOCK_T] -> [BLOCK_T, BLOCK_T]
    score = _scores(
        query_ptr, offs_t, mask_t, offs_t, mask_t, _visible(offs_t, offs_t, begin + start), W, stride_packed_r, scale,
        E, CHUNK_E, PRECISION,
    )  # fmt: skip
    top = tl.max(score, axis=1)  # [BLOCK_T]
    weight = tl.exp(score - top[:, None])  # [BLOCK_T, BLOCK_T]
    total = tl.sum(weight, axis=1)  # [BLOCK_T]
    value = load_rows(value_ptr, offs_t, mask_t, stride_packed_r, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
    # [BLOCK_T, BLOCK_T] @ [BLOCK_T, BLOCK_E] -> [BLOCK_T, BLOCK_E]
    out = tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
    # 2. Keys in front of the tile: online maximum and sum
    count = before + begin - seq_begin
    for first_p in range(0, count, BLOCK_P):
        offs_p = first_p + tl.arange(0, BLOCK_P)
        mask_p = offs_p < count
        rows_p = _rows_in_front(offs_p, before, seq_begin)  # [BLOCK_P]
        # [BLOCK_T, E] @ [E, BLOCK_P] -> [BLOCK_T, BLOCK_P]
        score_p = _scores(
            query_ptr, offs_t, mask_t, rows_p, mask_p, mask_p[None, :], W, stride_packed_r, scale,
            E, CHUNK_E, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(score_p, axis=1))  # [BLOCK_T]
        rescale = tl.exp(top - higher)
        weight_p = tl.exp(score_p - higher[:, None])  # [BLOCK_T, BLOCK_P]
        total = total * rescale + tl.sum(weight_p, axis=1)
        value_p = load_rows(value_ptr, rows_p, mask_p, stride_packed_r, E, BLOCK_E)  # [BLOCK_P, BLOCK_E]
        # [BLOCK_T, BLOCK_P] @ [BLOCK_P, BLOCK_E] -> [BLOCK_T, BLOCK_E]
        out = tl.dot(weight_p.to(value_p.dtype), value_p, out * rescale[:, None], input_precision=PRECISION)
        top = higher
    # 3. Divide by the sum; lse in fp64
    tl.store(lse_ptr + offs_t.to(tl.int64) * H, tl.log(total).to(tl.float64) + top, mask=mask_t)  # [BLOCK_T]
    store_rows(out_ptr, out / total[:, None], offs_t, mask_t, W, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]

    # 4. Zeros in this program's share of the rows behind the last suffix
    if HAS_OFFSETS:
        behind = P + tl.load(offsets_ptr + K).to(tl.int32)
        for first_r in range(behind + tile * BLOCK_T, R, tl.num_programs(0) * BLOCK_T):
            offs_r = first_r + tl.arange(0, BLOCK_T)
            store_rows(out_ptr, tl.zeros_like(out), offs_r, offs_r < R, W, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
            tl.store(lse_ptr + offs_r.to(tl.int64) * H, tl.zeros([BLOCK_T], tl.float64), mask=offs_r < R)


@triton.jit
def _store_key_gradients(
    d_packed_ptr, partial_ptr, d_key, d_value, offs_t, mask_t, in_prefix, W, E: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Store d_k and d_v of the rows of a tile: for the prefix as a part of a sum."""
    if in_prefix:
        store_rows(partial_ptr, d_key, offs_t, mask_t, 2 * W, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
        store_rows(partial_ptr + W, d_value, offs_t, mask_t, 2 * W, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
    else:
        store_rows(d_packed_ptr + W, d_key, offs_t, mask_t, 3 * W, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
        store_rows(d_packed_ptr + 2 * W, d_value, offs_t, mask_t, 3 * W, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]


@triton.jit
def _shared_prefix_attention_bwd_kernel(
    d_out_ptr,
    packed_ptr,
    offsets_ptr,
    lse_ptr,
    mean_ptr,
    d_packed_ptr,
    partial_ptr,
    R,
    K,
    P,
    H,
    max_length,
    stride_d_out_r,
    stride_packed_r,
    scale,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK_E: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_q_i = scale Σ_j d_score_ij k_j,   d_k_j = scale Σ_i d_score_ij q_i,   d_v_j = Σ_i weight_ij d_out_i.

    One program: one head of a tile, and a share of the rows behind the last suffix. If sequences may be longer than a
    tile (LONG), it stores mean_i in place of d_k and d_v, for `_bwd_key_kernel`.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    W = H * E
    d_out_ptr += head * E
    query_ptr = packed_ptr + head * E
    key_ptr = query_ptr + W
    d_packed_ptr += head * E
    partial_ptr += head * E
    # 1. Weights of the keys of the tile
    begin, end, seq_begin, seq_end, before, start = _tile(tile, offsets_ptr, P, K, max_length, BLOCK_T, HAS_OFFSETS)
    offs_t = begin + tl.arange(0, BLOCK_T)
    mask_t = offs_t < end
    offs_statistic = offs_t.to(tl.int64) * H + head
    lse, exp_rest = load_lse(lse_ptr, offs_statistic, mask_t)  # [BLOCK_T] each
    # Both [BLOCK_T, E] @ [E, BLOCK_T] -> [BLOCK_T, BLOCK_T]
    weight, d_weight = _weights(
        d_out_ptr, query_ptr, offs_t, mask_t, offs_t, mask_t, _visible(offs_t, offs_t, begin + start), lse, exp_rest, W,
        stride_d_out_r, stride_packed_r, scale, E, CHUNK_E, PRECISION,
    )  # fmt: skip
    # 2. mean_i, not ⟨d_out_i, out_i⟩: if one key has nearly all the weight, the rounding of `out` is more than the
    # gradient of the scores.
    mean = tl.sum(weight * d_weight, axis=1)  # [BLOCK_T]
    total = tl.sum(weight, axis=1)  # [BLOCK_T]
    count = before + begin - seq_begin
    for first_p in range(0, count, BLOCK_P):
        offs_p = first_p + tl.arange(0, BLOCK_P)
        mask_p = offs_p < count
        # Both [BLOCK_T, E] @ [E, BLOCK_P] -> [BLOCK_T, BLOCK_P]
        weight_p, d_weight_p = _weights(
            d_out_ptr, query_ptr, offs_t, mask_t, _rows_in_front(offs_p, before, seq_begin), mask_p, mask_p[None, :],
            lse, exp_rest, W, stride_d_out_r, stride_packed_r, scale, E, CHUNK_E, PRECISION,
        )  # fmt: skip
        mean += tl.sum(weight_p * d_weight_p, axis=1)
        total += tl.sum(weight_p, axis=1)
    mean /= tl.where(mask_t, total, 1.0)  # [BLOCK_T]

    # 3. d_k and d_v of the tile, or mean_i for the kernel that computes them
    d_score = (weight * (d_weight - mean[:, None])).to(packed_ptr.dtype.element_ty)  # [BLOCK_T, BLOCK_T]
    if LONG:
        tl.store(mean_ptr + offs_statistic, mean, mask=mask_t)  # [BLOCK_T]
    else:
        query = load_rows(query_ptr, offs_t, mask_t, stride_packed_r, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
        # [BLOCK_T, BLOCK_T] @ [BLOCK_T, BLOCK_E] -> [BLOCK_T, BLOCK_E]
        d_key = scale * tl.dot(tl.trans(d_score), query, input_precision=PRECISION)
        d_out = load_rows(d_out_ptr, offs_t, mask_t, stride_d_out_r, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
        # [BLOCK_T, BLOCK_T] @ [BLOCK_T, BLOCK_E] -> [BLOCK_T, BLOCK_E]
        d_value = tl.dot(tl.trans(weight.to(d_out.dtype)), d_out, input_precision=PRECISION)
        _store_key_gradients(d_packed_ptr, partial_ptr, d_key, d_value, offs_t, mask_t, before < P, W, E, BLOCK_E)

    # 4. d_q from the keys of the tile
    key = load_rows(key_ptr, offs_t, mask_t, stride_packed_r, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
    # [BLOCK_T, BLOCK_T] @ [BLOCK_T, BLOCK_E] -> [BLOCK_T, BLOCK_E]
    d_query = tl.dot(d_score, key, input_precision=PRECISION)
    # 5. d_q from the keys in front of the tile, and d_k and d_v of those in the prefix. partial is fp32 [1 + tiles of
    # suffixes, P, 2, H, E]: a part from the prefix's own rows, then one from each tile.
    part_ptr = partial_ptr + (1 + tile - tl.cdiv(P, BLOCK_T)).to(tl.int64) * P * 2 * W
    for first_p in range(0, count, BLOCK_P):
        offs_p = first_p + tl.arange(0, BLOCK_P)
        mask_p = offs_p < count
        rows_p = _rows_in_front(offs_p, before, seq_begin)  # [BLOCK_P]
        # Both [BLOCK_T, E] @ [E, BLOCK_P] -> [BLOCK_T, BLOCK_P]
        weight_p, d_weight_p = _weights(
            d_out_ptr, query_ptr, offs_t, mask_t, rows_p, mask_p, mask_p[None, :],
            lse, exp_rest, W, stride_d_out_r, stride_packed_r, scale, E, CHUNK_E, PRECISION,
        )  # fmt: skip
        d_score_p = (weight_p * (d_weight_p - mean[:, None])).to(d_score.dtype)  # [BLOCK_T, BLOCK_P]
        key_p = load_rows(key_ptr, rows_p, mask_p, stride_packed_r, E, BLOCK_E)  # [BLOCK_P, BLOCK_E]
        # [BLOCK_T, BLOCK_P] @ [BLOCK_P, BLOCK_E] -> [BLOCK_T, BLOCK_E]
        d_query = tl.dot(d_score_p, key_p, d_query, input_precision=PRECISION)
        query_t = load_rows(query_ptr, offs_t, mask_t, stride_packed_r, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
        # [BLOCK_P, BLOCK_T] @ [BLOCK_T, BLOCK_E] -> [BLOCK_P, BLOCK_E]
        d_key_p = scale * tl.dot(tl.trans(d_score_p), query_t, input_precision=PRECISION)
        store_rows(part_ptr, d_key_p, offs_p, offs_p < before, 2 * W, E, BLOCK_E)  # [BLOCK_P, BLOCK_E]
        d_out_t = load_rows(d_out_ptr, offs_t, mask_t, stride_d_out_r, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
        # [BLOCK_P, BLOCK_T] @ [BLOCK_T, BLOCK_E] -> [BLOCK_P, BLOCK_E]
        d_value_p = tl.dot(tl.trans(weight_p.to(d_out_t.dtype)), d_out_t, input_precision=PRECISION)
        store_rows(part_ptr + W, d_value_p, offs_p, offs_p < before, 2 * W, E, BLOCK_E)  # [BLOCK_P, BLOCK_E]
    store_rows(d_packed_ptr, scale * d_query, offs_t, mask_t, 3 * W, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]

    # 6. Zeros in this program's share of the rows behind the last suffix
    if HAS_OFFSETS:
        behind = P + tl.load(offsets_ptr + K).to(tl.int32)
        for first_r in range(behind + tile * BLOCK_T, R, tl.num_programs(0) * BLOCK_T):
            offs_r = first_r + tl.arange(0, BLOCK_T)
            for part in tl.static_range(3):
                zeros = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
                store_rows(d_packed_ptr + part * W, zeros, offs_r, offs_r < R, 3 * W, E, BLOCK_E)


@triton.jit
def _shared_prefix_attention_bwd_key_kernel(
    d_out_ptr,
    packed_ptr,
    offsets_ptr,
    lse_ptr,
    mean_ptr,
    d_packed_ptr,
    partial_ptr,
    K,
    P,
    H,
    max_length,
    stride_d_out_r,
    stride_packed_r,
    scale,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK_E: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k_j = scale Σ_i d_score_ij q_i,   d_v_j = Σ_i weight_ij d_out_i, from the sequence of j.

    One program: one head of the keys of a tile. Only for sequences that may be longer than a tile.
    """
    head = tl.program_id(1).to(tl.int64)
    W = H * E
    d_out_ptr += head * E
    query_ptr = packed_ptr + head * E
    begin, end, _, seq_end, before, start = _tile(tl.program_id(0), offsets_ptr, P, K, max_length, BLOCK_T, HAS_OFFSETS)
    offs_t = begin + tl.arange(0, BLOCK_T)
    mask_t = offs_t < end
    d_key = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    d_value = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    # 1. Sums over the queries of the sequence from the tile on
    for first_q in range(begin, seq_end, BLOCK_T):
        offs_q = first_q + tl.arange(0, BLOCK_T)
        mask_q = offs_q < seq_end
        offs_statistic = offs_q.to(tl.int64) * H + head
        lse, exp_rest = load_lse(lse_ptr, offs_statistic, mask_q)  # [BLOCK_T] each
        mean = tl.load(mean_ptr + offs_statistic, mask=mask_q, other=0.0)  # [BLOCK_T]
        visible = _visible(offs_q, offs_t, begin + tl.where(first_q == begin, start, 0))  # [BLOCK_T, BLOCK_T]
        # Both [BLOCK_T, E] @ [E, BLOCK_T] -> [BLOCK_T, BLOCK_T]
        weight, d_weight = _weights(
            d_out_ptr, query_ptr, offs_q, mask_q, offs_t, mask_t, visible, lse, exp_rest, W, stride_d_out_r,
            stride_packed_r, scale, E, CHUNK_E, PRECISION,
        )  # fmt: skip
        query = load_rows(query_ptr, offs_q, mask_q, stride_packed_r, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
        d_score = (weight * (d_weight - mean[:, None])).to(query.dtype)  # [BLOCK_T, BLOCK_T]
        # [BLOCK_T, BLOCK_T] @ [BLOCK_T, BLOCK_E] -> [BLOCK_T, BLOCK_E]
        d_key = tl.dot(tl.trans(d_score), query, d_key, input_precision=PRECISION)
        d_out = load_rows(d_out_ptr, offs_q, mask_q, stride_d_out_r, E, BLOCK_E)  # [BLOCK_T, BLOCK_E]
        # [BLOCK_T, BLOCK_T] @ [BLOCK_T, BLOCK_E] -> [BLOCK_T, BLOCK_E]
        d_value = tl.dot(tl.trans(weight.to(d_out.dtype)), d_out, d_value, input_precision=PRECISION)
    # 2. Store, for the prefix as a part of a sum
    _store_key_gradients(
        d_packed_ptr + head * E, partial_ptr + head * E, scale * d_key, d_value, offs_t, mask_t, before < P, W,
        E, BLOCK_E,
    )  # fmt: skip


@triton.jit
def _shared_prefix_attention_bwd_sum_kernel(
    partial_ptr, d_packed_ptr, slots, P, W, BLOCK_SLOTS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """d_k and d_v of the prefix = Σ_s partial_s. One program: BLOCK_N of P · 2W numbers; a loop over the parts."""
    N = P * 2 * W
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # 1. Sum of the parts
    total = tl.zeros([BLOCK_SLOTS, BLOCK_N], tl.float32)
    for first in range(0, slots, BLOCK_SLOTS):
        offs_s = first + tl.arange(0, BLOCK_SLOTS)
        part_ptr = partial_ptr + offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]  # [BLOCK_SLOTS, BLOCK_N]
        total += tl.load(part_ptr, mask=(offs_s < slots)[:, None] & (offs_n < N)[None, :], other=0.0)
    # 2. Number n of [P, 2W] is in columns W to 3W of a row of d_packed
    rows_ptr = d_packed_ptr + offs_n // (2 * W) * 3 * W + W + offs_n % (2 * W)  # [BLOCK_N]
    tl.store(rows_ptr, tl.sum(total, axis=0).to(d_packed_ptr.dtype.element_ty), mask=offs_n < N)  # [BLOCK_N]


# ---- launches of the kernels -----------------------------------------------------------------------------------------


def _launch(packed: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    call = Options(*options)
    if not _has_kernel(packed, call):
        return NotImplemented
    (R, width), H = packed.shape, call.heads
    tiles, arguments = _tiles_and_arguments("shared_prefix_attention_fwd", packed, call)
    out, lse = packed.new_empty(R, width // 3), packed.new_empty((R, H), dtype=torch.float64)  # [R, W], [R, H]
    launch(
        _shared_prefix_attention_fwd_kernel,
        (tiles, H),
        debug=True,  # compiles the assertion
        **arguments,
        R=R,
        out_ptr=out,
        lse_ptr=lse,
    )
    return out, lse


def _launch_backward(d_out: Tensor, packed: Tensor, lse: Tensor, *options: Any) -> Tensor:
    call = Options(*options)
    if not _has_kernel(packed, call):
        return NotImplemented
    (R, width), H, P = packed.shape, call.heads, call.prefix_length
    W = width // 3
    tiles, arguments = _tiles_and_arguments("shared_prefix_attention_bwd", packed, call)
    BLOCK_T = arguments["BLOCK_T"]
    long = max(P, arguments["max_length"]) > BLOCK_T
    # 1. Gradients of the tiles; of the keys of the prefix, parts of a sum
    slots = 1 + tiles - triton.cdiv(P, BLOCK_T)
    partial = packed.new_empty((slots, P, 2, W), dtype=torch.float32)
    d_packed = packed.new_empty(packed.shape)  # [R, 3W]
    d_out = with_contiguous_rows(d_out)
    arguments |= dict(
        d_out_ptr=d_out,
        stride_d_out_r=d_out.stride(0),
        lse_ptr=lse,
        mean_ptr=lse.new_empty(lse.shape, dtype=torch.float32) if long else None,  # [R, H]
        d_packed_ptr=d_packed,
        partial_ptr=partial,
    )
    launch(_shared_prefix_attention_bwd_kernel, (tiles, H), **arguments, R=R, LONG=long)
    # 2. Gradients of the keys of sequences that are longer than a tile
    if long:
        del arguments["BLOCK_P"]  # of the first kernel alone
        arguments |= launch_options("shared_prefix_attention_bwd_key", packed, E=arguments["E"])
        launch(_shared_prefix_attention_bwd_key_kernel, (tiles, H), **arguments)
    # 3. Sum of the parts
    sum_options = launch_options("shared_prefix_attention_bwd_sum", partial)
    launch(
        _shared_prefix_attention_bwd_sum_kernel,
        (triton.cdiv(P * 2 * W, sum_options["BLOCK_N"]),),
        device=packed.device,
        partial_ptr=partial,
        d_packed_ptr=d_packed,
        slots=slots,
        P=P,
        W=W,
        **sum_options,
    )
    return d_packed


def _has_kernel(packed: Tensor, call: Options) -> bool:
    """Return True if the heads have a Triton kernel."""
    return packed.shape[1] // (3 * call.heads) <= MAX_E


def _tiles_and_arguments(kernel: str, packed: Tensor, call: Options) -> tuple[int, dict[str, Any]]:
    """Return the number of tiles of rows, and the arguments that the kernels of both directions share."""
    packed, (H, P, offsets, _, scale) = with_contiguous_rows(packed), call
    R, width = packed.shape
    E = width // (3 * H)
    options = launch_options(kernel, packed, E=E)
    BLOCK_T, BLOCK_E = options["BLOCK_T"], max(triton.next_power_of_2(E), 16)
    max_length = min(call.max_length, R)
    K = (R - P) // max_length if offsets is None else offsets.shape[0] - 1
    # A tile has several suffixes, or a suffix several tiles.
    suffix_tiles = triton.cdiv(K, max(BLOCK_T // max_length, 1)) * triton.cdiv(max_length, BLOCK_T)
    arguments: dict[str, Any] = dict(options) | dict(
        device=packed.device,
        packed_ptr=packed,
        offsets_ptr=contiguous_or_none(offsets),
        K=K,
        P=P,
        H=H,
        max_length=max_length,
        stride_packed_r=packed.stride(0),
        scale=scale,
        E=E,
        BLOCK_E=BLOCK_E,
        CHUNK_E=min(BLOCK_E, options["CHUNK_E"]),
        HAS_OFFSETS=offsets is not None,
        PRECISION=dot_precision(packed.dtype, packed.device),
    )
    return triton.cdiv(P, BLOCK_T) + suffix_tiles, arguments


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def _fallback(packed: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference.shared_prefix_attention_and_lse(packed, **Options(*options)._asdict())
    return out.contiguous(), lse.contiguous()


def _fallback_backward(d_out: Tensor, packed: Tensor, lse: Tensor, *options: Any) -> Tensor:
    function = functools.partial(reference.shared_prefix_attention, **Options(*options)._asdict())
    return autograd.reference_gradients(function, (packed,), (True,), d_out)[0]


def _fake(packed: Tensor, heads: int, *options: Any) -> tuple[Tensor, Tensor]:
    R, width = packed.shape
    lse_dtype = dtypes.accumulation_dtype(packed.device)
    return packed.new_empty(R, width // 3), packed.new_empty((R, heads), dtype=lse_dtype)


# ---- registration ----------------------------------------------------------------------------------------------------


def _check(packed: Tensor, *options: Any) -> None:
    _, prefix_length, offsets, max_length, _ = Options(*options)
    if offsets is None:
        return
    name, tokens = "shared_prefix_attention", len(packed) - prefix_length
    in_range = (offsets >= 0) & (offsets <= tokens)
    in_range[0] = offsets[0] == 0
    check_values(name, "offsets", offsets, in_range, f"from 0 to at most {tokens}, the rows behind the prefix")
    lengths = offsets.diff()
    rising = (lengths >= 0) & (lengths <= max_length)
    check_values(name, "offsets", lengths, rising, f"rising by 0 to max_length ({max_length})")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    packed, *options = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.options = Options(*options)._replace(offsets=None)
    ctx.save_for_backward(packed, lse, Options(*options).offsets)


def _backward(ctx: Any, d_out: Tensor, _: None) -> tuple[Tensor]:
    packed, lse, offsets = ctx.saved_tensors
    return (shared_prefix_attention_backward(d_out, packed, lse, *ctx.options._replace(offsets=offsets)),)


shared_prefix_attention = registration.define(
    f"shared_prefix_attention(Tensor packed, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
    check=_check,
    fallback_note=f"fp64, heads wider than {MAX_E}",
    backward=autograd.GradientRule(_save, _backward),
    autocast_arguments=1,
)
shared_prefix_attention_backward = registration.define(
    f"shared_prefix_attention_backward(Tensor d_out, Tensor packed, Tensor lse, {_OPTIONS}) -> Tensor d_packed",
    fallback=_fallback_backward,
    launch=_launch_backward,
)
