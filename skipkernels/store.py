"""Rows of numbers in a folder: a manifest in JSON, and shards in safetensors that are read from memory maps.

A shard is replaced at once, and then the manifest that lists it, so that a folder is consistent at any moment.
docs/cache.md specifies the format.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import json
import math
import mmap
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .digests import digest_file, digest_json
from .folders import LOCK, locked, partial_of, replace_tensors, replace_text
from .formatting import decimal, first_line
from .memory import free_bytes
from .ops.gather_rows import gather_rows_out

FORMAT = 2
MANIFEST = "manifest.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
"""Storage dtypes of rows."""
COMPUTED = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Dtypes of rows before they are stored and after they are read."""

_DIGEST = re.compile("[0-9a-f]{32}")
_SHARD_NAME = re.compile(r"[0-9]{5,}\.safetensors")
_SHARD = "shard"  # the only metadata key of a shard: safetensors writes several in random order
_MAX_SIZE = 2**48  # of a number in a manifest; products of larger ones overflow
_LEVELS = 127  # int8 without −128: the scale is the same on both sides

# Bytes read from maps before all maps are closed, unless the store is small compared with the free memory. The pages
# stay in the system's cache, but no longer count as resident memory of this process.
_MAPPED = 32 << 20
_READ_AHEAD = 128 << 10  # bytes per madvise call: the system's default limit for one read-ahead


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


class LostManifest(StoreError):
    """Error for a damaged or missing manifest: the contents of the shards are unknown."""


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Convert an OSError to a StoreError with the file, the fault and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise StoreError(f"{folder}: in use by another process. Wait for it, or choose another folder.") from None
        named = error.filename if isinstance(error.filename, str) else folder
        raise StoreError(
            f"{named}: cannot be read or written ({error.strerror or error}). Complete shards stay. Free space, check "
            "the disk or choose another folder, and continue with `resume=True`."
        ) from error


# ---- manifest --------------------------------------------------------------------------------------------------------


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

    def __post_init__(self) -> None:
        sizes = (self.rows, self.shard_rows, *self.shape)
        if len(sizes) == 2 or not all(type(size) is int and 1 <= size < _MAX_SIZE for size in sizes):
            raise ValueError("rows, shard_rows and shape must be whole numbers of at least 1")
        if self.dtype not in DTYPES or self.computed not in COMPUTED or type(self.labelled) is not bool:
            raise ValueError("dtype, computed or labelled is unknown")
        if not all(isinstance(value, (str, int)) for value in self.fingerprint.values()):
            raise ValueError("fingerprint must be numbers and text")

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

    def tensors_of(self, shard: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a shard."""
        count = len(self.rows_of(shard))
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
        tensors = {"rows": ((count, *self.stored_shape), DTYPES[self.dtype])}
        if self.dtype == "int8":
            tensors["token_scale"] = (count, self.stored_shape[0]), torch.float32
        if self.labelled:
            tensors["labels"] = (count,), torch.int64
        return tensors

    @functools.cached_property  # used each time a shard is mapped
    def digest(self) -> str:
        """Digest of everything except the notes."""
        return digest_json(dataclasses.asdict(self) | {"notes": None, "format": FORMAT})

    def difference(self, other: Layout) -> str | None:
        """Return the first entry that differs, and its values unless they are digests; not shard_rows and notes."""
        pairs = [
            (name, self.fingerprint.get(name, "nothing"), other.fingerprint.get(name, "nothing"))
            for name in self.fingerprint | other.fingerprint
        ]
        fields = ("rows", "shape", "dtype", "computed", "labelled")
        for name, there, here in pairs + [(field, getattr(self, field), getattr(other, field)) for field in fields]:
            if there != here:
                digests = all(_DIGEST.fullmatch(str(value)) for value in (there, here))
                return name if digests else f"{name} ({there} there, {here} here)"
        return None


class Shard(NamedTuple):
    """Size in bytes and digest of the file of a complete shard."""

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """Layout of a store and its shards, None for a missing shard."""

    layout: Layout
    shards: tuple[Shard | None, ...]

    @property
    def missing(self) -> list[int]:
        """Numbers of missing shards, ascending."""
        return [number for number, shard in enumerate(self.shards) if shard is None]

    def with_shards(self, shards: Mapping[int, Shard | None]) -> Manifest:
        """Return a copy with some shards replaced."""
        replaced = tuple(shards.get(number, shard) for number, shard in enumerate(self.shards))
        return dataclasses.replace(self, shards=replaced)

    def write(self, folder: Path) -> None:
        """Write the manifest to a folder, replacing the old one."""
        shards = [None if shard is None else shard._asdict() for shard in self.shards]
        values = {"format": FORMAT, "layout": dataclasses.asdict(self.layout), "shards": shards}
        values["xxh3"] = digest_json(values)
        replace_text(folder / MANIFEST, json.dumps(values, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder, which may be damaged, or written by a stranger.

        Raises:
            LostManifest: If it is damaged or missing.
            StoreError: If it is unreadable, or has another format.
        """
        path = folder / MANIFEST
        try:
            if not path.is_file():
                raise LostManifest(f"{folder}: no {MANIFEST}: not a store. Build it first.")
            values = json.loads(path.read_bytes())
            digest, version, layout = values.pop("xxh3", None), values["format"], values.get("layout")
            if isinstance(version, int) and version != FORMAT:
                raise StoreError(
                    f"{path}: has format {version}, and this version of skipkernels reads format {FORMAT}. Build it "
                    "again with `overwrite=True`, or delete it."
                )
            if digest != digest_json(values):
                raise ValueError("its digest does not match its contents")
            shards = [None if shard is None else Shard(**shard) for shard in values["shards"]]
            read = cls(Layout(**layout | {"shape": tuple(layout["shape"])}), tuple(shards))
            sizes = [shard.bytes for shard in shards if shard is not None]
            if len(shards) != read.layout.shards or not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError("its shards do not match its rows")
            return read
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{path}: unreadable ({error.strerror}). Make it readable.") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise LostManifest(
                f"{path}: damaged ({type(error).__name__}: {first_line(error)}). Build it again with `resume=True`."
            ) from None


