"""Kills and disk errors during the writing of exports and blends: never a mix of two models."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import skipkernels as sk
from skipkernels.app.data import InputError
from skipkernels.app.serve import blending, exporting
from skipkernels.app.train import tune
from tests.app.serve.conftest import CONFIG

CALLS = ("replace", "rename", "link", "unlink", "rmdir", "mkdir", "fsync")  # functions of `os` that change a folder
BATCH = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Found = tuple[str, bytes]


def export(source: Path, folder: Path) -> Callable[[], object]:
    loaded = exporting.plain_model(source)  # once: only the writing is killed

    def write() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporting, "plain_model", lambda run, **options: loaded)
            sk.export(source, "open-clip", folder, overwrite=True)

    return write


def blend(source: Path, folder: Path) -> Callable[[], object]:
    with pytest.MonkeyPatch.context() as patch:
        calls: list[tuple] = []
        patch.setattr(blending, "_write", lambda *arguments: calls.append(arguments))
        sk.blend(source, 0.5, out=folder, overwrite=True)
    return lambda: blending._write(*calls[0])


def names_and_logits(folder: Path) -> Found:
    classifier = sk.Classifier.load(folder, device="cpu")
    return " ".join(classifier.classes), classifier.logits(BATCH).numpy().tobytes()


KINDS = {"export": export, "blend": blend}


class Case:
    """A folder with the first of two models and a file of the user, over which the second model is written."""

    def __init__(self, kind: str, sources: tuple[Path, Path], parent: Path):
        self.folder, self._first = parent / "work" / "target", parent / "first"
        self.folder.parent.mkdir(parents=True)
        self.expected: dict[Found, str] = {}
        for name, source in zip(("first", "second"), sources, strict=True):
            self.write = KINDS[kind](source, self.folder)
            self.write()
            self.expected[names_and_logits(self.folder)] = name
            if name == "first":
                shutil.copytree(self.folder, self._first)
        assert len(self.expected) == len({names for names, _ in self.expected}) == 2
        self.reset()
        counter = Counter[str]()
        with at_call(0, lambda: None, counter):
            self.write()
        self.calls = counter["calls"]  # number of calls of `CALLS` of an undisturbed write

    def reset(self) -> None:
        shutil.rmtree(self.folder.parent)
        shutil.copytree(self._first, self.folder)
        (self.folder / "mine.txt").write_text("mine")

    def state(self) -> str:
        """Contents for a reader: the first or the second model, a mix of both, or neither."""
        if not (self.folder / "mine.txt").is_file():
            return "lost"
        try:
            return self.expected.get(names_and_logits(self.folder), "mixed")
        except (InputError, OSError, ValueError):
            return "unreadable"

    def killed(self, call: int) -> str:
        """State after a write that is killed before a call."""
        self.reset()
        child = os.fork()  # with torch and the model loaded
        if child == 0:
            with at_call(call, lambda: os.kill(os.getpid(), signal.SIGKILL), Counter()):
                self.write()
            os._exit(0)
        os.waitpid(child, 0)
        return self.state()

    def failed(self, call: int) -> str:
        """State after a write in which a call fails."""
        self.reset()
        try:
            with at_call(call, fail, Counter()):
                self.write()
        except (InputError, OSError):
            pass
        return self.state()


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


class at_call:
    """Context in which `act` is called before the call of `CALLS` with a number; counts the calls."""

    def __init__(self, number: int, act: Callable[[], None], counter: Counter[str]):
        self._patch = pytest.MonkeyPatch()
        for name in CALLS:
            self._patch.setattr(os, name, self._wrapped(getattr(os, name), number, act, counter))

    @staticmethod
    def _wrapped(call, number: int, act: Callable[[], None], counter: Counter[str]):
        def wrapper(*arguments, **options):
            counter["calls"] += 1
            if counter["calls"] == number:
                act()
            return call(*arguments, **options)

        return wrapper

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        self._patch.undo()


@pytest.fixture(scope="module", params=list(KINDS))
def case(request, tmp_path_factory) -> Case:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    folder = tmp_path_factory.mktemp(f"killed-{request.param}")
    sources = folder / "first", folder / "second"
    for classes, source in zip((4, 6), sources, strict=True):
        tune(dataclasses.replace(CONFIG, classes=classes, shots=1, out=source))
    yield Case(request.param, sources, folder / "case")
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_kill_leaves_one_whole_model(case):
    assert {case.killed(call) for call in range(1, case.calls + 1)} <= {"first", "second"}


@pytest.mark.slow
def test_disk_error_leaves_one_whole_model(case):
    assert {case.failed(call) for call in range(1, case.calls + 1)} <= {"first", "second"}
