"""Stages of bench/gpu.sh, besides the tests, the benchmarks of the operators and `bench.tune`.

    python -m bench.gpu check           import what the stages import, and run an operator
    python -m bench.gpu machine         device, versions and limits of time, and which peers can run
    python -m bench.gpu step            time of a step with its update: published, also compiled; ours, also as a graph
    python -m bench.gpu full            time of training a whole CLIP: its own blocks, also compiled, and `sk.fuse`
    python -m bench.gpu profile_step    the kernels of our step that take longest
    python -m bench.gpu one_step        our step, between the calls that start and stop Nsight Compute
    python -m bench.gpu smoke           a small call of every operator, for compute-sanitizer

`step` checks the gradients of ours against the published step first; on a GPU it also counts the launches and compares
bits: of eager steps with each other, then of replays with eager steps. With --all-shapes it takes six shapes, the most
important first: all of them without torch.compile, then with it; what has not begun after --seconds is left out. Rows
of `step` are appended to DEVICE/gpu_step.csv, those of `full` to DEVICE/fuse.csv. The script repeats lines that begin
with "result: ". On a machine without a GPU all run on the CPU, `step` without the graph and torch.compile.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import importlib
import math
import os
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import skipkernels as sk
from skipkernels import testing
from skipkernels.app.train.precision import autocast
from skipkernels.formatting import first_line
from skipkernels.graphs.graphed_step import WARMUP, GraphedStep
from skipkernels.ops import OPERATORS, launching

from . import fuse, measure, peers
from .flops import flops_of
from .inputs import Case, Inputs, parser, random_inputs
from .measure import OURS
from .operators.record import small_call
from .rows import machine_columns, save
from .training import Published, Step, skip_step, with_update

GRAPHED, PUBLISHED = "skipkernels as a graph", "published"
COMPILED = {"default": "published, compiled", "reduce-overhead": "published, compiled with CUDA graphs"}  # by mode
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
    options = parser(__doc__, model="ViT-B-16", batch=4, classes=1000, skip_layers=6, precision="bf16", rounds=20)
    options.add_argument("stage", choices=[function.__name__ for function in STAGES])
    options.add_argument("--all-shapes", action="store_true", help="B = 4 and 32, C = 100, 1,000 and 10,000")
    options.add_argument("--seconds", type=float, default=math.inf, help="begin no other shape after this time")
    options.add_argument("--out", type=Path, metavar="FOLDER", help="of the rows; default: bench/results")
    args = options.parse_args(arguments)
    {function.__name__: function for function in STAGES}[args.stage](args)


def check(args: argparse.Namespace) -> None:
    """Raise an error where no stage could run: without a package, a GPU, or a compiler for Triton's launchers."""
    for package in ("hypothesis", "pytest_benchmark", "xdist"):
        importlib.import_module(package)
    run_small(OPERATORS[0], args.device)


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
            case = case_of(args)._replace(batch=B, classes=C)
            name = f"{args.precision}, {B} images, {C} classes" + (", compiled" if compiles else "")
            if time.monotonic() - begin > args.seconds:
                tell(f"{name}: no time left")
                continue
            try:
                rows = rows_of(args, case, compiles)
                if rows[-1]["implementation"] == GRAPHED and not compiles and (B, C) == shapes[0]:
                    rows[-1] |= differences(case, args.precision)
            except torch.AcceleratorError:  # the device is lost: no other shape would run
                raise
            except (RuntimeError, SystemExit) as error:  # such as too little memory, or gradients that differ
                tell(f"{name}: {first_line(error)}")
            else:
                for row in rows:
                    tell(f"{name}: {row['implementation']} {measure.shown(row)}")
                save(args, rows, "gpu_step", args.out)
            gc.collect()


def rows_of(args: argparse.Namespace, case: Case, compiles: bool) -> list[dict[str, Any]]:
    """Rows of our step, of the published one, eager or by torch.compile, and last of ours as a graph."""
    inputs, on_gpu = inputs_of(case), case.device.type == "cuda"
    published = Published(inputs, case.skip_layers)
    ours = skip_step(inputs, case.skip_layers, "fast", args.precision, published)
    floor = floor_of(ours, case.device)
    steps: dict[str, Callable[[], Any]] = {OURS: with_update(ours, sk.FusedSGD)}
    if compiles:
        for mode, name in COMPILED.items():
            steps[name] = with_update(published.compiled(args.precision, mode))
    else:
        steps[PUBLISHED] = with_update(published.step(args.precision))
    graph = graphed_step(case, args.precision) if on_gpu else None
    if graph is not None:
        steps[GRAPHED] = graph.run
    for run in steps.values():
        for _ in range(WARMUP + 1):  # the last captures a graph
            run()
    note = ""
    if graph is not None and not graph.step.is_captured:  # its steps are eager
        del steps[GRAPHED]
        note = "no graph was captured"
    seconds = measure.time_alternately(steps, args.rounds, case.device, calls=_CALLS if on_gpu else 1)
    best = seconds.get(GRAPHED, seconds[OURS])
    of_case = {"model": case.model, "B": case.batch, "C": case.classes, "K": ours.K, "skip_layers": case.skip_layers}
    rows = []
    for name, times in seconds.items():
        row = {"implementation": name, **of_case, "precision": args.precision}
        row |= measure.milliseconds(times, 3) | {"rounds": args.rounds}
        row["peak_mib"] = round(testing.peak_bytes(steps[name], case.device, warm_up=False) / 2**20)
        row |= {"floor_ms": round(1000 * floor, 3), "above_floor": round(measure.quantile(times, 0.5) / floor, 2)}
        if name not in (OURS, GRAPHED):
            row["faster"] = round(measure.median_ratio(times, best), 2)
        rows.append(row)
    if GRAPHED in steps:
        rows[-1] |= launches_of(steps[GRAPHED], case.device)
    rows[0]["note"] = note
    return rows


