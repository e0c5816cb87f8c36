"""What the operators can reach on GPUs that are not at hand. All of it is computed, nothing measured.

    python -m bench.roofline                prints three tables and writes them to bench/results
    python -m bench.roofline --no-save

**Floors** (roofline.csv). Time of an operator is at least its bytes over the bandwidth of the memory, and at least the
operations of its matrix products over the rate of the matrix units; the larger one binds. Bytes are what has to be read
or written once, each tensor in its dtype, forward and backward; operations are those of matrix products, two for a
multiplication and an addition. fp32 products are three tf32 ones (`launching.dot_precision`). Bandwidths and rates are
the vendors', see bench/targets.py. The formulas are in WORK, as they are evaluated and printed.

**Occupancy** (occupancy.csv). How many warps of a kernel fit on a multiprocessor, from the registers, shared memory and
warps in aot.csv and the limits of the architecture, and which of them binds.

**Launches** (launches.csv). How many kernels a training step of SkipCLIP launches, forward, backward and optimizer, at
ViT-B/16: with every operator in plain PyTorch (`skipkernels.reference`), and with the Triton kernels, as the launchers
of bench.aot record them. Counted by a dispatch mode over a real step on the CPU. The rule: a PyTorch operator is one
launch, unless it makes a view or allocates without writing; so PyTorch is counted for less than it launches, since
some of its operators launch several.
"""

from __future__ import annotations

import argparse
import collections
import csv
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import skipkernels as sk
from skipkernels import reference
from skipkernels.ops import OPERATORS, registration
from skipkernels.ops.class_sampled_ce import REDUCTIONS
from skipkernels.ops.mlp_activation import KINDS

from . import aot, measure
from .launches import CALLS
from .published import PublishedStep
from .targets import ARCHITECTURES, GPUS, Architecture, Gpu

BASIS = "computed, not measured"


# ---- floors ----------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What one call of an operator has to do, forward and backward."""

    sizes: Sequence[dict[str, int]]
    bytes: str
    """In the sizes and e, the bytes of one element."""
    flops: str = "0"


def image_tokens(W: int) -> dict[str, int]:
    return {"T": 4 * 197, "W": W}


def text_tokens(K: int, W: int) -> dict[str, int]:
    return {"T": K * 5, "W": W}


# Statistics that forward saves and backward reads are counted twice, results and gradients once for each side.
WORK = {
    "class_sampled_ce": Work(
        [dict(B=4, C=100, K=50, D=512), dict(B=32, C=1000, K=107, D=512), dict(B=4096, C=21841, K=21841, D=512)],
        # Forward reads both, backward reads both again and writes the gradients, that of the text for the whole bank;
        # labels and class ids are int64; lse is fp64 and lengths are fp32.
        "3*e*B*D + e*(2*K + C)*D + 16*(B + K) + 24*B + 8*K",
        "6*B*K*D",
    ),
    "class_sampled_logits": Work(
        [dict(B=4, C=100, K=50, D=512), dict(B=4096, C=21841, K=21841, D=512)],
        "3*e*B*D + e*(2*K + C)*D + 16*K + 8*B*K",
        "6*B*K*D",
    ),
    "class_scores": Work(
        [dict(B=4, C=100, D=512), dict(B=4, C=1000, D=512), dict(B=32, C=1000, D=512), dict(B=4, C=21841, D=512)],
        "e*(B + C)*D + 8*B + 4*C",
        "2*B*C*D",
    ),
    "add_layer_norm": Work(
        [image_tokens(768), *(text_tokens(K, 512) for K in (26, 276, 1380))],
        # Forward reads two and writes two, backward reads two gradients and the sum and writes one.
        "8*e*T*W + 5*e*W",
    ),
    "mlp_activation": Work(
        [image_tokens(3072), *(text_tokens(K, 2048) for K in (26, 276, 1380))],
        # Forward reads and writes, backward reads the gradient and the input again and writes.
        "5*e*T*W + 3*e*W",
    ),
    "suffix_attention": Work(
        [dict(K=K, S=5, P=5, W=512, H=8) for K in (26, 107, 1380)],
        # Forward: query, key, value, out. Backward: those and the gradient of out, and three gradients. The prefix
        # has two tensors read twice and two gradients. The log-sum-exp is fp64.
        "12*e*K*S*W + 6*e*P*W + 16*K*S*H",
        # Two products forward; backward computes the first again and has four more.
        "14*K*(S*P + S*(S + 1)//2)*W",
    ),
    "pooled_attention": Work(
        [dict(B=4, N=197, W=768, H=12), dict(B=107, N=10, W=512, H=8)],
        "6*e*B*W + 6*e*B*N*W + 16*B*H",
        "14*B*N*W",
    ),
    "gather_rows": Work([dict(B=4, N=197, W=768), dict(B=256, N=197, W=768)], "2*e*B*N*W + 8*B"),
    # One matrix of an MLP, and all that trains in ViT-B/16 with 6 of 12 blocks skipped.
    "sgd_momentum_": Work([dict(n=768 * 3072), dict(n=62_099_456)], "5*e*n"),
}


