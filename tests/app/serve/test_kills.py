"""Kills and disk errors during the writing of exports, blends and adapters: never a mix of two models.

A run of more kills: `python -c "from tests.app.serve.test_kills import main; main(70)"`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import skipkernels as sk
from skipkernels.app.data import InputError
from skipkernels.app.serve import blending, exporting
from skipkernels.app.train import tune
from tests.app.serve.conftest import CONFIG
from tests.models import tiny_tokens

KILLS, SEED = 8, 0
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


def save_lora(source: Path, folder: Path) -> Callable[[], object]:
    """LoRA with the number that names the source as alpha and as every element of A and B."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": 60, "eos_token_id": 59}
    config = transformers.CLIPConfig(text_config=text, vision_config=size | {"image_size": 16, "patch_size": 8})
    clip = sk.SkipCLIP(transformers.CLIPModel(config), tiny_tokens(3), skip_layers=1)
    sk.add_lora(clip, 2, alpha=float(source.name))
    for name, parameter in clip.model.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            torch.nn.init.constant_(parameter, float(source.name))
    return lambda: sk.save_lora(clip, folder)


def names_and_logits(folder: Path) -> Found:
    classifier = sk.Classifier.load(folder, device="cpu")
    return " ".join(classifier.classes), classifier.logits(BATCH).numpy().tobytes()


def alpha_and_weights(folder: Path) -> Found:
    config = json.loads((folder / "adapter_config.json").read_text())
    return str(config["lora_alpha"]), (folder / "adapter_model.safetensors").read_bytes()


KINDS = {
    "export": (export, names_and_logits),
    "blend": (blend, names_and_logits),
    "save_lora": (save_lora, alpha_and_weights),
}


class Case:
    """A folder with the first of two models and a file of the user, over which the second model is written."""

    def __init__(self, kind: str, sources: tuple[Path, Path], parent: Path):
        prepare, self._read = KINDS[kind]
        self.folder, self._first = parent / "work" / "target", parent / "first"
        self.folder.parent.mkdir(parents=True)
        self.expected: dict[Found, str] = {}
        for name, source in zip(("first", "second"), sources, strict=True):
            self.write = prepare(source, self.folder)
            self.write()
            self.expected[self._read(self.folder)] = name
            if name == "first":
                shutil.copytree(self.folder, self._first)
        assert len(self.expected) == len({names for names, _ in self.expected}) == 2
        self.seconds, self.calls = self._whole_write()

    def reset(self) -> None:
        shutil.rmtree(self.folder.parent)
        shutil.copytree(self._first, self.folder)
        (self.folder / "mine.txt").write_text("mine")

    def state(self) -> str:
        """Contents for a reader: the first or the second model, a mix of both, or neither."""
        if not (self.folder / "mine.txt").is_file():
            return "lost"
        try:
            return self.expected.get(self._read(self.folder), "mixed")
        except (InputError, OSError, ValueError):
            return "unreadable"

    def _whole_write(self) -> tuple[float, int]:
        """Seconds and number of calls of `CALLS` of an undisturbed write."""
        self.reset()
        counter, began = Counter[str](), time.perf_counter()
        with at_call(0, lambda: None, counter):
            self.write()
        return time.perf_counter() - began, counter["calls"]

    def killed(self, seconds: float, call: int) -> str:
        """State after a write that is killed after some seconds, and before a call if it is not 0."""
        self.reset()
        child = os.fork()  # with torch and the model loaded
        if child == 0:
            with at_call(call, lambda: os.kill(os.getpid(), signal.SIGKILL), Counter()):
                self.write()
            os._exit(0)
        end = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(min(0.001, seconds))
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


def make_case(kind: str, folder: Path) -> Case:
    sources = folder / "1.0", folder / "2.0"
    if kind != "save_lora":
        for classes, source in zip((4, 6), sources, strict=True):
            tune(dataclasses.replace(CONFIG, classes=classes, shots=1, out=source))
    return Case(kind, sources, folder / "case")


def after_kills(case: Case, kills: int) -> Counter[str]:
    """States after kills at random times, and then one before each call that changes a folder."""
    draw = random.Random(SEED)
    moments = [(kill + draw.random()) / kills * case.seconds for kill in range(kills)]
    found = Counter(case.killed(seconds, 0) for seconds in moments)
    return found + Counter(case.killed(60, call) for call in range(1, case.calls + 1))


def after_errors(case: Case) -> Counter[str]:
    """States after an error of the disk in each call that changes a folder."""
    return Counter(case.failed(call) for call in range(1, case.calls + 1))


@pytest.fixture(scope="module", params=list(KINDS))
def case(request, tmp_path_factory) -> Case:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    yield make_case(request.param, tmp_path_factory.mktemp(f"killed-{request.param}"))
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_kill_leaves_one_whole_model(case):
    assert after_kills(case, KILLS).keys() <= {"first", "second"}


@pytest.mark.slow
def test_disk_error_leaves_one_whole_model(case):
    assert after_errors(case).keys() <= {"first", "second"}


def main(kills: int) -> None:
    torch.set_num_threads(1)
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(kind, Path(folder))
            print(f"{kind}: {kills} kills at random in {case.seconds:.2f} s, {case.calls} calls", flush=True)  # noqa: T201
            print(f"  killed {dict(after_kills(case, kills))}, errors {dict(after_errors(case))}", flush=True)  # noqa: T201
