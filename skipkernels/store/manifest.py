"""Manifest of a store: layout of its rows, fingerprint of their inputs, and list of complete shards.

A manifest is JSON with its own digest, and every value is checked when it is read. File names follow from the number:
shard 7 is `00007.safetensors`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from .atomic import replace_text
from .digest import digest_json
from .safe_read import depth_at_most, open_regular, parse_object

FORMAT = 2
MANIFEST = "manifest.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
"""Storage dtypes of rows."""
COMPUTED = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Dtypes of rows before they are stored and after they are read."""
_MAX_SIZE = 2**48  # largest valid number in a manifest; larger ones are damage, and their products would overflow
_MAX_BYTES = 2**24  # size of a manifest file: 100,000 shards take 9 MB, and 30 times that in memory as JSON
_SHARD_TEXT = len(',\n  {\n   "bytes": 281474976710655,\n   "xxh3": ""\n  }') + 32  # most bytes per shard
_MAX_DEPTH = 16  # levels of notes


class StoreError(ValueError):
    """Error for a store that cannot be used. The message names the file, the fault and the remedy.

    Attributes:
        item: Item of a dataset that cannot be loaded, if this is the fault.
    """

    item: int | None = None


class DifferentStore(StoreError):
    """Error for a store with other rows than expected; `difference` is the first entry that differs, both values."""

    def __init__(self, message: str, difference: str):
        super().__init__(message)
        self.difference = difference


@contextlib.contextmanager
def file_errors(path: Path, remedy: str) -> Iterator[None]:
    """Convert an OSError to a StoreError with the file, the fault and the remedy."""
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else path
        raise StoreError(f"{named}: {error.strerror or error}. {remedy}") from error


def absolute_folder(folder: Path) -> Path:
    """Return the absolute path of a folder, so that a later change of the working directory has no effect."""
    with file_errors(folder, "Pass an absolute path."):
        folder = folder.absolute()
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        text = str(folder).encode(errors="backslashreplace").decode()
        raise StoreError(f"{text}: its path is not UTF-8. Rename it or choose another folder.") from None
    return folder


class LostManifest(StoreError):
    """Error for a damaged or missing manifest: the contents of the shards are unknown."""


