"""Builds that fail or are killed at any write, flush or rename: the store stays consistent, and resume completes it.

`tests/features/test_crash.py` kills real processes.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from skipkernels.store import Store, StoreError, Writer, erase, leftovers, partial_of, prune
from skipkernels.store.lock import OWNER
from skipkernels.store.manifest import Manifest
from tests.store.stores import contents, fill, layout_of, listed_shards, truth_of

pytestmark = pytest.mark.filterwarnings("error")  # no shard is damaged by a fault

LAYOUT = layout_of("int8")
WHERE = {"write": [(Path, "open")], "fsync": [(os, "fsync")], "replace": [(os, "replace")]}
CLEANING = [(Path, "unlink")]
OWNERS = {"write": 1, "fsync": 2, "replace": 1}  # calls that write the owner of the lock; errors there are ignored


class Killed(BaseException):
    """A kill: no later call has an effect."""


OPEN = Path.open


class Half:
    """A file that raises an error in the middle of the first write."""

    def __init__(self, file: BinaryIO, error: BaseException):
        self._file, self._error = file, error

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        raise self._error


class Fault:
    """Makes call number `at` of some functions raise an error, in the middle of a write.

    After a kill all later calls raise it, too, including those that would clean up.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str, at: int, error: BaseException):
        self.at, self.error, self.calls, self.raised = at, error, 0, False
        for name, functions in {**WHERE, "clean": CLEANING}.items():
            for owner, function in functions:
                monkeypatch.setattr(owner, function, self._failing(getattr(owner, function), name == where))

    def _failing(self, function, counted):
        def call(*arguments, **options):
            if self.raised and isinstance(self.error, Killed):
                raise self.error
            if counted and (function is not OPEN or "xb" in arguments):
                self.calls += 1
                if self.calls == self.at + 1:
                    self.raised = True
                    if function is OPEN:
                        return Half(function(*arguments, **options), self.error)
                    raise self.error
            return function(*arguments, **options)

        return call


