"""Benchmark of `add_layer_norm`: tokens of four images in ViT-B/16, suffixes in its text tower, and a wider tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from .. import peers
from . import COMPILED, CPU, Case, compiled, random, with_gradients

SHAPES = ((4 * 197, 768), (4 * 197, 3072), (26 * 5, 512), (788 * 5, 512), (788 * 5, 2048))
EPS = 1e-5


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    hidden = x + residual
    return hidden, F.layer_norm(hidden, hidden.shape[-1:], weight, bias, EPS)


def added(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A peer's LayerNorm after PyTorch's addition."""

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x + residual
        return hidden, norm(hidden, weight, bias, EPS)

    return function


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    for T, W in SHAPES:
        sizes = ((T, W), (T, W), (W,), (W,))
        inputs = [random(rng, *size, dtype=dtype, device=device).requires_grad_() for size in sizes]
        upstream = [random(rng, T, W, dtype=dtype, device=device) for _ in range(2)]
        exact = [x.detach().double().requires_grad_() for x in inputs]

        def run(function, inputs=inputs, upstream=upstream):
            return with_gradients(lambda: list(function(*inputs)), inputs, upstream)

        def of_peer(norm, run=run):
            return run(added(norm))

        yield Case(
            shape=f"T{T}-W{W}",
            runs={
                "skipkernels": run(functional.add_layer_norm),
                "eager": run(eager),
                COMPILED: run(compiled(reference.add_layer_norm)),
            },
            truth=run(reference.add_layer_norm, exact, [x.double() for x in upstream]),
            # Forward reads two and writes two, backward reads three and writes one; weight, bias and their gradients.
            moved=(8 * T + 5) * W * dtype.itemsize,
            target="≥ 1.5" if dtype == torch.float32 else "≥ 2.5",
        ).with_peers(peers.layer_norms(device), of_peer)
