"""Stages of bench/gpu.sh, besides the tests, the benchmarks of the operators and `bench.tune`.

    python -m bench.gpu machine         device, versions and limits of time, and which peers can run
    python -m bench.gpu step            time of a step with its update: published, also compiled; ours, also as a graph
    python -m bench.gpu full            time of training a whole CLIP: its own blocks, also compiled, and `sk.fuse`
    python -m bench.gpu profile_step    the kernels of our step that take longest
    python -m bench.gpu one_step        our step, between the calls that start and stop Nsight Compute
    python -m bench.gpu smoke           a small call of every operator, for compute-sanitizer

`step` checks the gradients of ours against the published step first; on a GPU it also counts the launches and compares
bits: of eager steps with each other, then of replays with eager steps. With --all-shapes it takes six shapes, the most
important first: all of them without torch.compile, then with it; what has not begun after --seconds is left out. Lines
that begin with "result: " are those that the script repeats. On a machine without a GPU all run on the CPU, `step`
without the graph and torch.compile.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import skipkernels as sk
from skipkernels import testing
from skipkernels.graphs.graphed_step import WARMUP, GraphedStep
from skipkernels.ops import OPERATORS, launching

from . import fuse, measure, peers
from .flops import flops_of
from .inputs import Inputs, autocast, parser, random_inputs
from .measure import OURS
from .operators.record import small_call
from .rows import machine_columns
from .training import COMPILER_MODES, Published, Skip, Step, skip_step, with_update

GRAPHED, PUBLISHED = "skipkernels as a graph", "published"
COMPILED = {"default": "published, compiled", "reduce-overhead": "published, compiled with CUDA graphs"}  # by mode
GOALS = {4: 3, 32: 2}  # on an H100: times as fast as the compiled published step, by batch
_LISTED = 40  # kernels
_CALLS = 10  # steps between two events, as in training: the host does not wait between them
# Least number of times that a step with its update reads or writes its weights: read in forward and in backward, and
# the gradient written; then weight, gradient and momentum read, weight and momentum written.
_PASSES = 3 + 5
_REPLAYS = 4  # that are compared with eager steps
_PROFILED = 2  # blocks of each tower in the step for Nsight Compute
_SHAPES = ((4, 1000), (32, 1000), (4, 100), (32, 100), (4, 10000), (32, 10000))  # images and classes
# An H100 with eight cores has the limits of bench/gpu.sh; a slower machine up to four times these.
_BYTES_PER_SECOND, _CORES, _MOST_SCALE = 2.5e12, 8, 4


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, batch=4, classes=1000, rounds=20, precision="bf16")
    options.add_argument("stage", choices=[function.__name__ for function in STAGES])
    options.add_argument("--all-shapes", action="store_true", help="B = 4 and 32, C = 100, 1,000 and 10,000")
    options.add_argument("--seconds", type=float, default=math.inf, help="begin no other shape after this time")
    args = options.parse_args(arguments)
    {function.__name__: function for function in STAGES}[args.stage](args)


def machine(args: argparse.Namespace) -> None:
    """Print device and versions, the peers, by how much limits of time are scaled, and all packages."""
    found = machine_columns(args.device)
    triton = launching.triton.__version__ if launching.installed else "not installed"
    absent = []
    for name, peer in all_peers(args.device).items():
        print(f"peer {name}: {peer.note or 'part of torch'}", flush=True)
        if peer.function is None:
            absent.append(name)
    tell(f"{found['device']}, torch {found['torch']}, Triton {triton}, commit {found['commit']}")
    tell(f"peers that cannot run: {', '.join(absent) or 'none'}")
    scale = scale_of(measure.bandwidth(args.device), len(os.sched_getaffinity(0)))
    print(f"limits of time: {round(100 * scale)} %")
    print(*sorted(f"{each.name}=={each.version}" for each in metadata.distributions()), sep="\n")


def tell(text: str) -> None:
    """Print a line that the script repeats."""
    print(f"result: {text}", flush=True)


def scale_of(bandwidth: float, cores: int) -> float:
    """The factor of all limits of time, from bytes per second of a copy and the cores that compile."""
    return min(max(1.0, _BYTES_PER_SECOND / bandwidth, _CORES / cores), _MOST_SCALE)


def all_peers(device: torch.device) -> dict[str, peers.Peer]:
    """The peers, at a dtype that all support."""
    return peers.cross_entropies(device, torch.bfloat16) | peers.layer_norms(device) | peers.attentions(device)


def step(args: argparse.Namespace) -> None:
    """Time steps with their updates, in turn; first of all shapes without torch.compile."""
    shapes, begin = _SHAPES if args.all_shapes else ((args.batch, args.classes),), time.monotonic()
    # The goal is one of bf16, and compilation takes half a minute.
    for compiles in (False, True) if args.device.type == "cuda" and args.precision == "bf16" else (False,):
        for B, C in shapes:
            shape = argparse.Namespace(**vars(args) | {"batch": B, "classes": C})
            name = f"{args.precision}, {B} images, {C} classes" + (", compiled" if compiles else "")
            if time.monotonic() - begin > args.seconds:
                tell(f"{name}: no time left")
                continue
            try:
                tell(f"{name}: {step_of_shape(shape, compiles, compares=not compiles and (B, C) == shapes[0])}")
            except torch.OutOfMemoryError:
                tell(f"{name}: out of memory")
            gc.collect()


def step_of_shape(args: argparse.Namespace, compiles: bool, compares: bool) -> str:
    """Time the steps of a shape: the published one, eager or by torch.compile, and ours, eager and as a graph."""
    inputs, on_gpu = inputs_of(args), args.device.type == "cuda"
    published = Published(inputs, args.skip_layers)
    ours = skip_step(inputs, args.skip_layers, "fast", args.precision, None if compiles else published)
    floor = floor_of(ours, args.device)
    steps: dict[str, Callable[[], Any]] = {OURS: with_update(ours)}
    if compiles:
        for mode in COMPILER_MODES:
            steps[COMPILED[mode]] = with_update(published.compiled(args.precision, mode))
    else:
        steps[PUBLISHED] = with_update(published.step(args.precision))
    if on_gpu:
        steps[GRAPHED], graph = graphed_step(args)
    for run in steps.values():
        for _ in range(WARMUP + 1):  # the last captures a graph
            run()
    notes = []
    if on_gpu and graph.is_captured:
        notes.append(launches_of(steps[GRAPHED], args.device))
        if compares:
            notes.append(comparison(*differences(args)))
    elif on_gpu:  # its steps are eager
        notes.append("no graph was captured")
        del steps[GRAPHED]
    seconds = measure.time_alternately(steps, args.rounds, args.device, calls=_CALLS if on_gpu else 1)
    columns = {name: measure.milliseconds(times, 3) for name, times in seconds.items()}
    for name, row in columns.items():
        row["peak_mib"] = round(testing.peak_bytes(steps[name], args.device, warm_up=False) / 2**20)
        print(f"{name:21} {measure.shown(row)}", flush=True)
    best = GRAPHED if GRAPHED in steps else OURS
    times = [f"{name} {row['p50_ms']} ms" for name, row in columns.items()]
    above = columns[best]["p50_ms"] / (1000 * floor)
    faster = [
        f"{measure.median_ratio(seconds[name], seconds[best]):.2f} times as fast as {name}{goal_of(args, name)}"
        for name in steps
        if name not in (OURS, GRAPHED)
    ]
    return "; ".join([", ".join(times), f"{above:.2f} times the floor of {1000 * floor:.3f} ms", *notes, *faster])


def goal_of(args: argparse.Namespace, name: str) -> str:
    """The goal of our speed-up, which is one of an H100 over the compiled step."""
    is_h100 = args.device.type == "cuda" and "H100" in torch.cuda.get_device_name(args.device)
    return f" (goal: {GOALS[args.batch]})" if is_h100 and name in COMPILED.values() and args.batch in GOALS else ""


def full(args: argparse.Namespace) -> None:
    """Time training of a whole CLIP on pairs: with its own blocks, the same compiled, and by `sk.fuse`."""
    inputs = _random_inputs(args.model, args.batch, args.batch, args.device)
    inputs.model.train().requires_grad_(True)
    models = fuse.implementations(inputs.model, ("eager", "compile", "fuse-fast"))
    rows = fuse.rows_of(args, models, inputs, "pairs", args.precision)
    tell(f"{args.batch} pairs: " + ", ".join(f"{row['implementation']} {row['p50_ms']} ms" for row in rows))


def floor_of(step: Step, device: torch.device) -> float:
    """Least seconds of a step with its update: products at the rate of a large one, then its weights by copies."""
    trained = sum(weight.nbytes for weight in step.model.parameters() if weight.requires_grad)
    flops = flops_of(step)
    step.model.zero_grad()
    return measure.floor(flops, measure.DTYPES[step.precision], _PASSES * trained, device)


def inputs_of(args: argparse.Namespace) -> Inputs:
    """Random inputs, with a model of their own."""
    inputs = _random_inputs(args.model, args.batch, args.classes, args.device)
    return inputs._replace(model=copy.deepcopy(inputs.model))


_random_inputs = functools.cache(random_inputs)  # seconds for each model


def graphed_step(
    args: argparse.Namespace, blocks: int | None = None
) -> tuple[Callable[[], sk.SkipOutput], GraphedStep]:
    """Our step with its update, of `blocks` in each tower if given; on a GPU a replayed CUDA graph."""
    model, tokens, images, labels = inputs_of(args)
    skip: Skip = args.skip_layers
    if blocks is not None:
        depths = [len(tower.transformer.resblocks) for tower in (model.visual, model)]
        skip = depths[0] - blocks, depths[1] - blocks
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, memory="fast")
    features, labels = clip.encode_lower(images), labels.contiguous()
    optimizer = sk.FusedSGD(clip.trainable_parameters(), lr=1e-5, momentum=0.9)
    with autocast(features.device, args.precision):
        step = sk.graphed(clip, optimizer, batch_size=len(labels))

    def run() -> sk.SkipOutput:
        with autocast(features.device, args.precision):
            return step(features, labels)

    return run, step


def differences(args: argparse.Namespace) -> tuple[float, float]:
    """Largest relative difference of a weight after eager steps, from as many others, and after replays.

    It is 0.0 if all bits are equal, and infinite if the steps keep other classes. PyTorch's attention may add gradients
    in another order in each run: then replays cannot have the bits of eager steps either.
    """
    first, second, replayed = (weights_after_steps(args, captures) for captures in (False, False, True))
    return difference(first, second), difference(first, replayed)


Trained = tuple[list[list[int]], list[Tensor]]
"""Classes of the steps, and the weights after them."""


def weights_after_steps(args: argparse.Namespace, captures: bool) -> Trained:
    run, step = graphed_step(args)
    if not captures:
        step._batch_size = -1  # no batch has this size, so nothing is captured
    classes = [run().class_ids.tolist() for _ in range(WARMUP + 1 + _REPLAYS)]
    return classes, [weight.detach() for weight in step._clip.trainable_parameters()]


def difference(one: Trained, other: Trained) -> float:
    if one[0] != other[0]:
        return math.inf
    return max(
        0.0 if torch.equal(x, y) else max(testing.relative_error(y, x), sys.float_info.min)
        for x, y in zip(one[1], other[1], strict=True)
    )


def comparison(eager: float, replayed: float) -> str:
    """The differences in words. If eager steps differ from each other, replays cannot have their bits."""
    if eager:
        return f"eager steps differ from each other by {eager:.1e}, replays from them by {replayed:.1e}"
    if replayed == math.inf:
        return "replays keep other classes (goal: equal bits)"
    return f"replays differ by {replayed:.1e} (goal: equal bits)" if replayed else "replays equal in all bits"


def launches_of(run: Callable[[], Any], device: torch.device) -> str:
    """Kernels, and copies and fills of memory, that a call runs on a GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        measure.synchronize(device)
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return f"{len(names) - copies} kernels and {copies} copies or fills"


