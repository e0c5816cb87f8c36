"""Benchmark of `add_layer_norm`: both towers of ViT-B/16, and rows four times as wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference
from skipkernels.ops.add_layer_norm import MAX_WIDTH, Backward

from .. import peers
from ..measure import CPU, OURS
from . import Arguments, Case, Random, Work, case
from .record import Call, Record, on_meta

# Rows and width: tokens of four images; suffixes of 26 and of 788 classes, five tokens each.
SHAPES = ((4 * 197, 768), (4 * 197, 3072), (26 * 5, 512), (788 * 5, 512), (788 * 5, 2048))
EPS = 1e-5
IN_A_BLOCK = {"need_sums": True, "partial": True, "need_normed": True}


def after_addition(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return x + residual, and a LayerNorm of this sum."""

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x + residual
        return hidden, norm(hidden, weight, bias, EPS)

    return function


def eager(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    hidden = x if residual is None else x + residual
    wide = hidden.to(weight.dtype)
    return hidden, F.layer_norm(wide, wide.shape[-1:], weight, bias, eps).to(x.dtype)


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    for T, W in SHAPES:
        yield case(
            f"T{T}-W{W}",
            {OURS: functional.add_layer_norm, "eager": eager},
            reference.add_layer_norm,
            Arguments([random(T, W), random(T, W), random(W), random(W)], [random(T, W), random(T, W)]),
            # Forward reads two and writes two, backward reads three and writes one; weight, bias and their gradients.
            Work((8 * T + 5) * W * dtype.itemsize),
            peers.adapted(peers.layer_norms(device), after_addition),
        )


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


def launches(dtype: torch.dtype) -> Iterator[Call]:
    for shape, x, weight in layer_norm_rows(dtype):
        yield Call(shape, (x, x, weight, weight, EPS, None))
    *_, (shape, x, weight) = layer_norm_rows(dtype)
    yield Call(f"{shape}-plain", (x, None, weight, weight, EPS, None))
    yield Call(f"{shape}-rms", (x, x, weight, None, 1e-6, None, True))
    for shape, x, low, weight in mixed_rows(dtype):
        yield Call(shape, (x, low, weight, weight, 1e-5, dtype))


def backward_of(x: Tensor, weight: Tensor, **changes: Any) -> Backward:
    """Arguments of backward with the gradients of x, weight and bias."""
    statistic = on_meta(x.shape[0], dtype=torch.float32)
    return Backward(
        d_normed=x,
        d_hidden=x,
        hidden=x,
        mean=statistic,
        rstd=statistic,
        weight=weight,
        bias=None,
        need_x=True,
        need_weight=True,
        need_bias=True,
    )._replace(**changes)


def launches_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, x, weight in layer_norm_rows(dtype):
        yield Call(shape, backward_of(x, weight))
        yield Call(f"{shape}-block", backward_of(x, weight, bias=weight, **IN_A_BLOCK))
    *_, (shape, x, weight) = layer_norm_rows(dtype)
    yield Call(f"{shape}-sums", backward_of(x, weight, need_sums=True))
    yield Call(f"{shape}-frozen", backward_of(x, weight, need_weight=False, need_bias=False))
    yield Call(f"{shape}-first", backward_of(x, weight, d_hidden=None, need_x=False))
    rms = backward_of(x, weight, mean=on_meta(0, dtype=torch.float32), need_bias=False, rms=True)
    yield Call(f"{shape}-rms", rms)
    yield Call(f"{shape}-rms-block", rms._replace(**IN_A_BLOCK))
    for shape, x, low, weight in mixed_rows(dtype):
        yield Call(shape, backward_of(x, weight, d_normed=low, bias=weight, cast=dtype, **IN_A_BLOCK))


def launches_of_widths(dtype: torch.dtype) -> Iterator[Call]:
    """Rows of every size of tile, full and not, up to the widest with a kernel."""
    for W in (64, 96, 192, 384, 512, 640, 768, 1024, 1152, 1664, 2048, 2560, 3072, 3584, MAX_WIDTH):
        x, weight = on_meta(33, W, dtype=dtype), on_meta(W, dtype=dtype)
        yield Call(f"W{W}", (x, x, weight, weight, 1e-5, None))


def launches_of_widths_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, (x, _, weight, *_) in launches_of_widths(dtype):
        yield Call(shape, backward_of(x, weight))
        yield Call(f"{shape}-block", backward_of(x, weight, bias=weight, **IN_A_BLOCK))


def launches_of_sums(dtype: torch.dtype) -> Iterator[Call]:
    """The partial sums of a block of ViT-B/16 and its packed gradients; those of its pooled block."""
    sums = [on_meta(25, 3072, dtype=torch.float32), on_meta(99, 3072, dtype=torch.float32)]
    norm_1, packed = on_meta(99, 1536, dtype=torch.float32), on_meta(788, 2304, dtype=dtype)
    yield Call("W768", ([*sums, packed, norm_1], torch.float32))
    yield Call("W768-pooled", ([*sums, packed[:4, :768], packed[:, 768:], norm_1], dtype))


RECORD = Record(
    cases=cases,
    launches={
        "add_layer_norm": launches,
        "add_layer_norm_backward": launches_backward,
        "column_sums": launches_of_sums,
    },
    widths={"add_layer_norm": launches_of_widths, "add_layer_norm_backward": launches_of_widths_backward},
    small_calls={
        "add_layer_norm": lambda randn: (
            {"x": randn(3, 4), "residual": randn(3, 4), "weight": randn(4), "bias": randn(4)},
            {},
        ),
        "add_rms_norm": lambda randn: ({"x": randn(3, 4), "residual": randn(3, 4), "weight": randn(4)}, {}),
    },
)
