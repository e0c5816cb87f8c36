"""The cases of the microbenchmarks, a module for each operator: `cases(dtype, device)` yields what `bench.run` times.

Inputs are drawn on the CPU, so that they are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..peers import Peer

Run = Callable[[], list[Tensor]]

CPU = torch.device("cpu")
COMPILED = "compiled reference"


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
    """Who cannot run here, each with the reason."""
    versions: dict[str, str] = {}
    """Of the packages that peers come from, by the peer's name."""
    prepare: Callable[[], object] = lambda: None
    """Called before each run whose results are looked at: puts back what an in-place operator has changed."""
    target: str = ""
    """What the ratio is wanted to be, for instance "≥ 2.5"; empty where nothing is promised."""

    def with_peers(self, peers: dict[str, Peer], run: Callable[[Callable[..., Tensor]], Run]) -> Case:
        """The same case, with peers: `run` makes of a peer's function what can be timed."""
        usable = {name: peer.function for name, peer in peers.items() if peer.function is not None}
        return self._replace(
            runs=self.runs | {name: run(function) for name, function in usable.items()},
            absent=self.absent | {name: peer.note for name, peer in peers.items() if name not in usable},
            versions=self.versions | {name: peers[name].note for name in usable},
        )


def with_gradients(function: Callable[[], list[Tensor]], inputs: list[Tensor], d_outputs: list[Tensor]) -> Run:
    """Forward and backward: the results of `function` and the gradients of `inputs`, for the given `d_outputs`."""

    def run() -> list[Tensor]:
        outputs = function()
        return [*outputs, *torch.autograd.grad(outputs, inputs, d_outputs)]

    return run


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for any sizes, as one graph: what falls back to eager PyTorch is an error, and no timing."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def random(rng: torch.Generator, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normally distributed."""
    return torch.randn(*size, generator=rng).to(dtype).to(device)
