"""Shards: safetensors files of rows, their labels, and the scales of int8.

rows         [n, N, W], in the dtype of the store
token_scale  [n, N] fp32, for int8
labels       [n] int64, if the store has them
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..formatting import first_line
from .atomic import replace_file
from .digest import digest_file
from .manifest import DTYPES, Layout, Manifest, Shard, StoreError
from .safe_read import open_regular
from .tensor_file import DTYPE_NAMES, write_tensors

_LEVELS = 127  # int8 without −128: the scale is the same on both sides
_NAME = "shard"  # the only metadata key of a header: safetensors writes several in random order


class MappedShard(NamedTuple):
    """Views of a private memory map of a shard file."""

    rows: Tensor
    token_scale: Tensor | None
    labels: Tensor | None


def path_of(folder: Path, number: int) -> Path:
    """Path of the file of a shard."""
    return folder / f"{number:05d}.safetensors"


def quantise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise features [n, N, W] to int8 [n, N, W] with fp32 scales [n, N], which map the largest of a token to ±127.

    >>> quantise(torch.tensor([[[0.5, -2.0]]]))[0].tolist()
    [[[32, -127]]]
    """
    features = features.float()
    scale = features.abs().amax(dim=-1) / _LEVELS
    steps = features / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return steps.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), scale


def rounded(features: Tensor, dtype: str) -> Tensor:
    """Round features [n, N, …] as if stored in `dtype`, a key of `DTYPES`, and read again.

    >>> rounded(torch.tensor([[[0.5, -2.0]]]), "int8").tolist()
    [[[0.5039370059967041, -2.0]]]
    """
    if dtype != "int8":
        return features.to(DTYPES[dtype]).to(features.dtype)
    steps, scale = quantise(features.flatten(2))
    return (steps * scale.unsqueeze(-1)).to(features.dtype).view_as(features)


def _name(layout: Layout, number: int) -> str:
    return f"{number} of {layout.digest}"


def is_shard_name(name: str) -> bool:
    """Return True if a file name has the form of `path_of`."""
    return re.fullmatch(r"[0-9]{5,}\.safetensors", name) is not None


def is_shard(path: Path) -> bool:
    """Return True if a file has the name and the header of a shard of any store."""
    if not is_shard_name(path.name):
        return False
    try:
        open_regular(path).close()
        with safe_open(path, "pt") as file:
            return re.fullmatch("[0-9]+ of [0-9a-f]{32}", (file.metadata() or {}).get(_NAME, "")) is not None
    except (SafetensorError, OSError, ValueError):
        return False


def write_shard(folder: Path, layout: Layout, number: int, tensors: dict[str, Tensor]) -> Shard:
    """Write a shard. The digest is computed from memory, so that a faulty write is detected later."""
    shards: list[Shard] = []

    def write(file: BinaryIO) -> None:
        shards.append(Shard(*write_tensors(file, tensors, {_NAME: _name(layout, number)})))

    replace_file(path_of(folder, number), write)
    return shards[0]


def map_shard(folder: Path, layout: Layout, number: int, shard: Shard) -> MappedShard:
    """Check the size and header of a shard against the manifest, and map it."""
    path = path_of(folder, number)

    def damaged(what: str) -> StoreError:
        return StoreError(f"{path}: {what}. Build it again with `resume=True`.")

    try:
        with open_regular(path) as opened:
            size = os.fstat(opened.fileno()).st_size
    except OSError as error:
        kind = "damaged" if error.errno in (errno.EISDIR, errno.EINVAL) else "unreadable"
        raise damaged("missing" if isinstance(error, FileNotFoundError) else f"{kind}: {error.strerror}") from None
    if size != shard.bytes:
        raise damaged(f"damaged: {size} bytes instead of {shard.bytes}")
    expected = _expected_tensors(layout, len(layout.rows_of(number)))
    try:
        with safe_open(path, "pt") as file:  # checks that offsets are inside the file and match shapes
            metadata, names = file.metadata() or {}, set(file.keys())
            slices = {name: file.get_slice(name) for name in names & set(expected)}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(f"damaged: its header is unreadable ({first_line(error)})") from None
    described = {name: (shape, DTYPE_NAMES[dtype]) for name, (shape, dtype) in expected.items()}
    if found != described or names != set(expected):
        raise damaged("damaged: its tensors do not match the manifest")
    if (name := metadata.get(_NAME, "")) != _name(layout, number):
        other, _, store = name.partition(" of ")
        raise damaged(f"is the file of shard {other}" if store == layout.digest else "belongs to another store")
    try:
        start, offsets = _offsets(path)
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except OSError as error:
        raise damaged(f"unreadable: {error.strerror}") from None
    except RuntimeError as error:  # raised by torch.from_file
        raise damaged(f"unreadable: {first_line(error)}") from None
    if any((start + offsets[name][0]) % dtype.itemsize for name, (_, dtype) in expected.items()):
        raise damaged("damaged: its tensors are not aligned")
    views = {
        name: whole[start + offsets[name][0] : start + offsets[name][1]].view(dtype).view(shape)
        for name, (shape, dtype) in expected.items()
    }
    return MappedShard(views["rows"], views.get("token_scale"), views.get("labels"))


def find_damage(
    folder: Path, manifest: Manifest, on_bytes: Callable[[int], None] = lambda count: None
) -> list[tuple[int, str]]:
    """Read every byte of all shards; return the number of each damaged shard and a message."""
    found = []
    for number, shard in enumerate(manifest.shards):
        if shard is not None and (reason := _damage(folder, manifest.layout, number, shard, on_bytes)):
            found.append((number, reason))
    return found


def _damage(folder: Path, layout: Layout, number: int, shard: Shard, on_bytes: Callable[[int], None]) -> str | None:
    try:
        map_shard(folder, layout, number, shard)
        digest = digest_file(path_of(folder, number))
        on_bytes(shard.bytes)
        if digest == shard.xxh3:
            return None
        what = "its contents have changed"
    except StoreError as error:
        return str(error)
    except OSError as error:
        what = f"unreadable: {error.strerror}"
    return f"{path_of(folder, number)}: damaged: {what}. Build it again with `resume=True`."


def _expected_tensors(layout: Layout, count: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the tensors of a shard with `count` rows."""
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "rows": ((count, *layout.stored_shape), DTYPES[layout.dtype])
    }
    if layout.dtype == "int8":
        tensors["token_scale"] = (count, layout.stored_shape[0]), torch.float32
    if layout.labelled:
        tensors["labels"] = (count,), torch.int64
    return tensors


def _offsets(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Start of the data in a file, and offsets of each tensor from there. The header was checked by safetensors."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return 8 + length, {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
