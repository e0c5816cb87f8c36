"""Building a store: shard by shard, going on where an earlier build was killed."""

from __future__ import annotations

import contextlib
import errno
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from torch import Tensor

from .lock import LOCK, OWNER, locked
from .manifest import MANIFEST, Layout, Manifest, StoreError, UnreadableManifest
from .shards import damages, path_of, write_shard

_SPARE = 1 << 24  # bytes that stay free on the disk: manifests, and what else a system needs to go on


class Writer:
    """A folder that is being filled. Only one at a time has it.

    Used as a context: entering takes the lock and looks at what is there. What was written is whole at every moment.

    Args:
        folder: Where; made if it is not there.
        layout: What is to be written.
        resume: Keep shards that are there and sound; make the others.
        overwrite: Begin anew, whatever store is there.
        on_bytes: Told how many bytes of shards that are there were read to check them.

    Raises:
        StoreError: On entering, if the folder has another store, someone else is at work in it, or the disk is too
            small.

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
    ):
        self.folder, self.layout = folder, layout
        self._resume, self._overwrite, self._on_bytes = resume, overwrite, on_bytes
        self._held = contextlib.ExitStack()
        self.manifest = Manifest(layout, (None,) * layout.shards)

    def __enter__(self) -> Writer:
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreError(f"{self.folder}: a file; choose a folder.")
        try:
            with self._disk_may_be_full():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._held.enter_context(locked(self.folder))
        except OSError as error:
            raise StoreError(f"{self.folder}: can't be written to ({error.strerror}); choose another.") from None
        try:
            with self._disk_may_be_full():
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
            StoreError: If the disk is full: what is there stays, and `resume` goes on from it.
        """
        self._check_space(len(self.layout.rows_of(number)))
        with self._disk_may_be_full():
            shard = write_shard(self.folder, self.layout, number, tensors)
            manifest = self.manifest.with_shard(number, shard)
            manifest.write(self.folder)
        self.manifest = manifest

    def _look(self) -> None:
        """At what is there: nothing, what an earlier build left, or something else."""
        there = (self.folder / MANIFEST).exists()
        known = {path for path in self.folder.iterdir() if _is_ours(path)}
        if not there:  # no build leaves shards without a manifest: these are someone else's
            known = {path for path in known if path.suffix == ".partial"}
        known |= {self.folder / name for name in (MANIFEST, LOCK, OWNER)}
        others = sorted(path.name for path in self.folder.iterdir() if path not in known)
        if others:
            raise StoreError(f"{self.folder}: holds other things ({others[0]}); choose an empty folder.")
        if there and not (self._resume or self._overwrite):
            raise StoreError(
                f"{self.folder}: holds a store. Open it; or complete and mend it with resume=True (--resume), or "
                "replace it with overwrite=True (--overwrite)."
            )
        if there and not self._overwrite:
            self._take_up()
        elif there:
            self.manifest.write(self.folder)  # before the shards of the old one go
        for path in leftovers(self.folder, self.manifest):
            path.unlink(missing_ok=True)

    def _take_up(self) -> None:
        try:
            manifest = Manifest.read(self.folder)
        except UnreadableManifest as error:
            warnings.warn(f"{error} All of it is made again.", stacklevel=6)
            return
        difference = manifest.layout.difference(self.layout)
        if difference is not None:
            if not any(manifest.shards):
                return  # nothing was made of it yet
            raise StoreError(
                f"{self.folder}: holds a store that differs in {difference}. Choose another folder, or replace it with "
                "overwrite=True (--overwrite)."
            )
        self.manifest, self.layout = manifest, manifest.layout  # whose shards may have another number of rows
        for number, reason in damages(self.folder, manifest, self._on_bytes):
            warnings.warn(f"{reason} It is made again.", stacklevel=6)
            self.manifest = self.manifest.with_shard(number, None)

    def _check_space(self, rows: int) -> None:
        needed = rows * self.layout.row_bytes + _SPARE
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._full(f"{needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free")

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._full("the disk is full") from error

    def _full(self, what: str) -> StoreError:
        try:
            shards = Manifest.read(self.folder).shards
        except StoreError:  # it has not come that far
            shards = self.manifest.shards
        done = sum(shard is not None for shard in shards)
        return StoreError(
            f"{self.folder}: {what}. {done} of {len(shards)} shards are there and stay; make room, or use a smaller "
            "dtype or fewer views, and go on with resume=True (--resume)."
        )


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
    with locked(folder):
        manifest = Manifest.read(folder)
        gone = leftovers(folder, manifest)
        if unfinished and not manifest.complete:
            gone = [*leftovers(folder, None), folder / MANIFEST]  # last what tells that the others are a store's
        sized = [(path, path.stat().st_size) for path in gone]
        for path, _ in [] if dry_run else sized:
            path.unlink(missing_ok=True)
    return sized


def leftovers(folder: Path, manifest: Manifest | None) -> list[Path]:
    """Files in a store's folder that belong to no store: of a build that was killed, or shards that nobody lists."""
    used = set() if manifest is None else {path_of(folder, n) for n, shard in enumerate(manifest.shards) if shard}
    return sorted(path for path in folder.iterdir() if _is_ours(path) and path not in used)


def _is_ours(path: Path) -> bool:
    shard = path.suffix == ".safetensors" and path.stem.isdecimal()
    return path.is_file() and (shard or (path.name.startswith(".") and path.suffix == ".partial"))
