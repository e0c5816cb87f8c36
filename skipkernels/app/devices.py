"""Device of a run, and the precision of its arithmetic. Weights are fp32. Imports torch only when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..formatting import first_line
from ..options import Precision
from .data.base import InputError

if TYPE_CHECKING:
    import torch


def usable_device(device: str, function: str) -> str:
    """Return the name of a device on which a tensor can be; "auto" is "cuda" or "mps" if there is one, else "cpu"."""
    import torch

    chosen = device
    if device == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=chosen).cpu()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {chosen!r} can't be used: {first_line(error).rstrip('.!')}. `skipkernels doctor` lists devices.",
            "device",
            function,
        ) from None
    return chosen


def resolved_precision(precision: Precision, device: str) -> Precision:
    """Return a precision in place of "auto": "bf16" on a GPU that computes in it, else "fp32"."""
    import torch

    if precision != "auto":
        return precision
    # Before 8.0, NVIDIA's GPUs emulate bf16. AMD's start at 9.0.
    return "bf16" if device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context of a forward in a precision other than "auto".

    Example:
        >>> import torch
        >>> with autocast("bf16", torch.device("cpu")):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.bfloat16
    """
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes[precision], enabled=precision != "fp32")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generators of the CPU and of a device, and restore their states at the end.

    `torch.manual_seed` would also seed the generators of all other devices.
    """
    import torch

    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield
