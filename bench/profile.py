"""Profile a SkipCLIP step: time in matrix products, attention, our operators, and the rest.

    python -m bench.profile --model ViT-B-16 --batch 4 --classes 50

Checks the step against the published one, then runs it under torch.profiler and sums the self time of each operator
(for our operators the total time): CPU time, or on a GPU the time of the launched kernels. The rest includes Python,
casts and copies. The rate of the matrix products is compared with that of one large square product in the same dtype.
Appends to bench/results/DEVICE/profile.csv.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from . import ceilings, measure
from .inputs import random_inputs
from .training import Published, skip_step, step_parser

MATRIX, ATTENTION, OURS, REST = "matrix products", "attention", "our operators", "the rest"
# Products with FLOPs counted by the profiler. Other products (of a matrix and a vector) are small.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_LISTED = 4  # largest operators of the rest to print


class Profile(NamedTuple):
    """One call: self time of each operator in seconds, and FLOPs of the matrix products."""

    seconds: dict[str, float]
    flops: int

    def group(self, name: str) -> float:
        """Total seconds."""
        return sum(seconds for operator, seconds in self.seconds.items() if group_of(operator) == name)

    def share(self, name: str) -> float:
        """Share of the total time."""
        return self.group(name) / sum(self.seconds.values())


def main(arguments: Sequence[str] | None = None) -> None:
    args = step_parser(__doc__, rounds=5).parse_args(arguments)
    inputs = random_inputs(args.model, args.batch, args.classes, args.device)
    step = skip_step(inputs, args.skip_layers, args.memory, args.precision, Published(inputs, args.skip_layers))
    profiles = [profile_of(step, args.device) for _ in range(args.rounds + 1)][1:]  # the first is a warm-up
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    peak = ceilings.matrix_rate(args.device, dtype) / 1e9

    rate = measure.quantile([profile.flops / profile.group(MATRIX) / 1e9 for profile in profiles], 0.5)
    of_products = {"gflops": round(rate, 1), "peak_gflops": round(peak, 1)}

    rows = []
    for group in (MATRIX, ATTENTION, OURS, REST):
        times = measure.milliseconds([profile.group(group) for profile in profiles])
        share = measure.quantile([profile.share(group) for profile in profiles], 0.5)
        rows.append(
            {"step": step.name, "model": args.model, "B": args.batch, "C": args.classes, "K": step.K}
            | {"skip_layers": step.skip_layers, "precision": step.precision, "group": group}
            | times
            | {"share": round(share, 4)}
            | (of_products if group == MATRIX else dict.fromkeys(of_products))
        )
        print(f"{group:16} {share:6.1%} {measure.shown(times)}")
    print(f"{MATRIX}: {rate:.1f} GFLOP/s, {rate / peak:.0%} of the {peak:.1f} of a large square one")
    last = profiles[-1]
    rest = {name: seconds for name, seconds in last.seconds.items() if group_of(name) == REST}
    largest = sorted(rest, key=rest.__getitem__, reverse=True)[:_LISTED]
    whole = sum(last.seconds.values())
    print(f"in {REST}: " + ", ".join(f"{name} {rest[name] / whole:.1%}" for name in largest))
    measure.save(args, rows, "profile")


def profile_of(function: Callable[[], Any], device: torch.device) -> Profile:
    """Run one call under the profiler."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, with_flops=True) as profiler, record_function("Python"):
        function()
        measure.synchronize(device)
    seconds: dict[str, float] = defaultdict(float)
    flops = 0
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:  # kernels on a GPU have their own events; they count at their launch
            operator = operator_of(event)
            seconds[operator] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
            flops += event.flops if group_of(operator) == MATRIX else 0
    return Profile(seconds, flops)


def operator_of(event: Any) -> str:
    """The name that an event counts for: its own, or that of the operator of ours that calls it."""
    name, caller = event.name, event.cpu_parent
    while caller is not None:
        name = caller.name if group_of(caller.name) == OURS else name
        caller = caller.cpu_parent
    return name


def group_of(operator: str) -> str:
    """The operator of an event name: aten::mm, skipkernels::class_scores, autograd::engine::…: MulBackward0."""
    if operator in _PRODUCTS:
        return MATRIX
    if operator.startswith("aten::") and "attention" in operator:
        return ATTENTION
    return OURS if operator.startswith("skipkernels::") else REST


if __name__ == "__main__":
    main()
