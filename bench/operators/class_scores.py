"""Benchmark of `class_scores`: few images, from 50 classes to all of ImageNet-21k."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from ..measure import CPU, OURS
from . import Arguments, Case, Random, Work, case
from .record import Call, Record, ids, on_meta


def eager(image: Tensor, prototypes: Tensor, labels: Tensor | None = None) -> Tensor:
    scores = (F.normalize(image, dim=-1) @ prototypes.T).amax(dim=0)
    return scores if labels is None else scores.index_fill(0, labels, torch.inf)


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    for B, C, D in ((4, 100, 512), (4, 1000, 512), (32, 1000, 512), (4, 21841, 512)):
        image, prototypes = random(B, D), F.normalize(random(C, D, dtype=torch.float32), dim=-1).to(dtype)
        yield case(
            f"B{B}-C{C}-D{D}",
            {OURS: functional.class_scores, "eager": eager},
            reference.class_scores,
            Arguments([image, prototypes, random.integers(C, B)]),
            Work((B + C) * D * dtype.itemsize + 8 * B + 4 * C, flops=2 * B * C * D),
        )


def launches(dtype: torch.dtype) -> Iterator[Call]:
    for B, C, D in ((4, 1000, 512), (4, 21841, 512), (5, 1001, 100)):
        yield Call(f"B{B}-C{C}-D{D}", (on_meta(B, D, dtype=dtype), on_meta(C, D, dtype=dtype), ids(B)))


def launches_of_ranks(dtype: torch.dtype) -> Iterator[Call]:
    """A step, and an evaluation of no labels."""
    for C, K, B in ((1000, 107, 4), (12_001, 700, 0)):
        yield Call(f"C{C}-K{K}-B{B}", (on_meta(C, dtype=dtype), ids(K), ids(B) if B else None))


RECORD = Record(
    cases=cases,
    launches={"class_scores": launches, "classes_at_ranks": launches_of_ranks},
    small_calls={
        "class_scores": lambda randn: (
            {},
            {"image": randn(2, 4), "prototypes": randn(5, 4), "labels": torch.tensor([0, 3])},
        )
    },
    flops={"class_scores": lambda image, prototypes, *_, **__: 2 * image.numel() * prototypes[0]},
)
