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
GATED = ((4 * 197, 2048), (4 * 257, 2730))  # of swiglu: EVA-02-B/16 and L/14
PLAIN = "T788-W3072-quick_gelu-plain"  # rows without a bias


def eager(x: Tensor, bias: Tensor | None = None, kind: str = "quick_gelu") -> Tensor:
    biased = x if bias is None else (x + bias).to(x.dtype)
    if kind == "quick_gelu":
        return biased * torch.sigmoid(1.702 * biased)
    if kind == "swiglu":
        gate, linear = biased.chunk(2, dim=-1)
        return F.silu(gate) * linear
    return F.gelu(biased, approximate="tanh" if kind == "gelu_tanh" else "none")


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    plain = [(shape, kind) for shape in SHAPES for kind in KINDS if kind != "swiglu"]
    for (T, W), kind in (*plain, *((shape, "swiglu") for shape in GATED)):
        read = 2 * W if kind == "swiglu" else W
        yield case(
            f"T{T}-W{W}-{kind}",
            {OURS: functional.mlp_activation, "eager": eager},
            reference.mlp_activation,
            Arguments([random(T, read), random(read), kind], [random(T, W)]),
            # Forward: x and out. Backward: d_out, x and d_x. The bias twice, and its gradient.
            Work(((3 * T + 3) * read + 2 * T * W) * dtype.itemsize),
        )


def activation_rows(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor | None, int]]:
    """Shape of the result, rows, bias and kind: an image tower with every kind, narrow rows, rows without a bias."""
    for kind, name in enumerate(KINDS):
        W = 3072 * (2 if name == "swiglu" else 1)
        yield f"T788-W3072-{name}", on_meta(788, W, dtype=dtype), on_meta(W, dtype=dtype), kind
    quick = KINDS.index("quick_gelu")
    yield "T33-W64-quick_gelu", on_meta(33, 64, dtype=dtype), on_meta(64, dtype=torch.float32), quick
    yield PLAIN, on_meta(788, 3072, dtype=dtype), None, quick


def launches(dtype: torch.dtype) -> Iterator[Call]:
    for shape, *arguments in activation_rows(dtype):
        yield Call(shape, tuple(arguments))


def launches_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, x, bias, kind in activation_rows(dtype):
        d_out = x.chunk(2, dim=-1)[0].contiguous() if KINDS[kind] == "swiglu" else x
        yield Call(shape, (d_out, x, bias, kind, True, bias is not None, False, False))
        if KINDS[kind] == "swiglu":
            yield Call(f"{shape}-block", (d_out, x, bias, kind, True, True, True, True))
        if shape == PLAIN:
            yield Call(f"{shape}-block", (x, x, x[0], kind, True, True, True, True))


RECORD = Record(
    cases=cases,
    launches={"mlp_activation": launches, "mlp_activation_backward": launches_backward},
    small_calls={"mlp_activation": lambda randn: ({"x": randn(3, 4), "bias": randn(4)}, {"kind": "gelu"})},
)
