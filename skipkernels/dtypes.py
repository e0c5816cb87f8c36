"""Dtypes of the arithmetic: at least fp32, wider for sums, and that of autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

WITHOUT_FP64 = frozenset({"mps"})
"""Types of the devices that have no fp64."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic: fp64 for fp64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert to the dtype of the arithmetic."""
    return x.to(wide_dtype(x.dtype))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off on a device that has it; the meta device has none."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of the autocast that is enabled on a device, or None; the meta device has none."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if available and torch.is_autocast_enabled(device.type) else None


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums of terms that cancel: fp64, but fp32 on a device that has no fp64."""
    return torch.float32 if device.type in WITHOUT_FP64 else torch.float64


def in_accumulation_dtype(x: Tensor) -> Tensor:
    """Convert to the `accumulation_dtype` of the device."""
    return x.to(accumulation_dtype(x.device))


def in_same_dtype(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a move or conversion to a tensor that keeps its dtype."""
    moved = fn(x)
    return moved if moved.dtype == x.dtype else x.to(moved.device)
