"""Benchmark of `class_sampled_lse`: the share of one process, of 1,000 classes among 4 and of ImageNet-21k among 8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from . import CPU, OURS, Case, Random, case

# B of all processes; C, K of one; D. At K = C there are no class_ids.
SHAPES = ((16, 250, 27, 512), (128, 250, 250, 512), (256, 2731, 2731, 512))


def eager(
    image: Tensor, text: Tensor, labels: Tensor, scale: Tensor, class_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    if class_ids is not None:
        hits = labels[:, None] == class_ids
        text, labels = text[class_ids], torch.where(hits.any(dim=1), hits.int().argmax(dim=1), -1)
    logits = (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * scale.to(image.dtype)).double()
    target = logits.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    return logits.logsumexp(dim=1), target.masked_fill(labels < 0, 0)


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    for B, C, K, D in SHAPES:
        random = Random(dtype, device)
        class_ids = random.sample(C, K)
        labels = random.integers(K, B)
        labels = labels if class_ids is None else class_ids[labels]
        labels = torch.where(torch.arange(B, device=device) % 4 == 0, labels, -1)
        bank = random(C, D, dtype=torch.float32)
        image = 0.1 * bank[labels] + random(B, D, dtype=torch.float32)
        share = torch.linspace(0.1, 0.9, B, dtype=torch.float64, device=device)
        yield case(
            f"B{B}-C{C}-K{K}-D{D}",
            {OURS: functional.class_sampled_lse, "eager": eager},
            reference.class_sampled_lse,
            inputs=[image.to(dtype), bank.to(dtype), labels, torch.tensor(100.0, device=device)],
            d_outputs=[share / B, torch.full_like(share, -1 / B)],
            class_ids=class_ids,
            # Forward and backward read the rows and backward writes their gradients, that of the text for the whole
            # bank; also labels, class ids, row statistics, and results and their gradients.
            moved=dtype.itemsize * (3 * B + 2 * K + C) * D + 16 * (B + K) + 56 * B + 8 * K,
            flops=6 * B * K * D,
        )
