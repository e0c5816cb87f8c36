"""Building a store: shard by shard, going on where an earlier build was killed."""

from __future__ import annotations

import contextlib
import errno
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from rich.filesize import decimal
from torch import Tensor

from .atomic import partial_of
from .lock import LOCK, OWNER, locked
from .manifest import (
    MANIFEST,
    DifferentStore,
    Layout,
    LostManifest,
    Manifest,
    StoreError,
    file_errors,
    usable_folder,
)
from .shards import damages, is_shard, is_shard_name, path_of, write_shard

_AGAIN = "Look at the disk, and try again."
_SPARE = 1 << 24  # bytes that stay free on the disk: manifests, and what else a system needs to go on


class Writer:
    """A folder that is being filled. Only one at a time has it.

    Used as a context: entering takes the lock and looks at what is there. What was written is whole at every moment.
    To resume a store that is complete and sound takes no lock and writes nothing: its disk may be read-only.

    Args:
        folder: Where; made if it is not there.
        layout: What is to be written.
        resume: Keep shards that are there and sound; make the others.
        overwrite: Begin anew, whatever store is there.
        on_bytes: Told how many bytes of shards that are there were read to check them.
        on_wait: Told who is at work in the folder, who is then waited for; None: that is an error.

    Raises:
        DifferentStore: On entering, if the folder has another store.
        StoreError: On entering, if the folder has other things or a store of a newer format, someone else is at work in
            it, or the disk is too small.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp(), "store")
        >>> layout = Layout(3, (1, 2), "fp32", "fp32", 2, False, {"made of": "threes"}, {})
        >>> with Writer(folder, layout) as writer:
        ...     for number in writer.missing:
        ...         writer.write(number, {"rows": torch.full((len(layout.rows_of(number)), 1, 2), 3.0)})
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
        on_bytes: Callable[[int], None] = lambda count: None,
        on_wait: Callable[[str], None] | None = None,
    ):
        self.folder, self.layout = usable_folder(folder), layout
        layout.check_manifest(self.folder)
        self._resume, self._overwrite, self._on_bytes, self._on_wait = resume, overwrite, on_bytes, on_wait
        self._held = contextlib.ExitStack()
        self.manifest = Manifest(layout, (None,) * layout.shards)

    def __enter__(self) -> Writer:
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreError(f"{self.folder}: a file; choose a folder.")
        if self._resume and not self._overwrite and self._is_done():
            return self
        try:
            with self._disk_may_be_full():
                self.folder.mkdir(parents=True, exist_ok=True)
                if not (self.folder / LOCK).exists():  # else someone may be at work, whose files come and go
                    self._refuse_strangers()  # before there is a lock in it
                self._held.enter_context(locked(self.folder, on_wait=self._on_wait))
        except OSError as error:
            raise StoreError(f"{self.folder}: can't be written to ({error.strerror}); choose another.") from None
        try:
            with self._failures_told():
                self._look()
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
        """Shards that have to be made, in order."""
        return [number for number, shard in enumerate(self.manifest.shards) if shard is None]

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write a shard, and say in the manifest that it is there.

        Raises:
            StoreError: If the disk is full or fails: what is there stays, and `resume` goes on from it.
        """
        with self._failures_told():
            self._check_space(len(self.layout.rows_of(number)))
            shard = write_shard(self.folder, self.layout, number, tensors)
            manifest = self.manifest.with_shard(number, shard)
            manifest.write(self.folder)
        self.manifest = manifest

    def _is_done(self) -> bool:
        """Whether the store is there, complete and sound."""
        manifest, _ = _read(self.folder)
        if manifest is None or not manifest.complete or manifest.layout.difference(self.layout) is not None:
            return False
        if damages(self.folder, manifest, self._on_bytes):
            return False
        self.manifest, self.layout = manifest, manifest.layout
        return True

    def _refuse_strangers(self) -> None:
        if others := strangers(self.folder):
            raise StoreError(f"{self.folder}: holds other things ({others[0]}); choose an empty folder.")

    def _look(self) -> None:
        """At what is there: nothing, what an earlier build left, or something else."""
        self._refuse_strangers()
        old, reason = _read(self.folder)
        ours = _files(self.folder, old)
        there = (self.folder / MANIFEST).exists() or any(path.suffix == ".safetensors" for path in ours)
        if there and not (self._resume or self._overwrite):
            raise StoreError(
                f"{self.folder}: holds a store. Open it; or complete and mend it with resume=True (--resume), or "
                "replace it with overwrite=True (--overwrite)."
            )
        if there and not self._overwrite:
            self._take_up(old, reason)
        elif there:
            self.manifest.write(self.folder)  # before the shards of the old one go
        for path in ours - _used(self.folder, self.manifest):
            path.unlink(missing_ok=True)

    def _take_up(self, manifest: Manifest | None, reason: StoreError | None) -> None:
        if isinstance(reason, LostManifest):
            warnings.warn(f"{reason} All of it is made again.", stacklevel=6)
        elif reason is not None:
            raise reason
        if manifest is None:
            return
        difference = manifest.layout.difference(self.layout)
        if difference is not None:
            if not any(manifest.shards):
                return  # nothing was made of it yet
            raise DifferentStore(
                f"{self.folder}: holds a store that differs in {difference}. Choose another folder, or replace it with "
                "overwrite=True (--overwrite).",
                difference,
            )
        self.manifest, self.layout = manifest, manifest.layout  # whose shards may have another number of rows
        for number, damage in damages(self.folder, manifest, self._on_bytes):
            warnings.warn(f"{damage} It is made again.", stacklevel=6)
            self.manifest = self.manifest.with_shard(number, None)

    def _check_space(self, rows: int) -> None:
        needed = rows * self.layout.row_bytes + _SPARE
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            lack = f"{decimal(free)} are free, {decimal(needed - free)} too little"
            raise self._full(f"{decimal(needed)} are needed, of which {decimal(_SPARE)} stay spare; {lack}")

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._full("the disk is full") from error

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            with self._disk_may_be_full():
                yield
        except OSError as error:
            named = error.filename if isinstance(error.filename, str) else self.folder
            raise StoreError(
                f"{named}: can't be written or read ({error.strerror or error}). {self._progress()} are there and "
                "stay; look at the disk, and go on with resume=True (--resume)."
            ) from error

    def _full(self, what: str) -> StoreError:
        return StoreError(
            f"{self.folder}: {what}. {self._progress()} are there and stay; make room, or use a smaller dtype or fewer "
            "views, and go on with resume=True (--resume)."
        )

    def _progress(self) -> str:
        try:
            shards = Manifest.read(self.folder).shards
        except StoreError:  # it has not come that far
            shards = self.manifest.shards
        return f"{sum(shard is not None for shard in shards)} of {len(shards)} shards"


