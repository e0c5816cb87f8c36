"""In which order, and in which company, images are trained on. Every image comes once an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler

SamplerKind = Literal["class_pure", "random", "sequential"]


class BatchSampler(Sampler[list[int]]):
    """Batches of item numbers, the same ones again from the same state.

    Args:
        labels: [n], class of every item.
        batch_size: Items of a batch of one process; the last one of an epoch may hold fewer.
        kind: "random"; "sequential", in order; or "class_pure": a batch holds images of one class as long as that class
            fills one, and what is left over of the classes is mixed, so that every image comes once an epoch.
        generator: Source of the order, which has to be the same in all processes; seeded with 0 if not given.
        rank: Which of `world_size` processes asks. Each gets its part of every batch, which is as large as all of them
            make it together: they take the same number of steps, and an image goes to one of them.
        world_size: Processes that train together.

    Attributes:
        epoch: Epochs that are over.

    Raises:
        ValueError: If an argument is out of range, or there are fewer images than processes.

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
        if kind not in get_args(SamplerKind):
            raise ValueError(f"BatchSampler: kind must be one of {', '.join(get_args(SamplerKind))}; got {kind!r}.")
        if batch_size < 1:
            raise ValueError(f"BatchSampler: batch_size must be at least 1; got {batch_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"BatchSampler: rank must be from 0 to world_size - 1 = {world_size - 1}; got {rank}.")
        if len(labels) < world_size:
            raise ValueError(f"BatchSampler: {len(labels)} images are too few for {world_size} processes.")
        self.labels, self.batch_size, self.kind = labels.cpu(), batch_size, kind
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._begin: Tensor | None = None  # the generator, before it drew the order of the epoch that is going on
        self._given = 0  # batches of it
        self._skip = 0  # batches that were given before a state was loaded

    def __len__(self) -> int:
        """Batches of an epoch."""
        together = self.batch_size * self.world_size
        short = len(self.labels) % together
        return len(self.labels) // together + (short >= self.world_size or len(self.labels) == short)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of an epoch; of one that a loaded state has begun, those that are left."""
        self._begin, self._given, self._skip = self.generator.get_state(), self._skip, 0
        for batch in self._order()[self._given :]:
            self._given += 1
            part = batch if self.world_size == 1 else batch.tensor_split(self.world_size)[self.rank]
            yield part.tolist()
        self.epoch, self._begin, self._given = self.epoch + 1, None, 0

    def abandon(self) -> None:
        """Forget the epoch that is going on: the next iteration begins one."""
        self._begin, self._given = None, 0

    def state_dict(self) -> dict[str, Any]:
        """What its batches depend on, epoch, batches of it that were given, and the generator's state before it."""
        begin = self.generator.get_state() if self._begin is None else self._begin
        return self._settings() | {"epoch": self.epoch, "batches": self._given or self._skip, "generator": begin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: If the state is of a sampler with other settings, or is none; nothing changes then.
        """
        expected = self._settings()
        if not isinstance(state, dict) or not state.keys() >= expected.keys() | {"epoch", "batches", "generator"}:
            raise ValueError("BatchSampler.load_state_dict: this is no state of a BatchSampler's state_dict.")
        for name, here in expected.items():
            if state[name] != here:
                raise ValueError(
                    f"BatchSampler.load_state_dict: the state is of {name}={state[name]!r}, and this sampler has "
                    f"{here!r}. Go on with the same, or begin anew without the state."
                )
        epoch, batches = state["epoch"], state["batches"]
        if not (isinstance(epoch, int) and epoch >= 0 and isinstance(batches, int) and 0 <= batches <= len(self)):
            raise ValueError(
                f"BatchSampler.load_state_dict: epoch must be at least 0, and batches from 0 to {len(self)}; got "
                f"{epoch!r} and {batches!r}."
            )
        try:
            self.generator.set_state(state["generator"])
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"BatchSampler.load_state_dict: generator is no state of one: {error}") from error
        self.epoch, self._skip, self._begin, self._given = epoch, batches, None, 0

    def _settings(self) -> dict[str, Any]:
        settings = {"kind": self.kind, "batch_size": self.batch_size, "world_size": self.world_size}
        return settings | {"images": len(self.labels)}

    def _order(self) -> list[Tensor]:
        """The batches of all processes together."""
        size = self.batch_size * self.world_size
        if self.kind == "sequential":
            return self._fit(list(torch.arange(len(self.labels)).split(size)))
        order = torch.randperm(len(self.labels), generator=self.generator)
        if self.kind == "random":
            return self._fit(list(order.split(size)))
        whole: list[Tensor] = []
        left_over: list[Tensor] = []
        _, counts = self.labels.unique(return_counts=True)
        by_class = order[self.labels[order].argsort(stable=True)].split(counts.tolist())
        for batch in (batch for of_class in by_class for batch in of_class.split(size)):
            (whole if len(batch) == size else left_over).append(batch)
        if left_over:
            mixed = torch.cat(left_over)
            whole += mixed[torch.randperm(len(mixed), generator=self.generator)].split(size)
        whole = self._fit(whole)
        return [whole[position] for position in torch.randperm(len(whole), generator=self.generator).tolist()]

    def _fit(self, batches: list[Tensor]) -> list[Tensor]:
        """A last batch with less than one image for each process goes to the one before."""
        if len(batches) > 1 and len(batches[-1]) < self.world_size:
            return [*batches[:-2], torch.cat(batches[-2:])]
        return batches
