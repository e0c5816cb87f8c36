"""Time and memory of a SkipCLIP training step with its update, by torch.optim.SGD and by FusedSGD inside backward.

    python -m bench.memory --model ViT-B-16 --batch 4 --classes 50 --memory min

Checks first that two steps with either give the same weights. Then measures, for each: the bytes saved for backward,
the peak bytes of gradients, the rise of memory during a step (in a process of its own: resident memory, on a GPU
max_memory_allocated), and the time, in turn. Appends to bench/results/DEVICE/memory.csv.
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
from .inputs import random_inputs
from .training import skip_step, step_parser

_OPTIMIZERS = {"torch.optim.SGD": torch.optim.SGD, "FusedSGD": sk.FusedSGD}
_HYPER = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4}
# Difference of the weights relative to their change in two steps: the optimizers round in different places, which
# changes the second gradient; in bf16 a weight may round to another multiple of 2⁻⁸.
_SLACK = {"fp32": 1e-4, "bf16": 1e-2}


class Training:
    """A training step with new weights, the same on each call except for the optimizer.

    Attributes:
        step: Forward and backward.
        weights: Trainable parameters.
        optimizer: Updates the weights, in backward or after it.
    """

    def __init__(self, args: argparse.Namespace, optimizer: str):
        inputs = random_inputs(args.model, args.batch, args.classes, args.device)
        self.step = skip_step(inputs, args.skip_layers, args.memory, args.precision)
        self.weights = [weight for weight in self.step.model.parameters() if weight.requires_grad]
        self.optimizer = _OPTIMIZERS[optimizer](self.weights, **_HYPER)

    def __call__(self) -> None:
        self.step.loss().backward()
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(arguments: Sequence[str] | None = None) -> None:
    args = step_parser(__doc__, rounds=7).parse_args(arguments)
    trainings = {name: Training(args, name) for name in _OPTIMIZERS}
    check(trainings, args.precision)
    saved = {name: testing.saved_bytes(each.step.loss) for name, each in trainings.items()}
    gradients = {}
    for name, each in trainings.items():
        gradients[name] = testing.gradient_bytes(each.step.loss())
        each.update()
    seconds = measure.time_alternately(trainings, args.rounds, args.device)
    peaks = {name: measure.in_new_process(peak, args, name) for name in trainings}
    rows = []
    for name, each in trainings.items():
        times = measure.milliseconds(seconds[name])
        sizes = {"saved_mib": saved[name], "gradients_mib": gradients[name], "peak_mib": peaks[name]}
        sizes = {column: round(size / 2**20, 1) for column, size in sizes.items()}
        row = {"optimizer": name, "model": args.model, "B": args.batch, "C": args.classes, "K": each.step.K}
        row |= {"skip_layers": args.skip_layers, "precision": args.precision, "memory": args.memory}
        rows.append(row | times | sizes)
        print(
            f"{name:15} {measure.shown(times)}  {sizes['saved_mib']:.1f} MiB saved, gradients of "
            f"{sizes['gradients_mib']:.1f} MiB at once; {sizes['peak_mib']:.1f} MiB more at the peak than between steps"
        )
    theirs, ours = trainings
    print(
        f"{measure.median_ratio(seconds[ours], seconds[theirs]):.2f} of the time (median of {args.rounds} pairs), "
        f"{gradients[ours] / gradients[theirs]:.1%} of the gradients; memory={args.memory}, {args.precision}"
    )
    measure.save(args, rows, "memory")


def check(trainings: dict[str, Training], precision: str) -> None:
    """Run two steps with each optimizer, the second with momentum.

    Raises:
        SystemExit: If the resulting weights differ.
    """

    def flat(each: Training) -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in each.weights])

    theirs, ours = trainings.values()
    start = flat(theirs)
    for each in (theirs, ours):
        each()
        each()
    off = relative_error(flat(ours) - start, flat(theirs) - start)
    print(f"after two steps in {precision} the weights differ by {off:.1e} of how far they moved")
    if not off <= _SLACK[precision]:
        raise SystemExit("the two optimizers leave other weights: no measurement")


def peak(args: argparse.Namespace, optimizer: str) -> int:
    """Bytes above the memory between steps, which holds weights and momentum."""
    return testing.peak_bytes(Training(args, optimizer), args.device)


if __name__ == "__main__":
    main()
