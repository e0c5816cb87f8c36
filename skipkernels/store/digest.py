"""Digests: XXH3 of 128 bits, which finds damage and change at the speed of memory. It is no defence against forgery."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

_BLOCK = 1 << 20  # bytes of a file in memory at once


def digest_bytes(data: bytes) -> str:
    """Of bytes, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_json(value: Any) -> str:
    """Of a tree of JSON values, whatever order its keys are in.

    >>> digest_json({"a": 1, "b": [2]}) == digest_json({"b": [2], "a": 1})
    True
    """
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def digest_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, shapes, dtypes and numbers, in order.

    >>> digest_tensors([("x", torch.zeros(2))]) == digest_tensors([("x", torch.zeros(2, 1))])
    False
    """
    digest = xxhash.xxh3_128()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_file(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Of a file's contents; `on_bytes` is told how many were read."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()