def evaluate(formula: str, sizes: dict[str, int], e: int) -> int:
    return eval(formula, {"__builtins__": {}}, {**sizes, "e": e})


class Floor(NamedTuple):
    microseconds: float
    bound: str


def floor(moved: int, flops: int, dtype: str, gpu: Gpu) -> Floor:
    """The least time for so many bytes and operations of matrix products."""
    rate = gpu.tf32 / 3 if dtype == "fp32" else gpu.half
    memory, products = moved / gpu.bandwidth, flops / rate
    return Floor(1e6 * max(memory, products), "memory" if memory >= products else "products")


def floors() -> Iterator[dict[str, Any]]:
    for op, work in WORK.items():
        for sizes in work.sizes:
            for dtype, e in (("fp32", 4), ("bf16", 2)):
                moved, flops = evaluate(work.bytes, sizes, e), evaluate(work.flops, sizes, e)
                row = {"op": op, "shape": "-".join(f"{name}{size}" for name, size in sizes.items()), "dtype": dtype}
                row |= {"bytes": moved, "flops": flops}
                for name, gpu in GPUS.items():
                    microseconds, bound = floor(moved, flops, dtype, gpu)
                    row |= {f"{name}_us": f"{microseconds:.3g}", f"{name}_bound": bound}
                yield row | {"basis": BASIS}


# ---- occupancy -------------------------------------------------------------------------------------------------------


class Occupancy(NamedTuple):
    blocks: int
    warps: int
    share: float
    """Of the warps that a multiprocessor can hold."""
    bound: str


