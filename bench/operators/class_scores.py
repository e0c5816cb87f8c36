"""`class_scores` at the sizes of the main job: few images, from 50 classes to all of ImageNet-21k."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from skipkernels import functional, reference

from . import Case


def cases(dtype: torch.dtype) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    for B, C, D in ((4, 100, 512), (4, 1000, 512), (32, 1000, 512), (4, 21841, 512)):
        image = torch.randn(B, D, generator=rng).to(dtype)
        prototypes = F.normalize(torch.randn(C, D, generator=rng), dim=-1).to(dtype)
        labels = torch.randint(0, C, (B,), generator=rng)

        def eager(image=image, prototypes=prototypes, labels=labels):
            scores = (F.normalize(image, dim=-1) @ prototypes.T).amax(dim=0)
            scores[labels] = torch.inf
            return [scores]

        yield Case(
            shape=f"B{B}-C{C}-D{D}",
            runs={
                "skipkernels": lambda i=image, p=prototypes, y=labels: [functional.class_scores(i, p, y)],
                "eager": eager,
            },
            truth=lambda i=image, p=prototypes, y=labels: [reference.class_scores(i.double(), p.double(), y)],
            moved=(B + C) * D * dtype.itemsize + 8 * B + 4 * C,
            flops=2 * B * C * D,
            target="≥ 1",
        )
