"""Autocast of operators: which of their arguments are cast, and a context without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off on a device that has it; the meta device has none."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def cast_first_arguments(library: torch.library.Library, operator: torch._ops.OpOverload, count: int) -> None:
    """Under autocast, cast the first `count` arguments, except fp64; a logit scale of 100.3 would become 100.5."""

    def cast_and_call(*args: Any) -> Any:
        device_type = args[0].device.type
        dtype = torch.get_autocast_dtype(device_type)
        cast = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in args[:count]]
        with torch.autocast(device_type, enabled=False):
            return operator(*cast, *args[count:])

    for key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS"):
        library.impl(operator._opname, cast_and_call, key)