def occupancy(registers: int, shared_bytes: int, num_warps: int, architecture: Architecture) -> Occupancy:
    """How many blocks of a kernel fit on a multiprocessor at once."""
    warp_registers = _round_up(max(registers, 1) * architecture.warp_size, architecture.register_unit)
    # A warp stays in one of four quarters of the multiprocessor, which have a quarter of the registers each.
    warps_by_registers = 4 * (architecture.registers // 4 // warp_registers)
    fits = {
        "registers": warps_by_registers // num_warps,
        "shared memory": architecture.shared // (shared_bytes + architecture.reserved_shared)
        if shared_bytes
        else math.inf,
        "warps": architecture.warps // num_warps,
        "blocks": architecture.blocks,
    }
    bound = min(fits, key=lambda name: fits[name])
    blocks = int(fits[bound])
    return Occupancy(blocks, blocks * num_warps, blocks * num_warps / architecture.warps, bound)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def occupancies(rows: Sequence[aot.Row]) -> Iterator[dict[str, Any]]:
    for row in rows:
        fit = occupancy(row.registers, row.shared_bytes, row.num_warps, ARCHITECTURES[row.target])
        yield {
            "op": row.op,
            "kernel": row.kernel,
            "target": row.target,
            "dtype": row.dtype,
            "shape": row.shape,
            "constants": row.constants,
            "programs": row.programs,
            "num_warps": row.num_warps,
            "registers": row.registers,
            "shared_bytes": row.shared_bytes,
            "blocks": fit.blocks,
            "warps": fit.warps,
            "occupancy": f"{fit.share:.3f}",
            "bound": fit.bound,
            "basis": BASIS,
        }


# ---- launches --------------------------------------------------------------------------------------------------------

# Operators that only allocate. Views are known by their schema.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


def launches_a_kernel(operator: torch._ops.OpOverload) -> bool:
    return not operator.is_view and operator.overloadpacket.__name__ not in _ALLOCATIONS


class Counted(NamedTuple):
    """Calls of PyTorch's operators that launch something, and of ours with their arguments."""

    torch: int
    ours: list[tuple[str, tuple[Any, ...]]]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()
        self.ours: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == registration.NAMESPACE:
            self.ours.append((operator._opname, args))
        elif launches_a_kernel(operator):
            self.names[operator.name()] += 1
        return operator(*args, **kwargs or {})


def count(function: Callable[[], Any]) -> Counted:
    with _Counter() as counter:
        function()
    return Counted(counter.names.total(), counter.ours)


def launches_of(op: str, arguments: Sequence[Any]) -> int:
    """Kernels that an operator launches on a GPU: its own, and PyTorch's within its launcher."""
    arguments = tree_map_only(Tensor, lambda x: x.to("meta"), tuple(arguments))
    definition = registration.definitions[op]
    with aot.recording(ARCHITECTURES["sm_80"]) as recorded:
        counted = count(lambda: definition.launch(*arguments))
    return counted.torch + len(recorded)


def _class_sampled_ce(*arguments: Any) -> Tensor:
    *inputs, reduction = arguments[:9]  # not which gradients to keep
    return reference.class_sampled_ce(*inputs, REDUCTIONS[reduction])


def _mlp_activation(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    return reference.mlp_activation(x, bias, KINDS[kind])


def _suffix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    offsets: Tensor | None,
    S: int,
    *_: Any,
) -> Tensor:
    K, P = query.shape[0] // S, prefix_key.shape[0]
    visible = query.new_ones(S, P + S).tril(P).bool()
    query, suffix_key, suffix_value = (x.unflatten(0, (K, S)) for x in (query, suffix_key, suffix_value))
    key = torch.cat([prefix_key.expand(K, *prefix_key.shape), suffix_key], dim=1)
    value = torch.cat([prefix_value.expand(K, *prefix_value.shape), suffix_value], dim=1)
    mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=visible)
    return mixed.transpose(1, 2)


def _pooled_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return F.scaled_dot_product_attention(query[:, :, None], key.transpose(1, 2), value.transpose(1, 2))[:, :, 0]


def _sgd_momentum_(weights: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor], *_: Any) -> None:
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True)
    for parameter, grad, momentum_buffer in zip(parameters, grads, momentum_buffers, strict=True):
        optimizer.state[parameter]["momentum_buffer"], parameter.grad = momentum_buffer, grad
    optimizer.step()


# What a user calls where PyTorch has something better than the steps of the reference, or where its arguments differ.
_EAGER: dict[str, Callable[..., Any]] = {
    "class_sampled_ce": _class_sampled_ce,
    "mlp_activation": _mlp_activation,
    "suffix_attention": _suffix_attention,
    "pooled_attention": _pooled_attention,
    "sgd_momentum_": _sgd_momentum_,
}
# How many of the first arguments get a gradient. logit_scale does not train in SkipCLIP.
_DIFFERENTIABLE = {
    "class_sampled_ce": 2,
    "class_sampled_logits": 2,
    "add_layer_norm": 4,
    "mlp_activation": 2,
    "suffix_attention": 5,
    "pooled_attention": 3,
}


def eager_launches(op: str, arguments: Sequence[Any]) -> int:
    """Kernels that the same costs in plain PyTorch, forward and backward."""
    first = arguments[: _DIFFERENTIABLE.get(op, 0)]
    inputs = [None if x is None else x.detach().requires_grad_() for x in first]
    function = _EAGER.get(op) or getattr(reference, op)

    def forward() -> tuple[Tensor, ...]:
        results = function(*inputs, *arguments[len(inputs) :])
        return results if isinstance(results, tuple) else (results,)

    given = [x for x in inputs if x is not None]
    if not given:
        return count(forward).torch
    d_results = [torch.ones_like(x) for x in forward()]
    return count(lambda: torch.autograd.grad(forward(), given, d_results)).torch


def launches_by_operator() -> Iterator[dict[str, Any]]:
    """One call of every operator, forward and backward."""
    for op in [op for op in OPERATORS if op in CALLS]:
        call = next(CALLS[op](torch.float32))
        ours = launches_of(op, call.arguments)
        if f"{op}_backward" in CALLS:
            ours += launches_of(f"{op}_backward", next(CALLS[f"{op}_backward"](torch.float32)).arguments)
        arguments = tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), call.arguments)
        yield {"what": op, "shape": call.shape, "plain_pytorch": eager_launches(op, arguments), "ours": ours}


