"""Digests by XXH3, which detect damage and changes at memory speed; not secure against forgery.

Digests of bytes, JSON and files need no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20  # bytes per read
_PART = 1 << 22  # tensor elements mixed at once


def digest_bytes(data: bytes) -> str:
    """Digest of bytes, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_json(value: Any) -> str:
    """Digest of a JSON value, independent of the order of keys.

    >>> digest_json({"a": 1, "b": [2]}) == digest_json({"b": [2], "a": 1})
    True
    """
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def digest_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, shapes, dtypes and elements, in order.

    >>> import torch
    >>> digest_tensors([("x", torch.zeros(2))]) == digest_tensors([("x", torch.zeros(2, 1))])
    False
    """
    digest = xxhash.xxh3_128()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def digests(tensors: Iterable[Tensor]) -> list[int]:
    """64-bit digest of each tensor, computed on its device; depends on the bits and the position of every element.

    >>> import torch
    >>> a, b = digests([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])])
    >>> a == b
    False
    """
    import torch

    def digest(x: Tensor) -> Tensor | int:
        if x.is_meta:
            return 0  # no elements
        return xxhash.xxh3_64_intdigest(_bytes(x)) if x.device.type == "cpu" else _device_digest(x)

    found = list(map(digest, tensors))
    on_device = [x for x in found if isinstance(x, torch.Tensor)]
    read = iter(torch.stack(on_device).tolist() if on_device else [])  # one host sync
    return [next(read) if isinstance(x, torch.Tensor) else x for x in found]


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _device_digest(tensor: Tensor) -> Tensor:
    """Σ mix(bits, position), [] int64; in parts, to bound memory."""
    import torch

    bits = tensor.detach().contiguous().flatten()
    bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(bits.split(_PART)):
        position = torch.arange(number * _PART, number * _PART + len(part), device=tensor.device)
        mixed = (part.long() ^ position * -7046029254386353131) * -4658895280553007687
        total += ((mixed ^ mixed >> 29) * -7723592293110705685).sum()
    return total


def digest_file(path: Path) -> str:
    """Digest of the contents of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
