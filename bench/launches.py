"""Calls of the operators that reach every Triton kernel and every entry of its block tables.

`CALLS[name](dtype)` yields arguments for `registration.definitions[name].with_triton`. The first call of an operator is
the typical one; the others reach the remaining kernels and block sizes. Tensors are on the meta device, so shapes can
be those of real jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipkernels.ops.class_sampled_ce import REDUCTIONS
from skipkernels.ops.mlp_activation import KINDS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Call(NamedTuple):
    shape: str
    """Shape in the form of test ids: B4-C1000-D512."""
    arguments: tuple[Any, ...]


Calls = Callable[[torch.dtype], Iterator[Call]]
CALLS: dict[str, Calls] = {}


def calls(function: Calls) -> Calls:
    """Add the calls of the operator with the name of the function."""
    CALLS[function.__name__] = function
    return function


def on_meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> Tensor:
    return on_meta(*shape, dtype=torch.int64)


# B, C, K, D, class weights and smoothing, reduction.
_CLASS_SAMPLED = (
    (4, 100, 50, 512, False, "mean"),
    (4096, 21841, 21841, 512, False, "mean"),
    (33, 101, 51, 640, True, "none"),
)


def _class_sampled_ce(
    dtype: torch.dtype,
) -> Iterator[tuple[str, tuple[Tensor, ...], tuple[Any, ...], tuple[int, int, int]]]:
    """Shape, the four leading tensors of both schemas, the options after them, and B, K, D."""
    for B, C, K, D, all_options, reduction in _CLASS_SAMPLED:
        tensors = on_meta(B, D, dtype=dtype), on_meta(C, D, dtype=dtype), ids(B), on_meta(dtype=torch.float32)
        weight = on_meta(C, dtype=torch.float32) if all_options else None
        options = ids(K) if K < C else None, weight, 0.1 if all_options else 0.0, -100, REDUCTIONS.index(reduction)
        yield f"B{B}-C{C}-K{K}-D{D}", tensors, options, (B, K, D)


@calls
def class_sampled_ce(dtype: torch.dtype) -> Iterator[Call]:
    for shape, tensors, options, _ in _class_sampled_ce(dtype):
        yield Call(shape, (*tensors, *options, False, False, False))


@calls
def class_sampled_ce_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, tensors, options, (B, K, D) in _class_sampled_ce(dtype):
        each = (B,) if REDUCTIONS[options[-1]] == "none" else ()
        wide, lse = (on_meta(*s, dtype=torch.float32) for s in (each, (B,), (K,), ())), on_meta(B, dtype=torch.float64)
        d_loss, image_norm, text_norm, denominator = wide
        kept = *[on_meta(0, D, dtype=torch.float32)] * 2, on_meta(0, dtype=torch.float64)
        saved = lse, image_norm, text_norm, denominator, *kept
        yield Call(shape, (d_loss, *tensors, *saved, *options, True, True, True))


@calls
def class_sampled_logits(dtype: torch.dtype) -> Iterator[Call]:
    """Calls at evaluation sizes first."""
    for shape, (image, text, _, scale), (class_ids, *_), _ in reversed(list(_class_sampled_ce(dtype))):
        yield Call(shape, (image, text, scale, class_ids))


@calls
def class_sampled_logits_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, (image, text, _, scale), (class_ids, *_), (B, K, _) in reversed(list(_class_sampled_ce(dtype))):
        d_logits, *norms = (on_meta(*s, dtype=torch.float32) for s in ((B, K), (B,), (K,)))
        yield Call(shape, (d_logits, image, text, scale, *norms, class_ids, True, True, False))


@calls
def class_scores(dtype: torch.dtype) -> Iterator[Call]:
    for B, C, D in ((4, 1000, 512), (4, 21841, 512), (5, 1001, 100)):
        yield Call(f"B{B}-C{C}-D{D}", (on_meta(B, D, dtype=dtype), on_meta(C, D, dtype=dtype), ids(B)))


@calls
def classes_at_ranks(dtype: torch.dtype) -> Iterator[Call]:
    """A step, and an evaluation of no labels."""
    for C, K, B in ((1000, 107, 4), (12_001, 700, 0)):
        yield Call(f"C{C}-K{K}-B{B}", (on_meta(C, dtype=dtype), ids(K), ids(B) if B else None))


def layer_norm_rows(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Shape, rows, weight: the image tower, then one width for each entry of the tile table; also fp32 weights."""
    widths = ((788, 768, dtype), (690, 512, torch.float32), *((33, W, dtype) for W in (64, 2048, 4096)))
    for T, W, weight_dtype in widths:
        yield f"T{T}-W{W}", on_meta(T, W, dtype=dtype), on_meta(W, dtype=weight_dtype)


