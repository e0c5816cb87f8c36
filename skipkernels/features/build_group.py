"""Processes that build a store together: each encodes whole shards, and the first lists them in the manifest."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..parallel.gathers import all_gather
from ..store import Layout, Shard, StoreError

_FAILED, _WORKS, _DONE = -1, 0, 1
_DIGITS = 8  # hexadecimal digits of a digest in one number of a message


class PeerError(RuntimeError):
    """Error raised on every other process of a build if one process fails."""


class Report(NamedTuple):
    """Work of a process since its last report."""

    state: int  # `_FAILED`, `_WORKS` or `_DONE`
    images: int = 0
    written: tuple[int, Shard] | None = None  # Number and digest of a shard that was written, or None


class Builders:
    """Processes that build a store together; without a `group`, only this one.

    After each batch of images every process sends a report, and receives the reports of the others. So an error of one
    process is raised on all processes within a batch, no process waits longer than a batch, and a killed process loses
    at most the shard that it encodes and the shard that it writes. As a context manager it reports an error of this
    process in place of its next report.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None):
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "FeatureCache.build: process_group must be a torch.distributed.ProcessGroup that contains this "
                "process, such as torch.distributed.group.WORLD after init_process_group; got "
                f"{type(group).__name__}."
            )
        self._group, self._ended, self._failed = group, group is None, False
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.first = self.rank == 0  # True on the process that writes the manifest and shows progress
        on_cpu = group is None or "cpu:gloo" in str(dist.get_backend_config(group))
        self._device = torch.device("cpu") if on_cpu or device is None else device
        self._pending: tuple[int, Shard] | None = None

    def __enter__(self) -> Builders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            with contextlib.suppress(PeerError):
                self.report_failed()

    def begin(self, layout: Layout, missing: list[int]) -> tuple[Layout, list[int]]:
        """Return the layout, and the numbers of the missing shards, that the first process has found; collective."""
        if self._group is None:
            return layout, missing
        own = int(replace(layout, shard_rows=1).digest[:15], 16)
        reports = self._exchange(_WORKS, images=own)
        self.check(reports)
        for rank, report in enumerate(reports):
            if report.images != own:
                self._ended = True
                raise StoreError(
                    "FeatureCache.build: model, dataset and options must be equal on all processes of process_group; "
                    f"got different ones on processes {self.rank} and {rank}. Pass the same on every process."
                )
        shard_rows, count = self._from_first([layout.shard_rows, len(missing)])
        return replace(layout, shard_rows=shard_rows), self._from_first(missing if self.first else [0] * count)

    def share(self, numbers: list[int]) -> list[int]:
        """Shards of this process among those to build."""
        return numbers[self.rank :: self.size]

    def written(self, number: int, shard: Shard) -> None:
        """Report a shard with the next batch. The first process lists its own."""
        if self.first:
            return
        if self._pending is not None and not (self._ended or self._failed):
            self._exchange(_WORKS)
        self._pending = number, shard

    def report(self, images: int) -> list[Report]:
        """Report a batch of images, and return the reports of all processes; collective."""
        return self._exchange(_WORKS, images)

    def report_done(self) -> tuple[list[Report], bool]:
        """Report that no shard is left; return the reports of all, and True if that holds for all; collective."""
        reports = self._exchange(_DONE)
        return reports, all(report.state == _DONE for report in reports)

    def report_failed(self) -> list[Report]:
        """Report the error of this process, or that it has another's; return the last reports of all; collective."""
        reports = [] if self._ended or self._failed else self._exchange(_FAILED)
        reports += [] if self._ended else self._exchange(_FAILED)  # the others have written their shards only now
        self._ended = True
        return reports

    def end(self) -> None:
        """Wait until the first process has listed all shards; collective."""
        self._exchange(_DONE)
        self._ended = True

    def check(self, reports: list[Report]) -> None:
        """Raise a PeerError if another process has failed."""
        for rank, report in enumerate(reports):
            if report.state == _FAILED:
                raise PeerError(
                    f"FeatureCache.build: process {rank} of process_group raised an error; see its output. Complete "
                    "shards stay; continue with `resume=True`."
                )

    def _exchange(self, state: int, images: int = 0) -> list[Report]:
        own, self._pending = Report(state, images, self._pending), None
        if self._group is None:
            return [own]
        try:
            rows = all_gather(torch.tensor(_numbers(own), device=self._device), self._group).tolist()
        except RuntimeError as error:
            self._ended = True
            raise PeerError(
                "FeatureCache.build: another process of process_group was killed, or does not answer. Complete shards "
                "stay; continue with `resume=True`."
            ) from error
        reports = [_report(row) for row in rows]
        self._failed = any(report.state == _FAILED for report in reports)
        return reports

    def _from_first(self, numbers: list[int]) -> list[int]:
        sent = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        dist.broadcast(sent, group=self._group, group_src=0)
        return sent.tolist()


def _numbers(report: Report) -> list[int]:
    number, shard = report.written or (-1, Shard(0, ""))
    digits = shard.xxh3.rjust(4 * _DIGITS, "0")
    parts = [int(digits[start : start + _DIGITS], 16) for start in range(0, 4 * _DIGITS, _DIGITS)]
    return [report.state, report.images, number, shard.bytes, *parts]


def _report(numbers: list[int]) -> Report:
    state, images, number, size, *parts = numbers
    digest = "".join(f"{part:0{_DIGITS}x}" for part in parts)
    return Report(state, images, None if number < 0 else (number, Shard(size, digest)))
