"""Faults of a captured step that the stand-in must find; without a fault, replays equal the loop.

The weights of both sides are in one group, and gradients are gathered up to 2 KiB, so that updates run on both streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from gpu_stand_in import Fault, Stream, stand_in
from graph_runs import Run, batches

import skipkernels as sk
from skipkernels import optimizer
from skipkernels.graphs import graphed_step as graphed
from skipkernels.ops import sgd_momentum
from skipkernels.ops.sgd_momentum import GraphTables


class Forgetful(list):
    def append(self, item: object) -> None:
        pass


class WithoutHeldTables(GraphTables):
    def __init__(self) -> None:
        super().__init__()
        self._held = Forgetful()


def without_wait(waiting: int, awaited: int) -> contextlib.AbstractContextManager[object]:
    """Leave out the waits of one stream for another; 0 is that of the caller, 1 of the step, 2 of the text side."""
    wait = Stream.wait_stream

    def wait_stream(stream: Stream, other: Stream) -> None:
        if (stream.stream_id, other.stream_id) != (waiting, awaited):
            wait(stream, other)

    return mock.patch.object(Stream, "wait_stream", wait_stream)


def without_copies_for_replays() -> contextlib.AbstractContextManager[object]:
    copy = graphed.GraphedStep._copy_options
    return mock.patch.object(graphed.GraphedStep, "_copy_options", lambda step: step.is_captured or copy(step))


MUTANTS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "the rates are not copied before a replay": without_copies_for_replays,
    "the tables are never uploaded": lambda: mock.patch.object(GraphTables, "upload"),
    "the tables are not kept": lambda: mock.patch.object(sgd_momentum, "GraphTables", WithoutHeldTables),
    "the caller does not wait for the warm-up": lambda: without_wait(0, 1),
    # Without `record_stream` these waits are what keeps memory that one stream frees until another has used it.
    "the step does not wait for the caller": lambda: without_wait(1, 0),
    "the text side does not wait for the step": lambda: without_wait(2, 1),
    "the step does not wait for the text side": lambda: without_wait(1, 2),
    "the options of a group are made on one of two streams": lambda: mock.patch.object(sk.FusedSGD, "copy_options"),
    "the graph reads the tensors of the caller": lambda: mock.patch.object(
        graphed._BatchState, "copied", lambda state, *batch: batch
    ),
}


def fault() -> str | None:
    """A fault of ten steps, or their difference from the loop."""
    with (
        stand_in() as gpu,
        mock.patch.object(optimizer, "_GATHERED_BYTES", 2048),
        mock.patch.object(Run, "captures", True),
    ):
        runs, found = (Run("one group", by_graph=True), Run("one group", by_graph=False)), []
        some = batches(runs[0].clip, 10)
        try:
            for run in runs:
                for batch in some:
                    found.append(run.train([batch]))
                    sgd_momentum._tables.clear()  # those that the graph does not hold
        except Fault as error:
            return str(error)
        assert gpu.captures == 1
        return None if found[:10] == found[10:] else "replays differ from the loop"


@pytest.mark.parametrize("waits", [False, True])
def test_memory_is_allocated_again_after_the_uses_of_all_streams(waits):
    """`record_stream` would ensure the same."""
    with stand_in() as gpu:
        own, other = Stream(), Stream()
        with gpu.stream(own):
            x = torch.ones(3)
        other.wait_stream(own)
        with gpu.stream(other):
            x.sum()
        del x
        if waits:
            own.wait_stream(other)
        with gpu.stream(own), contextlib.nullcontext() if waits else pytest.raises(Fault, match="still uses"):
            torch.ones(3)


def test_there_is_no_fault():
    assert fault() is None


@pytest.mark.parametrize("mutant", MUTANTS)
def test_fault_is_found(mutant):
    with MUTANTS[mutant]():
        assert fault() is not None
