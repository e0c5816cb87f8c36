"""Table of features in a folder: arrays in .npy files, a checksum of each row, and what the rows depend on.

docs/cache.md describes the files, and `writer` writes them.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..digests import digest_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Dtypes of rows in a folder, and of rows before they are stored and after they are read.
STORED_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
COMPUTED_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in COMPUTED_DTYPES.items()}
_NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int8": np.int8}  # NumPy has no bf16

FEATURES, SCALES, LABELS = "features.npy", "scales.npy", "labels.npy"
CHECKSUMS, IDENTITY = "rows.npy", "identity.json"
HEADER_BYTES = 128  # of each array, in front of its data
_FORMAT = 6  # version of the files
_DIGEST = re.compile("[0-9a-f]{32}")
_LEVELS = 127  # int8 without −128: the scale is the same on both sides
_VERIFIED_BYTES = 32 << 20  # bytes that are read at once to compare all rows with their checksums
_PROBED = 64  # numbers of a probe
# Tolerance of a probe, relative to its norm. Rounding differs with the device, number of threads and TF32; another
# activation, mask or number of heads changes more, even with small random weights.
_PROBE_TOLERANCE = {"fp64": 1e-6, "fp32": 1e-3, "fp16": 5e-2, "bf16": 5e-2}


class CacheError(ValueError):
    """Error for a cache that cannot be used. The message names the file, the fault and the remedy.

    Attributes:
        item: Item of a dataset that cannot be loaded, if this is the fault.
    """

    item: int | None = None


# ---- table -----------------------------------------------------------------------------------------------------------


class FolderTable:
    """Rows in a folder, read into the memory of the CPU; see `FeatureTable`.

    A row is compared with its checksums whenever it is read.

    Attributes:
        layout: Contents of identity.json.
        finished: False for each missing row, [n] bool.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder = folder.absolute()  # a later change of the working directory has no effect
        self.layout = layout
        self.shape, self.dtype = layout.shape, COMPUTED_DTYPES[layout.computed_dtype]
        self._checksums = layout.checksums.read(folder / CHECKSUMS, range(layout.rows))  # [n, arrays]
        self.finished = (self._checksums != 0).all(axis=1)
        for name in layout.arrays:  # raises now if a file is missing or damaged
            self._read(name, [])

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> FolderTable:
        """Open a complete table. With `verify` every row is compared with its checksums.

        Raises:
            CacheError: If there is none, or it is incomplete or damaged.
        """
        table = cls(folder, Layout.read(folder))
        if (done := int(table.finished.sum())) < len(table):
            raise CacheError(
                f"{folder}: incomplete: {done} of {len(table)} rows exist. Build the rest with `resume=True`."
            )
        if verify and (damaged := table.find_damage()):
            raise CacheError(table.damage_message(damaged))
        return table

    def __len__(self) -> int:
        return self.layout.rows

    def rows(self, row_numbers: Tensor) -> Tensor:
        """Read rows, see `FeatureTable.rows`; a CacheError if one is damaged."""
        numbers = row_numbers.tolist()
        parts = {name: self._read(name, numbers) for name in self.layout.arrays if name != LABELS}
        self._verify(numbers, parts)
        stored = torch.from_numpy(parts[FEATURES]).view(STORED_DTYPES[self.layout.dtype])
        features = dequantise(stored, torch.from_numpy(parts[SCALES])) if SCALES in parts else stored
        return features.to(self.dtype)

    def labels(self) -> Tensor:
        """Labels of all rows, [n] int64; a CacheError if one is damaged."""
        numbers = range(len(self))
        labels = self._read(LABELS, numbers)
        self._verify(numbers, {LABELS: labels})
        return torch.from_numpy(labels)

    def find_damage(self) -> list[int]:
        """Read all finished rows; return the numbers of those that do not match their checksums."""
        found, step = [], max(_VERIFIED_BYTES // self.layout.row_bytes, 1)
        for start in range(0, len(self), step):
            numbers = range(start, min(start + step, len(self)))
            if self.finished[start : numbers.stop].any():
                found += self._mismatches(numbers, {name: self._read(name, numbers) for name in self.layout.arrays})
        return [row for row in found if self.finished[row]]

    def damage_message(self, row_numbers: Sequence[int]) -> str:
        """Message that names damaged rows."""
        named = ", ".join(map(str, row_numbers[:9])) + (", …" if len(row_numbers) > 9 else "")
        return f"{self.folder}: row {named} damaged: bytes have changed. Build it again with `resume=True`."

    def _read(self, name: str, row_numbers: Sequence[int]) -> NDArray[Any]:
        return self.layout.arrays[name].read(self.folder / name, row_numbers)

    def _verify(self, row_numbers: Sequence[int], parts: dict[str, NDArray[Any]]) -> None:
        if damaged := self._mismatches(row_numbers, parts):
            raise CacheError(self.damage_message(damaged))

    def _mismatches(self, row_numbers: Sequence[int], parts: dict[str, NDArray[Any]]) -> list[int]:
        """Numbers of the rows of some arrays, by file name, that do not match their checksums."""
        numbers, wrong = np.asarray(row_numbers, np.int64), np.zeros(len(row_numbers), dtype=bool)
        for column, name in enumerate(self.layout.arrays):
            if name in parts:
                found = checksums_of(parts[name], row_numbers, self.layout.seed)
                wrong |= found != self._checksums[numbers, column]
        return numbers[wrong].tolist()


# ---- identity.json ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Sizes and dtypes of a table in a folder, and what its rows depend on: the contents of identity.json."""

    rows: int  # Number of rows, under its name in the file
    shape: tuple[int, ...]  # Shape of a row: tokens and width, or a feature map
    dtype: str  # Dtype in the folder, a key of `STORED_DTYPES`; int8 has a scale for each token, `shape[0]`
    computed_dtype: str  # Dtype of rows before they are stored and after they are read, a key of `COMPUTED_DTYPES`
    labelled: bool  # True if each row has a label
    identity: Mapping[str, str | int]  # What the rows depend on, by name
    probe: tuple[float, ...]  # See `probe_of`

    @functools.cached_property
    def arrays(self) -> dict[str, Array]:
        """Arrays with an entry for each row, by file name."""
        arrays = {FEATURES: Array((self.rows, *self.shape), _NUMPY[self.dtype])}
        if self.dtype == "int8":
            arrays[SCALES] = Array((self.rows, self.shape[0]), np.float32)
        if self.labelled:
            arrays[LABELS] = Array((self.rows,), np.int64)
        return arrays

    @property
    def checksums(self) -> Array:
        """Array of the checksums: of each row, one for each of `arrays`."""
        return Array((self.rows, len(self.arrays)), np.uint64)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in all arrays."""
        return sum(array.row_bytes for array in self.arrays.values())

    @functools.cached_property
    def seed(self) -> int:
        """Seed of the checksums: rows with another identity do not match them."""
        values = dataclasses.asdict(dataclasses.replace(self, probe=()))
        return int(digest_json(values)[:16], 16)

    def check_equal(self, expected: Layout, folder: Path) -> None:
        """Raise a CacheError that names a difference of this layout, that of the folder, from another."""
        if difference := self._difference(expected):
            raise CacheError(
                f"{folder}: holds a cache that differs in {difference}. Choose another folder, or delete this one."
            )
        stored, found = self.probe, expected.probe
        distance = math.dist(stored, found) / (math.hypot(*stored) or 1) if len(stored) == len(found) else math.inf
        if not distance <= _PROBE_TOLERANCE[self.computed_dtype]:
            raise CacheError(
                f"{folder}: this model computes other features from the same weights (relative distance {distance:.1e} "
                "on a probe): another activation, number of heads or hook below the cut. Choose another folder, or "
                "delete this one."
            )

    def _difference(self, expected: Layout) -> str | None:
        """Return the first entry that differs, with both values unless they are digests."""
        fields = ("rows", "shape", "dtype", "computed_dtype", "labelled")
        stored, wanted = ({**x.identity, **{name: getattr(x, name) for name in fields}} for x in (self, expected))
        for name in stored | wanted:
            there, here = stored.get(name, "nothing"), wanted.get(name, "nothing")
            if there != here:
                digests = _DIGEST.fullmatch(str(there)) and _DIGEST.fullmatch(str(here))
                return name if digests else f"{name} ({there} there, {here} here)"
        return None

    def to_json(self) -> str:
        """Return the contents of identity.json."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Layout:
        """Read identity.json, which may be that of another program."""
        path = folder / IDENTITY
        if not path.is_file():
            raise CacheError(f"{folder}: no {IDENTITY}: not a cache. Build it first.")
        try:
            values = json.loads(path.read_bytes())
            version = values.pop("format")
            if version == _FORMAT:
                return cls(**values | {"shape": tuple(values["shape"]), "probe": tuple(values["probe"])})
        except OSError as error:
            raise CacheError(f"{path}: unreadable ({error.strerror}). Make it readable.") from None
        except (ValueError, AttributeError, TypeError, LookupError) as error:  # no JSON, or other entries
            raise CacheError(f"{path}: damaged ({error}). Delete the folder, and build the cache again.") from None
        raise CacheError(
            f"{path}: of format {version}, and this version reads {_FORMAT}. Delete the folder, and build the cache "
            "again."
        )


# ---- arrays ----------------------------------------------------------------------------------------------------------


class Array(NamedTuple):
    """Shape and NumPy dtype of an array in a .npy file."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def header(self) -> bytes:
        """Header of version 1.0; of one length, so that the place of the data does not depend on NumPy."""
        descr = np.dtype(self.dtype).newbyteorder("<").str
        text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {self.shape}, }}"
        length = HEADER_BYTES - 10
        return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return HEADER_BYTES + self.shape[0] * self.row_bytes

    def read(self, path: Path, row_numbers: Sequence[int]) -> NDArray[Any]:
        """Read rows [n, …], after a check of size and header of the file. Consecutive ones are read at once."""
        try:
            with path.open("rb") as file:
                header, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
                if size != self.file_bytes:
                    raise CacheError(
                        f"{path}: damaged: {size} bytes instead of {self.file_bytes}. Build it again with "
                        "`resume=True`."
                    )
                if header != self.header:
                    raise CacheError(f"{path}: damaged: another header. Build it again with `resume=True`.")
                rows, row_bytes = np.empty((len(row_numbers), *self.shape[1:]), self.dtype), self.row_bytes
                # Ends of the runs of consecutive rows, but the last
                ends = (np.flatnonzero(np.diff(row_numbers) != 1) + 1).tolist()
                for start, end in itertools.pairwise(sorted({0, *ends, len(rows)})):
                    file.seek(HEADER_BYTES + row_numbers[start] * row_bytes)
                    if file.readinto(rows[start:end].data) < (end - start) * row_bytes:
                        raise OSError(errno.EIO, "truncated while it is read")
                return rows
        except OSError as error:
            fault = "missing" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror or error}"
            raise CacheError(f"{path}: {fault}. Build it again with `resume=True`.") from None


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


def checksums_of(rows: NDArray[Any], row_numbers: Sequence[int], seed: int) -> NDArray[np.uint64]:
    """Checksum [n] of the bytes of each row [n, …] of an array; depends on its number, and is never 0."""
    found = (xxhash.xxh3_64_intdigest(row, (seed + i) % 2**64) for i, row in zip(row_numbers, rows, strict=True))
    return np.array([checksum or 1 for checksum in found], np.uint64)


def probe_of(features: Tensor) -> tuple[float, ...]:
    """Some features of a fixed input: another activation or number of heads changes them, but no weight."""
    numbers = features.cpu().flatten()
    return tuple(numbers[torch.linspace(0, len(numbers) - 1, _PROBED, device="cpu").long()].tolist())