def interrupted(folder: Path, where: str, at: int, error: BaseException) -> BaseException | None:
    """Error of a build with a fault there; None if it completes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        fault = Fault(monkeypatch, where, at, error)
        try:
            fill(folder, LAYOUT)
        except (OSError, StoreError, Killed) as raised:
            assert fault.raised
            return raised.with_traceback(None)
    assert fault.raised == (at < OWNERS[where])
    return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Files of an uninterrupted build."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    fill(folder, LAYOUT)
    return contents(folder)


ERRORS = {
    "error": lambda: OSError(errno.EIO, "Input/output error"),
    "full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "killed": lambda: Killed(),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", WHERE)
def test_build_resumes_after_any_fault(tmp_path, whole, where, error):
    progress = []
    for at in itertools.count():
        folder = tmp_path / f"{at}"
        raised = interrupted(folder, where, at, ERRORS[error]())
        if raised is None:
            assert contents(folder) == whole
            if at < OWNERS[where]:
                continue
            break
        left = [path.name for path in folder.iterdir() if partial_of(path.name)]
        assert len(left) == (error == "killed" and not _renamed(where, at)), "only a kill leaves a temporary file"
        listed = listed_shards(folder)
        assert isinstance(raised, (StoreError, Killed)), "never an OSError"
        if error == "error":
            assert re.search(f"{folder}.*: cannot be written .*Input/output error.*stay|Choose another", str(raised))
        if error == "full":
            assert isinstance(raised, StoreError) and "resume=True" in str(raised)
            assert re.search(f"the disk is full. {listed} of 5 shards exist and stay. Free space", str(raised))
        try:
            assert Store(folder, verify=True).gather(torch.arange(LAYOUT.rows)).equal(truth_of(LAYOUT)) and listed == 5
        except StoreError as reason:
            assert str(folder) in str(reason) and listed < 5
        assert len(fill(folder, LAYOUT, resume=True)) == 5 - listed
        assert contents(folder) == whole
        progress.append(listed)
    assert progress == sorted(progress) and set(progress) >= set(range(5)), "faults at every stage"


def _renamed(where: str, at: int) -> bool:
    """Return True if a call comes after a rename: every other flush is of the folder."""
    return where == "fsync" and at % 2 == 1


def test_kill_leaves_the_owner_file_and_releases_the_lock(tmp_path):
    assert isinstance(interrupted(tmp_path, "replace", 5, Killed()), Killed)
    assert (tmp_path / OWNER).exists()
    fill(tmp_path, LAYOUT, resume=True)
    assert not (tmp_path / OWNER).exists()


def test_lock_is_released_if_the_owner_file_cannot_be_deleted(tmp_path, monkeypatch):
    writer = Writer(tmp_path, LAYOUT)
    with monkeypatch.context() as patch, writer:
        patch.setattr(Path, "unlink", _read_only)
        with pytest.raises(StoreError, match="Read-only file system. Complete shards stay"):
            writer.__exit__(None, None, None)
    with Writer(tmp_path, LAYOUT, resume=True) as again:
        assert again.missing == [0, 1, 2, 3, 4]


def _read_only(*arguments, **options):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENOLCK])
@pytest.mark.parametrize("owner, function", [(fcntl, "flock"), (os, "scandir"), (os, "listdir"), (os, "fsync")])
def test_system_errors_become_store_errors_of_one_line(tmp_path, monkeypatch, owner, function, number):
    """Operations on a store raise no other error."""
    fill(tmp_path, LAYOUT)
    manifest = Manifest.read(tmp_path)
    original = getattr(owner, function)

    def fail(*arguments, **options):
        if function == "flock" and arguments[1] == fcntl.LOCK_UN:
            return original(*arguments, **options)
        raise OSError(number, os.strerror(number))

    attempts = [
        lambda: fill(tmp_path, LAYOUT, overwrite=True),
        lambda: prune(tmp_path),
        lambda: leftovers(tmp_path, manifest),
        lambda: erase(tmp_path),
    ]
    for attempt in attempts:
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, fail)
            try:
                attempt()
            except StoreError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error)
                assert re.search("Choose|again|continue|Wait|Delete", str(error)), "a remedy"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_lock_on_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def fail(descriptor, operation):
        raise OSError(number, os.strerror(number))

    fill(tmp_path, LAYOUT)
    monkeypatch.setattr(fcntl, "flock", fail)
    for attempt in (lambda: prune(tmp_path), lambda: fill(tmp_path, LAYOUT, overwrite=True)):
        with pytest.raises(StoreError, match=rf"cannot be locked \({os.strerror(number)}\). Choose .*flock"):
            attempt()


def test_map_error_is_a_store_error(tmp_path, monkeypatch):
    fill(tmp_path, LAYOUT)

    def fail(*arguments, **options):
        raise RuntimeError("unable to mmap 10 bytes from file <x>: Cannot allocate memory (12)\nand more")

    monkeypatch.setattr(torch, "from_file", fail)
    with pytest.raises(StoreError, match=r"00000.safetensors: unreadable: unable to mmap .*\(12\)\. Build it again"):
        Store(tmp_path)


def test_writer_releases_the_lock_after_an_error(tmp_path):
    for times in range(3):
        with pytest.raises(ZeroDivisionError), Writer(tmp_path, LAYOUT, resume=times > 0):
            raise ZeroDivisionError
    assert len(fill(tmp_path, LAYOUT, resume=True)) == 5


# ---- full disks ------------------------------------------------------------------------------------------------------


def free_bytes(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """Successive values of the free bytes of the disk."""
    usage, answers = namedtuple("usage", "total used free"), iter(free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**50, 0, next(answers)))


ENOUGH = LAYOUT.rows * LAYOUT.row_bytes + (1 << 24)  # including the bytes kept free


def test_disk_too_small_is_refused_before_the_build(tmp_path, monkeypatch):
    free_bytes(monkeypatch, ENOUGH - 1)
    message = r"16\.8 MB are needed, 16\.8 MB of them to stay free; 16\.8 MB are free, 1 byte.? too little"
    with pytest.raises(StoreError, match=rf"{message}. 0 of 5 shards .* `resume=True`"):
        fill(tmp_path, LAYOUT)
    assert contents(tmp_path) == {}
    free_bytes(monkeypatch, *[ENOUGH] * 6)
    assert len(fill(tmp_path, LAYOUT)) == 5


def test_disk_too_small_to_overwrite_lists_no_shards(tmp_path, monkeypatch):
    fill(tmp_path, layout_of())
    free_bytes(monkeypatch, 0)
    with pytest.raises(StoreError, match="0 of 5 shards exist and stay"):
        fill(tmp_path, LAYOUT, overwrite=True)
    assert listed_shards(tmp_path) == 0


def test_disk_full_during_a_build_needs_only_the_rest_to_resume(tmp_path, monkeypatch, whole):
    free_bytes(monkeypatch, ENOUGH, ENOUGH, ENOUGH, 1 << 24)
    with pytest.raises(StoreError, match="2 of 5 shards exist and stay. Free space.* `resume=True`"):
        fill(tmp_path, LAYOUT)
    assert listed_shards(tmp_path) == 2
    rest = ENOUGH - 8 * LAYOUT.row_bytes
    free_bytes(monkeypatch, rest - 1)
    with pytest.raises(StoreError, match="2 of 5 shards exist and stay"):
        fill(tmp_path, LAYOUT, resume=True)
    free_bytes(monkeypatch, *[rest] * 4)
    assert fill(tmp_path, LAYOUT, resume=True) == [2, 3, 4]
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("where", WHERE)
def test_disk_full_while_resuming_reports_the_shards(tmp_path, where):
    interrupted(tmp_path, "replace", 6, Killed())
    listed = listed_shards(tmp_path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Fault(monkeypatch, where, OWNERS[where], ERRORS["full"]())
        with pytest.raises(StoreError, match=f"the disk is full. {listed} of 5 shards exist and stay"):
            fill(tmp_path, LAYOUT, resume=True)
    assert listed == 2 and listed_shards(tmp_path) == listed


@pytest.mark.parametrize("where", WHERE)
def test_disk_full_can_be_pruned(tmp_path, where):
    fill(tmp_path, LAYOUT)
    left = tmp_path / ".00003.safetensors.77.partial"
    left.write_bytes(b"left")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fault = Fault(monkeypatch, where, 0, ERRORS["full"]())
        assert prune(tmp_path) == [(left, 4)]
    assert fault.raised and not left.exists() and Store(tmp_path, verify=True)
