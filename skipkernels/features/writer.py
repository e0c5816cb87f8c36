"""Writing of a table of features, in any number of attempts.

    rows are written → flushed → marked as finished, by their checksums

so that a build can be killed at any moment, and a damaged row is found when it is read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..checks import warn_caller
from ..folders import locked, replace_text, sweep, sync
from ..formatting import decimal
from .folder_table import (
    CHECKSUMS,
    HEADER_BYTES,
    IDENTITY,
    STORED_DTYPES,
    CacheError,
    FolderTable,
    Layout,
    checksums_of,
    quantise,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLUSH_BYTES = 128 << 20  # bytes written between two flushes: the most that a killed build computes again


class TableWriter:
    """Context manager that writes a table, as the only process in its folder.

    Entering finds the rows to write. Resuming a complete table without damage takes no lock and writes nothing, so its
    disk can be read-only.

    Args:
        folder: Folder of the table; created if needed.
        layout: Layout of the table.
        resume: Keep the finished rows without damage, if the table has this layout.
        wait: Wait for another process that writes in the folder; by default, one is an error.

    Attributes:
        missing: True for each row to write, [n] bool.

    Raises:
        CacheError: On entering, if the folder has another table or other files, another process holds the lock, or the
            disk is too small.
    """

    def __init__(self, folder: Path, layout: Layout, *, resume: bool = False, wait: bool = False):
        self.folder, self.layout = folder.absolute(), layout
        self.missing = np.zeros(layout.rows, dtype=bool)
        self._resume, self._wait = resume, wait
        self._arrays = layout.arrays | {CHECKSUMS: layout.checksums}
        self._files: dict[str, BinaryIO] = {}
        # First row and checksums [n, arrays] of each write since the last flush
        self._written: list[tuple[int, NDArray[np.uint64]]] = []
        self._bytes = 0  # written since the last flush
        self._held = contextlib.ExitStack()

    def __enter__(self) -> TableWriter:
        with _disk_errors(self.folder), contextlib.ExitStack() as held:
            if self._check_folder() and self._is_whole():
                return self
            self.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(self.folder, wait=self._wait))
            sweep(self.folder)
            if not self._check_folder():  # again: another process may have written before it released the lock
                replace_text(self.folder / IDENTITY, self.layout.to_json())  # from here on it can be resumed
            self._files = {name: held.enter_context(self._open_file(name)) for name in self._arrays}
            sync(self.folder)
            self._find_missing()
            self._held = held.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._held:
            self._flush()  # also after an error: finished rows stay

    def write(self, first: int, features: Tensor, labels: Tensor | None = None) -> None:
        """Write consecutive rows [n, *shape] in the dtype in which they were computed, and their labels [n] int64.

        Raises:
            CacheError: If a row is not finite in the dtype of the folder, or the disk is full.
        """
        stored = quantise(features) if self.layout.dtype == "int8" else (features.to(STORED_DTYPES[self.layout.dtype]),)
        finite = stored[-1].flatten(1).isfinite().all(dim=1)  # for int8 that of the scales
        if not finite.all():
            row = int((~finite).nonzero()[0])
            remedy = 'Use dtype="bf16".' if features[row].isfinite().all() else "Check the input and the weights."
            raise CacheError(
                f"{self.folder}: the features of row {first + row} are NaN, or out of the range of "
                f"{self.layout.dtype}. {remedy}"
            )
        parts = [_array(part) for part in (*stored, labels) if part is not None]
        for part, (name, array) in zip(parts, self.layout.arrays.items(), strict=True):
            if part.shape[1:] != array.shape[1:] or part.dtype != array.dtype:
                raise ValueError(
                    f"TableWriter.write: rows of {name} must be {np.dtype(array.dtype)} {array.shape[1:]}; got "
                    f"{part.dtype} {part.shape[1:]}."
                )
        numbers = range(first, first + len(features))
        row_checksums = np.stack([checksums_of(part, numbers, self.layout.seed) for part in parts], axis=1)
        with _disk_errors(self.folder):
            for name, part in zip(self.layout.arrays, parts, strict=True):
                _write(self._files[name], first, part)
        self._written.append((first, row_checksums))
        self._bytes += len(features) * self.layout.row_bytes
        if self._bytes > _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Flush the rows to the disk, then mark them as finished."""
        if not self._written:
            return
        with _disk_errors(self.folder):
            for name in self.layout.arrays:
                os.fsync(self._files[name].fileno())
            for first, row_checksums in self._written:
                _write(self._files[CHECKSUMS], first, row_checksums)
            os.fsync(self._files[CHECKSUMS].fileno())
        self._written, self._bytes = [], 0

    def _check_folder(self) -> bool:
        """Return True if the folder has a table to resume, and False for a new or empty one.

        Raises:
            CacheError: If it has other files, or a table that is not to be resumed.
        """
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise CacheError(f"{folder}: is a file. Choose a folder.")
        files = sorted(path.name for path in folder.glob("[!.]*"))
        if not files:
            return False
        if IDENTITY not in files:
            raise CacheError(f"{folder}: holds other files ({files[0]}). Choose an empty folder.")
        layout = Layout.read(folder)
        if not self._resume:
            raise CacheError(
                f"{folder}: holds a cache. Open it, continue or repair it with `resume=True`, or delete the folder."
            )
        layout.check_equal(self.layout, folder)
        return True

    def _is_whole(self) -> bool:
        """Return True if the table in the folder is complete and without damage."""
        try:
            FolderTable.open(self.folder, verify=True)
            return True
        except CacheError:
            return False

    def _open_file(self, name: str) -> BinaryIO:
        """Open an array, with its header and size. Bytes that are there stay: checksums tell which rows are whole."""
        path, array = self.folder / name, self._arrays[name]
        path.touch()
        file = path.open("r+b")
        file.write(array.header)
        file.truncate(array.file_bytes)
        return file

    def _find_missing(self) -> None:
        """Set `missing`; a CacheError if these rows are larger than the free space."""
        table = FolderTable(self.folder, self.layout)
        damaged = table.find_damage()
        self.missing = ~table.finished
        self.missing[damaged] = True
        if damaged:
            warn_caller(f"{table.damage_message(damaged)} It is computed again.")
        needed, free = int(self.missing.sum()) * self.layout.row_bytes, shutil.disk_usage(self.folder).free
        if free < needed:
            raise CacheError(
                f"{self.folder}: {decimal(needed)} are needed, and {decimal(free)} are free. Free space, or use a "
                "smaller dtype."
            )


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Convert an OSError to a CacheError with the file, the fault and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise CacheError(f"{folder}: in use by another process. Wait for it, or choose another folder.") from None
        named = error.filename if isinstance(error.filename, str) else folder
        raise CacheError(
            f"{named}: cannot be read or written ({error.strerror or error}). Finished rows stay. Free space, check "
            "the disk or choose another folder, and run it again, FeatureCache.build with resume=True."
        ) from error


def _array(part: Tensor) -> NDArray[Any]:
    """Return a tensor as an array; NumPy has no bf16, and gets its bits."""
    part = part.contiguous()
    return (part.view(torch.uint16) if part.dtype == torch.bfloat16 else part).numpy()


def _write(file: BinaryIO, first: int, rows: NDArray[Any]) -> None:
    """Write rows [n, …] of an array."""
    file.seek(HEADER_BYTES + first * rows[0].nbytes)
    file.write(rows.data)
    file.flush()
