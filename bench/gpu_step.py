"""Our training step with its update on a GPU, eager and as a CUDA graph: times, launches, and bits of the weights."""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import skipkernels as sk
from skipkernels import testing
from skipkernels.app.devices import autocast
from skipkernels.graphs.graphed_step import WARMUP, GraphedStep

from . import measure
from .flops import flops_of
from .inputs import Case, Inputs, random_inputs
from .measure import OURS
from .training import Published, Step, skip_step, with_update

GRAPHED, PUBLISHED = "skipkernels as a graph", "published"
COMPILED = {"default": "published, compiled", "reduce-overhead": "published, compiled with CUDA graphs"}  # by mode
# PyTorch allocates nothing in a replay, so a peak above the memory before it would be about 0.
_REPLAYED = (GRAPHED, COMPILED["reduce-overhead"])
_CALLS = 10  # steps between two events, as in training: the host does not wait between them
# Least number of times that a step with its update reads or writes its weights: read in forward and in backward, and
# the gradient written; then weight, gradient and momentum read, weight and momentum written.
_PASSES = 3 + 5
_REPLAYS = 4  # that are compared with eager steps


# ---- the step --------------------------------------------------------------------------------------------------------


def inputs_of(case: Case) -> Inputs:
    """Random inputs, with a model of their own."""
    inputs = _random_inputs(case.model, case.batch, case.classes, case.device)
    return inputs._replace(model=copy.deepcopy(inputs.model))


_random_inputs = functools.cache(random_inputs)  # seconds for each model


class Graphed(NamedTuple):
    """Our step with its update; on a GPU a replayed CUDA graph from the call after WARMUP on."""

    run: Callable[[], sk.SkipOutput]
    step: GraphedStep
    clip: sk.SkipCLIP


def graphed_step(case: Case, precision: str, *, blocks: int | None = None, captures: bool = True) -> Graphed:
    """Make the step, of `blocks` in each tower if given; without `captures` its calls run the loop."""
    model, tokens, images, labels = inputs_of(case)
    skip: Any = case.skip_layers
    if blocks is not None:
        skip = tuple(len(tower.transformer.resblocks) - blocks for tower in (model.visual, model))
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, memory="fast")
    features = clip.encode_lower(images)
    optimizer = sk.FusedSGD(clip.trainable_parameters(), lr=1e-5, momentum=0.9)
    with autocast(precision, features.device):
        # Batches of another size than that of a graph run the loop.
        step = sk.graphed(clip, optimizer, batch_size=len(labels) if captures else len(labels) + 1)

    def run() -> sk.SkipOutput:
        with autocast(precision, features.device):
            return step(features, labels)

    return Graphed(run, step, clip)


# ---- times and launches ----------------------------------------------------------------------------------------------


def rows_of(args: argparse.Namespace, case: Case, compiles: bool) -> list[dict[str, Any]]:
    """Rows of our step, of the published one, eager or by torch.compile, and last of ours as a graph."""
    inputs, on_gpu = inputs_of(case), case.device.type == "cuda"
    published = Published(inputs, case.skip_layers)
    ours = skip_step(inputs, case.skip_layers, "fast", args.precision, published)
    floor = floor_of(ours, case.device)
    steps = steps_of(case, ours, published, compiles)
    seconds = measure.time_alternately(steps, args.rounds, case.device, calls=_CALLS if on_gpu else 1)
    best = seconds.get(GRAPHED, seconds[OURS])
    of_case = {"model": case.model, "B": case.batch, "C": case.classes, "K": ours.K, "skip_layers": case.skip_layers}
    rows = []
    for name, times in seconds.items():
        row = {"implementation": name, **of_case, "precision": args.precision}
        row |= measure.milliseconds(times, 3) | {"rounds": args.rounds}
        row["peak_mib"] = "" if name in _REPLAYED else peak_mib(steps[name], case.device)
        row |= {"floor_ms": round(1000 * floor, 3), "above_floor": round(measure.quantile(times, 0.5) / floor, 2)}
        row["faster"] = "" if name in (OURS, GRAPHED) else round(measure.median_ratio(times, best), 2)
        row["note"] = "a replay allocates nothing, so peak_mib is empty" if name in _REPLAYED else ""
        rows.append(row)
    if GRAPHED in steps:
        rows[-1] |= count_launches(steps[GRAPHED], case.device)
    elif on_gpu:
        rows[0]["note"] = "no graph was captured"
    return rows


def steps_of(case: Case, ours: Step, published: Published, compiles: bool) -> dict[str, Callable[[], Any]]:
    """The steps to time, with their updates, all of which have run; a graph that was not captured is left out."""
    steps: dict[str, Callable[[], Any]] = {OURS: with_update(ours, sk.FusedSGD)}
    if compiles:
        steps |= {name: with_update(published.compiled(ours.precision, mode)) for mode, name in COMPILED.items()}
    else:
        steps[PUBLISHED] = with_update(published.step(ours.precision))
    graph = graphed_step(case, ours.precision) if case.device.type == "cuda" else None
    if graph is not None:
        steps[GRAPHED] = graph.run
    for run in steps.values():
        for _ in range(WARMUP + 1):  # the last captures a graph
            run()
    if graph is not None and not graph.step.is_captured:
        del steps[GRAPHED]
    return steps


def peak_mib(run: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of a call that has run before, above the memory before it."""
    return round(testing.peak_bytes(run, device, warm_up=False) / 2**20)


def floor_of(step: Step, device: torch.device) -> float:
    """Least seconds of a step with its update: products at the rate of a large one, then its weights by copies."""
    trained = sum(weight.nbytes for weight in step.model.parameters() if weight.requires_grad)
    flops = flops_of(step)
    step.model.zero_grad()
    return measure.floor(flops, measure.DTYPES[step.precision], _PASSES * trained, device)


def count_launches(run: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Kernels, and copies and fills of memory, that a call runs on a GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        measure.synchronize(device)
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": len(names) - copies, "copies": copies}


# ---- bits ------------------------------------------------------------------------------------------------------------


def differences(case: Case, precision: str) -> dict[str, str]:
    """Differences of the weights after eager steps from those after as many others, and after replays.

    Each is relative to its weight, the largest of all: 0 if all bits are equal, infinite if the steps keep other
    classes. PyTorch's attention may add gradients in another order in each run: then replays cannot have the bits of
    eager steps either.
    """
    first, second, replayed = (weights_after_steps(case, precision, captures) for captures in (False, False, True))
    found = {"eager_difference": difference(first, second), "replay_difference": difference(first, replayed)}
    return {column: f"{value:.1e}" if value else "0" for column, value in found.items()}


Trained = tuple[list[list[int]], list[Tensor]]
"""Classes of the steps, and the weights after them."""


def weights_after_steps(case: Case, precision: str, captures: bool) -> Trained:
    run, _, clip = graphed_step(case, precision, captures=captures)
    clip.sampler.tail = "fixed"  # the K of a graph and of other steps are equal
    classes = [run().class_ids.tolist() for _ in range(WARMUP + 1 + _REPLAYS)]
    return classes, [weight.detach() for weight in clip.trainable_parameters()]


def difference(one: Trained, other: Trained) -> float:
    if one[0] != other[0]:
        return math.inf
    return max(testing.relative_error(y, x) for x, y in zip(one[1], other[1], strict=True))
