"""Count the operations, bytes, calls and launches of a step. They are the same on every machine.

    python -m bench.counts                     count all and write bench/results/counts.csv
    python -m bench.counts --check             count all and compare with the table; write nothing
    python -m bench.counts --check --model vit-tiny

For training steps of SkipCLIP, and `predict` from features after the weights have changed:

    flops              of matrix products (bench/flops.py)
    saved_bytes        bytes that autograd saves for backward, without parameters
    gradient_bytes     peak bytes of leaf gradients during backward
    calls              PyTorch operators that would launch a kernel on a GPU, and our operators
    launches           PyTorch operators, and the kernels that our Triton launchers would launch
    triton             those of our launchers
    waits              host syncs: a value is read, or a shape depends on values

Matrix products return zeros and are not computed, since the counts depend on shapes only. All scores are then equal and
the first classes are kept. Processor, threads and the implementation of our operators change nothing.

Calls, launches and waits of a step of SkipCLIP are those of `graphed` on a GPU, update included: the step runs on
the meta device. A call of a multi-tensor operator counts as one launch. FLOPs and bytes are those on a CPU, where
suffixes are packed without spare rows.

`--check` fails if a count is larger than in the table, or smaller, so that an improvement is recorded. If another minor
version of torch made the table, it fails only if a count is larger by more than ALLOWANCE.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import skipkernels as sk
from skipkernels import casts, testing
from skipkernels.casts import Casts
from skipkernels.ops import launching, registration
from skipkernels.selection import RankSampler

from . import measure, tables
from .flops import flops_of
from .inputs import autocast, random_inputs
from .launches import ARCHITECTURES, recording
from .meta_device import WithoutProducts, meta_as_gpu
from .rows import PRECISIONS, RESULTS, command

TABLE = RESULTS / "counts.csv"
ALLOWANCE = 1.05  # for another version of torch, which may split an operator into others
COUNTS = ("flops", "saved_bytes", "gradient_bytes", "calls", "launches", "triton", "waits")
STEP, PREDICT = "SkipCLIP, step", "SkipCLIP, predict"
SGD, IN_BACKWARD, KEPT = "FusedSGD", "FusedSGD in backward", "FusedSGD, kept casts"
BATCH = 4
_CPU = torch.device("cpu")


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
    optimizer: str
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
        return self[:8]

    @property
    def name(self) -> str:
        options = (self.precision, f"memory={self.memory}" if self.memory else "", self.optimizer)
        return f"{self.what} ({self.model}, B{self.B}-C{self.C}-K{self.K}, {', '.join(filter(None, options))})"


# ---- counting --------------------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_)
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def waits(operator: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    """True if the host of a GPU would wait for values of the call."""
    if operator.overloadpacket in _INDEXED:  # by a mask: its true elements have to be counted
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return not _DEPENDS_ON_VALUES.isdisjoint(operator.tags)


# Operators that only allocate. Views are known by their schema.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


def launches_a_kernel(operator: torch._ops.OpOverload, args: Sequence[Any], out: Any) -> bool:
    """True unless a PyTorch operator makes a view, only allocates, or copies from the host, as kept ranks are copied.

    One that launches several kernels counts once.
    """
    if operator.overloadpacket in (_aten.copy_, _aten._to_copy):
        return all(x.device == out.device for x in args if isinstance(x, Tensor))
    if operator is torch.ops.aten.contiguous.default:
        return not args[0].is_contiguous()
    return not operator.is_view and operator.overloadpacket.__name__ not in _ALLOCATIONS


class _Calls(TorchDispatchMode):
    """Count calls; with `gpu` only those with a tensor on the meta device, which stands in for a GPU."""

    def __init__(self, *, gpu: bool = False) -> None:
        super().__init__()
        self.torch = self.waits = 0
        self.ours: list[tuple[str, tuple[Any, ...]]] = []
        self._gpu = gpu

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **kwargs or {})
        if self._gpu and not any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs, out))):
            return out
        if operator.namespace == registration.NAMESPACE:
            # Not the tensors themselves: autograd copies a gradient that is held elsewhere.
            self.ours.append((operator._opname, tree_map_only(Tensor, Tensor.detach, args)))
        else:
            self.torch += launches_a_kernel(operator, args, out)
            self.waits += waits(operator, args)
        return out


def launches_of(op: str, arguments: Sequence[Any]) -> int:
    """Kernels that one of our operators launches on a GPU: Triton kernels and PyTorch's within its launcher."""
    arguments = tree_map_only(Tensor, lambda x: x.to("meta"), tuple(arguments))
    with recording(ARCHITECTURES["sm_80"]) as recorded, _Calls() as calls:
        registration.definitions[op].launch(*arguments)
    return calls.torch + len(recorded)


def counts_of(function: Callable[[], Any], *, gpu: bool = False) -> dict[str, int]:
    """FLOPs, calls, launches and waits of one call; with `gpu`, of its work on the meta device."""
    calls = _Calls(gpu=gpu)

    def counted() -> None:
        with calls:
            function()

    flops = flops_of(counted)
    triton = sum(launches_of(op, arguments) for op, arguments in calls.ours)
    counts = {"calls": calls.torch + len(calls.ours), "launches": calls.torch + triton, "triton": triton}
    return {"flops": flops, **counts, "waits": calls.waits}


# ---- rows ------------------------------------------------------------------------------------------------------------


