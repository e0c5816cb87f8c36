"""Gradients of operators: found by the names in two schemas, or computed by the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..reference import without_autocast


class GradientRule(NamedTuple):
    """Gradient of an operator: `save(ctx, inputs, output)`, and `backward(ctx, *d_outputs)` for its inputs.

    `backward` may leave out the last inputs; gradients that are not needed are dropped.
    """

    save: Callable[..., None]
    backward: Callable[..., Sequence[Tensor | None]]


# ---- by name -----------------------------------------------------------------------------------------------------


def gradient_by_names(operator: torch._ops.OpOverload, backward: torch._ops.OpOverload) -> GradientRule:
    """Return the gradient of an operator by another one, `backward`, from the names in the schemas of both.

    For example:

        unit(Tensor x, float eps) -> (Tensor out, Tensor norm)
        unit_backward(Tensor d_out, Tensor x, Tensor norm, float eps, bool need_x, bool partial=False) -> Tensor d_x

        argument       meaning
        d_out          gradient of the result out, the only differentiable one: norm has no d_norm
        x, norm, eps   an argument or a result of unit, saved
        need_x         True if the argument x requires a gradient
        partial        any other name must have a default

    The result d_x is the gradient of the argument x; eps has none.
    """
    arguments, results = _names(operator._schema.arguments), _names(operator._schema.returns)
    wanted = [x for x in backward._schema.arguments if not x.has_default_value()]
    gradients = [name for name in results if f"d_{name}" in _names(wanted)]
    given = {*arguments, *results, *(f"d_{name}" for name in gradients), *(f"need_{name}" for name in arguments)}
    for name in _names(wanted):
        assert name in given, f"{backward._opname}: {name} is no name in {operator._schema}"
    assert len(gradients) == 1, f"{backward._opname}: one result must have a gradient d_NAME; got {gradients}"
    (differentiable,) = gradients
    kept = [x for x in wanted if x.name in arguments or x.name in results]
    tensors = [x.name for x in kept if "Tensor" in str(x.type)]
    options = [x.name for x in kept if x.name not in tensors]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values = dict(zip([*arguments, *results], [*inputs, *_as_tuple(output)], strict=True))
        ctx.mark_non_differentiable(*(values[name] for name in results if name != differentiable))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(values[name] for name in tensors))
        ctx.options = {name: values[name] for name in options}

    def backward_of(ctx: Any, *d_results: Tensor | None) -> Sequence[Tensor | None]:
        d_result = d_results[results.index(differentiable)]
        if d_result is None:
            return ()
        values = dict(zip(tensors, ctx.saved_tensors, strict=True)) | ctx.options
        values |= {f"need_{name}": need for name, need in zip(arguments, ctx.needs_input_grad, strict=True)}
        values[f"d_{differentiable}"] = d_result
        found = _as_tuple(backward(*(values[x.name] for x in wanted)))
        named = dict(zip(_names(backward._schema.returns), found, strict=True))
        return [named.get(f"d_{name}") for name in arguments]

    return GradientRule(save, backward_of)


def fake_by_names(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """Return the function that allocates the gradients of an operator NAME_backward, from the names in its schema.

    A result `d_NAME` is like the argument NAME, and empty if there is an argument `need_NAME` that is false.
    """
    arguments, results = _names(operator._schema.arguments), _names(operator._schema.returns)

    def allocate(*args: Any) -> Tensor | tuple[Tensor, ...]:
        values = dict(zip(arguments, args, strict=True))
        inputs = [name.removeprefix("d_") for name in results]
        found = gradients_like([values[x] for x in inputs], [values.get(f"need_{x}", True) for x in inputs])
        return found if len(found) > 1 else found[0]

    return allocate


def _names(arguments: Sequence[Any]) -> list[str]:
    return [x.name for x in arguments]


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


# ---- autograd ----------------------------------------------------------------------------------------------------


def needed_gradients(rule: GradientRule, ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """Compute the gradients of all inputs; None where not needed."""
    # Called within autocast, the matrix products of Triton's path and of the fallback would be rounded to 16 bits.
    given = [x for x in d_outputs if x is not None] if torch._C._is_any_autocast_enabled() else []
    with without_autocast(given[0].device) if given else nullcontext():
        found = rule.backward(ctx, *d_outputs)
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
