"""Order of training images, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..checks import check_choice
from ..options import SamplerKind


class BatchSampler(Sampler[list[int]]):
    """Batches of item numbers, reproducible from a state.

    Args:
        labels: Label of every item, [n].
        batch_size: Items per batch of one process. The last batch of an epoch may have fewer; with several processes,
            its parts may differ by one item, and have one more: items that are fewer than the processes join it.
        kind: "class_pure" (default): full batches of one class, and batches that mix the remaining images of all
            classes; "random"; "sequential". With these every image is in one batch per epoch. "balanced": as many
            images are drawn with replacement, each class with the same probability.
        generator: Generator of the order, in the same state in all processes; default: a new one with seed 0.
        rank: Index of this process in `world_size`. Each process gets its part of every global batch of
            batch_size · world_size items, so that all take the same number of steps.
        world_size: Number of processes that train together.

    Example:
        >>> sampler = BatchSampler(torch.tensor([0, 0, 0, 1, 1]), 2, "class_pure")
        >>> sorted(sorted(batch) for batch in sampler), len(sampler)
        ([[0, 1], [2], [3, 4]], 3)
    """

    def __init__(
        self,
        labels: Tensor,
        batch_size: int,
        kind: SamplerKind = "class_pure",
        generator: torch.Generator | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
    ):
        check_choice("BatchSampler", "kind", kind, SamplerKind)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"BatchSampler: batch_size must be at least 1, a whole number; got {batch_size!r}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"BatchSampler: rank must be from 0 to world_size - 1 = {world_size - 1}; got {rank}.")
        if len(labels) < world_size:
            raise ValueError(f"BatchSampler: {len(labels)} images are too few for {world_size} processes.")
        self.labels, self.batch_size, self.kind = labels.cpu(), batch_size, kind
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.rank, self.world_size = rank, world_size
        self._initial: Tensor | None = None  # state of the generator before it drew the order of the current epoch
        self._yielded = 0  # batches of the current epoch, also before a state was loaded

    def __len__(self) -> int:
        together = self.batch_size * self.world_size
        short = len(self.labels) % together
        # A last batch with fewer images than processes is merged into the one before, see `_merge_short`.
        return len(self.labels) // together + (short >= self.world_size or len(self.labels) == short)

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over the batches of an epoch; after a state was loaded, over the rest of its epoch."""
        if self._initial is not None:  # the epoch before was not finished
            self._yielded = 0
        self._initial = self.generator.get_state()
        for batch in self._order()[self._yielded :]:
            self._yielded += 1
            part = batch if self.world_size == 1 else batch.tensor_split(self.world_size)[self.rank]
            yield part.tolist()
        self._initial, self._yielded = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return settings, number of batches yielded in this epoch, and the state of the generator before it."""
        initial = self.generator.get_state() if self._initial is None else self._initial
        return self._settings() | {"batches": self._yielded, "generator": initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state_dict`."""
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise ValueError(
                    f"BatchSampler.load_state_dict: the state is of {name}={state.get(name)!r}, and this sampler has "
                    f"{value!r}. Use the same settings, or start without the state."
                )
        self.generator.set_state(state["generator"].cpu())
        self._initial, self._yielded = None, state["batches"]

    def _settings(self) -> dict[str, Any]:
        settings = {"kind": self.kind, "batch_size": self.batch_size, "world_size": self.world_size}
        return settings | {"images": len(self.labels)}

    def _order(self) -> list[Tensor]:
        """Global batches of an epoch."""
        size = self.batch_size * self.world_size
        # 1. Draw the order of the n images.
        if self.kind == "sequential":
            order = torch.arange(len(self.labels), device="cpu")  # [n]
        elif self.kind == "balanced":
            _, classes, counts = self.labels.unique(return_inverse=True, return_counts=True)
            weights = 1 / counts[classes].double()  # [n]
            order = torch.multinomial(weights, len(weights), replacement=True, generator=self.generator)  # [n]
        else:
            order = torch.randperm(len(self.labels), generator=self.generator)  # [n]
        if self.kind != "class_pure":
            return self._merge_short(list(order.split(size)))
        # 2. Group it by class, each class in the drawn order, and cut classes into batches of `size` and a remainder.
        whole: list[Tensor] = []
        remainders: list[Tensor] = []
        _, counts = self.labels.unique(return_counts=True)
        by_class = order[self.labels[order].argsort(stable=True)].split(counts.tolist())  # one [images] per class
        for batch in (batch for of_class in by_class for batch in of_class.split(size)):
            (whole if len(batch) == size else remainders).append(batch)
        # 3. Shuffle the remainders of all classes together, into mixed batches.
        if remainders:
            mixed = torch.cat(remainders)
            whole += mixed[torch.randperm(len(mixed), generator=self.generator)].split(size)
        # 4. Shuffle the batches.
        whole = self._merge_short(whole)
        return [whole[position] for position in torch.randperm(len(whole), generator=self.generator).tolist()]

    def _merge_short(self, batches: list[Tensor]) -> list[Tensor]:
        """Merge a last batch with fewer images than processes into the batch before it."""
        if len(batches) > 1 and len(batches[-1]) < self.world_size:
            return [*batches[:-2], torch.cat(batches[-2:])]
        return batches
