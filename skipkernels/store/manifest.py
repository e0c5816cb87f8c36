"""What a store says of itself: how its rows lie, what they depend on, and which shards are there.

A manifest is JSON. It is believed only after every value was checked and its own digest fits, so that a damaged one is
found, and names no file: shard 7 is always `00007.safetensors`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from .atomic import replace_text
from .digest import digest_json
from .regular import fits, open_regular, parse_object

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
"""How numbers are kept."""
COMPUTED = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""How they come and go out."""
_MOST_ROWS = 2**48  # sizes from a file are multiplied; beyond this they are damage, not data
_MOST_BYTES = 2**24  # of a manifest: 100,000 shards take nine million, and JSON thirty times that in memory
_SHARD_TEXT = len(',\n  {\n   "bytes": 281474976710655,\n   "xxh3": ""\n  }') + 32  # bytes of a shard there, at most
_DEEPEST = 16  # levels of notes


class StoreError(ValueError):
    """A store that cannot be used: the message names the file, what is wrong with it, and the remedy."""


class DifferentStore(StoreError):
    """A store of something else.

    Attributes:
        difference: In what it differs.
    """

    def __init__(self, message: str, difference: str):
        super().__init__(message)
        self.difference = difference


@contextlib.contextmanager
def file_errors(path: Path, remedy: str) -> Iterator[None]:
    """Turn errors of the system into a StoreError: the file, what happened, the remedy."""
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else path
        raise StoreError(f"{named}: {error.strerror or error}. {remedy}") from error


def usable_folder(folder: Path) -> Path:
    """The absolute path of a store's folder, which stays the same when the process changes its working folder.

    Raises:
        StoreError: If it is not UTF-8: safetensors opens no such path.
    """
    with file_errors(folder, "Give an absolute path."):
        folder = folder.absolute()
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        text = str(folder).encode(errors="backslashreplace").decode()
        raise StoreError(f"{text}: its path is not UTF-8. Rename it, or choose another folder.") from None
    return folder


