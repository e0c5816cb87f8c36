"""Time and memory of a SkipCLIP training step with its update, by torch.optim.SGD and by FusedSGD inside backward.

    python -m bench.memory --model ViT-B-16 --batch 4 --classes 50 --memory min

Checks first that two steps with either optimizer give the same weights. Then measures, for each: the bytes saved for
backward, the peak bytes of gradients, the rise of memory during a step (in a process of its own: resident memory, on a
GPU max_memory_allocated), and the time, in turn. Appends to bench/results/DEVICE/memory.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import skipkernels as sk
from skipkernels import testing
from skipkernels.testing import relative_error

from . import measure
from .inputs import parser, random_inputs
from .rows import save
from .training import skip_step

OPTIMIZERS = {"torch.optim.SGD": torch.optim.SGD, "FusedSGD": sk.FusedSGD}
# Difference of the weights relative to their change in two steps: the updates round in different places, which changes
# the second gradient; in bf16 a weight may round to another multiple of 2⁻⁸.
_SLACK = {"fp32": 1e-4, "bf16": 1e-2}


class Training:
    """A training step with new weights, the same on each call except for the optimizer."""

    def __init__(self, args: argparse.Namespace, optimizer: str):
        inputs = random_inputs(args.model, args.batch, args.classes, args.device)
        self.step = skip_step(inputs, args.skip_layers, args.memory, args.precision)
        self.weights = [weight for weight in self.step.model.parameters() if weight.requires_grad]
        self.optimizer = OPTIMIZERS[optimizer](self.weights, lr=1e-2, momentum=0.9, weight_decay=5e-4)

    def __call__(self) -> None:
        self.step.loss().backward()
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def flat(self) -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in self.weights])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, batch=4, classes=50, rounds=7)
    memory = "saved for backward: outputs (fast) or inputs of blocks (min)"
    options.add_argument("--memory", choices=("fast", "min"), default="fast", help=memory)
    args = options.parse_args(arguments)
    trainings = {name: Training(args, name) for name in OPTIMIZERS}
    refuse_other_weights(*trainings.values(), args.precision)
    sizes = {}
    for name, each in trainings.items():
        saved, gradients = testing.saved_bytes(each.step.loss), testing.gradient_bytes(each.step.loss())
        each.update()
        peak = measure.in_new_process(peak_bytes, args, name)
        columns = {"saved_mib": saved, "gradients_mib": gradients, "peak_mib": peak}
        sizes[name] = {column: round(size / 2**20, 1) for column, size in columns.items()}
    seconds = measure.time_alternately(trainings, args.rounds, args.device)
    rows = []
    for name, each in trainings.items():
        row = {"optimizer": name, "model": args.model, "B": args.batch, "C": args.classes, "K": each.step.K}
        row |= {"skip_layers": args.skip_layers, "precision": args.precision, "memory": args.memory}
        rows.append(row | measure.milliseconds(seconds[name]) | sizes[name])
        print(f"{name:15} {measure.shown(rows[-1])}, gradients of {rows[-1]['gradients_mib']} MiB at once")
    save(args, rows, "memory")


def refuse_other_weights(theirs: Training, ours: Training, precision: str) -> None:
    """Run two steps with each optimizer, the second with momentum; exit if the resulting weights differ."""
    start = theirs.flat()
    for each in (theirs, ours, theirs, ours):
        each()
    off = relative_error(ours.flat() - start, theirs.flat() - start)
    print(f"after two steps in {precision} the weights differ by {off:.1e} of how far they moved")
    if not off <= _SLACK[precision]:
        raise SystemExit("the two optimizers leave other weights: no measurement")


def peak_bytes(args: argparse.Namespace, optimizer: str) -> int:
    """Bytes above the memory between steps, which holds weights and momentum."""
    return testing.peak_bytes(Training(args, optimizer), args.device)


if __name__ == "__main__":
    main()