def prune(folder: Path, *, unfinished: bool = False, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Delete what is in a store's folder and of no use to it: of builds that were killed, shards that nobody lists.

    Args:
        folder: Of a store.
        unfinished: Delete the store, too, if it is incomplete.
        dry_run: Only say what would go.

    Returns:
        Each file, with the bytes it takes.

    Raises:
        StoreError: If someone is at work in the folder, or its manifest cannot be read: nothing is known of it then.
    """
    with file_errors(folder, _AGAIN), locked(folder):
        manifest = Manifest.read(folder)
        gone = leftovers(folder, manifest)
        if unfinished and not manifest.complete:
            gone = _all_files(folder, manifest)
        sized = [(path, path.stat().st_size) for path in gone]
        for path, _ in [] if dry_run else sized:
            path.unlink(missing_ok=True)
    return sized


def erase(folder: Path) -> None:
    """Delete a store's files, and nothing else; its lock stays with whoever holds it.

    Raises:
        StoreError: If there is a manifest that is no store's: nothing was deleted.
    """
    manifest, reason = _read(folder)
    if reason is not None and (folder / MANIFEST).exists() and not is_store(folder):
        raise reason
    with file_errors(folder, _AGAIN):
        for path in _all_files(folder, manifest):
            path.unlink(missing_ok=True)


def is_store(folder: Path) -> bool:
    """Whether a folder has a store, be it damaged, and not something else with a file of that name."""
    _, reason = _read(folder)
    with file_errors(folder, _AGAIN):
        return not isinstance(reason, LostManifest) or (folder.is_dir() and any(map(is_shard, folder.iterdir())))


def leftovers(folder: Path, manifest: Manifest) -> list[Path]:
    """Files in a store's folder that are of no use to it: of a build that was killed, or shards that nobody lists."""
    with file_errors(folder, _AGAIN):
        return sorted(_files(folder, manifest) - _used(folder, manifest))


def strangers(folder: Path) -> list[str]:
    """Names of what is in a folder and is not a store's."""
    known = {*_files(folder, _read(folder)[0]), *(folder / name for name in (MANIFEST, LOCK, OWNER))}
    return sorted(path.name for path in folder.iterdir() if path not in known)


def _files(folder: Path, manifest: Manifest | None) -> set[Path]:
    """What builds wrote: shards that the manifest has a place for or whose header says so, and what is not finished."""
    places = set() if manifest is None else {path_of(folder, number) for number in range(manifest.layout.shards)}

    def ours(path: Path) -> bool:
        whole = partial_of(path.name)
        if whole is not None:
            return path.is_file() and (whole in (MANIFEST, OWNER) or is_shard_name(whole))
        return path.is_file() and (path in places or is_shard(path))

    return set(filter(ours, folder.iterdir()))


def _used(folder: Path, manifest: Manifest) -> set[Path]:
    return {path_of(folder, number) for number, shard in enumerate(manifest.shards) if shard is not None}


def _all_files(folder: Path, manifest: Manifest | None) -> list[Path]:
    return [*sorted(_files(folder, manifest)), folder / MANIFEST]  # last what tells that the others are a store's


def _read(folder: Path) -> tuple[Manifest | None, StoreError | None]:
    """The manifest of a folder, or why there is none."""
    try:
        return Manifest.read(folder), None
    except StoreError as error:
        return None, error
