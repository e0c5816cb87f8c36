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
import gc
import importlib
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from skipkernels.formatting import first_line
from skipkernels.graphs.graphed_step import WARMUP
from skipkernels.ops import OPERATORS, launching

from . import fuse, measure, peers
from .gpu_step import GRAPHED, differences, graphed_step, rows_of
from .inputs import Case, parser
from .operators.record import small_call
from .rows import machine_columns, save, shown

_LISTED = 40  # kernels
_PROFILED = 2  # blocks of each tower in the step for Nsight Compute
_SHAPES = ((4, 1000), (32, 1000), (4, 100), (32, 100), (4, 10000), (32, 10000))  # images and classes
# An H100 with eight cores has the limits of bench/gpu.sh; a slower machine up to four times these.
_BYTES_PER_SECOND, _CORES, _MOST_SCALE = 2.5e12, 8, 4


def case_of(args: argparse.Namespace) -> Case:
    return Case(args.model, args.batch, args.classes, args.device, args.skip_layers)


def check(args: argparse.Namespace) -> None:
    """Raise an error where no stage could run: without a package, a GPU, or a compiler for Triton's launchers."""
    for package in ("hypothesis", "pytest_benchmark", "xdist"):
        importlib.import_module(package)
    run_small(OPERATORS[0], args.device)


def machine(args: argparse.Namespace) -> None:
    """Print device and versions, the peers, by how much limits of time are scaled, and all packages."""
    found = machine_columns(args.device)
    triton = launching.triton.__version__ if launching.installed else "not installed"
    of_losses = peers.cross_entropies(args.device, torch.bfloat16)  # which all of them support
    every = of_losses | peers.layer_norms(args.device) | peers.attentions(args.device)
    for name, peer in every.items():
        print(f"peer {name}: {peer.note or 'part of torch'}", flush=True)
    absent = [name for name, peer in every.items() if peer.function is None]
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


def step(args: argparse.Namespace) -> None:
    """Time steps with their updates, in turn; first of all shapes without torch.compile."""
    shapes = _SHAPES if args.all_shapes else ((args.batch, args.classes),)
    # The goal is one of bf16, and compilation takes half a minute.
    passes = (False, True) if args.device.type == "cuda" and args.precision == "bf16" else (False,)
    begin = time.monotonic()
    for compiles, (B, C) in itertools.product(passes, shapes):
        gc.collect()  # of the shape before
        case = case_of(args)._replace(batch=B, classes=C)
        compares = not compiles and (B, C) == shapes[0]
        name = f"{args.precision}, {B} images, {C} classes" + (", compiled" if compiles else "")
        if time.monotonic() - begin > args.seconds:
            tell(f"{name}: no time left")
            continue
        try:
            rows = rows_of(args, case, compiles)
        except torch.AcceleratorError:  # the device is lost: no other shape would run
            raise
        except (RuntimeError, SystemExit) as error:  # such as too little memory, or gradients that differ
            tell(f"{name}: {first_line(error)}")
            rows = []
        for row in rows:
            if compares and row["implementation"] == GRAPHED:
                try:
                    row |= differences(case, args.precision)
                except torch.AcceleratorError:
                    save(args, rows, "gpu_step", args.out)
                    raise
                except (RuntimeError, AssertionError) as error:  # the times stay
                    tell(f"{name}: {first_line(error)}")
            tell(f"{name}: {row['implementation']} {shown(row)}")
        save(args, rows, "gpu_step", args.out)


def full(args: argparse.Namespace) -> None:
    """Time training of a whole CLIP on pairs: with its own blocks, the same compiled, and by `sk.fuse`."""
    names = ("eager", "compile", "fuse-fast")
    pairs = case_of(args)._replace(classes=args.batch)
    rows = fuse.rows_of(pairs, names, ("pairs",), args.precision, args.rounds)
    tell(f"{args.batch} pairs: " + ", ".join(f"{row['implementation']} {row['p50_ms']} ms" for row in rows))
    save(args, rows, "fuse", args.out)


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


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "check": check,
    "machine": machine,
    "step": step,
    "full": full,
    "profile_step": profile_step,
    "one_step": one_step,
    "smoke": smoke,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, model="ViT-B-16", batch=4, classes=1000, skip_layers=6, precision="bf16", rounds=20)
    options.add_argument("stage", choices=STAGES)
    options.add_argument("--all-shapes", action="store_true", help="B = 4 and 32, C = 100, 1,000 and 10,000")
    options.add_argument("--seconds", type=float, default=math.inf, help="begin no other shape after this time")
    options.add_argument("--out", type=Path, metavar="FOLDER", help="of the rows; default: bench/results")
    args = options.parse_args(arguments)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
