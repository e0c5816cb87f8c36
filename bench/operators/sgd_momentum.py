"""`sgd_momentum_` on the parameters that Skip Tuning trains in ViT-B/16 (six blocks of both towers and the heads), on
one large tensor, and on many small ones.

Against the function in `torch.optim.SGD(fused=True)`, without the optimiser around it. bf16 weights with stochastic
rounding are measured against its step in fp32, which is what gives the same mean; its plain bf16 is there too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from skipkernels import functional, reference

from . import Case

LR, MOMENTUM, WEIGHT_DECAY, SEED = 2e-5, 0.9, 5e-4, 1


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape, sizes in (("ViT-B/16-upper", upper_half()), ("32M", [(32 << 20,)]), ("100x768", [(768,)] * 100)):
        start = functools.cache(functools.partial(random_lists, sizes, dtype))
        ours = Step(start, dtype, functional.sgd_momentum_, seed=SEED if dtype == torch.bfloat16 else None)
        steps = {"skipkernels": ours, "eager": Step(start, torch.float32, fused)}
        if dtype != torch.float32:
            steps[f"fused {str(dtype)[6:]}"] = Step(start, dtype, fused)
        truth = Step(start, torch.float64, reference.sgd_momentum_)
        yield Case(
            shape=shape,
            runs=steps,
            truth=truth,
            moved=5 * sum(map(math.prod, sizes)) * dtype.itemsize,
            prepare=functools.partial(restart, [truth, *steps.values()]),
            target="≥ 1.7" if dtype == torch.bfloat16 else "≥ 1",
        )


class Step:
    """A step each time it is called; the first result after `restart` is that of the start."""

    def __init__(
        self, start: Callable[[], list[list[Tensor]]], dtype: torch.dtype, function: Callable[..., None], **options
    ):
        self.start, self.dtype, self.function, self.options = start, dtype, function, options
        self.lists: list[list[Tensor]] = []

    def __call__(self) -> list[Tensor]:
        self.function(*self.lists, LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **self.options)
        return [*self.lists[0], *self.lists[2]]


def restart(steps: list[Step]) -> None:
    for step in steps:
        step.lists = [[x.to(step.dtype, copy=True) for x in tensors] for tensors in step.start()]


def random_lists(sizes: list[tuple[int, ...]], dtype: torch.dtype) -> list[list[Tensor]]:
    """Weights, gradients and buffers."""
    rng = torch.Generator().manual_seed(0)
    return [[torch.randn(size, generator=rng).to(dtype) for size in sizes] for _ in range(3)]


def fused(weights: list[Tensor], grads: list[Tensor], buffers: list[Tensor], lr: float, **options: float) -> None:
    sgd(weights, grads, buffers, fused=True, lr=lr, dampening=0, nesterov=False, maximize=False, **options)


def upper_half() -> list[tuple[int, ...]]:
    """The shapes of six blocks of each tower (image 768 wide, text 512) and of both heads (D = 512)."""
    sizes: list[tuple[int, ...]] = []
    for W in (768, 512):
        block = [(W,), (W,), (3 * W, W), (3 * W,), (W, W), (W,), (W,), (W,), (4 * W, W), (4 * W,), (W, 4 * W), (W,)]
        sizes += 6 * block + [(W,), (W,), (W, 512)]
    return sizes
