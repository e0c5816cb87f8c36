"""Features that are extracted anew for each epoch, with transforms drawn anew, while the epoch before is trained on."""

from __future__ import annotations

import atexit
import shutil
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..store import Store
from ..store.lock import locked
from .build import Encoder, Source, write_store


class Refresher:
    """A folder with a store for the epoch that is trained on, and one that is being made for the next.

    Epoch e is view e of every image: the transforms of an epoch are the same however often it is made.

    Args:
        folder: Where.
        source: What of.
        encode: Images to features.
        progress: As `write_store` takes it, for the first epoch that is asked for.

    Raises:
        StoreError: If someone else is at work in the folder.
    """

    def __init__(self, folder: Path, source: Source, encode: Encoder, progress: Callable[[int], None] | bool):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._source, self._encode, self._progress = folder, source, encode, progress
        self._lock = locked(folder)
        self._lock.__enter__()
        self._thread: threading.Thread | None = None
        self._making: int | None = None
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        atexit.register(_close, weakref.ref(self))  # a process that ends while it computes is aborted

    def first(self) -> int:
        """The earliest epoch that an earlier run has left, or 0."""
        return min((int(path.name.removeprefix("epoch-")) for path in self._folder.glob("epoch-*")), default=0)

    def clear(self) -> None:
        """Delete what earlier runs have left."""
        self._keep()

    def store(self, epoch: int) -> Store:
        """The features of an epoch, whose successor is begun; those of others are deleted."""
        if self._making != epoch:
            self._stop()
        self._join()
        self._keep(epoch, epoch + 1)
        if self._making != epoch:
            self._write(self._source, epoch, self._progress)
        self._progress = False
        store = Store(self._path(epoch))
        self._making = epoch + 1
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, name="skipkernels extraction", daemon=True)
        self._thread.start()
        return store

    def close(self) -> None:
        """Stop what is being made, which stays for another time, and let go of the folder."""
        self._stop()
        self._lock.__exit__(None, None, None)

    def _path(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch:05d}"

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
        keep = set(map(self._path, epochs))
        for path in self._folder.glob("epoch-*"):
            if path not in keep:
                shutil.rmtree(path)

    def _run(self) -> None:
        assert self._making is not None
        # Transforms draw from the generators of a process, which are this one's to train with.
        source = replace(self._source, workers=max(self._source.workers, 1))
        try:
            self._write(source, self._making, self._go_on)
        except BaseException as error:
            self._error = error

    def _go_on(self, images: int) -> None:
        if self._stopped.is_set():
            raise InterruptedError("closed")

    def _write(self, source: Source, epoch: int, progress: Callable[[int], None] | bool) -> None:
        source = replace(source, first_view=epoch)
        write_store(self._path(epoch), source, self._encode, resume=True, overwrite=False, progress=progress)


def _close(refresher: weakref.ref[Refresher]) -> None:
    found = refresher()
    if found is not None:
        found.close()
