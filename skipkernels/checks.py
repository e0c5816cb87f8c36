"""Checks of arguments. Errors name the function, the argument, the expected and the given value, and a remedy."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def check_shape(
    function: str, argument: str, tensor: Tensor, like: tuple[str, Tensor] | None = None, **sizes: int | None
) -> None:
    """Raise a ValueError unless a tensor has the given sizes, by their names in the shape alphabet.

    None is any size ≥ 1, and `rest` any number of leading dimensions. `like` is the name and tensor of the argument
    that determines the sizes.
    """
    leading = "rest" in sizes
    wanted = {name: size for name, size in sizes.items() if name != "rest"}
    got = tensor.shape[tensor.dim() - len(wanted) :] if leading else tensor.shape
    if len(got) == len(wanted) and all(
        size == want or (want is None and size > 0) for size, want in zip(got, wanted.values(), strict=True)
    ):
        return
    names = [name if size is None else f"{name}={size}" for name, size in wanted.items()]
    free = [name for name, size in wanted.items() if size is None]
    raise ValueError(
        f"{function}: {argument} must be [{', '.join(['...'] * leading + names)}]"
        + (f" with {', '.join(free)} ≥ 1" if free else "")
        + (f" to match {like[0]} {list(like[1].shape)}" if like is not None else "")
        + f"; got {list(tensor.shape)}."
    )


def check_dtype(function: str, argument: str, tensor: Tensor, dtypes: Sequence[torch.dtype], remedy: str) -> None:
    """Raise a TypeError unless a tensor is dense and has one of the dtypes; an error for a tangent of forward mode."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(  # the tangent of the result would be zero
            f"{function}: forward-mode derivatives are not implemented. Use backward, or skipkernels.reference, which "
            "is plain PyTorch."
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{function}: {argument} must be a dense tensor; got {tensor.layout}. Use {argument}.to_dense()."
        )
    if tensor.dtype not in dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        names = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f"{function}: {argument} must be {names}; got {tensor.dtype}. {remedy}")


def check_device(function: str, argument: str, tensor: Tensor, like: tuple[str, Tensor]) -> None:
    """Raise a ValueError unless two tensors are on the same device."""
    name, other = like
    if tensor.device != other.device:
        raise ValueError(
            f"{function}: {argument} must be on {other.device}, where {name} is; got {tensor.device}. "
            f"Use {argument}.to({str(other.device)!r})."
        )


def check_features(
    function: str, argument: str, tensor: Tensor, like: tuple[str, Tensor] | None = None, **sizes: int | None
) -> None:
    """Check the sizes of a floating-point tensor, and that it is on the device of `like`; it may have another dtype."""
    check_shape(function, argument, tensor, like, **sizes)
    check_dtype(function, argument, tensor, FEATURE_DTYPES, f"Use {argument}.float().")
    if like is not None:
        check_device(function, argument, tensor, like)


def check_like(
    function: str,
    argument: str,
    tensor: Tensor,
    like: tuple[str, Tensor],
    *,
    narrower: bool = False,
    **sizes: int | None,
) -> None:
    """Check that a tensor has the dtype and device of `like`, and the given sizes; if there are none, its shape.

    `narrower`: 16 bits pass beside fp32.
    """
    name, other = like
    if sizes:
        check_shape(function, argument, tensor, like, **sizes)
    elif tensor.shape != other.shape:
        raise ValueError(
            f"{function}: {argument} must be {list(other.shape)}, the shape of {name}; got {list(tensor.shape)}."
        )
    dtypes, kind = [other.dtype], other.device.type
    if narrower and other.dtype == torch.float32:
        dtypes += [torch.bfloat16, torch.float16]
    if tensor.dtype != other.dtype and other.dtype != torch.float64:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # which casts both to one dtype
            dtypes = [dtype for dtype in FEATURE_DTYPES if dtype != torch.float64]
    check_dtype(function, argument, tensor, dtypes, f"Convert one of {argument} and {name}.")
    check_device(function, argument, tensor, like)


def check_ids(function: str, argument: str, ids: Tensor, like: tuple[str, Tensor], **size: int | None) -> None:
    """Check the dtype of indices [n], that they are on the device of `like`, and their number, which it may give."""
    check_dtype(function, argument, ids, [torch.int64], f"Use {argument}.long().")
    check_shape(function, argument, ids, like if all(size.values()) else None, **size)
    check_device(function, argument, ids, like)


def as_scalar(
    function: str, argument: str, value: Tensor | float, like: tuple[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """Convert a number to a tensor [] of `dtype` without a host sync; check a tensor and return it unchanged."""
    if not isinstance(value, Tensor):
        if dtype.is_floating_point and not abs(value) <= torch.finfo(dtype).max:
            raise ValueError(f"{function}: {argument} must be finite in {dtype}; got {value}.")
        return torch.full((), value, dtype=dtype, device=like[1].device)
    if value.numel() != 1 or value.dim() > 1:
        raise ValueError(f"{function}: {argument} must be a number, [] or [1]; got {list(value.shape)}.")
    allowed = FEATURE_DTYPES if dtype.is_floating_point else [dtype]
    check_dtype(function, argument, value, allowed, f"Use {argument}.to({dtype}).")
    check_device(function, argument, value, like)
    return value


# ---- values ----------------------------------------------------------------------------------------------------------


def check_choice(function: str, argument: str, value: Any, literal: Any) -> None:
    """Raise a ValueError unless a value is one of a `Literal`."""
    if value not in (choices := get_args(literal)):
        raise ValueError(f"{function}: {argument} must be one of {', '.join(choices)}; got {value!r}.")


def check_range(function: str, argument: str, ids: Tensor, num_classes: int, remedy: str) -> None:
    """Raise a ValueError if an id is outside [0, num_classes). A host sync on a GPU."""
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= num_classes:
        raise ValueError(f"{function}: {argument} must be in [0, C={num_classes}); got {low} to {high}. {remedy}")


def check_values(function: str, argument: str, values: Tensor, valid: Tensor, expected: str, remedy: str = "") -> None:
    """Raise a ValueError unless all values are valid; on a GPU, and compiled, an assertion without a host sync."""
    message = f"{function}: {argument} must be {expected}"
    try:
        torch._assert_async(valid.all(), message)
        return
    except NotImplementedError:  # on MPS and XPU
        if valid.all():
            return
    except RuntimeError:  # on the CPU
        pass
    raise ValueError(f"{message}; got {values[~valid][0]}. {remedy}".rstrip())


# ---- warnings --------------------------------------------------------------------------------------------------------


def warn_caller(message: str) -> None:
    """Issue a UserWarning at the line of the caller outside this package and PyTorch."""
    frame, level, inside = sys._getframe(), 1, ("skipkernels", "torch")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
