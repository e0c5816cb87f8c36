"""Digests: XXH3 of 128 bits, which finds damage and change at the speed of memory. It is no defence against forgery."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from .regular import open_regular

_BLOCK = 1 << 20  # bytes of a file in memory at once
_PART = 1 << 22  # numbers of a tensor that are mixed at once


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
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def digests(tensors: Iterable[Tensor]) -> list[int]:
    """64 bits for each tensor, which depend on every number, its sign and its position; computed where the tensor is.

    >>> a, b = digests([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])])
    >>> a == b
    False
    """
    found = [_digest_there(x) if x.device.type != "cpu" else xxhash.xxh3_64_intdigest(_bytes(x)) for x in tensors]
    there = [x for x in found if isinstance(x, Tensor)]
    read = iter(torch.stack(there).tolist() if there else [])  # one wait for the device
    return [next(read) if isinstance(x, Tensor) else x for x in found]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _digest_there(tensor: Tensor) -> Tensor:
    """[] int64: Σ mix(bits, position), in parts, so that little memory is taken."""
    bits = tensor.detach().contiguous().flatten()
    bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(bits.split(_PART)):
        position = torch.arange(number * _PART, number * _PART + len(part), device=tensor.device)
        mixed = (part.long() ^ position * -7046029254386353131) * -4658895280553007687
        total += ((mixed ^ mixed >> 29) * -7723592293110705685).sum()
    return total


def digest_file(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Of a file's contents; `on_bytes` is told how many were read."""
    digest = xxhash.xxh3_128()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()
