"""Writing of a store, shard by shard; a killed build can be resumed."""

from __future__ import annotations

import contextlib
import errno
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from ..formatting import decimal
from .atomic import partial_of
from .lock import LOCK, OWNER, locked
from .manifest import (
    MANIFEST,
    DifferentStore,
    Layout,
    LostManifest,
    Manifest,
    Shard,
    StoreError,
    absolute_folder,
    file_errors,
)
from .shards import find_damage, is_shard, is_shard_name, path_of, write_shard

_TRY_AGAIN = "Check the disk and try again."
_SPARE = 1 << 24  # bytes of the disk kept free: for manifests, and for the system


class Writer:
    """Context manager that writes a store, as the only process in its folder.

    Entering acquires the lock and checks the folder. The store is consistent at every moment. Resuming a complete store
    without damage acquires no lock and writes nothing, so its disk can be read-only.

    Args:
        folder: Folder of the store; created if needed.
        layout: Layout of the store.
        resume: Keep existing shards without damage.
        overwrite: Replace any store in the folder.
        on_wait: See `store.lock.locked`.

    Raises:
        DifferentStore: On entering, if the folder has another store.
        StoreError: On entering, if the folder has foreign files, another process holds the lock, or the disk is too
            small.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp(), "store")
        >>> layout = Layout(3, (1, 2), "fp32", "fp32", 2, False, {"made of": "threes"}, {})
        >>> with Writer(folder, layout) as writer:
        ...     for number in writer.missing:
        ...         _ = writer.write(number, {"rows": torch.full((len(layout.rows_of(number)), 1, 2), 3.0)})
        >>> sorted(path.name for path in folder.glob("[!.]*"))
        ['00000.safetensors', '00001.safetensors', 'manifest.json']
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        resume: bool = False,
        overwrite: bool = False,
        on_wait: Callable[[str], None] | None = None,
    ):
        self.folder, self.layout = absolute_folder(folder), layout
        layout.check_manifest(self.folder)
        self._resume, self._overwrite, self._on_wait = resume, overwrite, on_wait
        self._held, self._adding = contextlib.ExitStack(), threading.Lock()
        self.manifest = Manifest(layout, (None,) * layout.shards)

    def __enter__(self) -> Writer:
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreError(f"{self.folder}: is a file. Choose a folder.")
        if self._resume and not self._overwrite and self._is_complete():
            return self
        try:
            with self._full_disk_errors():
                self.folder.mkdir(parents=True, exist_ok=True)
                if not (self.folder / LOCK).exists():  # otherwise another process may be changing files
                    self._refuse_foreign_files()  # before a lock file is created
                self._held.enter_context(locked(self.folder, on_wait=self._on_wait))
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be written ({error.strerror}). Choose another.") from None
        try:
            with self._system_errors():
                self._inspect()
                self._check_space(sum(len(self.layout.rows_of(number)) for number in self.missing))
                self.manifest.write(self.folder)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    @property
    def missing(self) -> list[int]:
        """Numbers of missing shards, ascending."""
        return [number for number, shard in enumerate(self.manifest.shards) if shard is None]

    def write(self, number: int, tensors: dict[str, Tensor]) -> Shard:
        """Write a shard, and add it to the manifest.

        Raises:
            StoreError: If the disk is full or fails; existing shards stay, and `resume` continues from them.
        """
        with self._system_errors():
            self._check_space(len(self.layout.rows_of(number)))
            shard = write_shard(self.folder, self.layout, number, tensors)
        self.add({number: shard})
        return shard

    def add(self, shards: Mapping[int, Shard]) -> None:
        """Add shards to the manifest, after this or another process has written their files."""
        with self._system_errors(), self._adding:
            manifest = self.manifest
            for number, shard in shards.items():
                manifest = manifest.with_shard(number, shard)
            manifest.write(self.folder)
            self.manifest = manifest

    def _is_complete(self) -> bool:
        """Return True if the store is complete and has no damage."""
        manifest, _ = _read(self.folder)
        if manifest is None or not manifest.complete or manifest.layout.difference(self.layout) is not None:
            return False
        if find_damage(self.folder, manifest):
            return False
        self.manifest, self.layout = manifest, manifest.layout
        return True

    def _refuse_foreign_files(self) -> None:
        if foreign := foreign_files(self.folder):
            raise StoreError(f"{self.folder}: holds other files ({foreign[0]}). Choose an empty folder.")

    def _inspect(self) -> None:
        """Find the shards to keep, and delete all other files of earlier builds."""
        self._refuse_foreign_files()
        old, reason = _read(self.folder)
        files = _files(self.folder, old)
        exists = (self.folder / MANIFEST).exists() or any(path.suffix == ".safetensors" for path in files)
        if exists and not (self._resume or self._overwrite):
            raise StoreError(
                f"{self.folder}: holds a store. Open it, continue or repair it with `resume=True`, or replace it with "
                "`overwrite=True`."
            )
        if exists and not self._overwrite:
            self._resume_from(old, reason)
        elif exists:
            self.manifest.write(self.folder)  # before the shards of the old store are deleted
        for path in files - _used(self.folder, self.manifest):
            path.unlink(missing_ok=True)

    def _resume_from(self, manifest: Manifest | None, reason: StoreError | None) -> None:
        if isinstance(reason, LostManifest):
            warnings.warn(f"{reason} It is rebuilt completely.", stacklevel=6)
        elif reason is not None:
            raise reason
        if manifest is None:
            return
        difference = manifest.layout.difference(self.layout)
        if difference is not None:
            if not any(manifest.shards):
                return
            raise DifferentStore(
                f"{self.folder}: holds a store that differs in {difference}. Choose another folder, or replace it with "
                "`overwrite=True`.",
                difference,
            )
        self.manifest, self.layout = manifest, manifest.layout  # its shard_rows may differ
        for number, damage in find_damage(self.folder, manifest):
            warnings.warn(f"{damage} It is rebuilt.", stacklevel=6)
            self.manifest = self.manifest.with_shard(number, None)

    def _check_space(self, rows: int) -> None:
        needed = rows * self.layout.row_bytes + _SPARE
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            lack = f"{decimal(free)} are free, {decimal(needed - free)} too little"
            raise self._full(f"{decimal(needed)} are needed, {decimal(_SPARE)} of them to stay free; {lack}")

    @contextlib.contextmanager
    def _full_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._full("the disk is full") from error

    @contextlib.contextmanager
    def _system_errors(self) -> Iterator[None]:
        try:
            with self._full_disk_errors():
                yield
        except OSError as error:
            named = error.filename if isinstance(error.filename, str) else self.folder
            raise StoreError(
                f"{named}: cannot be written or read ({error.strerror or error}). {self._progress()} exist and "
                "stay. Check the disk, and continue with `resume=True`."
            ) from error

    def _full(self, what: str) -> StoreError:
        return StoreError(
            f"{self.folder}: {what}. {self._progress()} exist and stay. Free space, or use a smaller dtype or fewer "
            "views, and continue with `resume=True`."
        )

    def _progress(self) -> str:
        try:
            shards = Manifest.read(self.folder).shards
        except StoreError:  # not written yet
            shards = self.manifest.shards
        return f"{sum(shard is not None for shard in shards)} of {len(shards)} shards"


class ShardWriter(Writer):
    """Writer of the files of shards only: the `Writer` of another process has the lock, and must `add` them."""

    def __init__(self, folder: Path, layout: Layout):
        super().__init__(folder, layout)

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, shards: Mapping[int, Shard]) -> None:
        """Do nothing."""


def prune(folder: Path, *, unfinished: bool = False, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Delete the leftovers of killed builds in a store's folder (see `leftovers`); return each file with its bytes.

    `unfinished` also deletes the store if it is incomplete; `dry_run` deletes nothing.
    """
    with file_errors(folder, _TRY_AGAIN), locked(folder):
        manifest = Manifest.read(folder)
        gone = leftovers(folder, manifest)
        if unfinished and not manifest.complete:
            gone = _all_files(folder, manifest)
        sized = [(path, path.stat().st_size) for path in gone]
        if not dry_run:
            for path in gone:
                path.unlink(missing_ok=True)
    return sized