def one_step(args: argparse.Namespace) -> None:
    """Run a step for Nsight Compute, which profiles only what is launched between two calls of the profiler's API.

    The step is eager: it launches the kernels of a replay, and versions of Nsight Compute differ in whether they see
    the kernels of a graph. The steps before it compile kernels and create the state of the optimizer. Two blocks of
    each tower are left, one of them pooled: the others have the same launches, and each launch is repeated many times.
    """
    run, _ = graphed_step(args, _PROFILED)
    for _ in range(WARMUP - 1):
        run()
    measure.synchronize(args.device)
    with torch.cuda.profiler.profile() if args.device.type == "cuda" else contextlib.nullcontext():
        print(f"loss: {run().loss.item():.6f}")  # waits for the device


def profile_step(args: argparse.Namespace) -> None:
    (run, _), on_gpu = graphed_step(args), args.device.type == "cuda"
    for _ in range(WARMUP + 1 if on_gpu else 1):  # the last captures a graph
        run()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        measure.synchronize(args.device)
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=_LISTED, max_name_column_width=80))


def smoke(args: argparse.Namespace) -> None:
    for op in OPERATORS:
        call = small_call(op).on(args.device)
        total = call.total(*(x.requires_grad_() for x in call.inputs.values()))
        if call.inputs:
            total.backward()
        print(f"{op}: {total.item():.6f}", flush=True)


STAGES = (machine, step, full, profile_step, one_step, smoke)

if __name__ == "__main__":
    main()
