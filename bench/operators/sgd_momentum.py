"""Benchmark of `sgd_momentum_` on the parameters that Skip Tuning trains in ViT-B/16 (six blocks of both towers and the
heads), on one large tensor, and on many small ones.

Peers are the functions behind `torch.optim.SGD(fused=True)` and `foreach=True`, without the optimizer around them. bf16
weights with stochastic rounding are compared with fp32 steps, which have the same mean; the fused function in bf16 is
included too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from skipkernels import functional, reference

from ..measure import CPU, OURS
from . import COMPILED, Case, Random, Work, compiled
from .record import Call, Record, ids, on_meta

LR, MOMENTUM, WEIGHT_DECAY, SEED = 2e-5, 0.9, 5e-4, 1
Start = Callable[[], list[list[Tensor]]]
"""Returns the initial weights, gradients and momentum buffers."""


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    yield case("ViT-B/16-upper", upper_half(), dtype, device)
    yield case("32M", [(32 << 20,)], dtype, device)
    yield case("100x768", [(768,)] * 100, dtype, device)


def case(shape: str, sizes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Case:
    start = functools.cache(functools.partial(random_lists, sizes, dtype, device))
    alone = len(sizes) == 1
    checked, truth = updates(start, dtype, alone), Update(start, torch.float64, reference.sgd_momentum_)

    def restart() -> None:
        for update in (truth, *checked.values()):
            update.restart()

    return Case(
        shape=shape,
        runs={**checked},
        copy=lambda: {**updates(start, dtype, alone)},
        truth=truth,
        work=Work(5 * sum(map(math.prod, sizes)) * dtype.itemsize),
        absent={} if alone else {COMPILED: f"not timed here: {len(sizes)} tensors take minutes to compile"},
        prepare=restart,
    )


def updates(start: Start, dtype: torch.dtype, compiles: bool) -> dict[str, Update]:
    """The implementations with tensors of their own, by name."""
    seed = SEED if dtype == torch.bfloat16 else None
    found = {
        OURS: Update(start, dtype, functional.sgd_momentum_, seed=seed),
        "eager": Update(start, torch.float32, torch_sgd, fused=True),
        "foreach": Update(start, torch.float32, torch_sgd, foreach=True),
    }
    if dtype != torch.float32:
        found[f"fused {str(dtype).removeprefix('torch.')}"] = Update(start, dtype, torch_sgd, fused=True)
    if compiles:
        found[COMPILED] = Update(start, dtype, compiled(reference.sgd_momentum_), seed=seed)
    return found


class Update:
    """Makes one update per call; the first result after `restart` is that of the initial weights."""

    def __init__(self, start: Start, dtype: torch.dtype, function: Callable[..., None], **options: Any):
        self.start, self.dtype, self.function, self.options = start, dtype, function, options
        self.lists: list[list[Tensor]] = []

    def __call__(self) -> list[Tensor]:
        if not self.lists:
            self.lists = [[x.to(self.dtype, copy=True) for x in tensors] for tensors in self.start()]
        self.function(*self.lists, LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **self.options)
        return [*self.lists[0], *self.lists[2]]

    def restart(self) -> None:
        """Reset to the initial weights; copies are made on demand, to save memory."""
        self.lists = []


def random_lists(sizes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """Weights, gradients and momentum buffers."""
    random = Random(dtype, device)
    return [[random(*size) for size in sizes] for _ in range(3)]


def torch_sgd(weights: list[Tensor], grads: list[Tensor], buffers: list[Tensor], lr: float, **options: Any) -> None:
    sgd(weights, grads, [*buffers], lr=lr, dampening=0, nesterov=False, maximize=False, **options)


def upper_half() -> list[tuple[int, ...]]:
    """The shapes of six blocks of each tower (image 768 wide, text 512) and of both heads (D = 512)."""
    sizes: list[tuple[int, ...]] = []
    for W in (768, 512):
        block = [(W,), (W,), (3 * W, W), (3 * W,), (W, W), (W,), (W,), (W,), (4 * W, W), (4 * W,), (W, 4 * W), (W,)]
        sizes += 6 * block + [(W,), (W,), (W, 512)]
    return sizes


def launches(dtype: torch.dtype) -> Iterator[Call]:
    """The two largest weights of a block and two vectors: both roundings; momentum buffers in fp32; casts to bf16."""
    sizes = ((3072, 768), (768, 3072), (768,), (67,))
    casts = [on_meta(*size, dtype=torch.bfloat16) for size in (*sizes[:2], (0,), (0,))]  # not of the vectors
    options = [on_meta(dtype=torch.float64) for _ in range(3)]
    for buffer in dict.fromkeys((dtype, torch.float32)):
        lists = [[on_meta(*size, dtype=each) for size in sizes] for each in (dtype, dtype, buffer)]
        form = "" if buffer == dtype else "-fp32-buffer"
        yield Call(f"block{form}", (*lists, *options, None, None, []))
        if dtype == torch.bfloat16:
            yield Call(f"block-random{form}", (*lists, *options, ids(), None, []))
        if dtype == torch.float32:
            yield Call(f"block{form}-casts", (*lists, *options, None, None, casts))


def small_call(randn: Random) -> tuple[dict[str, Any], dict[str, Any]]:
    weight, grad, momentum_buffer = ([randn(4, 3), randn(3)] for _ in range(3))
    return {}, {"weight": weight, "grad": grad, "momentum_buffer": momentum_buffer, "lr": 1e-9}


RECORD = Record(cases=cases, launches={"sgd_momentum_": launches}, small_calls={"sgd_momentum_": small_call})
