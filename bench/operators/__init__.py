"""The cases of the microbenchmarks, a module for each operator: `cases(dtype)` yields what `bench.run` times."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Run = Callable[[], list[Tensor]]


class Case(NamedTuple):
    """One shape and dtype of an operator: who is timed on it, and what the result must be."""

    shape: str
    """As in the ids of the tests: B4-C100-K37-D512."""
    runs: dict[str, Run]
    """Forward and backward of everyone who does the same, by name: "skipkernels" (through the public function), "eager"
    (what a user writes in plain PyTorch), and peers. Each gives its results and gradients, all in the same order."""
    truth: Run
    """The same results from the reference in fp64."""
    moved: int
    """Bytes that must be read or written at least, forward and backward."""
    flops: int = 0
    """Operations of the matrix products, forward and backward, at least."""
    absent: dict[str, str] = {}
    """Peers that cannot run here, each with the reason."""
    prepare: Callable[[], object] = lambda: None
    """Called before each run whose results are looked at: puts back what an in-place operator has changed."""
    target: str = ""
    """What the ratio is wanted to be, for instance "≥ 2.5"; empty where nothing is promised."""


def with_gradients(function: Callable[[], list[Tensor]], inputs: list[Tensor], d_outputs: list[Tensor]) -> Run:
    """Forward and backward: the results of `function` and the gradients of `inputs`, for the given `d_outputs`."""

    def run() -> list[Tensor]:
        outputs = function()
        return [*outputs, *torch.autograd.grad(outputs, inputs, d_outputs)]

    return run
