"""Kills and disk errors during the writing of exports and blends: never a mix of two models.

tests/test_folders.py has the kills and errors of `replaced_folder` itself, which both use.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import skipkernels as sk
from skipkernels.app.data import InputError
from skipkernels.app.serve import blending, exporting
from tests.app.runs import shortened

CALLS = ("replace", "rename", "link", "unlink", "rmdir", "mkdir", "fsync")  # functions of `os` that change a folder
Write = Callable[[], object]


def exports(run: Path, folder: Path) -> Iterator[Write]:
    """Exports of two models, which are loaded before: only the writing is disturbed."""
    for scale in (1.0, 2.0):
        plain = exporting.plain_model(run)
        plain.model.logit_scale.fill_(scale)

        def write(plain=plain) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(exporting, "plain_model", lambda run, **options: plain)
                sk.export(run, "open-clip", folder, overwrite=True)

        yield write


def blends(run: Path, folder: Path) -> Iterator[Write]:
    """Writing of two blends, which are evaluated before."""
    for alpha in (0.25, 0.75):
        with pytest.MonkeyPatch.context() as patch:
            calls: list[tuple] = []
            patch.setattr(blending, "ALPHAS", (0.0, 1.0))
            patch.setattr(blending, "_write", lambda *arguments, calls=calls: calls.append(arguments))
            sk.blend(run, alpha, out=folder, overwrite=True, trust=True)
        yield lambda calls=calls: blending._write(*calls[0])


@contextlib.contextmanager
def at_call(number: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Call `act` before the call of `CALLS` with a number; yield the names of the calls."""
    made: list[str] = []

    def wrapped(name: str, call: Callable) -> Callable:
        def wrapper(*arguments, **options):
            made.append(name)
            if len(made) == number:
                act()
            return None if name == "fsync" else call(*arguments, **options)  # a kill does not lose what is not flushed

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield made


def kill(number: int, write: Write) -> None:
    child = os.fork()
    if child == 0:
        with at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            write()
        os._exit(0)
    os.waitpid(child, 0)


def fail(number: int, write: Write) -> None:
    def error() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with contextlib.suppress(InputError, OSError), at_call(number, error):
        write()


def contents(folder: Path) -> dict[str, bytes]:
    """Files without the headers of safetensors, in which the order of the metadata varies."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    headers = {name: 8 + int.from_bytes(data[:8], "little") for name, data in found.items() if "safetensors" in name}
    return {name: data[headers.get(name, 0) :] for name, data in found.items()}


@pytest.mark.parametrize("writes", [exports, blends])
@shortened()
def test_folder_has_one_whole_model(native_run, tmp_path, writes):
    """Disturbed at the first call, in the middle, and at each call around the exchange of the two folders."""
    first, folder = tmp_path / "first", tmp_path / "work" / "target"
    folder.parent.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    try:
        write_first, write = writes(native_run, folder)
        write_first()
        (folder / "mine.txt").write_text("of the user")
        shutil.copytree(folder, first)
        with at_call(0, lambda: None) as made:
            write()
        whole = [contents(first), contents(folder)]
        assert whole[0].keys() == whole[1].keys() and whole[0] != whole[1] and "mine.txt" in whole[1]
        kept = made.index("link")  # the last call before the new folder has all files
        points = {1, kept // 2, *range(kept + 1, kept + 5), len(made)}
        for disturb in (kill, fail):
            found = []
            for number in sorted(points):
                shutil.rmtree(folder.parent)
                shutil.copytree(first, folder)
                disturb(number, write)
                assert (now := contents(folder)) in whole, (disturb, number, made[number - 1])
                found.append(whole.index(now))
            assert set(found) == {0, 1} and (disturb is fail or found == sorted(found))  # some errors are harmless
    finally:
        torch.set_num_threads(threads)
