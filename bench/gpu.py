"""Stages of bench/gpu.sh, besides the tests and the benchmarks of the operators.

    python -m bench.gpu step            time of a training step: published, ours, ours as a CUDA graph, with the update
    python -m bench.gpu profile_step    the kernels of our step that take longest
    python -m bench.gpu one_step        our step once, for Nsight Compute
    python -m bench.gpu smoke           a small call of every operator, for compute-sanitizer

`step` checks the gradients of ours against the published step first. Its rows are appended to
bench/results/DEVICE/gpu_step.csv. On a machine without a GPU all run on the CPU, `step` without the graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

import skipkernels as sk
from skipkernels import testing
from skipkernels.clip import graphed
from skipkernels.ops import OPERATORS
from tests.ops.small_calls import small_call

from . import measure
from .inputs import autocast, parser, random_inputs
from .training import Published, skip_step, with_update

_LISTED = 40  # kernels


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, batch=4, classes=1000, rounds=50, precision="bf16")
    options.add_argument("stage", choices=[function.__name__ for function in STAGES])
    args = options.parse_args(arguments)
    {function.__name__: function for function in STAGES}[args.stage](args)


def step(args: argparse.Namespace) -> None:
    """Time steps with their updates, in turn."""
    inputs = random_inputs(args.model, args.batch, args.classes, args.device)
    published = Published(inputs, args.skip_layers)
    ours = skip_step(inputs, args.skip_layers, "fast", args.precision, published)
    steps: dict[str, Callable[[], Any]] = {
        "published": with_update(published.step(args.precision)),
        "skipkernels": with_update(ours),
    }
    if args.device.type == "cuda":
        steps["skipkernels, graphed"] = graphed_step(args)
    for run in steps.values():
        for _ in range(graphed.WARMUP + 1):  # the last captures a graph
            run()
    seconds = measure.time_alternately(steps, args.rounds, args.device)
    rows = []
    for name, times in seconds.items():
        row = {"implementation": name, "model": args.model, "B": args.batch, "C": args.classes, "K": ours.K}
        row |= {"skip_layers": args.skip_layers, "precision": args.precision} | measure.milliseconds(times, 3)
        peak = testing.peak_bytes(steps[name], args.device, warm_up=False)
        rows.append(row | {"peak_mib": round(peak / 2**20)})
        print(f"{name:21} {measure.shown(rows[-1])}")
    measure.save(args, rows, "gpu_step")


def graphed_step(args: argparse.Namespace) -> Callable[[], Any]:
    """Our step with its update; on a GPU a replayed CUDA graph."""
    model, tokens, images, labels = random_inputs(args.model, args.batch, args.classes, args.device)
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers, memory="fast")
    features, optimizer = clip.encode_lower(images), sk.FusedSGD(clip.trainable_parameters(), lr=1e-5, momentum=0.9)
    labels = labels.contiguous()
    with autocast(args.device, args.precision):
        replay = clip.graphed(optimizer, batch_size=args.batch)

    def run() -> None:
        with autocast(args.device, args.precision):
            replay(features, labels)

    return run


def one_step(args: argparse.Namespace) -> None:
    graphed_step(args)()


def profile_step(args: argparse.Namespace) -> None:
    run, on_gpu = graphed_step(args), args.device.type == "cuda"
    run()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        measure.synchronize(args.device)
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=_LISTED, max_name_column_width=80))


def smoke(args: argparse.Namespace) -> None:
    for op in OPERATORS:
        call = small_call(op).on(args.device)
        total = call.total(*(x.requires_grad_() for x in call.inputs))
        if call.inputs:
            total.backward()
        print(f"{op}: {total.item():.6f}", flush=True)


STAGES = (step, profile_step, one_step, smoke)

if __name__ == "__main__":
    main()
