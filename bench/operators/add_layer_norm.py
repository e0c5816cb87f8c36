"""Benchmark of `add_layer_norm`: both towers of ViT-B/16, and rows four times as wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference
from skipkernels.ops.add_layer_norm import MAX_WIDTH

from .. import peers
from ..measure import CPU, OURS
from . import Arguments, Case, Random, Work, case
from .record import Call, Record, on_meta

# Rows and width: tokens of four images; suffixes of 26 and of 788 classes, five tokens each.
SHAPES = ((4 * 197, 768), (4 * 197, 3072), (26 * 5, 512), (788 * 5, 512), (788 * 5, 2048))
EPS = 1e-5


def after_addition(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return x + residual, and a LayerNorm of this sum."""

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x + residual
        return hidden, norm(hidden, weight, bias, EPS)

    return function


eager = after_addition(lambda hidden, *rest: F.layer_norm(hidden, hidden.shape[-1:], *rest))


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    for T, W in SHAPES:
        yield case(
            f"T{T}-W{W}",
            {OURS: functional.add_layer_norm, "eager": eager},
            reference.add_layer_norm,
            Arguments([random(T, W), random(T, W), random(W), random(W)], [random(T, W), random(T, W)]),
            # Forward reads two and writes two, backward reads three and writes one; weight, bias and their gradients.
            Work((8 * T + 5) * W * dtype.itemsize, target="≥ 1.5" if dtype == torch.float32 else "≥ 2.5"),
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
        yield Call(shape, (x, x, weight, weight, 1e-5, None))
    yield Call(f"{shape}-plain", (x, None, weight, weight, 1e-5, None))
    yield Call(f"{shape}-rms", (x, x, weight, None, 1e-6, None, True))
    for shape, x, low, weight in mixed_rows(dtype):
        yield Call(shape, (x, low, weight, weight, 1e-5, dtype))


def launches_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, x, weight in layer_norm_rows(dtype):
        statistic = on_meta(x.shape[0], dtype=torch.float32)
        saved = (x, statistic, statistic, weight)
        yield Call(shape, (x, x, *saved, None, True, True, True, False, False, None, False))
        yield Call(f"{shape}-block", (x, x, *saved, weight, True, True, True, True, True, None, True))
    yield Call(f"{shape}-sums", (x, x, *saved, None, True, True, True, True, False, None, False))
    yield Call(f"{shape}-frozen", (x, x, *saved, None, True, False, False, False, False, None, False))
    yield Call(f"{shape}-first", (x, None, *saved, None, False, True, True, False, False, None, False))
    no_mean = (x, on_meta(0, dtype=torch.float32), statistic, weight)
    yield Call(f"{shape}-rms", (x, x, *no_mean, None, True, True, False, False, False, None, False, True))
    yield Call(f"{shape}-rms-block", (x, x, *no_mean, None, True, True, False, True, True, None, True, True))
    for shape, x, low, weight in mixed_rows(dtype):
        statistic = on_meta(x.shape[0], dtype=torch.float32)
        yield Call(shape, (low, x, x, statistic, statistic, weight, weight, True, True, True, True, True, dtype, True))


def launches_of_widths(dtype: torch.dtype) -> Iterator[Call]:
    """Rows of every size of tile, full and not, up to the widest with a kernel."""
    for W in (64, 96, 192, 384, 512, 640, 768, 1024, 1152, 1664, 2048, 2560, 3072, 3584, MAX_WIDTH):
        x, weight = on_meta(33, W, dtype=dtype), on_meta(W, dtype=dtype)
        yield Call(f"W{W}", (x, x, weight, weight, 1e-5, None))


def launches_of_widths_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, (x, _, weight, *_) in launches_of_widths(dtype):
        statistic = on_meta(x.shape[0], dtype=torch.float32)
        saved = (x, statistic, statistic, weight)
        yield Call(shape, (x, x, *saved, None, True, True, True, False, False, None, False))
        yield Call(f"{shape}-block", (x, x, *saved, weight, True, True, True, True, True, None, True))


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