def mixed_rows(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Shape, fp32 residual stream, product in a 16-bit dtype, fp32 weight: both towers under autocast."""
    for T, W in ((788, 768), (690, 512)) if dtype != torch.float32 else ():
        x, low = (on_meta(T, W, dtype=each) for each in (torch.float32, dtype))
        yield f"T{T}-W{W}-autocast", x, low, on_meta(W, dtype=torch.float32)


@calls
def add_layer_norm(dtype: torch.dtype) -> Iterator[Call]:
    for shape, x, weight in layer_norm_rows(dtype):
        yield Call(shape, (x, x, weight, weight, 1e-5, None))
    yield Call(f"{shape}-plain", (x, None, weight, weight, 1e-5, None))
    yield Call(f"{shape}-unit", (x, None, None, None, 1e-5, None))
    yield Call(f"{shape}-rms", (x, x, weight, None, 1e-6, None, True))
    for shape, x, low, weight in mixed_rows(dtype):
        yield Call(shape, (x, low, weight, weight, 1e-5, dtype))


@calls
def add_layer_norm_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, x, weight in layer_norm_rows(dtype):
        statistic = on_meta(x.shape[0], dtype=torch.float32)
        saved = (x, statistic, statistic, weight)
        yield Call(shape, (x, x, *saved, None, True, True, True, False, False, None))
        yield Call(f"{shape}-block", (x, x, *saved, weight, True, True, True, True, True, None))
    yield Call(f"{shape}-sums", (x, x, *saved, None, True, True, True, True, False, None))
    yield Call(f"{shape}-frozen", (x, x, *saved, None, True, False, False, False, False, None))
    yield Call(f"{shape}-first", (x, None, *saved, None, False, True, True, False, False, None))
    no_mean = (x, on_meta(0, dtype=torch.float32), statistic, weight)
    yield Call(f"{shape}-rms", (x, x, *no_mean, None, True, True, False, False, False, None))
    yield Call(f"{shape}-rms-block", (x, x, *no_mean, None, True, True, False, True, True, None, True))
    for shape, x, low, weight in mixed_rows(dtype):
        statistic = on_meta(x.shape[0], dtype=torch.float32)
        yield Call(shape, (low, x, x, statistic, statistic, weight, weight, True, True, True, True, True, dtype))


@calls
def column_sums(dtype: torch.dtype) -> Iterator[Call]:
    """The partial sums of a block of ViT-B/16 and its packed gradients; those of its pooled block."""
    sums = [on_meta(25, 3072, dtype=torch.float32), on_meta(99, 3072, dtype=torch.float32)]
    norm_1, packed = on_meta(99, 1536, dtype=torch.float32), on_meta(788, 2304, dtype=dtype)
    yield Call("W768", ([*sums, packed, norm_1], torch.float32))
    yield Call("W768-pooled", ([*sums, packed[:4, :768], packed[:, 768:], norm_1], dtype))


def activation_rows(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor | None, int]]:
    """Shape of the result, rows, bias and kind: an image tower with every kind, narrow rows, rows without a bias."""
    for kind, name in enumerate(KINDS):
        W = 3072 * (2 if name == "swiglu" else 1)
        yield f"T788-W3072-{name}", on_meta(788, W, dtype=dtype), on_meta(W, dtype=dtype), kind
    x = on_meta(788, 3072, dtype=dtype)
    kind, narrow = KINDS.index("quick_gelu"), (on_meta(33, 64, dtype=dtype), on_meta(64, dtype=torch.float32))
    yield "T33-W64-quick_gelu", *narrow, kind
    yield "T788-W3072-quick_gelu-plain", x, None, kind


@calls
def mlp_activation(dtype: torch.dtype) -> Iterator[Call]:
    for shape, *arguments in activation_rows(dtype):
        yield Call(shape, tuple(arguments))


@calls
def mlp_activation_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, x, bias, kind in activation_rows(dtype):
        d_out = x.chunk(2, dim=-1)[0].contiguous() if KINDS[kind] == "swiglu" else x
        yield Call(shape, (d_out, x, bias, kind, True, bias is not None, False, False))
        if KINDS[kind] == "swiglu":
            yield Call(f"{shape}-block", (d_out, x, bias, kind, True, True, True, True))
    yield Call(f"{shape}-block", (x, x, x[0], kind, True, True, True, True))


@calls
def rotary_embedding(dtype: torch.dtype) -> Iterator[Call]:
    """Query, key and value of PE-Core's L/14; heads that are no power of two; the gradient, with pairs of halves."""
    for n, T, H, E, interleaved in ((4, 577, 16, 64, True), (3, 5, 6, 80, True), (4, 577, 16, 64, False)):
        x, angles = on_meta(n * T, 3 * H * E, dtype=dtype), on_meta(T, E // 2, dtype=torch.float32)
        form = "" if interleaved else "-halves-inverse"
        yield Call(f"N{n}-T{T}-H{H}-E{E}{form}", (x, angles, angles, 2 * H, interleaved, not interleaved))


@calls
def sgd_momentum_(dtype: torch.dtype) -> Iterator[Call]:
    """The two largest weights of a block and a bias, with both roundings; momentum buffers in fp32; copies in bf16."""
    options = [on_meta(dtype=torch.float64) for _ in range(3)]
    for buffer in (dtype, torch.float32):
        for seed in (None, ids()) if dtype == torch.bfloat16 else (None,):
            sizes = ((3072, 768), (768, 3072), (768,), (67,))
            lists = [[on_meta(*size, dtype=x) for size in sizes] for x in (dtype, dtype, buffer)]
            how = ("" if seed is None else "-random") + ("" if buffer == dtype else "-fp32-buffer")
            casts = [on_meta(*size, dtype=torch.bfloat16) for size in (*sizes[:2], (0,), (0,))]  # not of the biases
            for given in ([], casts) if dtype == torch.float32 else ([],):
                yield Call(f"block{how}" + ("-casts" if given else ""), (*lists, *options, seed, None, given))


# K, S, P, H, E: prompts of classes, and suffixes and a prefix of several tiles with wide heads.
_PROMPTS = ((1380, 5, 6, 8, 64), (50, 40, 70, 10, 128))


@calls
def packed_layout(dtype: torch.dtype) -> Iterator[Call]:
    """The prompts of a step on ImageNet; the dtype plays no part."""
    yield Call("K107-P5-R891", (ids(107), ids(1000), ids(1000), 5, 891))


@calls
def shared_prefix_attention(dtype: torch.dtype) -> Iterator[Call]:
    for K, S, P, H, E in _PROMPTS:
        packed = on_meta(P + K * S, 3 * H * E, dtype=dtype)
        for offsets in (None, ids(K + 1)):
            form = "" if offsets is None else "-packed"
            yield Call(f"K{K}-S{S}-P{P}-H{H}-E{E}{form}", (packed, H, P, offsets, S, E**-0.5))


@calls
def shared_prefix_attention_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, (packed, H, *options) in shared_prefix_attention(dtype):
        R, width = packed.shape
        d_out, lse = on_meta(R, width // 3, dtype=dtype), on_meta(R, H, dtype=torch.float64)
        yield Call(shape, (d_out, packed, lse, H, *options))


@calls
def pooled_attention(dtype: torch.dtype) -> Iterator[Call]:
    for B, N, H, E in ((4, 197, 12, 64), (4, 577, 16, 80), (26, 11, 8, 32), (4, 50, 4, 256)):
        query, key = on_meta(B, H, E, dtype=dtype), on_meta(B, N, H, E, dtype=dtype)
        for lengths in (None, ids(B)):
            form = "" if lengths is None else "-lengths"
            yield Call(f"B{B}-N{N}-H{H}-E{E}{form}", (query, key, key, lengths, E**-0.5))


@calls
def pooled_attention_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, (query, key, value, lengths, scale) in pooled_attention(dtype):
        lse = on_meta(*query.shape[:2], dtype=torch.float64)
        yield Call(shape, (query, query, key, value, query, lse, lengths, scale, True, True, True))