def full(args: argparse.Namespace) -> None:
    """Time training of a whole CLIP on pairs: with its own blocks, the same compiled, and by `sk.fuse`."""
    names = ("eager", "compile", "fuse-fast")
    rows = fuse.rows_of(args, args.model, args.batch, args.precision, names, ("pairs",))
    tell(f"{args.batch} pairs: " + ", ".join(f"{row['implementation']} {row['p50_ms']} ms" for row in rows))
    save(args, rows, "fuse", args.out)


def floor_of(step: Step, device: torch.device) -> float:
    """Least seconds of a step with its update: products at the rate of a large one, then its weights by copies."""
    trained = sum(weight.nbytes for weight in step.model.parameters() if weight.requires_grad)
    flops = flops_of(step)
    step.model.zero_grad()
    return measure.floor(flops, measure.DTYPES[step.precision], _PASSES * trained, device)


def case_of(args: argparse.Namespace) -> Case:
    return Case(args.model, args.batch, args.classes, args.device, args.skip_layers)


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
    """Make the step, of `blocks` in each tower if given; without `captures` its calls are eager, with the same K."""
    model, tokens, images, labels = inputs_of(case)
    skip: Any = case.skip_layers
    if blocks is not None:
        skip = tuple(len(tower.transformer.resblocks) - blocks for tower in (model.visual, model))
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, memory="fast")
    features, labels = clip.encode_lower(images), labels.contiguous()
    optimizer = sk.FusedSGD(clip.trainable_parameters(), lr=1e-5, momentum=0.9)
    with autocast(precision, features.device):
        # Batches of another size than that of a graph run eagerly.
        step = sk.graphed(clip, optimizer, batch_size=len(labels) if captures else len(labels) + 1)

    def run() -> sk.SkipOutput:
        with autocast(precision, features.device):
            return step(features, labels)

    return Graphed(run, step, clip)


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
    classes = [run().class_ids.tolist() for _ in range(WARMUP + 1 + _REPLAYS)]
    return classes, [weight.detach() for weight in clip.trainable_parameters()]


def difference(one: Trained, other: Trained) -> float:
    if one[0] != other[0]:
        return math.inf
    return max(testing.relative_error(y, x) for x, y in zip(one[1], other[1], strict=True))


def launches_of(run: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Kernels, and copies and fills of memory, that a call runs on a GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        measure.synchronize(device)
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": len(names) - copies, "copies": copies}


def one_step(args: argparse.Namespace) -> None:
    """Run a step for Nsight Compute, which profiles only what is launched between two calls of the profiler's API.

    The step is eager: it launches the kernels of a replay, and versions of Nsight Compute differ in whether they see
    the kernels of a graph. The steps before it compile kernels and create the state of the optimizer. Two blocks of
    each tower are left, one of them pooled: the others have the same launches, and each launch is repeated many times.
    """
    run = graphed_step(case_of(args), args.precision, blocks=_PROFILED).run
    for _ in range(WARMUP - 1):
        run()
    measure.synchronize(args.device)
    with torch.cuda.profiler.profile() if args.device.type == "cuda" else contextlib.nullcontext():
        print(f"loss: {run().loss.item():.6f}")  # waits for the device


def profile_step(args: argparse.Namespace) -> None:
    run, on_gpu = graphed_step(case_of(args), args.precision).run, args.device.type == "cuda"
    for _ in range(WARMUP + 1 if on_gpu else 1):  # the last captures a graph
        run()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        measure.synchronize(args.device)
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=_LISTED, max_name_column_width=80))


def smoke(args: argparse.Namespace) -> None:
    for op in OPERATORS:
        print(f"{op}: {run_small(op, args.device):.6f}", flush=True)


def run_small(op: str, device: torch.device) -> float:
    """Sum of the squared results of a small call of an operator, after its backward."""
    call = small_call(op).on(device)
    total = call.total(*(x.requires_grad_() for x in call.inputs.values()))
    if call.inputs:
        total.backward()
    return total.item()


STAGES = (check, machine, step, full, profile_step, one_step, smoke)

if __name__ == "__main__":
    main()
