"""How an operator comes to be: one name and one schema for every device, whoever serves it.

The schemas are defined here, from Python, because they must exist where the C++ kernels do not. The C++ library only
adds kernels for the CPU under the same names; Triton kernels serve CUDA and ROCm devices. What nobody serves, the
reference does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .. import _extension
from . import launching

NAMESPACE = "skipkernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Definition(NamedTuple):
    """Who can serve an operator, besides the C++ kernels."""

    serve: Callable[..., Any]
    launch: Callable[..., Any]
    leaves: str


definitions: dict[str, Definition] = {}


def define(
    schema: str,
    *,
    serve: Callable[..., Any],
    fake: Callable[..., Any],
    launch: Callable[..., Any],
    leaves: str = "fp64",
) -> torch._ops.OpOverload:
    """Define an operator.

    Args:
        schema: `name(arguments) -> results`.
        serve: computes it in plain PyTorch on any device, with no autograd; answers where there is no kernel.
        fake: gives results of the right shape, dtype and device, without computing.
        launch: computes it with Triton kernels; fp64 is not for them and goes to `serve`.
        leaves: in words, the calls for which `serve` answers also where `launch` could.

    Returns:
        The operator, to be called with positional arguments.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def serve_or_load(*args: Any) -> Any:
        # Once loaded, the C++ kernel stands before this one; who comes here then has tensors that are not for it.
        on_cpu = _first(args).device.type == "cpu" and not has_cpp(name)
        if on_cpu and _extension.load().path is not None and has_cpp(name):
            return operator(*args)
        return serve(*args)

    _library.impl(name, serve_or_load, "CompositeExplicitAutograd")
    launch = _or_serve_double(launch, serve)
    if launching.installed:
        _library.impl(name, launch, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    definitions[name] = Definition(serve, launch, leaves)
    return operator


def has_cpp(name: str) -> bool:
    """Whether the C++ library, once loaded, serves an operator on the CPU."""
    return name in definitions and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")


def _or_serve_double(launch: Callable[..., Any], serve: Callable[..., Any]) -> Callable[..., Any]:
    def launch_or_serve(*args: Any) -> Any:
        return (serve if _first(args).dtype == torch.float64 else launch)(*args)

    return launch_or_serve


def _first(args: tuple[Any, ...]) -> torch.Tensor:
    """The tensor that decides who serves a call: the first, also that of a list."""
    return args[0] if isinstance(args[0], torch.Tensor) else args[0][0]


def differentiate(operator: torch._ops.OpOverload, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Give an operator its gradient.

    As `torch.library.register_autograd` does, at a third of its cost a call: that one is made for any schema, and at
    a few rows its Python takes longer than the kernels.

    Args:
        operator: gets the gradient. It takes no lists of tensors that have one.
        backward: (ctx, gradients of the results) → gradients of the first arguments, of as many as can have one. What
            it gives where `ctx.needs_input_grad` is False is dropped.
        setup: (ctx, arguments, results): saves what backward needs.
    """
    below, arity = torch._C._after_autograd_keyset, len(operator._schema.arguments)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            with torch._C._AutoDispatchBelowAutograd():
                output = operator.redispatch(keyset & below, *inputs)
            setup(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            needs = ctx.needs_input_grad = ctx.needs_input_grad[:arity]  # without the keyset's
            gradients = backward(ctx, *upstream)
            wanted = [x if need else None for x, need in zip(gradients, needs, strict=False)]
            return *wanted, *[None] * (arity + 1 - len(wanted))

    class AtOneLevel(torch.autograd.function._SingleLevelFunction):
        """Under torch.func: the dispatcher has chosen the level that this call records; `Function.apply`, which needs a
        `setup_context`, would choose once more. The levels further out record what forward calls.
        """

        backward = Differentiated.backward

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch.enable_grad():
                return Differentiated.forward(ctx, *args)

    def record_or_call(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0:  # silence would be a tangent of zero
            _refuse_tangents(operator._opname, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if torch._C._are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    return AtOneLevel.apply(*args, keyset)  # type: ignore[attr-defined]
            return Differentiated.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & below, *args)

    _library.impl(operator._opname, record_or_call, "Autograd", with_keyset=True)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    for x in args:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name}: forward-mode derivatives are not implemented. Use backward, or skipkernels.reference, which "
                "is plain PyTorch."
            )


def gradients_like(inputs: Sequence[torch.Tensor], needs: Sequence[bool]) -> tuple[torch.Tensor, ...]:
    """Memory for the gradients of `inputs`: empty where not needed, since an operator's result cannot be absent."""
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needs, strict=True))


def reference_gradients(
    function: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    needs: Sequence[bool],
    d_result: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Compute the gradients of `function(*inputs)` by autograd: the fallback of a backward operator.

    Gradients that are not needed are empty, as in `gradients_like`.
    """
    gradients = [x.new_empty(0) for x in inputs]
    wanted = [i for i, need in enumerate(needs) if need]
    if wanted:
        # The dispatcher calls the fallback of an operator below autograd: recording needs its keys again.
        include = torch._C._dispatch_tls_local_include_set()
        exclude = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
        device_type = inputs[0].device.type
        with (
            torch._C._ForceDispatchKeyGuard(include, exclude),
            torch.enable_grad(),
            torch.autocast(device_type, enabled=False),
        ):
            leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
            found = torch.autograd.grad(function(*leaves), [leaves[i] for i in wanted], d_result)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient.contiguous()
    return tuple(gradients)


def refuse_double_backward(operator: torch._ops.OpOverload, instead: str) -> None:
    """Make the gradient of a backward operator a clear error, where silence would be a wrong zero."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{operator._opname}: the gradient of a gradient is not implemented. Call backward without "
            f"create_graph, or use {instead}, which is plain PyTorch."
        )

    differentiate(operator, backward, lambda ctx, inputs, output: None)


def not_differentiable(operator: torch._ops.OpOverload) -> None:
    """Make the results of an operator constants to autograd, which then costs nothing."""
    _library.impl(operator._opname, torch.library.fallthrough_kernel, "Autograd")


def mutates(operator: torch._ops.OpOverload) -> None:
    """Let an operator that changes its arguments count up their versions, as every in-place operator must."""
    arguments = operator._schema.arguments
    changed = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    below = torch._C._after_ADInplaceOrView_keyset

    def count_and_call(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        for i in changed:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keyset & below, *args)

    _library.impl(operator._opname, count_and_call, "ADInplaceOrView", with_keyset=True)


def autocast_features(operator: torch._ops.OpOverload, features: int) -> None:
    """Under autocast, cast the first `features` arguments to its dtype, fp64 excepted, and nothing else.

    `torch.library.register_autocast` casts every floating-point argument; a logit scale of 100.3 would become 100.5.
    """

    def cast_and_call(*args: Any) -> Any:
        device_type = args[0].device.type
        dtype = torch.get_autocast_dtype(device_type)
        cast = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in args[:features]]
        with torch.autocast(device_type, enabled=False):
            return operator(*cast, *args[features:])

    for key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"):
        _library.impl(operator._opname, cast_and_call, key)
