"""In which order, and in which company, images are trained on. Every image comes once an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler

SamplerKind = Literal["class_pure", "random"]


class BatchSampler(Sampler[list[int]]):
    """Batches of item numbers.

    Args:
        labels: [n], class of every item.
        batch_size: Items of a batch; the last one of an epoch may hold fewer.
        kind: "random", or "class_pure": a batch holds images of one class as long as that class fills one; what is
            left over of the classes is mixed, so that every image comes once an epoch.
        generator: Source of the order; its state is what resuming needs.

    Example:
        >>> sampler = BatchSampler(torch.tensor([0, 0, 0, 1, 1]), 2, "class_pure", torch.Generator().manual_seed(0))
        >>> sorted(sorted(batch) for batch in sampler), len(sampler)
        ([[0, 1], [2], [3, 4]], 3)
    """

    def __init__(self, labels: Tensor, batch_size: int, kind: SamplerKind, generator: torch.Generator):
        if kind not in get_args(SamplerKind):
            raise ValueError(f"BatchSampler: kind must be one of {', '.join(get_args(SamplerKind))}; got {kind!r}.")
        if batch_size < 1:
            raise ValueError(f"BatchSampler: batch_size must be at least 1; got {batch_size}.")
        self.labels, self.batch_size, self.kind, self.generator = labels, batch_size, kind, generator

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        if self.kind == "random":
            yield from (batch.tolist() for batch in order.split(self.batch_size))
            return
        whole, left_over = [], []
        for label in self.labels.unique():
            batches = order[self.labels[order] == label].split(self.batch_size)
            whole += [batch for batch in batches if len(batch) == self.batch_size]
            left_over += [batch for batch in batches if len(batch) < self.batch_size]
        if left_over:
            mixed = torch.cat(left_over)
            whole += mixed[torch.randperm(len(mixed), generator=self.generator)].split(self.batch_size)
        for position in torch.randperm(len(whole), generator=self.generator).tolist():
            yield whole[position].tolist()
