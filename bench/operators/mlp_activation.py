"""Benchmark of `mlp_activation`: the MLPs of both towers of ViT-B/16, and narrower ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from . import CPU, OURS, Case, Random, case

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
            [random(T, W), random(W), kind],
            [random(T, W)],
            # Forward reads one and writes one, backward reads two and writes one; the bias twice, and its gradient.
            moved=(5 * T + 3) * W * dtype.itemsize,
            target=TARGETS[kind],
        )
    for T, W in GATED:
        yield case(
            f"T{T}-W{W}-swiglu",
            {OURS: functional.mlp_activation, "eager": eager},
            reference.mlp_activation,
            [random(T, 2 * W), random(2 * W), "swiglu"],
            [random(T, W)],
            # Forward reads two and writes one, backward reads three and writes two; the bias twice, and its gradient.
            moved=(8 * T + 6) * W * dtype.itemsize,
        )