def rows_of(size: Size) -> list[Row]:
    inputs = random_inputs(size.model, BATCH, size.C, _CPU)
    K, sampling = without_tail(size.C, BATCH)
    rows: list[Row] = []

    def add(what: str, precision: str, memory: str, optimizer: str, counts: dict[str, int]) -> None:
        version = ".".join(torch.__version__.split(".")[:2])  # minor
        rows.append(Row(what, size.model, BATCH, size.C, K, precision, memory, optimizer, **counts, torch=version))

    with WithoutProducts():
        for memory, optimizers in (("fast", (SGD, IN_BACKWARD, KEPT)), ("min", (SGD,))):
            clip = sk.SkipCLIP(inputs.model, inputs.tokens, skip_layers=size.skip_layers, memory=memory, **sampling)
            features = clip.encode_lower(inputs.images)
            for precision in PRECISIONS:
                counts = _step(clip, features, inputs.labels, precision)
                for optimizer in optimizers:
                    if optimizer == KEPT and precision == "fp32":
                        continue  # nothing is cast
                    counts |= _on_a_gpu(clip, features, inputs.labels, precision, optimizer)
                    add(STEP, precision, memory, optimizer, counts)
        for precision in PRECISIONS:
            add(PREDICT, precision, "", "", _predict(clip, features, precision))
    return rows


def without_tail(classes: int, batch: int) -> tuple[int, dict[str, Any]]:
    """The default number of kept classes, and options of SkipCLIP that keep as many without a random tail.

    Which classes are drawn depends on the machine, and their prompts have different lengths.
    """
    K = RankSampler().expected_keep(classes, batch)
    return K, {"keep_ratio": K - 1, "max_keep": K - 1, "decay": 1e-6}


def _step(clip: sk.SkipCLIP, features: Tensor, labels: Tensor, precision: str) -> dict[str, int]:
    """Counts of forward, backward and update."""

    def loss() -> Tensor:
        with autocast(_CPU, precision):
            return clip(features, labels).loss

    update = sk.FusedSGD(clip.trainable_parameters(), lr=0.0, momentum=0.9, in_backward=False)
    saved, gradients = testing.saved_bytes(loss), []

    def step() -> None:
        gradients.append(testing.gradient_bytes(loss()))
        update.step()
        update.zero_grad()

    step()  # the first makes the momentum buffers
    counts = counts_of(step)
    update.close()
    return counts | {"saved_bytes": saved, "gradient_bytes": gradients[-1]}


def _on_a_gpu(clip: sk.SkipCLIP, features: Tensor, labels: Tensor, precision: str, optimizer: str) -> dict[str, int]:
    """Calls, launches and waits of a step on a GPU, for which the meta device stands in."""
    clip = copy.deepcopy(clip)
    clip(features, labels)  # caches the text features at the cut, which needs values
    clip.to("meta")
    features, labels = features.to("meta"), labels.to("meta")
    groups = clip.parameter_groups(text_lr=0.0, image_lr=0.0)
    step = sk.graphed(clip, sk.FusedSGD(groups, momentum=0.9, in_backward=optimizer == IN_BACKWARD), batch_size=BATCH)
    kept = Casts(clip.trainable_parameters()) if optimizer == KEPT else None

    def run() -> None:
        with autocast(_CPU, precision), casts.used(kept):
            step(features, labels)

    with meta_as_gpu():
        counts_of(run, gpu=True)  # makes momentum buffers, and tables of addresses of the update
        counts = counts_of(run, gpu=True)
    return {name: counts[name] for name in ("calls", "launches", "triton", "waits")}


def _predict(clip: sk.SkipCLIP, features: Tensor, precision: str) -> dict[str, int]:
    def predict() -> Tensor:
        with autocast(_CPU, precision):
            return clip.predict(features)

    predict()
    with torch.no_grad():
        for parameter in clip.trainable_parameters():  # as a step changes them: class embeddings are recomputed
            parameter.mul_(1.001)
    return counts_of(predict) | {"saved_bytes": 0, "gradient_bytes": 0}


# ---- the table -------------------------------------------------------------------------------------------------------


def worse_than(committed: Row, row: Row) -> Iterator[str]:
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
    return tables.compare(rows, table, TABLE, "counts", worse_than)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the table and do not write it")
    parser.add_argument("--model", nargs="+", choices=dict.fromkeys(size.model for size in SIZES), help="only these")
    classes = dict.fromkeys(size.C for size in SIZES)
    parser.add_argument("--classes", nargs="+", type=int, choices=classes, help="only these numbers of classes")
    args = parser.parse_args(arguments)
    if not launching.installed:
        parser.error("Triton is not installed, and its launches are counted: pip install triton")
    measure.keep_freed_memory()  # else half of the time is the system clearing pages

    def selected(size: Size | Row) -> bool:
        return (not args.model or size.model in args.model) and (not args.classes or size.C in args.classes)

    sizes = list(filter(selected, SIZES))
    rows = [row for size in sizes for row in rows_of(size)]
    if not args.check:
        columns = ("what", "model", "C", "K", "precision", "memory", "optimizer", *COUNTS)
        tables.show(columns, [[getattr(row, name) for name in columns] for row in rows])
        if not (args.no_save or args.model or args.classes):
            tables.write(TABLE, rows)
            print(f"wrote {TABLE}")
        return
    problems = list(compare(rows, [row for row in tables.read(TABLE, Row) if selected(row)]))
    for problem in problems:
        print(problem)
    print(f"{len(rows)} rows, {len(problems)} problems")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