@dataclass(frozen=True)
class Layout:
    """Layout of the rows of a store, and fingerprint of their inputs."""

    rows: int
    shape: tuple[int, ...]  # Shape of a row: tokens and width, or a feature map
    dtype: str  # Storage dtype, a key of `DTYPES`; int8 has a scale for each token (first dimension of `shape`)
    computed: str  # Dtype of rows before they are stored and after they are read, a key of `COMPUTED`
    shard_rows: int  # Rows per shard; the last shard may have fewer
    labelled: bool  # True if each row has a label
    # Inputs of the rows: numbers and strings by name, compared when a store is resumed
    fingerprint: dict[str, str | int]
    notes: dict[str, Any]  # Other JSON values, not compared

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of a stored row: tokens, and elements of a token."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        tokens, width = self.stored_shape
        scales = 4 * tokens if self.dtype == "int8" else 0
        return tokens * width * DTYPES[self.dtype].itemsize + scales + 8 * self.labelled

    def rows_of(self, shard: int) -> range:
        """Row numbers of a shard."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.rows))

    def values(self) -> dict[str, Any]:
        """Attributes by name. Unlike `dataclasses.asdict`, this copies no notes."""
        return {name: getattr(self, name) for name in Layout.__dataclass_fields__}

    @functools.cached_property  # used each time a shard is mapped
    def digest(self) -> str:
        """Digest of everything except the notes."""
        return digest_json({**self.values(), "notes": None, "format": FORMAT})

    def check_manifest(self, folder: Path) -> None:
        """Raise a StoreError if the complete manifest of this layout would be too large to read."""
        empty = Manifest(replace(self, shard_rows=self.rows), (Shard(_MAX_SIZE - 1, "0" * 32),)).text()
        size = len(empty) + (self.shards - 1) * _SHARD_TEXT
        if size > _MAX_BYTES:
            raise StoreError(
                f"{folder}: {self.shards} shards need a manifest of up to {size} bytes; at most {_MAX_BYTES} are "
                "read. Use a larger `shard_bytes`, or fewer images or views."
            )

    def difference(self, other: Layout) -> str | None:
        """Describe the first difference from another layout; None if equal except for `shard_rows` and notes."""
        for name in (*self.fingerprint, *(name for name in other.fingerprint if name not in self.fingerprint)):
            theirs, ours = other.fingerprint.get(name, "nothing"), self.fingerprint.get(name, "nothing")
            if theirs != ours:
                return f"{name} ({ours} there, {theirs} here)"
        for field in ("rows", "shape", "dtype", "computed", "labelled"):
            theirs, ours = getattr(other, field), getattr(self, field)
            if theirs != ours:
                return f"{field} ({ours} there, {theirs} here)"
        return None


@dataclass(frozen=True)
class Shard:
    """Size in bytes and digest of the file of a complete shard."""

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """Layout of a store and its shards, None for a missing shard."""

    layout: Layout
    shards: tuple[Shard | None, ...]

    @property
    def complete(self) -> bool:
        """True if no shard is missing."""
        return None not in self.shards

    def with_shard(self, number: int, shard: Shard | None) -> Manifest:
        """Return a copy with one shard replaced."""
        return replace(self, shards=(*self.shards[:number], shard, *self.shards[number + 1 :]))

    def write(self, folder: Path) -> None:
        """Write the manifest to a folder, replacing the old one."""
        replace_text(folder / MANIFEST, self.text())

    def text(self) -> str:
        """JSON of the manifest, with its digest."""
        shards = [None if shard is None else vars(shard) for shard in self.shards]
        values = {"format": FORMAT, "layout": self.layout.values(), "shards": shards}
        values["xxh3"] = digest_json(values)
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            LostManifest: If it is damaged or missing.
            StoreError: If it is unreadable, or has another format.
        """
        path = folder / MANIFEST

        def damaged(what: str) -> NoReturn:
            raise LostManifest(f"{path}: damaged: {what}. Build it again with `resume=True`.")

        try:
            with open_regular(path) as file:
                if (size := os.fstat(file.fileno()).st_size) > _MAX_BYTES:
                    damaged(f"{size} bytes")
                text = file.read(_MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise LostManifest(f"{folder}: no {MANIFEST}: not a store. Build it first.") from None
        except OSError as error:
            raise StoreError(
                f"{path}: unreadable: {error.strerror}. Make it readable, or choose another folder."
            ) from None
        try:
            values = parse_object(text, finite=False)  # numbers of sampled images may be NaN
        except ValueError as error:
            damaged(str(error))
        check = _Check(damaged)
        version = check.integer(values.get("format"), "format", 1)
        if version != FORMAT:
            age, remedy = ("newer", "Update skipkernels, or build") if version > FORMAT else ("older", "Build")
            raise StoreError(
                f"{path}: has format {version}, of a{'n' * (age == 'older')} {age} skipkernels; this one reads format "
                f"{FORMAT}. {remedy} it again with `overwrite=True`, or delete it."
            )
        digest = values.pop("xxh3", None)
        check(digest == digest_json(values), "its digest does not match its contents")
        return cls(_layout(values.get("layout"), check), _shards(values, check))


class _Check:
    """Checks of values. Call `damaged` with a description of an invalid value."""

    def __init__(self, damaged: Callable[[str], NoReturn]):
        self.damaged = damaged

    def __call__(self, holds: bool, what: str) -> None:
        if not holds:
            self.damaged(what)

    def integer(self, value: Any, name: str, least: int) -> int:
        self(
            isinstance(value, int) and not isinstance(value, bool) and least <= value < _MAX_SIZE,
            f"{name} must be a whole number of at least {least}",
        )
        return value

    def mapping(self, value: Any, name: str) -> dict[str, Any]:
        self(isinstance(value, dict), f"{name} must be an object")
        return value


def _layout(values: Any, check: _Check) -> Layout:
    values = check.mapping(values, "layout")
    check(set(values) == set(Layout.__dataclass_fields__), "layout has unknown fields")
    shape = values["shape"]
    check(isinstance(shape, list) and 1 <= len(shape) <= 4, "shape must have one to four sizes")
    sizes = tuple(check.integer(size, "a size of shape", 1) for size in shape)
    check(math.prod(sizes) < _MAX_SIZE, "shape is too large")
    for name, dtypes in (("dtype", DTYPES), ("computed", COMPUTED)):
        check(isinstance(values[name], str) and values[name] in dtypes, f"{name} must be one of {', '.join(dtypes)}")
    check(isinstance(values["labelled"], bool), "labelled must be true or false")
    fingerprint = check.mapping(values["fingerprint"], "fingerprint")
    check(all(isinstance(value, (str, int)) for value in fingerprint.values()), "fingerprint must be numbers and text")
    notes = check.mapping(values["notes"], "notes")
    check(depth_at_most(notes, _MAX_DEPTH), f"notes must be at most {_MAX_DEPTH} levels deep")
    for name in ("rows", "shard_rows"):
        check.integer(values[name], name, 1)
    return Layout(**values | {"shape": sizes})


def _shards(values: dict[str, Any], check: _Check) -> tuple[Shard | None, ...]:
    shards, layout = values.get("shards"), values["layout"]
    check(isinstance(shards, list), "shards must be a list")
    assert isinstance(shards, list)
    check(len(shards) == -(-layout["rows"] // layout["shard_rows"]), "the number of shards does not match the rows")
    found: list[Shard | None] = []
    for shard in shards:
        if shard is None:
            found.append(None)
            continue
        shard = check.mapping(shard, "a shard")
        check(set(shard) == {"bytes", "xxh3"} and isinstance(shard["xxh3"], str), "a shard has unknown fields")
        found.append(Shard(check.integer(shard["bytes"], "bytes of a shard", 1), shard["xxh3"]))
    return tuple(found)
