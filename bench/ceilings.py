"""Measured limits of this machine: the rate of matrix products and the memory bandwidth."""

from __future__ import annotations

from functools import cache

import torch

from . import measure

_ROUNDS = 5
_COPIED = 1 << 28  # bytes: larger than any cache


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square product: the fastest of five."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = measure.time_alternately({"product": lambda: left @ right}, _ROUNDS, device)["product"]
    return 2 * size**3 / min(seconds)


@cache
def bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy, both the bytes read and those written: the fastest of five."""
    copy = measure.copying(2 * _COPIED, device)
    seconds = measure.time_alternately({"copy": copy}, _ROUNDS, device)["copy"]
    return 2 * _COPIED / min(seconds)
