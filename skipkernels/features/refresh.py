"""`FeatureCache.build(refresh="epoch")`: features of a new view of every image, computed when an epoch begins.

A folder `epoch-00000`, `epoch-00001`, … has the store of that epoch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..folders import LOCK, locked
from ..store import Store, StoreError, check_folder, disk_errors, erase, is_store
from .builder import BuildConfig, Encoder, write_store


def clear_epochs(folder: Path, *, overwrite: bool) -> None:
    """Delete the stores of epochs in a folder, before another store is built in it."""
    # Without a lock file, the folder is new, or folders in it with such names are not of this package.
    epochs = _epochs_in(folder) if (folder / LOCK).exists() else {}
    if epochs and not overwrite:
        raise StoreError(
            f'{folder}: holds the features of epochs, built with refresh="epoch". Choose another folder, or replace '
            "them with `overwrite=True`."
        )
    if epochs:
        with disk_errors(folder), locked(folder):
            _delete(epochs.values())


class EpochStores:
    """Folder with the store of one epoch at a time, locked by this process until `close`.

    The store of epoch e has view e of every image. Random transforms are seeded by the view, so building an epoch again
    gives the same features.
    """

    def __init__(
        self,
        folder: Path,
        config: BuildConfig,
        encode: Encoder,
        progress: Callable[[int], None] | bool,
        *,
        overwrite: bool = False,
    ):
        self._folder, self._config, self._encode, self._progress = folder, config, encode, progress
        self._labels: Tensor | None = None
        with disk_errors(folder), contextlib.ExitStack() as stack:  # an error here releases the lock
            check_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            if is_store(folder) and not overwrite:
                raise StoreError(
                    f"{folder}: holds a store for all epochs. Choose another folder, or replace it with "
                    "`overwrite=True`."
                )
            if overwrite:
                erase(folder)
                _delete(_epochs_in(folder).values())
            self._lock: contextlib.ExitStack | None = stack.pop_all()
        self.first = min(_epochs_in(folder), default=0)  # epoch of the store in the folder, or 0

    def store(self, epoch: int) -> Store:
        """Build or resume the store of an epoch, and delete all others."""
        if self._lock is None:
            raise StoreError(f"{self._folder}: this FeatureCache was closed. Build it again to continue.")
        epochs = _epochs_in(self._folder)
        folder = epochs.pop(epoch, self._folder / f"epoch-{epoch:05d}")
        _delete(epochs.values())
        config = replace(self._config, first_view=epoch)
        write_store(folder, config, self._encode, resume=True, overwrite=False, progress=self._progress)
        self._progress = False  # from the second epoch on: training shows its own progress
        store = Store(folder)
        labels = store.labels()
        if self._labels is not None and not labels.equal(self._labels):
            raise StoreError(
                f"{self._folder}: epoch {epoch} has other labels than the first: the dataset's order or labels change "
                "from one iteration to the next. Give a map-style dataset with fixed labels."
            )
        self._labels = labels
        return store

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None


def _epochs_in(folder: Path) -> dict[int, Path]:
    """Folders of the stores of epochs, by epoch."""
    found = {path: re.fullmatch("epoch-([0-9]{5,})", path.name) for path in folder.iterdir() if path.is_dir()}
    return {int(name[1]): path for path, name in found.items() if name is not None}


def _delete(stores: Iterable[Path]) -> None:
    """Delete stores and their folders. A folder with files that are not of a store stays."""
    for store in stores:
        erase(store)
        with contextlib.suppress(OSError):  # the folder is not empty
            (store / LOCK).unlink(missing_ok=True)
            store.rmdir()
