"""Benchmark of `class_scores`: few images, from 50 classes to all of ImageNet-21k."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from skipkernels import functional, reference

from . import COMPILED, CPU, Case, compiled, random


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    for B, C, D in ((4, 100, 512), (4, 1000, 512), (32, 1000, 512), (4, 21841, 512)):
        image = random(rng, B, D, dtype=dtype, device=device)
        prototypes = F.normalize(torch.randn(C, D, generator=rng), dim=-1).to(dtype).to(device)
        labels = torch.randint(0, C, (B,), generator=rng).to(device)

        def run(function, image=image, prototypes=prototypes, labels=labels):
            return lambda: [function(image, prototypes, labels)]

        def eager(image, prototypes, labels):
            scores = (F.normalize(image, dim=-1) @ prototypes.T).amax(dim=0)
            scores[labels] = torch.inf
            return scores

        yield Case(
            shape=f"B{B}-C{C}-D{D}",
            runs={
                "skipkernels": run(functional.class_scores),
                "eager": run(eager),
                COMPILED: run(compiled(reference.class_scores)),
            },
            truth=run(reference.class_scores, image.double(), prototypes.double()),
            moved=(B + C) * D * dtype.itemsize + 8 * B + 4 * C,
            flops=2 * B * C * D,
            target="≥ 1",
        )
