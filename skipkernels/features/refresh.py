"""Features with a new view of every image for each epoch, computed during the epoch before."""

from __future__ import annotations

import atexit
import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..folders import LOCK, locked
from ..store import Store, StoreError, disk_errors, erase, foreign_files, is_store, refuse_foreign_files
from .builder import BuildConfig, Encoder, write_store


def clear_epochs(folder: Path, *, overwrite: bool) -> None:
    """Delete the stores of epochs in a folder, before another store is built in it."""
    if not (folder.is_dir() and any(folder.glob("epoch-*"))):
        return
    with _locked_folder(folder):
        epochs = _epochs_in(folder)
        if not overwrite:
            raise StoreError(
                f'{folder}: holds the features of epochs ({_name(min(epochs))}), built with refresh="epoch". Choose '
                "another folder, or replace them with `overwrite=True`."
            )
        for epoch in epochs:
            _remove(folder / _name(epoch))


class EpochStores:
    """Folder with a store for the current epoch, and one in progress for the next.

    Epoch e is view e of every image, so that an epoch that is built again has the same random transforms.
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
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(_locked_folder(folder))
        try:
            self._present = _epochs_in(folder)
            if overwrite:
                erase(folder)
                self._delete_all_but()
            elif is_store(folder):
                raise StoreError(
                    f"{folder}: holds a store for all epochs. Choose another folder, or replace it with "
                    "`overwrite=True`."
                )
        except BaseException:
            self._lock.close()
            raise
        self.first = min(self._present, default=0)  # Earliest epoch found in the folder, or 0
        self._labels: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._building: int | None = None
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._loading = threading.Event()
        self._closed = False
        atexit.register(_close, weakref.ref(self))  # the interpreter aborts if it ends while the thread computes

    def check_open(self) -> None:
        """Raise a StoreError after `close`, when another process may use the folder."""
        if self._closed:
            raise StoreError(f"{self._folder}: this FeatureCache was closed. Build it again to continue.")

    def store(self, epoch: int) -> Store:
        """Return the store of an epoch, start to build that of the next epoch, and delete all other stores."""
        if self._building != epoch:
            self._stop()
        self._join()
        self._delete_all_but(epoch, epoch + 1)
        self._present |= {epoch, epoch + 1}
        if self._building != epoch:
            self._write(self._config, epoch, self._progress)
        self._progress = False
        store = Store(self._folder / _name(epoch))
        labels = store.labels()
        if self._labels is not None and not labels.equal(self._labels):
            raise StoreError(
                f"{self._folder}: epoch {epoch} has other labels than the first: the dataset's order or labels change "
                "from one iteration to the next. Give a map-style dataset with fixed labels."
            )
        self._labels = labels
        self._building = epoch + 1
        self._stopped.clear()
        self._loading.clear()
        self._thread = threading.Thread(target=self._run, name="skipkernels extraction", daemon=True)
        self._thread.start()
        # Worker processes must be forked before training continues: a process that is forked while another thread
        # holds a lock of PyTorch would wait forever.
        self._loading.wait()
        return store

    def close(self) -> None:
        """Stop the build in progress, which can be resumed, and release the folder."""
        self._closed = True
        self._stop()
        self._lock.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error, self._building = self._error, None, None
            raise error

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = self._error = self._building = None

    def _delete_all_but(self, *epochs: int) -> None:
        for epoch in self._present - set(epochs):
            _remove(self._folder / _name(epoch))
        self._present &= set(epochs)

    def _run(self) -> None:
        assert self._building is not None
        # Load in another process, so that transforms do not seed the generators that training uses here.
        config = replace(self._config, workers=max(self._config.workers, 1))
        try:
            self._write(config, self._building, self._check_stopped)
        except BaseException as error:
            self._error = error
        finally:
            self._loading.set()

    def _check_stopped(self, images: int) -> None:
        if self._stopped.is_set():
            raise InterruptedError("closed")

    def _write(self, config: BuildConfig, epoch: int, progress: Callable[[int], None] | bool) -> None:
        config = replace(config, first_view=epoch)
        folder = self._folder / _name(epoch)
        write_store(
            folder, config, self._encode, resume=True, overwrite=False, progress=progress, on_loading=self._loading.set
        )


def _name(epoch: int) -> str:
    return f"epoch-{epoch:05d}"


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file. Choose a folder.")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / LOCK).exists():
            _epochs_in(folder)  # before a lock file is created in it
        with locked(folder):
            yield


def _epochs_in(folder: Path) -> set[int]:
    """Numbers of the epochs with a store in a folder; raise a StoreError if there are foreign files."""
    epochs = set()
    for name in foreign_files(folder):
        path = folder / name
        if not re.fullmatch("epoch-[0-9]{5,}", name) or path.is_symlink() or not path.is_dir():
            raise StoreError(f"{folder}: holds other files ({name}). Choose an empty folder.")
        refuse_foreign_files(path)
        epochs.add(int(name.removeprefix("epoch-")))
    return epochs


def _remove(epoch: Path) -> None:
    if epoch.is_dir():
        erase(epoch)
        with contextlib.suppress(OSError):  # foreign files were added
            (epoch / LOCK).unlink(missing_ok=True)
            epoch.rmdir()


def _close(stores: weakref.ref[EpochStores]) -> None:
    found = stores()
    if found is not None:
        found.close()
