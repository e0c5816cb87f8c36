"""Comparison of embeddings and gradients of SkipCLIP with those of the caller's model."""

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
# Largest distance between two unit-norm embeddings. Another order of operations changes about 1e-6 in fp32 over twelve
# blocks; some fp64 models compute a softmax in fp32. A wrong activation in one block changes at least 2e-3.
_EMBEDDING_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# Largest relative error of the gradient of norms and biases; in fp32, at most 5e-4 was measured over all of open_clip.
_GRADIENT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}


class Pair(NamedTuple):
    """The same embeddings, computed by the caller's model and by SkipCLIP."""

    inputs: str  # Name of the inputs, for messages
    reference: Callable[[], Tensor]  # Returns the embeddings [n, D] of the caller's model, normalised or not
    actual: Callable[[], Tensor]  # Returns the embeddings [n, D] of SkipCLIP
    parameters: list[nn.Parameter]


class _InFloat32(TorchDispatchMode):
    """Run every operator on fp32 copies of its half-precision arguments, which takes less memory than an fp32 model."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_upcast, (args, kwargs or {}))
        return func(*args, **kwargs)


class _ConvolutionInFloat32(TorchFunctionMode):
    """Run convolutions on fp32 copies too: PyTorch compares the dtypes of their arguments before dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv1d, torch.conv2d, torch.conv3d):
            args, kwargs = tree_map(_upcast, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _upcast(x: Any) -> Any:
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
    """Raise if the two embeddings, or their gradients, differ by more than rounding, or are not finite.

    Half-precision models are compared in fp32: in half precision rounding would hide a wrong activation. `gradients`
    also compares gradients of trainable norms and biases; without any, of all trainable parameters.
    """
    trainable = [p for p in pair.parameters if p.requires_grad] if gradients else []
    parameters = [p for p in trainable if p.ndim <= 1] or trainable
    with _in_float32(pair.parameters), torch.set_grad_enabled(bool(parameters)):
        raw = pair.reference(), pair.actual()
        wide = torch.promote_types(raw[1].dtype, torch.float32)
        expected, got = (nn.functional.normalize(x.to(wide), dim=-1) for x in raw)
        if not expected.isfinite().all():
            raise RuntimeError(
                f"SkipCLIP: the model's embeddings of {pair.inputs} are not finite. Its weights are damaged, or too "
                "large for its dtype. Load other weights."
            )
        distance = (expected - got).detach().norm(dim=-1).max().item()
        _raise_if_above(pair.inputs, mode, "unit-norm distance", distance, _EMBEDDING_TOLERANCE[wide])
        if parameters and not (expected.requires_grad and got.requires_grad):
            raise RuntimeError(
                f"SkipCLIP: no parameter that trains has an effect on the model's embeddings of {pair.inputs}. "
                "torch.nn.MultiheadAttention reads the weight of its out_proj and does not call that layer, so an "
                "adapter of this layer has no effect. Adapt another layer."
            )
        if parameters:
            generator = torch.Generator().manual_seed(1)
            upstream = torch.randn(expected.shape, generator=generator).to(expected)
            both = (
                torch.autograd.grad((x * upstream).sum(), parameters, materialize_grads=True) for x in (got, expected)
            )
            d_got, d_expected = (torch.cat([d.flatten() for d in gradients]) for gradients in both)
            norm = d_expected.norm().clamp_min(torch.finfo(d_expected.dtype).tiny)
            error = ((d_got - d_expected).norm() / norm).item()
            _raise_if_above(pair.inputs, mode, "relative error of the gradient", error, _GRADIENT_TOLERANCE[wide])


def _raise_if_above(inputs: str, mode: str, measure: str, value: float, allowed: float) -> None:
    if not value <= allowed:
        raise RuntimeError(
            f"SkipCLIP: its embeddings of {inputs} differ from the model's in {mode} mode: {measure} {value:.2e}, "
            f"allowed {allowed:.0e}. A part of the model (a hook, a changed forward, a mask or activation) is not what "
            "its type implies, so tuning would be silently wrong."
        )
