"""Features that are extracted anew for each epoch, with transforms drawn anew, while the epoch before is trained on."""

from __future__ import annotations

import atexit
import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..store import MANIFEST, Store, StoreError, file_errors
from ..store.lock import LOCK, OWNER, locked
from ..store.writer import erase, foreign_files, is_store
from .builder import Encoder, Source, write_store


def make_room(folder: Path, *, overwrite: bool) -> None:
    """For a store in a folder that may hold those of epochs: delete them if that is wanted.

    Raises:
        StoreError: If it is not, or the folder holds something else, too: nothing was deleted.
    """
    if not (folder.is_dir() and any(folder.glob("epoch-*"))):
        return
    with _held(folder):
        epochs = _epochs_in(folder)
        if not overwrite:
            raise StoreError(
                f'{folder}: holds the features of epochs ({_name(min(epochs))}), made with refresh="epoch". Choose '
                "another folder, or replace them with overwrite=True (--overwrite)."
            )
        for epoch in epochs:
            _remove(folder / _name(epoch))


class Refresher:
    """A folder with a store for the epoch that is trained on, and one that is being made for the next.

    Epoch e is view e of every image: the transforms of an epoch are the same however often it is made.

    Args:
        folder: Where.
        source: What of.
        encode: Images to features.
        progress: As `write_store` takes it, for the first epoch that is asked for.
        overwrite: Delete what is there: what an earlier run has left, or another store.

    Attributes:
        first: The earliest epoch that an earlier run has left, or 0.

    Raises:
        StoreError: If someone else is at work in the folder, or it holds something else: nothing was deleted.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        encode: Encoder,
        progress: Callable[[int], None] | bool,
        *,
        overwrite: bool = False,
    ):
        self._folder, self._source, self._encode, self._progress = folder, source, encode, progress
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(_held(folder))
        try:
            self._there = _epochs_in(folder)
            if overwrite:
                erase(folder)
                self._keep()
            elif is_store(folder):
                raise StoreError(
                    f"{folder}: holds a store that serves every epoch. Choose another folder, or replace it with "
                    "overwrite=True."
                )
        except BaseException:
            self._lock.close()
            raise
        self.first = min(self._there, default=0)
        self._thread: threading.Thread | None = None
        self._making: int | None = None
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._loading = threading.Event()
        self._closed = False
        atexit.register(_close, weakref.ref(self))  # a process that ends while it computes is aborted

    def check_open(self) -> None:
        """Refuse to go on after `close`: the folder may be someone else's by now.

        Raises:
            StoreError: If it was closed.
        """
        if self._closed:
            raise StoreError(f"{self._folder}: this FeatureCache was closed. Build it again to go on with its epochs.")

    def store(self, epoch: int) -> Store:
        """The features of an epoch, whose successor is begun; those of others are deleted."""
        if self._making != epoch:
            self._stop()
        self._join()
        self._keep(epoch, epoch + 1)
        self._there |= {epoch, epoch + 1}
        if self._making != epoch:
            self._write(self._source, epoch, self._progress)
        self._progress = False
        store = Store(self._folder / _name(epoch))
        self._source = replace(self._source, labels=store.labels())  # the other epochs have to have these
        self._making = epoch + 1
        self._stopped.clear()
        self._loading.clear()
        self._thread = threading.Thread(target=self._run, name="skipkernels extraction", daemon=True)
        self._thread.start()
        # A process that is forked while this thread holds a lock of PyTorch's, as it does in training, waits forever.
        self._loading.wait()
        return store

    def close(self) -> None:
        """Stop what is being made, which stays for another time, and let go of the folder."""
        self._closed = True
        self._stop()
        self._lock.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error, self._making = self._error, None, None
            raise error

    def _stop(self) -> None:
        """Break off what is being made."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = self._error = self._making = None

    def _keep(self, *epochs: int) -> None:
        for epoch in self._there - set(epochs):
            _remove(self._folder / _name(epoch))
        self._there &= set(epochs)

    def _run(self) -> None:
        assert self._making is not None
        # Transforms draw from the generators of a process, which are this one's to train with.
        source = replace(self._source, workers=max(self._source.workers, 1))
        try:
            self._write(source, self._making, self._go_on)
        except BaseException as error:
            self._error = error
        finally:
            self._loading.set()

    def _go_on(self, images: int) -> None:
        if self._stopped.is_set():
            raise InterruptedError("closed")

    def _write(self, source: Source, epoch: int, progress: Callable[[int], None] | bool) -> None:
        source = replace(source, first_view=epoch)
        folder = self._folder / _name(epoch)
        write_store(
            folder, source, self._encode, resume=True, overwrite=False, progress=progress, on_loading=self._loading.set
        )


def _name(epoch: int) -> str:
    return f"epoch-{epoch:05d}"


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make a folder, and hold its lock."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: a file; choose a folder.")
    with contextlib.ExitStack() as lock:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / LOCK).exists():
                _epochs_in(folder)  # what is not ours gets no lock, either
            lock.enter_context(locked(folder))
        except OSError as error:
            raise StoreError(f"{folder}: can't be written to ({error.strerror}); choose another.") from None
        with file_errors(folder, "Look at the disk, and try again."):
            yield


def _epochs_in(folder: Path) -> set[int]:
    """The epochs that an earlier run has left.

    Raises:
        StoreError: If there is anything else besides them and a store.
    """
    epochs = set()
    for name in _others(folder):
        path = folder / name
        if not re.fullmatch("epoch-[0-9]{5,}", name) or path.is_symlink() or not path.is_dir():
            raise StoreError(f"{folder}: holds other things ({name}); choose an empty folder.")
        if others := _others(path):
            raise StoreError(f"{path}: holds other things ({others[0]}); choose another folder.")
        epochs.add(int(name.removeprefix("epoch-")))
    return epochs


def _others(folder: Path) -> list[str]:
    """What is not a store's, and a manifest that may be someone else's."""
    foreign = (folder / MANIFEST).exists() and not is_store(folder)
    return foreign_files(folder) + [MANIFEST] * foreign


def _remove(epoch: Path) -> None:
    """Delete the store of an epoch."""
    if epoch.is_dir():
        erase(epoch)
        with file_errors(epoch, "Delete it, and go on with resume=True (--resume)."):
            for name in (OWNER, LOCK):
                (epoch / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what has come to be there since is not ours
            epoch.rmdir()


def _close(refresher: weakref.ref[Refresher]) -> None:
    found = refresher()
    if found is not None:
        found.close()
