"""Reading a store: rows out of maps of its shards, in bounded memory."""

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
from .manifest import COMPUTED, DTYPES, MANIFEST, Layout, Manifest, StoreError, usable_folder
from .shards import MappedShard, damages, map_shard

# Bytes of maps that may be in memory before all are let go of, of a store that is not small beside what is free. They
# stay in the system's cache, but no longer count as this process's.
_MAPPED = 32 << 20
_AHEAD = 8 << 20  # bytes that the disk is told of: where memory is short it forgets more before it was asked for
_READ_AHEAD = 128 << 10  # bytes that the system reads ahead at a time, by default; of more it reads no more


def _system_call() -> Callable[[int, int, int], int] | None:
    """madvise, where there is one."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        call = ctypes.CDLL(None).madvise
        call.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        return call
    return None


_madvise = _system_call()


class Store:
    """A complete store.

    Args:
        folder: Where it is.
        verify: Read all of it, and compare digests.

    Raises:
        StoreError: If it is none, incomplete, or damaged. Without `verify` damage is found that changes a file's size
            or header.

    Example:
        >>> import tempfile
        >>> from skipkernels.store import Writer
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Writer(folder, Layout(3, (1, 2), "fp32", "fp32", 2, False, {}, {})) as writer:
        ...     writer.write(0, {"rows": torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])})
        ...     writer.write(1, {"rows": torch.tensor([[[5.0, 6.0]]])})
        >>> Store(folder).gather(torch.tensor([2, 0])).tolist()
        [[[5.0, 6.0]], [[1.0, 2.0]]]
    """

    def __init__(self, folder: Path, *, verify: bool = False):
        self.folder = folder = usable_folder(folder)
        self._version = _version(folder)
        self.manifest = Manifest.read(folder)
        if not self.manifest.complete:
            done = sum(shard is not None for shard in self.manifest.shards)
            raise StoreError(
                f"{folder}: incomplete: {done} of {self.layout.shards} shards are there. Go on building it with "
                "resume=True (--resume)."
            )
        for number in range(self.layout.shards):
            self._map(number)
        if verify and (found := self.verify()):
            raise StoreError(found[0])
        self._kept_shape, self._row_bytes = self.layout.kept_shape, self.layout.row_bytes
        self._token_rows_bytes = math.prod(self._kept_shape) * DTYPES[self.layout.dtype].itemsize
        self._limit = math.inf if self.bytes < free_bytes(self.device) / 32 else _MAPPED
        self._maps: dict[int, MappedShard] = {}
        self._read = 0  # bytes of these maps

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: another process makes its own."""
        return self.__dict__ | {"_maps": {}, "_read": 0}

    @property
    def layout(self) -> Layout:
        """How its rows lie."""
        return self.manifest.layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of a row, as it was computed and comes out."""
        return COMPUTED[self.layout.computed]

    @property
    def device(self) -> torch.device:
        """Where rows come out."""
        return torch.device("cpu")

    @property
    def bytes(self) -> int:
        """On disk, without the manifest."""
        return sum(shard.bytes for shard in self.manifest.shards if shard is not None)

    def verify(self, on_bytes: Callable[[int], None] = lambda count: None) -> list[str]:
        """Read all of it; says what is damaged, file by file. `on_bytes` is told how many bytes were read."""
        return [reason for _, reason in damages(self.folder, self.manifest, on_bytes)]

    def labels(self) -> Tensor:
        """The classes of all rows, int64 [rows]."""
        parts = [self._map(number).labels for number in range(self.layout.shards)]
        return torch.cat([part for part in parts if part is not None])

    @property
    def ahead(self) -> int:
        """Rows to read at once while others are expected."""
        return max(_AHEAD // self._row_bytes, 1)

    def expect(self, index: Tensor) -> None:
        """Have the system read rows by number [B] that will be asked for soon, if they are not in memory.

        Each as a whole, all at once. Left to itself it reads page by page what is touched in random order: measured, at
        a fortieth of the rate. A small store that was read once is in memory.
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
        """Rows by number.

        Args:
            index: int64 [B], from 0 on.
            out: [B, *shape], contiguous, where they go, in its dtype; by default new memory, in the dtype in which they
                were computed.

        Returns:
            [B, *shape]: `out`, if there is one.

        Raises:
            IndexError: If there is no such row.
            StoreError: If a shard has gone or changed its size.
        """
        layout = self.layout
        if out is None:
            out = torch.empty(len(index), *layout.shape, dtype=self.dtype)
        if len(index) == 0:
            return out
        rows, numbers = out.view(len(index), *self._kept_shape), index.tolist()
        if not 0 <= min(numbers) <= max(numbers) < layout.rows:
            wrong = next(number for number in numbers if not 0 <= number < layout.rows)
            raise IndexError(f"gather: rows are numbered from 0 to {layout.rows - 1}; got {wrong}.")
        of_shard: dict[int, tuple[list[int], list[int]]] = {}  # shard → rows of it, and where they go
        for place, number in enumerate(numbers):
            shard, row = divmod(number, layout.shard_rows)
            chosen, places = of_shard.setdefault(shard, ([], []))
            chosen.append(row)
            places.append(place)
        for shard, (chosen, places) in of_shard.items():
            there = self._mapped(shard)
            where = None if len(of_shard) == 1 else torch.tensor(places)
            # What `functional.gather_rows` looks at first is known here.
            gather_rows_out(there.rows, torch.tensor(chosen), there.token_scale, where, rows)
        self._read += len(index) * self._row_bytes
        if self._read > self._limit:
            self._maps, self._read = {}, 0
        return out

    def _mapped(self, number: int) -> MappedShard:
        maps = self._maps  # another thread may let go of them meanwhile
        if number not in maps:
            maps[number] = self._map(number)
        return maps[number]

    def _map(self, number: int) -> MappedShard:
        shard = self.manifest.shards[number]
        assert shard is not None
        there = map_shard(self.folder, self.layout, number, shard)
        # A store may be rebuilt while it is open. Its manifest is replaced before its shards are.
        if (version := _version(self.folder)) != self._version:
            shards = Manifest.read(self.folder).shards
            if number >= len(shards) or shards[number] != shard:
                raise StoreError(f"{self.folder}: was built again since it was opened. Open it again.")
            self._version = version
        return there


def _version(folder: Path) -> tuple[int, int, int] | None:
    """What tells a manifest from one that replaces it; None if there is none."""
    try:
        status = os.stat(folder / MANIFEST)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
