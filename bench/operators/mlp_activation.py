"""Benchmark of `mlp_activation`: the MLPs of both towers of ViT-B/16, and narrower ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference
from skipkernels.ops.mlp_activation import KINDS

from ..measure import CPU, OURS
from . import Arguments, Case, Random, Work, case
from .record import Call, Record, on_meta

SHAPES = ((4 * 197, 768), (4 * 197, 3072), (26 * 5, 2048), (788 * 5, 512), (788 * 5, 2048))
TARGETS = {"quick_gelu": "≥ 2.5", "gelu": "≥ 1.3", "gelu_tanh": "≥ 1.3"}
GATED = ((4 * 197, 2048), (4 * 257, 2730))  # of swiglu: EVA-02-B/16 and L/14


def eager(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    u = x + bias
    if kind == "quick_gelu":
        return u * torch.sigmoid(1.702 * u)
    if kind == "swiglu":
        gate, linear = u.chunk(2, dim=-1)
        return F.silu(gate) * linear
    return F.gelu(u, approximate="tanh" if kind == "gelu_tanh" else "none")


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    for (T, W), kind in ((shape, kind) for shape in SHAPES for kind in TARGETS):
        yield case(
            f"T{T}-W{W}-{kind}",
            {OURS: functional.mlp_activation, "eager": eager},
            reference.mlp_activation,
            Arguments([random(T, W), random(W), kind], [random(T, W)]),
            # Forward reads one and writes one, backward reads two and writes one; the bias twice, and its gradient.
            Work((5 * T + 3) * W * dtype.itemsize, target=TARGETS[kind]),
        )
    for T, W in GATED:
        yield case(
            f"T{T}-W{W}-swiglu",
            {OURS: functional.mlp_activation, "eager": eager},
            reference.mlp_activation,
            Arguments([random(T, 2 * W), random(2 * W), "swiglu"], [random(T, W)]),
            # Forward reads two and writes one, backward reads three and writes two; the bias twice, and its gradient.
            Work((8 * T + 6) * W * dtype.itemsize),
        )


def activation_rows(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor | None, int]]:
    """Shape of the result, rows, bias and kind: an image tower with every kind, narrow rows, rows without a bias."""
    for kind, name in enumerate(KINDS):
        W = 3072 * (2 if name == "swiglu" else 1)
        yield f"T788-W3072-{name}", on_meta(788, W, dtype=dtype), on_meta(W, dtype=dtype), kind
    x = on_meta(788, 3072, dtype=dtype)
    kind, narrow = KINDS.index("quick_gelu"), (on_meta(33, 64, dtype=dtype), on_meta(64, dtype=torch.float32))
    yield "T33-W64-quick_gelu", *narrow, kind
    yield "T788-W3072-quick_gelu-plain", x, None, kind


def launches(dtype: torch.dtype) -> Iterator[Call]:
    for shape, *arguments in activation_rows(dtype):
        yield Call(shape, tuple(arguments))


def launches_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, x, bias, kind in activation_rows(dtype):
        d_out = x.chunk(2, dim=-1)[0].contiguous() if KINDS[kind] == "swiglu" else x
        yield Call(shape, (d_out, x, bias, kind, True, bias is not None, False, False))
        if KINDS[kind] == "swiglu":
            yield Call(f"{shape}-block", (d_out, x, bias, kind, True, True, True, True))
    yield Call(f"{shape}-block", (x, x, x[0], kind, True, True, True, True))


RECORD = Record(
    cases=cases,
    launches={"mlp_activation": launches, "mlp_activation_backward": launches_backward},
    small_calls={"mlp_activation": lambda randn: ({"x": randn(3, 4), "bias": randn(4)}, {"kind": "gelu"})},
)
