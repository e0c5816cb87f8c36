"""Operator registration: one schema per operator, with CPU, CUDA and fallback implementations.

The schemas are defined here, since they must exist without the C++ library, which only adds CPU kernels under the same
names. Triton kernels are for CUDA and ROCm devices. Without a kernel, the fallback is used: the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _build
from . import launching

NAMESPACE = "skipkernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Definition(NamedTuple):
    """Implementations of an operator besides the C++ kernel."""

    fallback: Callable[..., Any]
    launch: Callable[..., Any]
    check: Callable[..., None]
    fallback_cases: str


definitions: dict[str, Definition] = {}


def _accept(*args: Any) -> None:
    """Check nothing."""


class Gradient(NamedTuple):
    """Gradient of an operator: `save(ctx, inputs, output)`, and `backward(ctx, *d_outputs)` for its inputs."""

    save: Callable[..., None]
    backward: Callable[..., Any]


def define(
    schema: str,
    *,
    fallback: Callable[..., Any],
    fake: Callable[..., Any],
    launch: Callable[..., Any],
    check: Callable[..., None] = _accept,
    fallback_cases: str = "fp64",
    backward: torch._ops.OpOverload | Gradient | None = None,
    cast: int = 0,
) -> torch._ops.OpOverload:
    """Define an operator, to be called with positional arguments.

    `fallback` computes the results in plain PyTorch on any device, without autograd; `fake` only allocates them.
    `launch` computes them with Triton kernels, except for fp64 and the calls that `fallback_cases` describes. `check`
    raises ValueError for values of CPU tensors that the C++ kernel refuses. On a GPU it would be a host sync: the
    kernels have device-side assertions.

    `backward` is the operator that computes the gradients, and its schema says what is saved: see `gradient_by_names`.
    Without it the results are constants to autograd, and the gradient of an operator NAME_backward is an error. Under
    autocast the first `cast` arguments are cast.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def check_and_fall_back(*args: Any) -> Any:
        if _first(args).device.type == "cpu":
            check(*args)
        return fallback(*args)

    def load_or_fall_back(*args: Any) -> Any:
        # Once loaded, the C++ kernel has precedence: this is reached only with tensors that it has no kernel for.
        on_cpu = _first(args).device.type == "cpu" and not has_cpp(name)
        if on_cpu and _build.load().path is not None and has_cpp(name):
            return operator(*args)
        return check_and_fall_back(*args)

    def launch_or_fall_back(*args: Any) -> Any:
        return (fallback if _first(args).dtype == torch.float64 else launch)(*args)

    _library.impl(name, load_or_fall_back, "CompositeExplicitAutograd")
    if launching.installed:
        _library.impl(name, launch_or_fall_back, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    definitions[name] = Definition(check_and_fall_back, launch_or_fall_back, check, fallback_cases)
    _register_autograd(operator, backward)
    if cast:
        _autocast(operator, cast)
    if any(argument.alias_info and argument.alias_info.is_write for argument in operator._schema.arguments):
        _increment_versions(operator)
    return operator


def _register_autograd(operator: torch._ops.OpOverload, backward: torch._ops.OpOverload | Gradient | None) -> None:
    if backward is None and operator._opname.endswith("_backward"):
        backward = Gradient(lambda ctx, inputs, output: None, partial(_refuse_double_backward, operator._opname))
    if backward is None:  # a constant to autograd, at no cost per call
        _library.impl(operator._opname, torch.library.fallthrough_kernel, "Autograd")
        return
    differentiate(operator, backward if isinstance(backward, Gradient) else gradient_by_names(operator, backward))


def _refuse_double_backward(name: str, *_: Any) -> NoReturn:
    """Raise an error; without a gradient, that of a gradient would be a wrong zero."""
    raise RuntimeError(
        f"{name}: the gradient of a gradient is not implemented. Call backward without create_graph, or use "
        "skipkernels.reference, which is plain PyTorch."
    )


def gradient_by_names(operator: torch._ops.OpOverload, backward: torch._ops.OpOverload) -> Gradient:
    """Return the gradient of an operator by another one, from the names in the schemas of both.

    An argument of `backward` is saved if it has the name of an argument or a result of the operator. `d_NAME` is the
    gradient of the result NAME, the only one of the operator that has a gradient; `need_NAME` is true if the argument
    NAME requires one; any other flag is false. A result `d_NAME` of `backward` is the gradient of the argument NAME.
    """
    arguments, results = ([x.name for x in xs] for xs in (operator._schema.arguments, operator._schema.returns))
    place = {name: i for i, name in enumerate([*arguments, *results])}
    upstream, saved, options, needs, flags = range(5)  # where backward finds an argument
    plan: list[tuple[int, int]] = []  # for each argument of backward, where, and its index there
    kept: dict[int, list[int]] = {saved: [], options: []}  # places of what is saved
    differentiable = -1
    for argument in backward._schema.arguments:
        name, of = argument.name, argument.name.partition("_")[2]
        if name in place:
            where = saved if "Tensor" in str(argument.type) else options
            plan.append((where, len(kept[where])))
            kept[where].append(place[name])
        elif name == f"d_{of}" and of in results:
            differentiable = results.index(of)
            plan.append((upstream, differentiable))
        elif name == f"need_{of}" and of in arguments:
            plan.append((needs, arguments.index(of)))
        else:
            assert str(argument.type) == "bool", f"{backward._opname}: {name} is no name in {operator._schema}"
            plan.append((flags, 0))
    names = [x.name.removeprefix("d_") for x in backward._schema.returns]
    order = [names.index(name) if name in names else None for name in arguments]  # None: no gradient

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        values = (*inputs, *outputs)
        ctx.mark_non_differentiable(*(x for i, x in enumerate(outputs) if i != differentiable))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(values[i] for i in kept[saved]))
        ctx.options = [values[i] for i in kept[options]]

    def backward_of(ctx: Any, *d_results: Tensor | None) -> Sequence[Tensor | None]:
        if d_results[differentiable] is None:
            return ()
        sources = d_results, ctx.saved_tensors, ctx.options, ctx.needs_input_grad, (False,)
        found = backward(*(sources[where][i] for where, i in plan))
        found = found if isinstance(found, tuple) else (found,)
        return [None if i is None else found[i] for i in order]

    return Gradient(save, backward_of)


