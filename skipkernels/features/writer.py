"""Writing of a table of features, in any number of attempts: see `table` for the order of its steps."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..checks import warn_caller
from ..folders import LOCK, locked, replace_text, sweep, sync
from ..formatting import decimal
from .table import (
    CHECKSUMS,
    FEATURES,
    FORMAT,
    HEADER,
    IDENTITY,
    LABELS,
    SCALES,
    STORED_DTYPES,
    CacheError,
    Layout,
    MappedTable,
    checksums,
    disk_errors,
    header_of,
    map_array,
    quantise,
)

_FLUSH_BYTES = 128 << 20  # bytes written between two flushes: the most that a killed build computes again


class TableWriter:
    """Context manager that writes a table, as the only process in its folder.

    Entering finds the rows to write. Resuming a complete table without damage takes no lock and writes nothing, so its
    disk can be read-only.

    Args:
        folder: Folder of the table; created if needed.
        layout: Layout of the table.
        resume: Keep the finished rows without damage, if the table has this layout.
        overwrite: Replace any table in the folder.
        wait: Wait for another process that writes in the folder; by default, one is an error.

    Attributes:
        layout: Layout of the table; of one that is resumed, with its own probe.
        missing: True for each row to write, [n] bool.

    Raises:
        CacheError: On entering, if the folder has another table or other files, another process holds the lock, or the
            disk is too small.
    """

    def __init__(
        self, folder: Path, layout: Layout, *, resume: bool = False, overwrite: bool = False, wait: bool = False
    ):
        self.folder, self.layout = folder.absolute(), layout
        self.missing = np.zeros(layout.rows, dtype=bool)
        self._resume, self._overwrite, self._wait = resume and not overwrite, overwrite, wait
        self._files: dict[str, BinaryIO] = {}
        self._written: list[tuple[int, list[int]]] = []  # first row and checksums of each write since the last flush
        self._bytes = 0  # written since the last flush
        self._held = contextlib.ExitStack()

    def __enter__(self) -> TableWriter:
        if self._resume and self._is_complete():
            return self
        with disk_errors(self.folder), contextlib.ExitStack() as held:
            self._check_folder()
            self.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(self.folder, wait=self._wait))
            self._check_folder()  # again: another process may have written to it before it released the lock
            self._prepare()
            for name in (*self.layout.arrays, CHECKSUMS):
                self._files[name] = held.enter_context((self.folder / name).open("r+b"))
            self._held = held.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._held:
            self._flush()  # also after an error: finished rows stay

    def write(self, first: int, features: Tensor, labels: Tensor | None = None) -> None:
        """Write consecutive rows [n, *shape] in the dtype in which they were computed, and their labels [n] int64."""
        stored = quantise(features) if self.layout.dtype == "int8" else (features.to(STORED_DTYPES[self.layout.dtype]),)
        parts = [part.contiguous() for part in (*stored, labels) if part is not None]
        row_checksums = checksums(self.layout.seed, range(first, first + len(features)), parts)
        with disk_errors(self.folder):
            for name, part in zip(self.layout.arrays, parts, strict=True):
                _write(self._files[name], first * part[0].nbytes, part.flatten().view(torch.uint8).numpy())
        self._written.append((first, row_checksums))
        self._bytes += len(features) * self.layout.row_bytes
        if self._bytes > _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Flush the rows to the disk, then mark them as finished."""
        if not self._written:
            return
        with disk_errors(self.folder):
            for name in self.layout.arrays:
                os.fsync(self._files[name].fileno())
            for first, row_checksums in self._written:
                _write(self._files[CHECKSUMS], 8 * first, np.array(row_checksums, np.uint64))
            os.fsync(self._files[CHECKSUMS].fileno())
        self._written, self._bytes = [], 0

    def _is_complete(self) -> bool:
        try:
            if Layout.read(self.folder).difference(self.layout) is not None:
                return False
            self.layout = MappedTable.open(self.folder, verify=True).layout
            return True
        except CacheError:
            return False

    def _check_folder(self) -> None:
        """Raise a CacheError if a folder is not new, empty or that of a table, or has one that must not be replaced."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise CacheError(f"{folder}: is a file. Choose a folder.")
        others = sorted(path.name for path in folder.glob("[!.]*"))
        if not others:
            return
        if not (folder / IDENTITY).is_file():
            raise CacheError(f"{folder}: holds other files ({others[0]}). Choose an empty folder.")
        if self._overwrite and (folder / LOCK).exists():
            return
        found = Layout.read(folder)
        if not self._resume and not self._overwrite:
            raise CacheError(
                f"{folder}: holds a cache. Open it, continue or repair it with `resume=True`, or replace it with "
                "`overwrite=True`."
            )
        if self._resume:
            found.check_equal(self.layout, folder)
            self.layout = found

    def _prepare(self) -> None:
        """Give every file its header and size, and find the rows to write."""
        folder, layout = self.folder, self.layout
        arrays = layout.arrays | {CHECKSUMS: ((layout.rows,), np.uint64)}
        if not self._resume or not (folder / IDENTITY).exists():
            for name in {FEATURES, SCALES, LABELS, CHECKSUMS} - layout.arrays.keys():
                (folder / name).unlink(missing_ok=True)
            values = {"format": FORMAT, **dataclasses.asdict(layout)}
            # Before the files: from here on the folder can be resumed.
            replace_text(folder / IDENTITY, json.dumps(values, indent=1) + "\n")
        sweep(folder)
        for name, (shape, dtype) in arrays.items():
            try:
                map_array(folder / name, shape, dtype)
            except CacheError:  # Bytes that are there stay: checksums tell which rows are whole.
                with (folder / name).open("r+b" if (folder / name).exists() else "w+b") as file:
                    file.write(header_of(shape, dtype))
                    file.truncate(HEADER + math.prod(shape) * np.dtype(dtype).itemsize)
        sync(folder)
        table = MappedTable(folder, layout)
        self.missing = table.row_checksums == 0
        if damaged := table.find_damage():
            warn_caller(f"{table.damage_message(damaged)} It is computed again.")
            self.missing[damaged] = True
        needed, free = sum(_unallocated(folder / name) for name in arrays), shutil.disk_usage(folder).free
        if free < needed:
            raise CacheError(
                f"{folder}: {decimal(needed)} are needed, and {decimal(free)} are free. Free space, or use a smaller "
                "dtype."
            )


def _unallocated(path: Path) -> int:
    """Bytes of a file that have no place on the disk yet, as in a file that only has its size; 0 on Windows."""
    status = path.stat()
    return max(status.st_size - 512 * getattr(status, "st_blocks", status.st_size), 0)


def _write(file: BinaryIO, place: int, data: np.ndarray) -> None:
    """Write at a place of the data of an array."""
    file.seek(HEADER + place)
    file.write(data.data)
    file.flush()
