"""Cases of the microbenchmarks (test_operators.py), one module per operator: `cases(dtype, device)` yields them.

Inputs are drawn on the CPU, so that they are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..peers import Peer

Run = Callable[[], list[Tensor]]

COMPILED = "compiled reference"


class Work(NamedTuple):
    """Work of a case, forward and backward."""

    moved: int
    """Least bytes to read and write."""
    flops: int = 0
    """Least FLOPs of matrix products."""


class Case(NamedTuple):
    """One shape and dtype of an operator, with its implementations and the correct result."""

    shape: str
    """Shape in the form of test ids: B4-C100-K37-D512."""
    runs: dict[str, Run]
    """Forward and backward of each implementation, by name: "skipkernels" (the public function), "eager" (plain PyTorch
    as a user would write it), and peers. Each returns results and gradients in the same order."""
    truth: Run
    """Results and gradients of the reference in fp64."""
    work: Work
    absent: dict[str, str] = {}
    """Implementations that cannot run here, with the reason."""
    versions: dict[str, str] = {}
    """Package version of each peer."""
    prepare: Callable[[], object] = lambda: None
    """Called before each run that is checked; restores the inputs of an in-place operator."""
    copy: Callable[[], dict[str, Run]] | None = None
    """Returns the same runs with inputs of their own."""


class Arguments(NamedTuple):
    """Arguments of a function, and the gradients of its results."""

    inputs: Sequence[Any]
    """Positional; floating-point tensors get gradients."""
    d_outputs: Sequence[Tensor] = ()
    """None for the forward pass alone."""
    options: dict[str, Any] = {}
    """Keyword arguments, without gradients."""

    def converted(self, convert: Callable[[Tensor], Tensor]) -> Arguments:
        """The same with new tensors, of which those that get gradients are leaves."""
        new = Arguments(*tree_map_only(Tensor, lambda x: convert(x.detach()), tuple(self)))
        for x in new.inputs if new.d_outputs else ():
            if isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_()
        return new

    def run(self, function: Callable[..., Any]) -> Run:
        """A run that returns the results of a function, and the gradients of its inputs."""
        leaves = [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]

        def run() -> list[Tensor]:
            outputs = function(*self.inputs, **self.options)
            outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs]
            return [*outputs, *torch.autograd.grad(outputs, leaves, self.d_outputs)] if self.d_outputs else outputs

        return run


def case(
    shape: str,
    functions: dict[str, Callable[..., Any]],
    reference: Callable[..., Any],
    arguments: Arguments,
    work: Work,
    peers: dict[str, Peer] | None = None,
    not_compiled: str = "",
) -> Case:
    """The case of a pure operator.

    Args:
        shape: Shape in the form of test ids.
        functions: Implementations with the signature of the reference.
        reference: The correct result in fp64; also timed under torch.compile.
        arguments: Arguments of every implementation.
        work: Work of a call with its backward.
        peers: Functions of other packages with the signature of the reference.
        not_compiled: Reason to leave out the compiled reference.
    """
    peers = peers or {}
    usable = {name: peer for name, peer in peers.items() if peer.function is not None}
    functions = functions | {name: peer.function for name, peer in usable.items()}
    absent = {name: peer.note for name, peer in peers.items() if name not in usable}
    if not_compiled:
        absent = {COMPILED: not_compiled} | absent
    else:
        functions = functions | {COMPILED: compiled(reference)}

    def runs(arguments: Arguments) -> dict[str, Run]:
        return {name: arguments.run(function) for name, function in functions.items()}

    return Case(
        shape=shape,
        runs=runs(arguments.converted(lambda x: x)),
        truth=lambda: arguments.converted(lambda x: x.double() if x.is_floating_point() else x).run(reference)(),
        work=work,
        absent=absent,
        versions={name: peer.note for name, peer in usable.items()},
        copy=lambda: runs(arguments.converted(_copy)),
    )


def _copy(x: Tensor) -> Tensor:
    """A copy with the same strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with dynamic shapes as one graph; a graph break is an error."""
    return torch.compile(function, dynamic=True, fullgraph=True)


class Random:
    """Normally distributed tensors of a dtype, the same on every device."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.rng, self.dtype, self.device = torch.Generator().manual_seed(0), dtype, device

    def __call__(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, generator=self.rng).to(dtype or self.dtype).to(self.device)

    def integers(self, high: int, *size: int) -> Tensor:
        """Uniform int64 numbers below `high`."""
        return torch.randint(0, high, size, generator=self.rng).to(self.device)

    def sample(self, total: int, count: int) -> Tensor | None:
        """`count` of the numbers below `total` in random order, or None for all."""
        return torch.randperm(total, generator=self.rng)[:count].to(self.device) if count < total else None
