"""Reading of a store: rows from memory maps of its shards, in bounded memory."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..memory import free_bytes
from ..ops.gather_rows import gather_rows_out
from .manifest import COMPUTED, DTYPES, MANIFEST, Layout, Manifest, StoreError, absolute_folder
from .shards import MappedShard, find_damage, map_shard

# Bytes read from maps before all maps are closed, unless the store is small compared with the free memory. The pages
# stay in the system's cache, but no longer count as resident memory of this process.
_MAPPED = 32 << 20
_ANNOUNCED = 8 << 20  # bytes announced to the system: with little memory, more would be evicted before they are read
_READ_AHEAD = 128 << 10  # bytes per madvise call: the system's default limit for one read-ahead


def _system_call() -> Callable[[int, int, int], int] | None:
    """Return `madvise`; None if the system does not have it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        call = ctypes.CDLL(None).madvise
        call.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        return call
    return None


_madvise = _system_call()


class Store:
    """A complete store. With `verify` every byte is read and digests are compared; otherwise sizes and headers.

    Raises:
        StoreError: If there is no store, or it is incomplete or damaged.

    Example:
        >>> import tempfile
        >>> from skipkernels.store import Writer
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Writer(folder, Layout(3, (1, 2), "fp32", "fp32", 2, False, {}, {})) as writer:
        ...     _ = writer.write(0, {"rows": torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])})
        ...     _ = writer.write(1, {"rows": torch.tensor([[[5.0, 6.0]]])})
        >>> Store(folder).gather(torch.tensor([2, 0])).tolist()
        [[[5.0, 6.0]], [[1.0, 2.0]]]
    """

    def __init__(self, folder: Path, *, verify: bool = False):
        self.folder = folder = absolute_folder(folder)
        self._version = _version(folder)
        self.manifest = Manifest.read(folder)
        if not self.manifest.complete:
            done = sum(shard is not None for shard in self.manifest.shards)
            raise StoreError(
                f"{folder}: incomplete: {done} of {self.layout.shards} shards exist. Build the rest with `resume=True`."
            )
        for number in range(self.layout.shards):
            self._map(number)
        if verify and (found := self.verify()):
            raise StoreError(found[0])
        self._stored_shape, self._row_bytes = self.layout.stored_shape, self.layout.row_bytes
        self._token_rows_bytes = math.prod(self._stored_shape) * DTYPES[self.layout.dtype].itemsize
        self._limit = math.inf if self.bytes < free_bytes(self.device) / 32 else _MAPPED
        self._maps: dict[int, MappedShard] = {}
        self._read = 0  # bytes read from these maps

    def __getstate__(self) -> dict[str, Any]:
        # Without the maps: another process opens its own.
        return self.__dict__ | {"_maps": {}, "_read": 0}

    @property
    def layout(self) -> Layout:
        """Layout of the rows."""
        return self.manifest.layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of rows before they were stored, and of gathered rows."""
        return COMPUTED[self.layout.computed]

    @property
    def device(self) -> torch.device:
        """Device of gathered rows."""
        return torch.device("cpu")

    @property
    def bytes(self) -> int:
        """Bytes on the disk, without the manifest."""
        return sum(shard.bytes for shard in self.manifest.shards if shard is not None)

    def verify(self, on_bytes: Callable[[int], None] = lambda count: None) -> list[str]:
        """Read every byte; return a message for each damaged file. `on_bytes` is called with numbers of bytes."""
        return [reason for _, reason in find_damage(self.folder, self.manifest, on_bytes)]

    def labels(self) -> Tensor:
        """Labels of all rows, [rows] int64."""
        parts = [self._map(number).labels for number in range(self.layout.shards)]
        return torch.cat([part for part in parts if part is not None])

    @property
    def rows_per_read(self) -> int:
        """Number of rows to gather at once while the next rows are read ahead."""
        return max(_ANNOUNCED // self._row_bytes, 1)

    def expect(self, index: Tensor) -> None:
        """Ask the system to read rows by number [B] that will be gathered soon.

        Without this, rows in random order are read page by page on access, 40 times slower in a measurement. Does
        nothing for a small store that has been read once, which is in memory.
        """
        small_and_read = self._limit == math.inf and self._read >= self.layout.rows * self._row_bytes
        if _madvise is None or small_and_read:
            return
        size, page = self._token_rows_bytes, mmap.PAGESIZE
        for number, place in (divmod(row, self.layout.shard_rows) for row in index.tolist()):
            begin = self._mapped(number).rows.data_ptr() + place * size
            for start in range(begin - begin % page, begin + size, _READ_AHEAD):
                _madvise(start, min(_READ_AHEAD, begin + size - start), mmap.MADV_WILLNEED)

    def gather(self, index: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Gather rows by number, int64 [B], to [B, *shape]: in `out`, of any floating dtype, or a new tensor."""
        layout = self.layout
        if out is None:
            out = torch.empty(len(index), *layout.shape, dtype=self.dtype)
        if len(index) == 0:
            return out
        rows, numbers = out.view(len(index), *self._stored_shape), index.tolist()
        if not 0 <= min(numbers) <= max(numbers) < layout.rows:
            wrong = next(number for number in numbers if not 0 <= number < layout.rows)
            raise IndexError(f"gather: rows are numbered from 0 to {layout.rows - 1}; got {wrong}.")
        by_shard: dict[int, tuple[list[int], list[int]]] = {}  # shard → its rows, and their places in the output
        for place, number in enumerate(numbers):
            shard, row = divmod(number, layout.shard_rows)
            chosen, places = by_shard.setdefault(shard, ([], []))
            chosen.append(row)
            places.append(place)
        for shard, (chosen, places) in by_shard.items():
            mapped = self._mapped(shard)
            out_index = None if len(by_shard) == 1 else torch.tensor(places)
            # Not `functional.gather_rows`: its checks of arguments are not needed here.
            gather_rows_out(mapped.rows, torch.tensor(chosen), mapped.token_scale, out_index, rows)
        self._read += len(index) * self._row_bytes
        if self._read > self._limit:
            self._maps, self._read = {}, 0
        return out

    def _mapped(self, number: int) -> MappedShard:
        maps = self._maps  # another thread may replace them
        if number not in maps:
            maps[number] = self._map(number)
        return maps[number]

    def _map(self, number: int) -> MappedShard:
        shard = self.manifest.shards[number]
        assert shard is not None
        mapped = map_shard(self.folder, self.layout, number, shard)
        # A store may be rebuilt while it is open. Its manifest is replaced before its shards.
        if (version := _version(self.folder)) != self._version:
            shards = Manifest.read(self.folder).shards
            if number >= len(shards) or shards[number] != shard:
                raise StoreError(f"{self.folder}: has been rebuilt since it was opened. Open it again.")
            self._version = version
        return mapped


def _version(folder: Path) -> tuple[int, int, int] | None:
    """Inode, time and size of the manifest, which change when it is replaced; None without a manifest."""
    try:
        status = os.stat(folder / MANIFEST)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