# ---- shards ----------------------------------------------------------------------------------------------------------


class MappedShard(NamedTuple):
    """Views of a private memory map of a shard."""

    rows: Tensor  # [n, N, W], in the dtype of the store
    token_scale: Tensor | None = None  # [n, N] fp32, for int8
    labels: Tensor | None = None  # [n] int64, if the store has them


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


def write_shard(folder: Path, layout: Layout, number: int, tensors: Mapping[str, Tensor]) -> Shard:
    """Write the file of a shard, which is part of the store when `Writer.add` has listed it."""
    path = path_of(folder, number)
    with disk_errors(folder):
        replace_tensors(path, tensors, {_SHARD: f"{number} of {layout.digest}"})
        return Shard(path.stat().st_size, digest_file(path))


def map_shard(folder: Path, layout: Layout, number: int, shard: Shard) -> MappedShard:
    """Check the size and header of a shard against the manifest, and map it."""
    path = path_of(folder, number)
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise ValueError(f"damaged: {size} bytes instead of {shard.bytes}")
        with safe_open(path, "pt") as file:
            identity = (file.metadata() or {}).get(_SHARD, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # views of its memory map
        if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != layout.tensors_of(number):
            raise ValueError("damaged: its tensors do not match the manifest")
        if identity != f"{number} of {layout.digest}":
            raise ValueError(f"is shard {identity.partition(' ')[0] or 'of another program'}, or of another store")
        return MappedShard(**tensors)
    except FileNotFoundError:
        fault = "missing"
    except OSError as error:
        fault = f"unreadable: {error.strerror or error}"
    except SafetensorError as error:
        fault = f"damaged: its header is unreadable ({first_line(error)})"
    except (ValueError, RuntimeError) as error:
        fault = first_line(error)
    raise StoreError(f"{path}: {fault}. Build it again with `resume=True`.")


def find_damage(
    folder: Path, manifest: Manifest, on_bytes: Callable[[int], None] = lambda count: None
) -> dict[int, str]:
    """Read every byte of all shards; return a message for each damaged shard, by number."""
    found: dict[int, str] = {}
    for number, shard in enumerate(manifest.shards):
        if shard is None:
            continue
        try:
            map_shard(folder, manifest.layout, number, shard)
            with disk_errors(folder):
                digest = digest_file(path_of(folder, number))
            if digest != shard.xxh3:
                path = path_of(folder, number)
                raise StoreError(f"{path}: damaged: its contents have changed. Build it again with `resume=True`.")
        except StoreError as error:
            found[number] = str(error)
        on_bytes(shard.bytes)
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------


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

    Attributes:
        shape, dtype, device: Those of a gathered row.
        bytes: Bytes on the disk, without the manifest.

    Raises:
        StoreError: If there is no store, or it is incomplete or damaged.
    """

    def __init__(self, folder: Path, *, verify: bool = False):
        self.folder = folder = folder.absolute()  # a later change of the working directory has no effect
        self.manifest = Manifest.read(folder)
        self.layout = layout = self.manifest.layout
        if missing := self.manifest.missing:
            done = layout.shards - len(missing)
            raise StoreError(
                f"{folder}: incomplete: {done} of {layout.shards} shards exist. Build the rest with `resume=True`."
            )
        for number in range(layout.shards):
            self._map(number)
        if verify and (found := self.verify()):
            raise StoreError(found[0])
        self.shape, self.dtype, self.device = layout.shape, COMPUTED[layout.computed], torch.device("cpu")
        self.bytes = sum(shard.bytes for shard in self.manifest.shards if shard is not None)
        self._token_rows_bytes = math.prod(layout.stored_shape) * DTYPES[layout.dtype].itemsize
        self._limit = math.inf if self.bytes < free_bytes(self.device) / 32 else _MAPPED
        self._maps: dict[int, MappedShard] = {}
        self._read = 0  # bytes read from these maps

    def __getstate__(self) -> dict[str, Any]:
        # Without the maps: another process opens its own.
        return self.__dict__ | {"_maps": {}, "_read": 0}

    def verify(self, on_bytes: Callable[[int], None] = lambda count: None) -> list[str]:
        """Read every byte; return a message for each damaged file. `on_bytes` is called with the bytes of a shard."""
        return list(find_damage(self.folder, self.manifest, on_bytes).values())

    def labels(self) -> Tensor:
        """Labels of all rows, [rows] int64."""
        parts = [self._map(number).labels for number in range(self.layout.shards)]
        return torch.cat([part for part in parts if part is not None])

    def expect(self, index: Tensor) -> None:
        """Ask the system to read rows by number [B] that will be gathered soon.

        Without this, rows in random order are read page by page on access, 40 times slower in a measurement. Does
        nothing for a small store that has been read once, which is in memory.
        """
        small_and_read = self._limit == math.inf and self._read >= self.layout.rows * self.layout.row_bytes
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
        rows, numbers = out.view(len(index), *layout.stored_shape), index.tolist()
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
        self._read += len(index) * layout.row_bytes
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
        return map_shard(self.folder, self.layout, number, shard)


# ---- writing ---------------------------------------------------------------------------------------------------------


class Writer:
    """Context manager that writes a store, as the only process in its folder.

    Entering acquires the lock, checks the folder, and deletes unlisted files of earlier builds. Resuming a complete
    store without damage acquires no lock and writes nothing, so its disk can be read-only.

    Args:
        folder: Folder of the store; created if needed.
        layout: Layout of the store.
        resume: Keep existing shards without damage.
        overwrite: Replace any store in the folder.
        wait: Wait for another process that builds in the folder; by default, one is an error.

    Raises:
        DifferentStore: On entering, if the folder has another store.
        StoreError: On entering, if the folder has other files, another process holds the lock, or the disk is too
            small.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        resume: bool = False,
        overwrite: bool = False,
        wait: bool = False,
    ):
        self.folder, self.manifest = folder.absolute(), Manifest(layout, (None,) * layout.shards)
        self._resume, self._overwrite, self._wait = resume, overwrite, wait
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Writer:
        if self._resume and not self._overwrite and self._is_complete():
            return self
        with disk_errors(self.folder), contextlib.ExitStack() as held:
            check_folder(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(self.folder, wait=self._wait))
            self._choose_shards()
            self._check_space()
            self.manifest.write(self.folder)
            listed = set(range(self.layout.shards)) - set(self.missing)
            used = {MANIFEST, *(path_of(self.folder, number).name for number in listed)}
            _delete([path for path in _files(self.folder) if path.name not in used])
            self._held = held.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    @property
    def layout(self) -> Layout:
        """Layout of the store: the given one, with `shard_rows` of a store that is resumed."""
        return self.manifest.layout

    @property
    def missing(self) -> list[int]:
        """Numbers of missing shards, ascending."""
        return self.manifest.missing

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard, and add it to the manifest."""
        self.add({number: write_shard(self.folder, self.layout, number, tensors)})

    def add(self, shards: Mapping[int, Shard]) -> None:
        """Add shards to the manifest, after this or another process has written their files."""
        manifest = self.manifest.with_shards(shards)
        with disk_errors(self.folder):
            manifest.write(self.folder)
        self.manifest = manifest

    def _is_complete(self) -> bool:
        """Return True if the store is complete and has no damage."""
        try:
            manifest = Manifest.read(self.folder)
        except StoreError:
            return False
        if manifest.missing or manifest.layout.difference(self.layout) or find_damage(self.folder, manifest):
            return False
        self.manifest = manifest
        return True

    def _choose_shards(self) -> None:
        """Find the shards to keep; refuse a store that may not be replaced."""
        if self._overwrite or not any(path.name[0] != "." for path in _files(self.folder)):
            return
        if not self._resume:
            raise StoreError(
                f"{self.folder}: holds a store. Open it, continue or repair it with `resume=True`, or replace it with "
                "`overwrite=True`."
            )
        try:
            manifest = Manifest.read(self.folder)
        except LostManifest as lost:
            warnings.warn(f"{lost} It is rebuilt completely.", stacklevel=6)
            return
        difference = manifest.layout.difference(self.layout)
        if difference is not None and any(manifest.shards):
            raise DifferentStore(
                f"{self.folder}: holds a store that differs in {difference}. Choose another folder, or replace it with "
                "`overwrite=True`.",
                difference,
            )
        if difference is None:
            damaged = find_damage(self.folder, manifest)
            for message in damaged.values():
                warnings.warn(f"{message} It is rebuilt.", stacklevel=6)
            self.manifest = manifest.with_shards(dict.fromkeys(damaged))

    def _check_space(self) -> None:
        needed = sum(len(self.layout.rows_of(number)) for number in self.missing) * self.layout.row_bytes
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise StoreError(
                f"{self.folder}: {decimal(needed)} are needed, and {decimal(free)} are free. Free space, or use a "
                "smaller dtype or fewer views."
            )


# ---- files of a folder -----------------------------------------------------------------------------------------------


def is_store(folder: Path) -> bool:
    """Return True if a folder has a store, possibly damaged: then it also has the lock of a build."""
    try:
        Manifest.read(folder)
    except LostManifest:
        return (folder / MANIFEST).is_file() and (folder / LOCK).exists()
    except StoreError:
        pass
    return True


def check_folder(folder: Path) -> None:
    """Raise a StoreError unless a folder is new, empty, or that of a build, in which other files are left alone."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file. Choose a folder.")
    if folder.is_dir() and not (folder / LOCK).exists() and not is_store(folder):
        other = min((path.name for path in folder.iterdir()), default=None)
        if other is not None:
            raise StoreError(f"{folder}: holds other files ({other}). Choose an empty folder.")


def erase(folder: Path) -> None:
    """Delete the files of a store, except that of the lock."""
    with disk_errors(folder):
        _delete(_files(folder))


def _files(folder: Path) -> list[Path]:
    """Files of a store and temporary folders of its builds, by their names; the manifest last."""

    def belongs(path: Path) -> bool:
        name = partial_of(path.name) or path.name
        known = name == MANIFEST or _SHARD_NAME.fullmatch(name) is not None
        return known and (path.name != name or path.is_file())

    return sorted(filter(belongs, folder.iterdir()), key=lambda path: (path.name == MANIFEST, path))


def _delete(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():  # temporary, of a killed build
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
