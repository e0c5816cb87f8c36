"""What a training step of SkipCLIP takes, its update included: with torch.optim.SGD, and with FusedSGD inside backward.

    python -m bench.memory --model ViT-B-16 --batch 4 --classes 50 --memory min

Checks first that two steps with either leave the same weights. Then, for each: the bytes saved for backward, the most
bytes of gradients that are alive at once, how far memory rises during a step (in a process of its own: resident memory,
on a GPU max_memory_allocated), and the time, taken in turn. Appends to bench/results/DEVICE/memory.csv.
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
from tests.tolerances import relative_error

from . import measure
from .inputs import autocast, random_inputs
from .training import step_parser

_OPTIMIZERS = {"torch.optim.SGD": torch.optim.SGD, "FusedSGD": sk.FusedSGD}
_HYPER = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4}
# Of how far the weights moved in two steps, the two optimizers' may differ by this: they round in other places, and the
# second gradient sees it, in bf16 where a weight falls on the other side of a step of 2⁻⁸.
_SLACK = {"fp32": 1e-4, "bf16": 1e-2}


class Training(NamedTuple):
    """Forward, backward and update, as often as it is called.

    Attributes:
        K: Classes that take part.
        weights: What trains.
        loss: The forward.
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
    saved = {name: measure.saved_bytes(each.loss) for name, each in trainings.items()}
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
    """The same on each call, but for the optimizer."""
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
    """Two steps of each, the second with a momentum.

    Raises:
        SystemExit: If they do not leave the same weights.
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
    """Most bytes of gradients alive at once during a step."""
    most = measure.gradient_bytes(each.loss())
    each.update()
    return most


def in_a_process_of_its_own(args: argparse.Namespace, optimizer: str) -> int:
    """How far memory rises during a step: nothing that another one held is there to be used again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(peak, args, optimizer).result()


def peak(args: argparse.Namespace, optimizer: str) -> int:
    """Bytes above what is held between steps, weights and momentum included."""
    return measure.peak_bytes(training(args, optimizer), args.device)


if __name__ == "__main__":
    main()
