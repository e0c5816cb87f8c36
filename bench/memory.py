"""Time and memory of a SkipCLIP training step with its update, by torch.optim.SGD and by FusedSGD inside backward.

    python -m bench.memory --model ViT-B-16 --batch 4 --classes 50 --memory min

Checks first that two steps with either give the same weights. Then measures, for each: the bytes saved for backward,
the peak bytes of gradients, the rise of memory during a step (in a process of its own: resident memory, on a GPU
max_memory_allocated), and the time, in turn. Appends to bench/results/DEVICE/memory.csv.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

import skipkernels as sk
from skipkernels import testing
from skipkernels.testing import relative_error

from . import measure
from .inputs import autocast, random_inputs
from .training import step_parser

_OPTIMIZERS = {"torch.optim.SGD": torch.optim.SGD, "FusedSGD": sk.FusedSGD}
_HYPER = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4}
# Difference of the weights relative to their change in two steps: the optimizers round in different places, which
# changes the second gradient; in bf16 a weight may round to another multiple of 2⁻⁸.
_SLACK = {"fp32": 1e-4, "bf16": 1e-2}


class Training(NamedTuple):
    """A training step: forward, backward and update.

    Attributes:
        K: Number of kept classes.
        weights: Trainable parameters.
        loss: The forward pass.
        optimizer: Updates the weights, in backward or after it.
    """

    K: int
    weights: list[torch.nn.Parameter]
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer

    def __call__(self) -> None:
        self.loss().backward()
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(arguments: Sequence[str] | None = None) -> None:
    args = step_parser(__doc__, rounds=7).parse_args(arguments)
    trainings = {name: training(args, name) for name in _OPTIMIZERS}
    check(trainings, args.precision)
    saved = {name: testing.saved_bytes(each.loss) for name, each in trainings.items()}
    gradients = {name: gradient_bytes(each) for name, each in trainings.items()}
    seconds = measure.time_alternately(trainings, args.rounds, args.device)
    peaks = {name: in_a_process_of_its_own(args, name) for name in trainings}
    rows = []
    for name, each in trainings.items():
        times = measure.milliseconds(seconds[name])
        sizes = {"saved_mib": saved[name], "gradients_mib": gradients[name], "peak_mib": peaks[name]}
        sizes = {column: round(size / 2**20, 1) for column, size in sizes.items()}
        rows.append(
            measure.machine(args.device)
            | {"optimizer": name, "model": args.model, "B": args.batch, "C": args.classes, "K": each.K}
            | {"skip_layers": args.skip_layers, "precision": args.precision, "memory": args.memory}
            | times
            | sizes
        )
        print(
            f"{name:15} {measure.shown(times)}  {sizes['saved_mib']:.1f} MiB saved, gradients of "
            f"{sizes['gradients_mib']:.1f} MiB at once; {sizes['peak_mib']:.1f} MiB more at the peak than between steps"
        )
    theirs, ours = trainings
    print(
        f"{measure.median_ratio(seconds[ours], seconds[theirs]):.2f} of the time (median of {args.rounds} pairs), "
        f"{gradients[ours] / gradients[theirs]:.1%} of the gradients; memory={args.memory}, {args.precision}"
    )
    if not args.no_save:
        print(f"appended to {measure.append_rows(rows, 'memory')}")


def training(args: argparse.Namespace, optimizer: str) -> Training:
    """A step with new weights, the same on each call except for the optimizer."""
    model, tokens, images, labels = random_inputs(args.model, args.batch, args.classes, args.device)
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers, memory=args.memory)
    features, weights = clip.encode_lower(images), clip.trainable_parameters()

    def forward() -> sk.SkipOutput:
        with autocast(args.device, args.precision):
            return clip(features, labels)

    with torch.no_grad():
        K = len(forward().class_ids)
    return Training(K, weights, lambda: forward().loss, _OPTIMIZERS[optimizer](weights, **_HYPER))


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


def gradient_bytes(each: Training) -> int:
    """Peak bytes of gradients during a step."""
    most = testing.gradient_bytes(each.loss())
    each.update()
    return most


def in_a_process_of_its_own(args: argparse.Namespace, optimizer: str) -> int:
    """Rise of memory during a step, in a new process, so that no freed memory of another step is reused."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(peak, args, optimizer).result()


def peak(args: argparse.Namespace, optimizer: str) -> int:
    """Bytes above the memory between steps, which holds weights and momentum."""
    return testing.peak_bytes(training(args, optimizer), args.device)


if __name__ == "__main__":
    main()