class LostManifest(StoreError):
    """A manifest that is damaged or gone: what the shards hold is then unknown."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a store lie, and what they depend on.

    Attributes:
        rows: How many.
        shape: Of a row, as it comes out: tokens and widths, or a map.
        dtype: How numbers are kept, a key of `DTYPES`; int8 has a scale for each token, the first dimension of `shape`.
        computed: How they came and go out; a key of `COMPUTED`.
        shard_rows: Rows of a shard; the last has what is left.
        labelled: Whether each row has a class.
        fingerprint: What the rows depend on, by name: numbers and strings that are compared.
        notes: What else a reader wants to know; JSON that is not compared.
    """

    rows: int
    shape: tuple[int, ...]
    dtype: str
    computed: str
    shard_rows: int
    labelled: bool
    fingerprint: dict[str, str | int]
    notes: dict[str, Any]

    @property
    def shards(self) -> int:
        """How many."""
        return -(-self.rows // self.shard_rows)

    @property
    def kept_shape(self) -> tuple[int, int]:
        """Of a row in a shard: tokens, and numbers of a token."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """What a row takes in a shard."""
        tokens, width = self.kept_shape
        scales = 4 * tokens if self.dtype == "int8" else 0
        return tokens * width * DTYPES[self.dtype].itemsize + scales + 8 * self.labelled

    def rows_of(self, shard: int) -> range:
        """Rows of a shard."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.rows))

    @property
    def digest(self) -> str:
        """The same for the same rows, kept the same way."""
        return digest_json({**asdict(self), "notes": None, "format": FORMAT})

    def check_manifest(self, folder: Path) -> None:
        """Refuse a store whose manifest, when it is complete, would be larger than one may be.

        Raises:
            StoreError: If so.
        """
        empty = Manifest(replace(self, shard_rows=self.rows), (Shard(_MOST_ROWS - 1, "0" * 32),)).text()
        size = len(empty) + (self.shards - 1) * _SHARD_TEXT
        if size > _MOST_BYTES:
            raise StoreError(
                f"{folder}: {self.shards} shards need a manifest of up to {size} bytes, and {_MOST_BYTES} are read. "
                "Make shards larger (shard_bytes=), or images or views fewer."
            )

    def difference(self, other: Layout) -> str | None:
        """In words, the first thing in which another store differs; how many rows a shard has is no difference."""
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
    """A shard that is there: bytes of its file, and their digest."""

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """A layout, and the shards that are there; None for one that is not."""

    layout: Layout
    shards: tuple[Shard | None, ...]

    @property
    def complete(self) -> bool:
        """Whether all shards are there."""
        return None not in self.shards

    def with_shard(self, number: int, shard: Shard | None) -> Manifest:
        """The same with one shard replaced."""
        return replace(self, shards=(*self.shards[:number], shard, *self.shards[number + 1 :]))

    def write(self, folder: Path) -> None:
        """Replace the manifest of a folder."""
        replace_text(folder / MANIFEST, self.text())

    def text(self) -> str:
        """As `read` takes it."""
        values = {"format": FORMAT, **asdict(self)}
        values["xxh3"] = digest_json(values)
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            LostManifest: If it is damaged, or there is none.
            StoreError: If it may not be read, or is of a newer format.
        """
        path = folder / MANIFEST

        def damaged(what: str) -> NoReturn:
            raise LostManifest(f"{path}: damaged: {what}. Build it again with resume=True (--resume).")

        try:
            with open_regular(path) as file:
                if (size := os.fstat(file.fileno()).st_size) > _MOST_BYTES:
                    damaged(f"{size} bytes")
                text = file.read(_MOST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise LostManifest(f"{folder}: no {MANIFEST}: not a store. Build it first.") from None
        except OSError as error:
            raise StoreError(
                f"{path}: unreadable: {error.strerror}. Make it readable, or choose another folder."
            ) from None
        try:
            values = parse_object(text, finite=False)  # a sample may have been NaN
        except ValueError as error:
            damaged(str(error))
        check = _Check(damaged)
        version = check.integer(values.get("format"), "format", 1)
        if version > FORMAT:
            raise StoreError(
                f"{path}: of format {version}, made by a newer skipkernels; this one reads format {FORMAT}. Update "
                "skipkernels, or replace it with overwrite=True (--overwrite)."
            )
        digest = values.pop("xxh3", None)
        check(digest == digest_json(values), "its digest does not fit its contents")
        return cls(_layout(values.get("layout"), check), _shards(values, check))


class _Check:
    """Looks at values and calls `damaged` with what is wrong."""

    def __init__(self, damaged: Callable[[str], NoReturn]):
        self.damaged = damaged

    def __call__(self, holds: bool, what: str) -> None:
        if not holds:
            self.damaged(what)

    def integer(self, value: Any, name: str, least: int) -> int:
        self(
            isinstance(value, int) and not isinstance(value, bool) and least <= value < _MOST_ROWS,
            f"{name} must be a whole number from {least} on",
        )
        return value

    def mapping(self, value: Any, name: str) -> dict[str, Any]:
        self(isinstance(value, dict), f"{name} must be a mapping")
        return value


def _layout(values: Any, check: _Check) -> Layout:
    values = check.mapping(values, "layout")
    check(set(values) == set(Layout.__dataclass_fields__), "layout has other fields")
    shape = values["shape"]
    check(isinstance(shape, list) and 1 <= len(shape) <= 4, "shape must be one to four sizes")
    sizes = tuple(check.integer(size, "a size of shape", 1) for size in shape)
    check(math.prod(sizes) < _MOST_ROWS, "shape is too large")
    check(isinstance(values["dtype"], str) and values["dtype"] in DTYPES, f"dtype must be one of {', '.join(DTYPES)}")
    check(
        isinstance(values["computed"], str) and values["computed"] in COMPUTED,
        f"computed must be one of {', '.join(COMPUTED)}",
    )
    check(isinstance(values["labelled"], bool), "labelled must be true or false")
    fingerprint = check.mapping(values["fingerprint"], "fingerprint")
    check(all(isinstance(value, (str, int)) for value in fingerprint.values()), "fingerprint must be numbers and text")
    notes = check.mapping(values["notes"], "notes")
    check(fits(notes, _DEEPEST), f"notes must be at most {_DEEPEST} levels deep")
    return Layout(
        rows=check.integer(values["rows"], "rows", 1),
        shape=sizes,
        dtype=values["dtype"],
        computed=values["computed"],
        shard_rows=check.integer(values["shard_rows"], "shard_rows", 1),
        labelled=values["labelled"],
        fingerprint=fingerprint,
        notes=notes,
    )


def _shards(values: dict[str, Any], check: _Check) -> tuple[Shard | None, ...]:
    shards, layout = values.get("shards"), values["layout"]
    check(isinstance(shards, list), "shards must be a list")
    assert isinstance(shards, list)
    check(len(shards) == -(-layout["rows"] // layout["shard_rows"]), "shards must be as many as the rows need")
    found: list[Shard | None] = []
    for shard in shards:
        if shard is None:
            found.append(None)
            continue
        shard = check.mapping(shard, "a shard")
        check(set(shard) == {"bytes", "xxh3"} and isinstance(shard["xxh3"], str), "a shard has other fields")
        found.append(Shard(check.integer(shard["bytes"], "bytes of a shard", 1), shard["xxh3"]))
    return tuple(found)
