"""Operator registration: one schema per operator, with CPU, CUDA and fallback implementations.

The schemas are defined here, since they must exist without the C++ library, which only adds CPU kernels under the same
names. Triton kernels are for CUDA and ROCm devices. Without a kernel, the fallback is used: the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import launching
from .autograd import GradientRule, fake_by_names, refuse_double_backward

NAMESPACE = "skipkernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Definition(NamedTuple):
    """Implementations of an operator besides the C++ kernel."""

    fallback: Callable[..., Any]
    """Plain PyTorch, after a check of the values."""
    launch: Callable[..., Any]
    """The Triton kernels; the fallback in fp64, and for the calls that they do not implement."""
    check: Callable[..., None]
    fallback_note: str
    """The calls for which `launch` uses the fallback."""


definitions: dict[str, Definition] = {}
"""All operators by name."""

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    torch.dtype | None: "ScalarType?",
    bool: "bool",
    int: "int",
    float: "float",
}


def arguments_of(call: Any) -> str:
    """Return the arguments of a schema from the fields of a NamedTuple.

    Example:
        >>> class Call(NamedTuple):
        ...     x: Tensor
        ...     bias: Tensor | None
        ...     eps: float
        ...     rms: bool = False
        >>> arguments_of(Call)
        'Tensor x, Tensor? bias, float eps, bool rms=False'
    """
    defaults = {name: f"={value}" for name, value in call._field_defaults.items()}
    return ", ".join(
        f"{_SCHEMA_TYPES[kind]} {name}{defaults.get(name, '')}" for name, kind in get_type_hints(call).items()
    )


def _accept(*args: Any) -> None:
    """Check nothing."""


def define(
    schema: str,
    *,
    fallback: Callable[..., Any],
    launch: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    check: Callable[..., None] = _accept,
    fallback_note: str = "fp64",
    backward: GradientRule | None = None,
    autocast_arguments: int = 0,
) -> torch._ops.OpOverload:
    """Define an operator, to be called with positional arguments.

    `fallback` computes the results in plain PyTorch on any device, without autograd; `fake` only allocates them, by
    default as `fake_by_names`. `launch` computes them with Triton kernels, except for fp64 and the calls that
    `fallback_note` describes, for which it returns NotImplemented.

    `check` is `check_values` of all ids, labels and offsets. It runs before the fallback, on every device, and after an
    error of the C++ kernel, which only says that a value is invalid. Triton kernels have device-side assertions of the
    same values.

    `backward` says what is saved and how the gradients are computed. Without it the results are constants to autograd,
    and the gradient of an operator NAME_backward is an error. Under autocast the first `autocast_arguments` arguments
    are cast.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    # 1. Without a kernel
    def check_and_fall_back(*args: Any) -> Any:
        check(*args)
        return fallback(*args)

    # 2. CUDA and ROCm devices, if Triton is installed
    def launch_or_fall_back(*args: Any) -> Any:
        results = NotImplemented if _first(args).dtype == torch.float64 else launch(*args)
        return check_and_fall_back(*args) if results is NotImplemented else results

    # 3. All other devices. On the CPU the C++ kernel has precedence, once it is loaded: this is then reached only with
    # tensors that it has no kernel for.
    def load_or_fall_back(*args: Any) -> Any:
        if _first(args).device.type == "cpu" and not has_cpp(name):
            from .. import _build  # not needed before

            _build.load()
            if has_cpp(name):
                return operator(*args)
        return check_and_fall_back(*args)

    _library.impl(name, load_or_fall_back, "CompositeExplicitAutograd")
    if launching.installed:
        _library.impl(name, launch_or_fall_back, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake or fake_by_names(operator), lib=_library)
    definitions[name] = Definition(check_and_fall_back, launch_or_fall_back, check, fallback_note)
    _register_autograd(operator, backward)
    if autocast_arguments:
        _autocast(operator, autocast_arguments)
    if any(argument.alias_info and argument.alias_info.is_write for argument in operator._schema.arguments):
        _increment_versions(operator)
    return operator


def _register_autograd(operator: torch._ops.OpOverload, rule: GradientRule | None) -> None:
    if rule is None and operator._opname.endswith("_backward"):
        rule = refuse_double_backward(operator._opname)
    if rule is None:  # a constant to autograd, at no cost per call
        _library.impl(operator._opname, torch.library.fallthrough_kernel, "Autograd")
        return
    torch.library.register_autograd(operator._schema.name, rule.compute, setup_context=rule.setup_context, lib=_library)


def _autocast(operator: torch._ops.OpOverload, count: int) -> None:
    """Under autocast, cast the first `count` arguments, except fp64; a logit scale of 100.3 would become 100.5."""

    def cast_and_call(*args: Any) -> Any:
        device_type = args[0].device.type
        dtype = torch.get_autocast_dtype(device_type)
        cast = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in args[:count]]
        with torch.autocast(device_type, enabled=False):
            return operator(*cast, *args[count:])

    for key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS"):
        _library.impl(operator._opname, cast_and_call, key)


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


def has_cpp(name: str) -> bool:
    """True if the C++ library is loaded and has a CPU kernel for the operator."""
    return name in definitions and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")


def call_and_explain(operator: torch._ops.OpOverload, *args: Any) -> Any:
    """Call an operator; if it fails on the CPU, raise the ValueError of its check, if that finds the cause.

    The check is not made before each call: it takes as long as a small call.
    """
    try:
        return operator(*args)
    except RuntimeError:
        if _first(args).device.type == "cpu":
            definitions[operator._opname].check(*args)
        raise


def _first(args: tuple[Any, ...]) -> Tensor:
    """Return the tensor that chooses the implementation by device and dtype: the first, also of a list."""
    return args[0] if isinstance(args[0], Tensor) else args[0][0]