def erase(folder: Path) -> None:
    """Delete the files of a store, except those of the lock."""
    manifest, reason = _read(folder)
    if reason is not None and (folder / MANIFEST).exists() and not is_store(folder):
        raise reason
    with file_errors(folder, _TRY_AGAIN):
        for path in _all_files(folder, manifest):
            path.unlink(missing_ok=True)


def is_store(folder: Path) -> bool:
    """Return True if a folder has a store, possibly damaged; a manifest of another program is not a store."""
    _, reason = _read(folder)
    with file_errors(folder, _TRY_AGAIN):
        return not isinstance(reason, LostManifest) or (folder.is_dir() and any(map(is_shard, folder.iterdir())))


def leftovers(folder: Path, manifest: Manifest) -> list[Path]:
    """Unused files in the folder of a store: temporary files of killed builds, and shards not in the manifest."""
    with file_errors(folder, _TRY_AGAIN):
        return sorted(_files(folder, manifest) - _used(folder, manifest))


def foreign_files(folder: Path) -> list[str]:
    """Names of entries of a folder that do not belong to a store."""
    known = {*_files(folder, _read(folder)[0]), *(folder / name for name in (MANIFEST, LOCK, OWNER))}
    return sorted(path.name for path in folder.iterdir() if path not in known)


def _files(folder: Path, manifest: Manifest | None) -> set[Path]:
    """Files of builds: shards, recognised by the manifest or their header, and temporary files."""
    places = set() if manifest is None else {path_of(folder, number) for number in range(manifest.layout.shards)}

    def of_store(path: Path) -> bool:
        final = partial_of(path.name)
        if final is not None:
            return path.is_file() and (final in (MANIFEST, OWNER) or is_shard_name(final))
        return path.is_file() and (path in places or is_shard(path))

    return set(filter(of_store, folder.iterdir()))


def _used(folder: Path, manifest: Manifest) -> set[Path]:
    return {path_of(folder, number) for number, shard in enumerate(manifest.shards) if shard is not None}


def _all_files(folder: Path, manifest: Manifest | None) -> list[Path]:
    return [*sorted(_files(folder, manifest)), folder / MANIFEST]  # last: without it the others are foreign files


def _read(folder: Path) -> tuple[Manifest | None, StoreError | None]:
    """Return the manifest of a folder, or the error that reading it raises."""
    try:
        return Manifest.read(folder), None
    except StoreError as error:
        return None, error
