"""Tables of features: an array in memory, or in a folder of .npy files with a checksum for each finished row.

    rows are written → flushed → marked as finished, by their checksums

so that a build can be killed at any moment, and a damaged row is found when it is read. docs/cache.md has the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..digests import digest_json

# Dtypes of rows in a folder, and of rows before they are stored and after they are read.
STORED_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
COMPUTED_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int8": np.int8}  # NumPy has no bf16

FEATURES, SCALES, LABELS = "features.npy", "scales.npy", "labels.npy"
CHECKSUMS, IDENTITY = "rows.npy", "identity.json"
FORMAT = 4  # version of the files
HEADER = 128  # bytes before the data of an array
_DIGEST = re.compile("[0-9a-f]{32}")
_LEVELS = 127  # int8 without −128: the scale is the same on both sides
# Bytes read before the files are mapped anew. Pages that were read count as resident memory of this process until then.
_MAPPED_BYTES = 32 << 20


class CacheError(ValueError):
    """Error for a cache that cannot be used. The message names the file, the fault and the remedy.

    Attributes:
        item: Item of a dataset that cannot be loaded, if this is the fault.
    """

    item: int | None = None


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Convert an OSError to a CacheError with the file, the fault and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise CacheError(f"{folder}: in use by another process. Wait for it, or choose another folder.") from None
        named = error.filename if isinstance(error.filename, str) else folder
        raise CacheError(
            f"{named}: cannot be read or written ({error.strerror or error}). Finished rows stay. Free space, check "
            "the disk or choose another folder, and continue with `resume=True`."
        ) from error


# ---- numbers ---------------------------------------------------------------------------------------------------------


def quantise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise features [n, N, …] to int8 and fp32 scales [n, N], which map the largest number of a token to ±127.

    >>> quantise(torch.tensor([[[0.5, -2.0]]]))[0].tolist()
    [[[32, -127]]]
    """
    tokens = features.float().flatten(2)  # [n, N, W]
    scales = tokens.abs().amax(dim=-1) / _LEVELS  # [n, N]
    steps = tokens / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return steps.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8).view_as(features), scales


def dequantise(steps: Tensor, scales: Tensor) -> Tensor:
    """Inverse of `quantise` up to rounding, fp32."""
    return (steps.flatten(2) * scales.unsqueeze(-1)).view_as(steps)


