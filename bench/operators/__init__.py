"""Cases of the microbenchmarks, one module per operator: `cases(dtype, device)` yields the cases of `bench.run`.

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
    """One shape and dtype of an operator, with its implementations and the correct result."""

    shape: str
    """Shape in the form of test ids: B4-C100-K37-D512."""
    runs: dict[str, Run]
    """Forward and backward of each implementation, by name: "skipkernels" (the public function), "eager" (plain PyTorch
    as a user would write it), and peers. Each returns results and gradients in the same order."""
    truth: Run
    """Results and gradients of the reference in fp64."""
    moved: int
    """Least bytes to read and write, forward and backward."""
    flops: int = 0
    """Least FLOPs of matrix products, forward and backward."""
    absent: dict[str, str] = {}
    """Implementations that cannot run here, with the reason."""
    versions: dict[str, str] = {}
    """Package version of each peer."""
    prepare: Callable[[], object] = lambda: None
    """Called before each run that is checked; restores the inputs of an in-place operator."""
    target: str = ""
    """Goal of the speed-up over eager, such as "≥ 2.5", or ""."""

    def with_peers(self, peers: dict[str, Peer], run: Callable[[Callable[..., Tensor]], Run]) -> Case:
        """Add peers; `run` makes a `Run` from the function of a peer."""
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
    """Compile a function with dynamic shapes as one graph; a graph break is an error."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def random(rng: torch.Generator, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A normally distributed tensor."""
    return torch.randn(*size, generator=rng).to(dtype).to(device)
