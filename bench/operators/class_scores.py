"""Benchmark of `class_scores`: few images, from 50 classes to all of ImageNet-21k."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from . import CPU, OURS, Case, Random, case


def eager(image: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    scores = (F.normalize(image, dim=-1) @ prototypes.T).amax(dim=0)
    scores[labels] = torch.inf
    return scores


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    for B, C, D in ((4, 100, 512), (4, 1000, 512), (32, 1000, 512), (4, 21841, 512)):
        image, prototypes = random(B, D), F.normalize(random(C, D, dtype=torch.float32), dim=-1).to(dtype)
        yield case(
            f"B{B}-C{C}-D{D}",
            {OURS: functional.class_scores, "eager": eager},
            reference.class_scores,
            [image, prototypes, random.integers(C, B)],
            moved=(B + C) * D * dtype.itemsize + 8 * B + 4 * C,
            flops=2 * B * C * D,
            target="≥ 1",
        )