def checksums(seed: int, row_numbers: Sequence[int], parts: Sequence[Tensor]) -> list[int]:
    """Checksum of the bytes of each row in all parts [n, …]; depends on its number, and is never 0."""
    arrays = [part.contiguous().unsqueeze(-1).flatten(1).view(torch.uint8).numpy() for part in parts]  # [n, bytes]
    found = []
    for place, row in enumerate(row_numbers):
        checksum = xxhash.xxh3_64(seed=(seed + row) % 2**64)
        for array in arrays:
            checksum.update(array[place])
        found.append(checksum.intdigest() or 1)
    return found


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Sizes and dtypes of a table in a folder, and what its rows depend on: the contents of identity.json."""

    rows: int  # Number of rows, under its name in the file
    shape: tuple[int, ...]  # Shape of a row: tokens and width, or a feature map
    dtype: str  # Dtype in the folder, a key of `STORED_DTYPES`; int8 has a scale for each token, `shape[0]`
    computed_dtype: str  # Dtype of rows before they are stored and after they are read, a key of `COMPUTED_DTYPES`
    labelled: bool  # True if each row has a label
    identity: Mapping[str, str | int]  # What the rows depend on, by name
    probe: Sequence[float] = ()  # Some features of a fixed input, see `identity.check_probe`; not compared here

    @functools.cached_property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and NumPy dtype of each array, by file name."""
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {FEATURES: ((self.rows, *self.shape), _NUMPY[self.dtype])}
        if self.dtype == "int8":
            arrays[SCALES] = (self.rows, self.shape[0]), np.float32
        if self.labelled:
            arrays[LABELS] = (self.rows,), np.int64
        return arrays

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of a row in all arrays."""
        return sum(math.prod(shape[1:]) * np.dtype(dtype).itemsize for shape, dtype in self.arrays.values())

    @functools.cached_property
    def seed(self) -> int:
        """Seed of the checksums: rows with another identity do not match them."""
        values = dataclasses.asdict(dataclasses.replace(self, probe=()))
        return int(digest_json(values)[:16], 16)

    def check_equal(self, expected: Layout, folder: Path) -> None:
        """Raise a CacheError that names a difference of this layout, that of the folder, from another."""
        if difference := self.difference(expected):
            raise CacheError(
                f"{folder}: holds a cache that differs in {difference}. Choose another folder, or delete this one."
            )

    def difference(self, expected: Layout) -> str | None:
        """Return the first entry that differs, with both values unless they are digests."""
        fields = ("rows", "shape", "dtype", "computed_dtype", "labelled")
        stored, wanted = ({**x.identity, **{name: getattr(x, name) for name in fields}} for x in (self, expected))
        for name in stored | wanted:
            there, here = stored.get(name, "nothing"), wanted.get(name, "nothing")
            if there != here:
                digests = _DIGEST.fullmatch(str(there)) and _DIGEST.fullmatch(str(here))
                return name if digests else f"{name} ({there} there, {here} here)"
        return None

    @classmethod
    def read(cls, folder: Path) -> Layout:
        """Read identity.json, which may be damaged, or written by another program."""
        path = folder / IDENTITY
        if not path.is_file():
            raise CacheError(f"{folder}: no {IDENTITY}: not a cache. Build it first.")
        try:
            values = json.loads(path.read_bytes())
            if (version := values.pop("format")) != FORMAT:
                raise ValueError(f"format {version}, and this version reads {FORMAT}")
            layout = cls(**values | {"shape": tuple(values["shape"]), "identity": dict(values["identity"])})
            if layout.computed_dtype not in COMPUTED_DTYPES:
                raise ValueError(f"computed_dtype {layout.computed_dtype!r}")
            if min(layout.rows, *layout.shape) < 1 or layout.row_bytes < 1:
                raise ValueError("sizes below 1")
            return layout
        except OSError as error:
            raise CacheError(f"{path}: unreadable ({error.strerror}). Make it readable.") from None
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CacheError(f"{path}: damaged ({error}). Delete the folder, and build the cache again.") from None


def header_of(shape: tuple[int, ...], dtype: Any) -> bytes:
    """Header of a .npy file, version 1.0; of one length, so that the place of the data does not depend on NumPy."""
    text = f"{{'descr': {np.dtype(dtype).newbyteorder('<').str!r}, 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


def map_array(path: Path, shape: tuple[int, ...], dtype: Any) -> Tensor:
    """Map an array. Its pages are read at the first access."""
    try:
        with path.open("rb") as file:
            header, size = file.read(HEADER), os.fstat(file.fileno()).st_size
            expected_size = HEADER + math.prod(shape) * np.dtype(dtype).itemsize
            if size != expected_size:
                raise CacheError(
                    f"{path}: damaged: {size} bytes instead of {expected_size}. Build it again with `resume=True`."
                )
            if header != header_of(shape, dtype):
                raise CacheError(f"{path}: damaged: another header. Build it again with `resume=True`.")
            # Mapped as writable, without effect on the file: PyTorch warns about arrays that are not.
            return torch.from_numpy(np.memmap(file, dtype, "c", HEADER, shape))
    except OSError as error:
        fault = "missing" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror or error}"
        raise CacheError(f"{path}: {fault}. Build it again with `resume=True`.") from None


# ---- tables ----------------------------------------------------------------------------------------------------------


class FeatureTable(ABC):
    """Rows of features: in memory, or in a folder.

    Attributes:
        folder: Folder of the rows; None in memory.
        features: All rows [n, *shape] in memory; None in a folder.
        shape, dtype: Those of a row that is read.
    """

    folder: Path | None = None
    features: Tensor | None = None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, row_numbers: Tensor) -> Tensor:
        """Copy rows by number, int64 [B] on any device, to [B, *shape] on the device of the table."""

    def converted(self, fn: Callable[[Tensor], Tensor]) -> FeatureTable | None:
        """Return the rows moved by `fn`; None if that changes their dtype, or if they are in a folder."""
        return None

    def damage(self) -> str | None:
        """Compare every row with its checksum; return a message that names damaged rows, or None."""
        return None


class MemoryTable(FeatureTable):
    """Rows of features in memory, on the device of `features` [n, *shape]."""

    def __init__(self, features: Tensor):
        self.features: Tensor = features
        self.shape, self.dtype = tuple(features.shape[1:]), features.dtype

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, row_numbers: Tensor) -> Tensor:  # noqa: D102
        return self.features.index_select(0, row_numbers.to(self.features.device))

    def converted(self, fn: Callable[[Tensor], Tensor]) -> MemoryTable | None:  # noqa: D102
        features = fn(self.features)
        return MemoryTable(features) if features.dtype == self.dtype else None


class SelectedRows(FeatureTable):
    """Some rows of another table, by number, int64 [m]; not copied."""

    def __init__(self, table: FeatureTable, row_numbers: Tensor):
        self._table, self._row_numbers = table, row_numbers.cpu()
        self.folder, self.shape, self.dtype = table.folder, table.shape, table.dtype

    def __len__(self) -> int:
        return len(self._row_numbers)

    def rows(self, row_numbers: Tensor) -> Tensor:  # noqa: D102
        return self._table.rows(self._row_numbers[row_numbers.cpu()])

    def damage(self) -> str | None:  # noqa: D102
        return self._table.damage()


class MappedTable(FeatureTable):
    """Rows of features in a folder, mapped into the memory of the CPU.

    A row is compared with its checksum when it is first read.

    Attributes:
        layout: Contents of identity.json.
        row_checksums: Checksum of each row, [n] uint64; 0 if it is missing.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder: Path = folder
        self.layout = layout
        self.shape, self.dtype = layout.shape, COMPUTED_DTYPES[layout.computed_dtype]
        self.row_checksums = map_array(folder / CHECKSUMS, (layout.rows,), np.uint64).numpy().copy()
        self._verified = np.zeros(layout.rows, dtype=bool)
        self._maps: dict[str, Tensor] = {}  # by file name
        self._bytes_read = 0  # from these maps
        self._arrays()  # raises now if a file is missing or damaged

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> MappedTable:
        """Open a complete table. With `verify` every row is compared with its checksum.

        Raises:
            CacheError: If there is none, or it is incomplete or damaged.
        """
        folder = folder.absolute()  # a later change of the working directory has no effect
        table = cls(folder, Layout.read(folder))
        if missing := int((table.row_checksums == 0).sum()):
            done = len(table) - missing
            raise CacheError(
                f"{folder}: incomplete: {done} of {len(table)} rows exist. Build the rest with `resume=True`."
            )
        if verify and (damage := table.damage()):
            raise CacheError(damage)
        return table

    def __len__(self) -> int:
        return self.layout.rows

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_maps": {}, "_bytes_read": 0}  # another process maps the files itself

    def rows(self, row_numbers: Tensor) -> Tensor:
        """Copy rows, see `FeatureTable.rows`; a CacheError if one is damaged."""
        index = row_numbers.cpu()
        parts = {name: array.index_select(0, index) for name, array in self._arrays().items()}
        if not self._verified[index].all():
            if damaged := self._mismatches(index.tolist(), list(parts.values())):
                raise CacheError(self.damage_message(damaged))
            self._verified[index] = True
        self._bound_memory(len(index))
        stored = parts[FEATURES].view(STORED_DTYPES[self.layout.dtype])
        features = dequantise(stored, parts[SCALES]) if SCALES in parts else stored
        return features.to(self.dtype)

    def check_identity(self, expected: Mapping[str, str | int]) -> None:
        """Raise a CacheError if an entry of the identity differs from `expected`."""
        identity = {**self.layout.identity, **expected}
        self.layout.check_equal(dataclasses.replace(self.layout, identity=identity), self.folder)

    def labels(self) -> Tensor:
        """Labels of all rows, [n] int64."""
        return self._arrays()[LABELS].clone()

    def find_damage(self) -> list[int]:
        """Read all finished rows; return the numbers of those that do not match their checksums."""
        found, step = [], max(_MAPPED_BYTES // self.layout.row_bytes, 1)
        for start in range(0, len(self), step):
            end = min(start + step, len(self))
            if self.row_checksums[start:end].any():
                parts = [array[start:end] for array in self._arrays().values()]
                found += self._mismatches(range(start, end), parts)
                self._bound_memory(end - start)
        return [row for row in found if self.row_checksums[row]]

    def damage(self) -> str | None:  # noqa: D102
        damaged = self.find_damage()
        return self.damage_message(damaged) if damaged else None

    def verify_again(self) -> None:
        """Compare each row with its checksum when it is next read: the folder is written."""
        self._verified[:] = False

    def damage_message(self, row_numbers: Sequence[int]) -> str:
        """Message that names damaged rows."""
        named = ", ".join(map(str, row_numbers[:9])) + (", …" if len(row_numbers) > 9 else "")
        return f"{self.folder}: row {named} damaged: bytes have changed. Build it again with `resume=True`."

    def _mismatches(self, row_numbers: Sequence[int], parts: Sequence[Tensor]) -> list[int]:
        """Numbers of the rows with parts [n, …] that do not match their checksums."""
        found = checksums(self.layout.seed, row_numbers, parts)
        return [row for row, checksum in zip(row_numbers, found, strict=True) if checksum != self.row_checksums[row]]

    def _arrays(self) -> dict[str, Tensor]:
        maps = self._maps  # another thread may replace them
        if not maps:
            maps = self._maps = {
                name: map_array(self.folder / name, *array) for name, array in self.layout.arrays.items()
            }
        return maps

    def _bound_memory(self, row_count: int) -> None:
        """Close the maps after a number of reads, since pages that were read stay in resident memory."""
        self._bytes_read += row_count * self.layout.row_bytes
        if self._bytes_read > _MAPPED_BYTES:
            self._maps, self._bytes_read = {}, 0
