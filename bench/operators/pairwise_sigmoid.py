"""Benchmark of `pairwise_sigmoid`: the sigmoid loss of batches of pairs, and the block of one of eight processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from .. import peers
from . import CPU, OURS, Case, Random, case
from .class_sampled_ce import not_compiled

# B images, N texts, D. At N < B these are the texts of one of several processes.
SHAPES = ((1024, 1024, 512), (4096, 512, 512), (4096, 4096, 512))
SCALE, BIAS = 10.0, -10.0  # at which SigLIP starts training

Loss = Callable[..., Tensor]


def eager(image: Tensor, text: Tensor, labels: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * scale.to(image.dtype) + bias.to(image.dtype)
    signs = 2 * (labels[:, None] == torch.arange(text.shape[0], device=text.device)).to(image.dtype) - 1
    return -F.logsigmoid(signs * logits).sum(dtype=torch.float32)


def of_sum(mean: Loss) -> Loss:
    return lambda image, text, labels, scale, bias: image.shape[0] * mean(image, text, scale, bias)


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    for B, N, D in SHAPES:
        random = Random(dtype, device)
        text = random(N, D, dtype=torch.float32)
        labels = torch.arange(B, device=device)
        # Cosines of pairs are about 0.3.
        image = random(B, D, dtype=torch.float32) + 0.3 * text[labels % N]
        labels = torch.where(labels < N, labels, -1)
        inputs = [image.to(dtype), text.to(dtype), labels, *torch.tensor([SCALE, BIAS], device=device)]
        yield case(
            f"B{B}-N{N}-D{D}",
            {OURS: functional.pairwise_sigmoid, "eager": eager},
            reference.pairwise_sigmoid,
            inputs,
            [torch.ones((), device=device)],
            # Forward and backward read the rows and backward writes their gradients; also labels and norms.
            moved=dtype.itemsize * 3 * (B + N) * D + 16 * B + 8 * (B + N),
            flops=3 * 2 * B * N * D,
            peers=peers.sigmoid_losses(device) if N == B else None,
            adapt=of_sum,
            not_compiled=not_compiled(B * N * D, device),
        )