def has_cpp(name: str) -> bool:
    """True if the C++ library is loaded and has a CPU kernel for the operator."""
    return name in definitions and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")


def call(operator: torch._ops.OpOverload, *args: Any) -> Any:
    """Call an operator; values that its kernel refuses raise ValueError."""
    try:
        return operator(*args)
    except RuntimeError:  # PyTorch 2.15 turns every error of a C++ kernel into one
        if _first(args).device.type == "cpu":
            definitions[operator._opname].check(*args)
        raise


def _first(args: tuple[Any, ...]) -> torch.Tensor:
    """Return the tensor that chooses the implementation by device and dtype: the first, also of a list."""
    return args[0] if isinstance(args[0], torch.Tensor) else args[0][0]


PRIVATE = (
    "_AutoDispatchBelowAutograd",
    "_after_autograd_keyset",
    "_any_requires_grad",
    "_are_functorch_transforms_active",
)
"""Names in `torch._C` that `differentiate` uses. Without them `torch.library.register_autograd` is used."""


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off on a device that has it; the meta device has none."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def differentiate(operator: torch._ops.OpOverload, gradient: Gradient) -> None:
    """Register the gradient of an operator, as `torch.library.register_autograd` does for more schemas at more cost.

    A call of an operator that copies four numbers takes 37 µs instead of 56 µs with a gradient recorded, and 112 µs
    instead of 146 µs with its backward (torch 2.13, one core of an AMD EPYC, least of 15 runs).

    Its `backward` returns gradients of the first arguments; those that are not needed are dropped. The operator must
    not take lists of tensors that require grad.
    """
    arity, (save, backward) = len(operator._schema.arguments), gradient

    def all_gradients(ctx: Any, *upstream: Any) -> list[Any]:
        # Called within autocast, the matrix products of Triton's path and of the fallback would be rounded to 16 bits.
        given = [x for x in upstream if x is not None] if torch._C._is_any_autocast_enabled() else []
        with without_autocast(given[0].device) if given else nullcontext():
            gradients = backward(ctx, *upstream)
        wanted = [x if need else None for x, need in zip(gradients, ctx.needs_input_grad, strict=False)]
        return wanted + [None] * (arity - len(wanted))

    try:
        from torch._functorch.utils import enable_single_level_autograd_function

        below, available = torch._C._after_autograd_keyset, all(hasattr(torch._C, name) for name in PRIVATE)
    except (ImportError, AttributeError):
        available = False
    if not available:
        name = f"{NAMESPACE}::{operator._opname}"
        register = torch.library.register_autograd
        register(name, lambda *args: tuple(all_gradients(*args)), setup_context=save, lib=_library)
        return

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            with torch._C._AutoDispatchBelowAutograd():
                output = operator.redispatch(keyset & below, *inputs)
            save(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            ctx.needs_input_grad = ctx.needs_input_grad[:arity]  # without the keyset's
            return *all_gradients(ctx, *upstream), None

    # `Function.apply` would choose a level once more, and needs a `setup_context`.
    class AtOneLevel(torch.autograd.function._SingleLevelFunction):
        """`Differentiated` at the level of torch.func that the dispatcher has chosen; outer levels record forward."""

        backward = Differentiated.backward

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch.enable_grad():
                return Differentiated.forward(ctx, *args)

    def record_or_call(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0:  # without an error the tangent would be zero
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
    """Allocate the gradients of `inputs`: empty where not needed, since an operator cannot return None."""
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needs, strict=True))


def reference_gradients(
    function: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    needs: Sequence[bool],
    d_result: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
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


def _increment_versions(operator: torch._ops.OpOverload) -> None:
    """Increment the versions of the arguments that an in-place operator writes."""
    arguments = operator._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    below = torch._C._after_ADInplaceOrView_keyset

    def increment_and_call(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keyset & below, *args)

    _library.impl(operator._opname, increment_and_call, "ADInplaceOrView", with_keyset=True)


def _autocast(operator: torch._ops.OpOverload, features: int) -> None:
    """Under autocast, cast the first `features` arguments except fp64; a logit scale of 100.3 would become 100.5."""

    def cast_and_call(*args: Any) -> Any:
        device_type = args[0].device.type
        dtype = torch.get_autocast_dtype(device_type)
        cast = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in args[:features]]
        with torch.autocast(device_type, enabled=False):
            return operator(*cast, *args[features:])

    for key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS"):
        _library.impl(operator._opname, cast_and_call, key)
