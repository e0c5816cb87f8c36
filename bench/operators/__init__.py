"""Cases of the microbenchmarks (test_operators.py), one module per operator: `cases(dtype, device)` yields them.

Inputs are drawn on the CPU, so that they are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..peers import Peer

Run = Callable[[], list[Tensor]]

CPU = torch.device("cpu")
OURS, COMPILED = "skipkernels", "compiled reference"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    copy: Callable[[], dict[str, Run]] | None = None
    """Returns the same runs with inputs of their own."""


def case(
    shape: str,
    functions: dict[str, Callable[..., Any]],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    d_outputs: Sequence[Tensor] = (),
    *,
    moved: int,
    flops: int = 0,
    target: str = "",
    peers: dict[str, Peer] | None = None,
    adapt: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    not_compiled: str = "",
    constants: int = 0,
    **options: Any,
) -> Case:
    """The case of a pure operator.

    Args:
        shape: Shape in the form of test ids.
        functions: Implementations with the signature of the reference.
        reference: The correct result in fp64; also timed under torch.compile.
        inputs: Positional arguments; all floating-point tensors but the constants get gradients.
        d_outputs: Gradients of the results; none for the forward pass alone.
        moved: Least bytes to read and write.
        flops: Least FLOPs of matrix products.
        target: Goal of the speed-up over eager.
        peers: Functions of other packages, with one common signature.
        adapt: Turns a peer's function into one with the signature of the reference.
        not_compiled: Reason to leave out the compiled reference.
        constants: Number of inputs at the end that get no gradients.
        options: Keyword arguments.
    """
    peers = peers or {}
    usable = {name: peer for name, peer in peers.items() if peer.function is not None}
    functions = functions | {name: adapt(peer.function) for name, peer in usable.items() if peer.function is not None}
    if not not_compiled:
        functions = functions | {COMPILED: compiled(reference)}
    absent = {COMPILED: not_compiled} if not_compiled else {}
    absent |= {name: peer.note for name, peer in peers.items() if name not in usable}
    differentiated = len(inputs) - constants if d_outputs else 0
    inputs = [x.detach().requires_grad_(place < differentiated) if _is_real(x) else x for place, x in enumerate(inputs)]

    def truth() -> list[Tensor]:
        wide = [x.detach().double().requires_grad_(x.requires_grad) if _is_real(x) else x for x in inputs]
        return _run_of(reference, wide, options, [x.double() for x in d_outputs])()

    def runs_on(inputs: Sequence[Any], d_outputs: Sequence[Tensor]) -> dict[str, Run]:
        return {name: _run_of(function, inputs, options, d_outputs) for name, function in functions.items()}

    def copy() -> dict[str, Run]:
        return runs_on([_copy(x) if isinstance(x, Tensor) else x for x in inputs], [_copy(x) for x in d_outputs])

    versions = {name: peer.note for name, peer in usable.items()}
    return Case(shape, runs_on(inputs, d_outputs), truth, moved, flops, absent, versions, target=target, copy=copy)


def _copy(x: Tensor) -> Tensor:
    """A copy with the same strides."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return out.copy_(x.detach()).requires_grad_(x.requires_grad)


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _run_of(
    function: Callable[..., Any], inputs: Sequence[Any], options: dict[str, Any], d_outputs: Sequence[Tensor]
) -> Run:
    """A run that returns the results of a function, and the gradients of its inputs."""
    leaves = [x for x in inputs if _is_real(x) and x.requires_grad]

    def run() -> list[Tensor]:
        outputs = function(*inputs, **options)
        outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, d_outputs)] if d_outputs else outputs

    return run


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
