"""Count the operations, bytes, calls and launches of a step. They are the same on every machine.

    python -m bench.counts                     count all and write bench/results/counts.csv
    python -m bench.counts --check             count all and compare with the table; write nothing
    python -m bench.counts --check --classes 20

For training steps of SkipCLIP, and `predict` from features after the weights have changed:

    flops              of matrix products (bench/flops.py)
    saved_bytes        bytes that autograd saves for backward, without parameters
    gradient_bytes     peak bytes of leaf gradients during backward
    calls              PyTorch operators that would launch a kernel on a GPU, and our operators
    launches           PyTorch operators, and the kernels that our Triton launchers would launch
    triton             Triton kernels among these
    waits              host syncs: a value is read, or a shape depends on values

Matrix products return zeros and are not computed, since the counts depend on shapes only. All scores are then equal and
the first classes are kept. Processor, threads and the implementation of our operators change nothing.

Calls, launches and waits of a step are those of `graphed` on a GPU, with the update in backward: the step runs on the
meta device (`bench.recording`). A call of a multi-tensor operator counts as one launch. FLOPs and bytes are those on a
CPU, where suffixes are packed without spare rows.

`--check` fails if a count is larger than in the table, or smaller, so that an improvement is recorded. If another minor
version of torch made the table, it fails only if a count is larger by more than ALLOWANCE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import skipkernels as sk
from skipkernels import testing
from skipkernels.app.devices import autocast
from skipkernels.ops import launching

from . import measure, recording, tables
from .flops import flops_of
from .meta_device import WithoutProducts
from .recording import Recording
from .rows import PRECISIONS, RESULTS, command

TABLE = RESULTS / "counts.csv"
ALLOWANCE = 1.05  # for another version of torch, which may split an operator into others
COUNTS = ("flops", "saved_bytes", "gradient_bytes", "calls", "launches", "triton", "waits")
STEP, PREDICT = "SkipCLIP, step", "SkipCLIP, predict"
BATCH = 4


class Size(NamedTuple):
    """A model, its skipped blocks and the number of classes."""

    model: str
    skip_layers: int
    C: int


SIZES = (Size("vit-tiny", 3, 20), Size("ViT-B-16", 6, 50), Size("ViT-B-16", 6, 1000))


class Row(NamedTuple):
    """One line of the table."""

    what: str
    model: str
    B: int
    C: int
    K: int
    precision: str
    memory: str
    flops: int
    saved_bytes: int
    gradient_bytes: int
    calls: int
    launches: int
    triton: int
    waits: int
    torch: str

    @property
    def key(self) -> tuple[Any, ...]:
        return self[:7]

    @property
    def name(self) -> str:
        memory = f", memory={self.memory}" if self.memory else ""
        return f"{self.what} ({self.model}, B{self.B}-C{self.C}-K{self.K}, {self.precision}{memory})"


def counts_of(function: Callable[[], Any]) -> dict[str, int]:
    """FLOPs, calls, launches and waits of a call on the CPU, as it would run on a GPU."""
    found = Recording("cpu")

    def recorded() -> None:
        with found:
            function()

    return {"flops": flops_of(recorded), **found.counts()}


def rows_of(size: Size) -> list[Row]:
    K, _ = recording.without_tail(size.C, BATCH)
    rows: list[Row] = []

    def add(what: str, precision: str, memory: str, counts: dict[str, int]) -> None:
        version = ".".join(torch.__version__.split(".")[:2])  # minor
        rows.append(Row(what, size.model, BATCH, size.C, K, precision, memory, **counts, torch=version))

    for memory in ("fast", "min"):
        clip, features, labels = recording.skip_clip(size.model, size.skip_layers, BATCH, size.C, memory)
        # All of this precedes record_step, which moves `clip` to the meta device.
        with WithoutProducts():
            of_steps = {precision: _step(clip, features, labels, precision) for precision in PRECISIONS}
            if memory == "fast":
                for precision in PRECISIONS:
                    add(PREDICT, precision, "", _predict(clip, features, precision))
        for precision, counts in of_steps.items():
            launched = recording.record_step(clip, features, labels, precision)
            add(STEP, precision, memory, counts | launched.counts())
    return rows


def _step(clip: sk.SkipCLIP, features: Tensor, labels: Tensor, precision: str) -> dict[str, int]:
    """FLOPs and bytes of forward, backward and update."""

    def loss() -> Tensor:
        with autocast(precision, measure.CPU):
            return clip(features, labels).loss

    saved = testing.saved_bytes(loss)
    update = sk.FusedSGD(clip.trainable_parameters(), lr=0.0, momentum=0.9)
    gradients = testing.gradient_bytes(loss())
    update.step()
    counts = {"flops": flops_of(lambda: loss().backward()), "saved_bytes": saved, "gradient_bytes": gradients}
    update.close()
    clip.zero_grad()
    return counts


def _predict(clip: sk.SkipCLIP, features: Tensor, precision: str) -> dict[str, int]:
    def predict() -> Tensor:
        with autocast(precision, measure.CPU):
            return clip.predict(features)

    predict()
    with torch.no_grad():
        for parameter in clip.trainable_parameters():  # as a step changes them: class embeddings are recomputed
            parameter.mul_(1.001)
    return counts_of(predict) | {"saved_bytes": 0, "gradient_bytes": 0}


# ---- the table -------------------------------------------------------------------------------------------------------


def differences(committed: Row, row: Row) -> Iterator[str]:
    """Yield each count that differs from the committed row."""
    exact = committed.torch == row.torch
    for name in COUNTS:
        before, now = getattr(committed, name), getattr(row, name)
        if now > (before if exact else ALLOWANCE * before):
            yield f"{row.name}: {name} {before:,} → {now:,}"
        elif exact and now < before:
            yield f"{row.name}: {name} {before:,} → {now:,}, better than in the table: run python -m bench.counts"


def compare(rows: Sequence[Row], table: Sequence[Row]) -> Iterator[str]:
    """Differences between counts and `table`, the part of the committed table that was selected."""
    return tables.compare(rows, table, TABLE, "counts", differences)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the table and do not write it")
    classes = [size.C for size in SIZES]
    parser.add_argument("--classes", nargs="+", type=int, choices=classes, default=classes, help="only these numbers")
    args = parser.parse_args(arguments)
    if not launching.installed:
        parser.error("Triton is not installed, and its launches are counted: pip install triton")
    measure.keep_freed_memory()  # else half of the time is the system clearing pages
    rows = [row for size in SIZES if size.C in args.classes for row in rows_of(size)]
    if not args.check:
        columns = ("what", "model", "C", "K", "precision", "memory", *COUNTS)
        tables.show(columns, [[getattr(row, name) for name in columns] for row in rows])
        if not args.no_save and set(args.classes) == set(classes):
            tables.write(TABLE, rows)
            print(f"wrote {TABLE}")
        return
    table = [row for row in tables.read(TABLE, Row) if row.C in args.classes]
    tables.exit_with(list(compare(rows, table)), f"{len(rows)} rows")


if __name__ == "__main__":
    main()
