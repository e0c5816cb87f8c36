"""Comparison of SkipCLIP's embeddings and gradients with those of the caller's model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_HALF = (torch.float16, torch.bfloat16)
# Largest distance of two unit-norm embeddings. Both sides run the same arithmetic in another order: about 1e-6 in fp32
# over twelve blocks. Some models take a softmax in fp32 though all else is in fp64. A wrong activation in one block is
# off by 2e-3 and more.
_EMBEDDING_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# Largest relative error of the gradient of norms and biases. At most 5e-4 in fp32 over all models of open_clip.
_GRADIENT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}


class Pair(NamedTuple):
    """Two ways to compute the same embeddings.

    Attributes:
        what: Name of the inputs, for messages.
        own: By the caller's model; returns [n, D], normalised or not.
        ours: By SkipCLIP; returns [n, D].
        parameters: The parameters that train on this side.
    """

    what: str
    own: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    parameters: list[nn.Parameter]


class _InFloat32(TorchDispatchMode):
    """Run every operator on fp32 copies of its half-precision arguments, one operator at a time.

    The fp32 copy of a whole model would take three times its memory.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return func(*args, **kwargs)


class _ConvolutionInFloat32(TorchFunctionMode):
    """The same for convolutions, which compare the dtypes of their arguments before they dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv1d, torch.conv2d, torch.conv3d):
            args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _widened(x: Any) -> Any:
    if isinstance(x, Tensor) and x.dtype in _HALF:
        return x.float()
    return torch.float32 if x in _HALF and isinstance(x, torch.dtype) else x


@contextmanager
def _in_float32(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Run half-precision arithmetic in fp32, with fp32 gradients of these parameters."""
    half = [p for p in parameters if p.dtype in _HALF]
    try:
        for parameter in half:
            parameter.grad_dtype = torch.float32
        with ExitStack() as modes:
            if half:
                modes.enter_context(_ConvolutionInFloat32())
                modes.enter_context(_InFloat32())
            yield
    finally:
        for parameter in half:
            parameter.grad_dtype = parameter.dtype


def check_agreement(pair: Pair, mode: str, *, gradients: bool) -> None:
    """Raise if the two embeddings, or their gradients, differ by more than rounding.

    Half-precision models are compared in fp32: in their own dtype rounding would hide a wrong activation.

    Args:
        pair: What is compared.
        mode: "evaluation" or "training", for messages.
        gradients: Compare gradients too, of norms and biases, or of all trainable parameters if there are none.

    Raises:
        RuntimeError: If they differ, or the model's own embedding is not finite.
    """
    trainable = [p for p in pair.parameters if p.requires_grad] if gradients else []
    parameters = [p for p in trainable if p.ndim <= 1] or trainable
    with _in_float32(pair.parameters), torch.set_grad_enabled(bool(parameters)):
        raw = pair.own(), pair.ours()
        wide = torch.promote_types(raw[1].dtype, torch.float32)
        expected, got = (nn.functional.normalize(x.to(wide), dim=-1) for x in raw)
        if not expected.isfinite().all():
            raise RuntimeError(
                f"SkipCLIP: the model itself gives {pair.what} an embedding that is not finite. Its weights are "
                "damaged, or too large for its dtype; load others."
            )
        _refuse(pair.what, mode, "unit-norm distance", _distance(got, expected), _EMBEDDING_TOLERANCE[wide])
        if parameters:
            generator = torch.Generator().manual_seed(1)
            upstream = torch.randn(expected.shape, generator=generator).to(expected)
            derived = [
                torch.autograd.grad((x * upstream).sum(), parameters, materialize_grads=True) for x in (got, expected)
            ]
            _refuse(pair.what, mode, "relative error of the gradient", _error(*derived), _GRADIENT_TOLERANCE[wide])


def _distance(got: Tensor, expected: Tensor) -> float:
    return (expected - got).detach().norm(dim=-1).max().item()


def _error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """‖got − expected‖ / ‖expected‖ over all gradients."""
    left, right = (torch.cat([gradient.flatten() for gradient in side]) for side in (got, expected))
    return ((left - right).norm() / right.norm().clamp_min(torch.finfo(right.dtype).tiny)).item()


def _refuse(what: str, mode: str, measure: str, value: float, allowed: float) -> None:
    if not value <= allowed:
        raise RuntimeError(
            f"SkipCLIP: the model itself embeds {what} differently in {mode} mode: {measure} {value:.2e}, allowed "
            f"{allowed:.0e}. Something in this model (a hook, a changed forward, another mask or activation) is not "
            "what its type promises, and tuning it would be silently wrong."
        )
