"""Refusals of a tuned model in use: the call, and the text of the error; the command, and the text of its line."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import skipkernels as sk
from skipkernels.app.data import InputError
from skipkernels.app.report.run_page import run_report
from skipkernels.app.results.files import read_metrics
from skipkernels.app.train import evaluate_run
from skipkernels.app.train.candidates import Choice
from tests.app.runs import fails


class Given(NamedTuple):
    """Folders of a run, of photos, and an empty one; preprocessed images."""

    run: Path
    photos: Path
    empty: Path
    images: torch.Tensor

    @property
    def copy(self) -> Path:
        """Copy of the run, to be changed."""
        return shutil.copytree(self.run, self.empty.parent / "copy")

    def load(self, **options: Any) -> sk.Classifier:
        return sk.Classifier.load(self.run, **{"device": "cpu"} | options)

    def predict(self, images: Any = None, **options: Any) -> object:
        return self.load().predict(self.images if images is None else images, **options)


@pytest.fixture
def given(run, photos, images, tmp_path) -> Given:
    (tmp_path / "empty").mkdir()
    return Given(run.folder, photos, tmp_path / "empty", images)


def written(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def described(folder: Path, **changes: Any) -> Path:
    values = json.loads((folder / "classifier.json").read_text())
    return written(folder, "classifier.json", json.dumps(values | changes))


CALLS: list[tuple[Callable[[Given], object], str]] = [
    (lambda on: on.load(classes="cat"), "classes must be a list of names"),
    *((lambda on, names=names: on.load(classes=names), f"'{names[0]}' and '{names[1]}' are the same class name")
      for names in (["a", "a"], ["Cat", "cat"], ["sea_lion", "sea lion"])),
    (lambda on: on.load(classes=["", "a"]), "a class can't be named ''"),
    (lambda on: on.load(classes=["a"]), r"classes must be at least two names; got \['a'\]"),
    (lambda on: on.load(device="gpu"), "device 'gpu' can't be used"),
    (lambda on: on.load(precision="int8"), "precision must be one of auto, fp32"),
    (lambda on: on.predict(unreadable="ignore"), "unreadable must be one of raise, skip; got 'ignore'"),
    (lambda on: on.predict(top=0), "top must be a whole number of at least 1"),
    *((lambda on, bad=bad: on.predict(threshold=bad), "threshold must be a number from 0 to 1; got")
      for bad in (-1, 2, math.nan, "0.8")),
    (lambda on: on.predict(torch.zeros(3, 32, 32)), r"\[N, 3, H, W\]"),
    (lambda on: on.predict([Image.new("F", (32, 32))]), "image 0: has 32 bits per channel"),
    (lambda on: on.predict(np.zeros((8, 8, 3), np.float32)), r"got float32 \[8, 8, 3\]. From 0 to 1\? Multiply by 255"),
    (lambda on: on.predict(np.zeros((3, 8, 8), np.uint8)), r"image 0: pixels must be an array \[H, W\], \[H, W, 3\]"),
    (lambda on: on.predict([torch.zeros(8, 8, 3).byte()]), r"a tensor \[3, H, W\] of uint8; got uint8 \[8, 8, 3\]"),
    (lambda on: on.predict(np.zeros((0, 8, 3), np.uint8)), r"got uint8 \[0, 8, 3\]"),
    (lambda on: on.predict([3]), "must be paths, images of Pillow, or uint8 arrays; got int"),
    (lambda on: on.predict(["missing.png"]), "missing.png: no such file"),
    *((lambda on, text=text: sk.Classifier.load(written(on.copy, "classifier.json", text)), error) for text, error in (
        ("{", "damaged: not JSON"), ("[" * 200_000, "damaged: not JSON"), ("{}", "damaged: format must be 1; got None"),
    )),
    (lambda on: sk.Classifier.load(without(on.copy, "classifier.json")), "no such file"),
    (lambda on: sk.Classifier.load(described(without(on.copy, "open_clip_config.json"), model="local-dir:/moved"),
                                   trust=True),
     r"^/.*classifier\.json: model: local-dir:/moved: no folder /moved"),
    *((lambda on, use=use: use(written(on.copy, "model.safetensors", "x")),
       "model.safetensors: missing or damaged: it does not match classifier.json. Copy the whole folder")
      for use in (sk.Classifier.load, evaluate_run)),
    (lambda on: sk.Classifier.load(described(on.copy, head_xxh3="0")),
     r"head.safetensors: missing or damaged \(.*Copy the whole folder"),
    (lambda on: sk.Classifier.load(written(described(on.copy, head_xxh3="0"), "head.safetensors", "x")),
     r"head.safetensors: missing or damaged \(it does not match classifier.json"),
    *((lambda on, text=text: read_metrics(written(on.copy, "metrics.json", text)),
       rf"metrics.json: damaged \(.*{reason}.*\)\. Restore it")
      for text, reason in (("[]", "not a JSON object"), ('{"status": "com', "Unterminated"))),
    (lambda on: run_report(written(on.copy, "metrics.jsonl", "{")), r"metrics.jsonl: damaged \(Expecting"),
    *((lambda on, text=text: Choice.read(written(on.copy, "candidates.json", text)),
       rf"candidates.json: damaged \({reason}\)")
      for text, reason in (("[]", "not a JSON object"), ("{}", "asked: Field required"))),
    # A method has more arguments than the settings of a run, such as a folder that it writes.
    (lambda on: sk.Classifier.load(described(on.copy, settings={"text_cache": "x"})),
     "settings.text_cache.*skip_layers"),
    (lambda on: sk.Classifier.load(described(on.copy, method="later")), "methods skip, .*; got 'later'. Upgrade"),
    (lambda on: sk.blend(on.run, alpha=1.5), "alpha must be from 0 to 1"),
    (lambda on: sk.blend(on.run, alpha=True), "alpha must be from 0 to 1"),
    (lambda on: sk.blend(on.run, alpha="best"), 'or "auto"'),
    (lambda on: sk.blend(on.run, out=on.run), "must not be the folder of the run"),
    (lambda on: sk.export(on.run, "open-clip", on.run, overwrite=True), "out must not be the folder of a run"),
    (lambda on: sk.export(on.run, "open-clip", on.copy, overwrite=True), "out must not be the folder of a run"),
    (lambda on: sk.export(on.run, "open-clip", on.photos), "out must be a new or an empty folder"),
    *((lambda on, options=options: sk.export(on.run, "open-clip", on.photos / "notes.txt", **options),
       "notes.txt is a file; choose a folder") for options in ({}, {"overwrite": True})),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), CALLS, ids=[text for _, text in CALLS])
def test_call_is_refused(given, call, text):
    with pytest.raises(InputError, match=text):
        call(given)


# With {run}, {photos} and {empty} for the folders.
COMMANDS = {
    "predict {empty}/none {photos}": "RUN must be the folder of a run",
    "predict {run} {empty}": "IMAGES must be files or folders of images",
    "predict {run} {photos} {empty}/none": "IMAGES must be files or folders of images; there is no",
    "predict {run} {photos} --top 0": "--top must be a whole number",
    "predict {run} {photos} --threshold nan": "--threshold must be a number from 0 to 1; got nan",
    "predict {run} {photos} --classes clases.txt": "--classes must be at least two names",
    "predict {run} {photos} --out {empty}/a.xlsx": "--out must end in .csv; got",
    "predict {run} {photos} --embeddings {empty}/a.csv": "--embeddings must end in .npy; got",
    "predict {run} {photos} --out /proc/a.csv": "--out: /proc can't be created",
    "serve {run} --port 70000": "--port must be from 0 to 65535; got 70000",
    "serve {run} --port 0 --top 0": "--top must be a whole number",
    "serve {run} --port 0 --threshold 2": "--threshold must be a number from 0 to 1",
    "serve {run} --port 0 --host 192.0.2.1": "--host: can't listen at 192.0.2.1",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_refused(given, capsys, command):
    if command.startswith("serve"):
        pytest.importorskip("uvicorn", reason="serve needs the extra web")
    if "/proc" in command and sys.platform != "linux":
        pytest.skip("needs a folder in which root can't write either")
    words = [word.format(**given._asdict()) for word in command.split(" ")]
    assert COMMANDS[command] in fails([*words, "--device", "cpu"], capsys)
    assert not list(given.empty.iterdir())
