"""Gradients of operators: their registration, and helpers for implementations of backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..dtypes import without_autocast


class GradientRule(NamedTuple):
    """Gradient of an operator: `save(ctx, inputs, output)`, and `backward(ctx, *d_outputs)` for its inputs.

    `backward` is called if an output has a gradient; those of others are None. It may leave out the last inputs, and
    gradients that are not needed are dropped.
    """

    save: Callable[..., None]
    backward: Callable[..., Sequence[Tensor | None]]

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save what backward needs."""
        ctx.set_materialize_grads(False)
        self.save(ctx, inputs, output)

    def compute(self, ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients of all inputs; None where not needed."""
        given = [x for x in d_outputs if x is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        # Called within autocast, the matrix products of Triton's path and of the fallback would be rounded to 16 bits.
        autocast = torch._C._is_any_autocast_enabled()
        with without_autocast(given[0].device) if autocast else nullcontext():
            found = self.backward(ctx, *d_outputs)
        return tuple(x if need else None for x, need in itertools.zip_longest(found, ctx.needs_input_grad))


def refuse_double_backward(name: str) -> GradientRule:
    """Return the gradient of an operator NAME_backward, an error; without it, the gradient would be a wrong zero."""

    def backward(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"{name}: the gradient of a gradient is not implemented. Call backward without create_graph, or use "
            "skipkernels.reference, which is plain PyTorch."
        )

    return GradientRule(lambda ctx, inputs, output: None, backward)


# ---- for implementations of backward -----------------------------------------------------------------------------


def fake_by_names(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """Return the function that allocates the gradients of an operator NAME_backward, from the names in its schema.

    A result `d_NAME` is like the argument NAME, and empty if there is an argument `need_NAME` that is false.
    """
    arguments = [x.name for x in operator._schema.arguments]
    inputs = [x.name.removeprefix("d_") for x in operator._schema.returns]

    def allocate(*args: Any) -> Tensor | tuple[Tensor, ...]:
        values = dict(zip(arguments, args, strict=True))
        found = gradients_like([values[x] for x in inputs], [values.get(f"need_{x}", True) for x in inputs])
        return found if len(found) > 1 else found[0]

    return allocate


def gradients_like(inputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Allocate the gradients of `inputs`: empty where not needed, since an operator cannot return None."""
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needs, strict=True))


def reference_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], d_result: Tensor
) -> tuple[Tensor, ...]:
    """Compute the gradients of `function(*inputs)` by autograd; empty where not needed, as in `gradients_like`."""
    gradients = [x.new_empty(0) for x in inputs]
    wanted = [i for i, need in enumerate(needs) if need]
    if wanted:
        # The dispatcher calls a fallback below autograd: recording needs the autograd keys again.
        include = torch._C._dispatch_tls_local_include_set()
        exclude = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
        with (
            torch._C._ForceDispatchKeyGuard(include, exclude),
            torch.enable_grad(),
            without_autocast(inputs[0].device),
        ):
            leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
            found = torch.autograd.grad(function(*leaves), [leaves[i] for i in wanted], d_result.contiguous())
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient.contiguous()
    return tuple(gradients)