def launches_of_a_step(model_name: str = "ViT-B-16", B: int = 2, C: int = 8) -> Iterator[dict[str, Any]]:
    """A whole training step, from cached features to updated weights. The numbers do not depend on B and C."""
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    model = open_clip.create_model(model_name)
    tokens = open_clip.get_tokenizer(model_name)([f"a photo of a thing {n}." for n in range(C)])
    clip = sk.SkipCLIP(model, tokens, skip_layers=6)
    published = PublishedStep(model, tokens, 6, clip.sampler)
    features = clip.encode_lower(torch.randn(B, 3, *model.visual.image_size))
    labels = torch.zeros(B, dtype=torch.int64)
    optimizer = torch.optim.SGD(
        clip.parameter_groups(text_lr=1e-5, image_lr=1e-5), momentum=0.9, weight_decay=5e-4, foreach=True
    )

    def step(forward: Callable[..., Any]) -> None:
        forward(features, labels)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    step(clip)  # the first one makes the momentum buffers
    row = {"what": "published training step", "shape": model_name}
    yield row | {"plain_pytorch": count(lambda: step(published)).torch, "ours": ""}
    counted = count(lambda: step(clip))
    ours = counted.torch + sum(launches_of(op, arguments) for op, arguments in counted.ours)
    forward = [(op, arguments) for op, arguments in counted.ours if not op.endswith("_backward")]
    plain = counted.torch + sum(eager_launches(op, arguments) for op, arguments in forward)
    row = {"what": f"SkipCLIP's training step, with {', '.join(dict(forward))}", "shape": model_name}
    yield row | {"plain_pytorch": plain, "ours": ours}


# ---- tables ----------------------------------------------------------------------------------------------------------


def write(rows: Sequence[dict[str, Any]], name: str) -> None:
    with (measure.RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(console: Console, title: str, rows: Sequence[dict[str, Any]], leave_out: Sequence[str] = ("basis",)) -> None:
    columns = [name for name in rows[0] if name not in leave_out]
    table = Table(*(name.replace("_", " ") for name in columns), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in columns))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    console = Console()
    console.width = max(console.width, 170)

    for name, gpu in GPUS.items():
        console.print(
            f"{name}: {gpu.bandwidth / 1e12:.3f} TB/s, {gpu.half / 1e12:.0f} TFLOPS in fp16 and bf16, "
            f"{gpu.tf32 / 1e12:.0f} in tf32 (the vendor's, dense)"
        )
    for op, work in WORK.items():
        console.print(f"{op}: bytes = {work.bytes}; operations = {work.flops}", highlight=False)
    tables = {"roofline": list(floors()), "occupancy": list(occupancies(aot.read_table()))}
    show(console, f"Floors in µs, forward and backward ({BASIS})", [briefly(row) for row in tables["roofline"]])
    show(console, f"Occupancy ({BASIS})", worst(tables["occupancy"]), ("basis", "constants", "shape"))
    console.print("[dim]running a step[/dim]", end="\r")
    tables["launches"] = [row | {"basis": BASIS} for row in (*launches_by_operator(), *launches_of_a_step())]
    show(console, f"Kernel launches, forward and backward ({BASIS})", tables["launches"])
    if not args.no_save:
        for name, rows in tables.items():
            write(rows, name)
        console.print(f"wrote {', '.join(f'{name}.csv' for name in tables)} to {measure.RESULTS}")


def briefly(row: dict[str, Any]) -> dict[str, Any]:
    """A line of roofline.csv with what binds beside each floor."""
    kept = {name: value for name, value in row.items() if not name.endswith(("_us", "_bound"))}
    return kept | {name: f"{row[f'{name}_us']} {row[f'{name}_bound']}" for name in GPUS}


def worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel, target and dtype the line with the fewest warps."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["warps"]):
        found.setdefault((row["op"], row["kernel"], row["target"], row["dtype"]), row)
    order = [(row["op"], row["kernel"], row["target"], row["dtype"]) for row in rows]
    return [found[key] for key in dict.fromkeys(order)]


if __name__ == "__main__":
    main()
