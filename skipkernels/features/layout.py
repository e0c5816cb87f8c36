"""Files of a table of features: arrays in .npy files, checksums of each finished row, and what the rows depend on.

docs/cache.md describes the files.
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
from typing import TYPE_CHECKING, Any

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
NAMES = {dtype: name for name, dtype in COMPUTED_DTYPES.items()}
_NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int8": np.int8}  # NumPy has no bf16

FEATURES, SCALES, LABELS = "features.npy", "scales.npy", "labels.npy"
CHECKSUMS, IDENTITY = "rows.npy", "identity.json"
HEADER = 128  # bytes before the data of an array
_FORMAT = 6  # version of the files
_DIGEST = re.compile("[0-9a-f]{32}")
_LEVELS = 127  # int8 without −128: the scale is the same on both sides
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


def checksums(seed: int, row_numbers: Sequence[int], rows: NDArray[Any]) -> NDArray[np.uint64]:
    """Checksum [n] of the bytes of each row [n, …] of an array; depends on its number, and is never 0."""
    found = (xxhash.xxh3_64_intdigest(row, (seed + i) % 2**64) for i, row in zip(row_numbers, rows, strict=True))
    return np.array([checksum or 1 for checksum in found], np.uint64)


def probe_of(features: Tensor) -> tuple[float, ...]:
    """Some features of a fixed input: another activation or number of heads changes them, but no weight."""
    numbers = features.cpu().flatten()
    return tuple(numbers[torch.linspace(0, len(numbers) - 1, _PROBED, device="cpu").long()].tolist())


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
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and NumPy dtype of each array of the rows, by file name."""
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {FEATURES: ((self.rows, *self.shape), _NUMPY[self.dtype])}
        if self.dtype == "int8":
            arrays[SCALES] = (self.rows, self.shape[0]), np.float32
        if self.labelled:
            arrays[LABELS] = (self.rows,), np.int64
        return arrays

    @property
    def checksum_array(self) -> tuple[tuple[int, ...], Any]:
        """Shape and NumPy dtype of the checksums: of each row, one for each array."""
        return (self.rows, len(self.arrays)), np.uint64

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


def header_of(shape: tuple[int, ...], dtype: Any) -> bytes:
    """Header of a .npy file, version 1.0; of one length, so that the place of the data does not depend on NumPy."""
    text = f"{{'descr': {np.dtype(dtype).newbyteorder('<').str!r}, 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


def file_size(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of the .npy file of an array."""
    return HEADER + math.prod(shape) * np.dtype(dtype).itemsize


def read_rows(path: Path, shape: tuple[int, ...], dtype: Any, row_numbers: Sequence[int]) -> NDArray[Any]:
    """Read rows [n, …] of an array, after a check of its size and header. Consecutive ones are read at once."""
    try:
        with path.open("rb") as file:
            header, size, expected = file.read(HEADER), os.fstat(file.fileno()).st_size, file_size(shape, dtype)
            if size != expected:
                raise CacheError(
                    f"{path}: damaged: {size} bytes instead of {expected}. Build it again with `resume=True`."
                )
            if header != header_of(shape, dtype):
                raise CacheError(f"{path}: damaged: another header. Build it again with `resume=True`.")
            rows = np.empty((len(row_numbers), *shape[1:]), dtype)
            ends = (np.flatnonzero(np.diff(row_numbers) != 1) + 1).tolist()  # of runs of consecutive rows, but the last
            for start, end in itertools.pairwise(sorted({0, *ends, len(rows)})):
                file.seek(HEADER + row_numbers[start] * rows[start].nbytes)
                part = rows[start:end]
                if file.readinto(part.data) < part.nbytes:
                    raise OSError(errno.EIO, "truncated while it is read")
            return rows
    except OSError as error:
        fault = "missing" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror or error}"
        raise CacheError(f"{path}: {fault}. Build it again with `resume=True`.") from None
