"""Refusals of a tuned model in use: arguments, damaged files of a run, and commands."""

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


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"classes": "cat"}, "classes must be a list of names"),
        ({"classes": ["a", "a"]}, "'a' and 'a' are the same class name"),
        ({"classes": ["Cat", "cat"]}, "'Cat' and 'cat' are the same class name"),
        ({"classes": ["sea_lion", "sea lion"]}, "'sea_lion' and 'sea lion' are the same class name"),
        ({"classes": ["", "a"]}, "a class can't be named ''"),
        ({"classes": ["a"]}, r"classes must be at least two names; got \['a'\]"),
        ({"device": "gpu"}, "device 'gpu' can't be used"),
        ({"precision": "int8"}, "precision must be one of auto, fp32"),
    ],
)
def test_load_is_refused(run, options, error):
    with pytest.raises(InputError, match=error):
        sk.Classifier.load(run.folder, **{"device": "cpu"} | options)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"unreadable": "ignore"}, "unreadable must be one of raise, skip; got 'ignore'"),
        *(({"top": bad}, "top must be a whole number of at least 1") for bad in (0, None)),
        *(({"threshold": bad}, "threshold must be a number from 0 to 1; got") for bad in (-1, 2, math.nan, "0.8")),
        ({"images": torch.zeros(3, 32, 32)}, r"\[N, 3, H, W\]"),
        ({"images": [Image.new("F", (32, 32))]}, "image 0: has 32 bits per channel"),
        ({"images": np.zeros((8, 8, 3), np.float32)}, r"got float32 \[8, 8, 3\]. From 0 to 1\? Multiply by 255"),
        ({"images": np.zeros((3, 8, 8), np.uint8)}, r"image 0: pixels must be an array \[H, W\], \[H, W, 3\]"),
        ({"images": [torch.zeros(8, 8, 3).byte()]}, r"a tensor \[3, H, W\] of uint8; got uint8 \[8, 8, 3\]"),
        ({"images": np.zeros((0, 8, 3), np.uint8)}, r"got uint8 \[0, 8, 3\]"),
        ({"images": [3]}, "must be paths, images of Pillow, or uint8 arrays; got int"),
        ({"images": ["missing.png"]}, "missing.png: no such file"),
    ],
)
def test_predict_is_refused(classifier, images, changes, error):
    with pytest.raises(InputError, match=error):
        classifier.predict(**{"images": images} | changes)


class Damage(NamedTuple):
    """Change of the files of a run, the call that reads them, and its error."""

    error: str
    files: dict[str, str | None]  # contents by name; None: it is deleted
    described: dict[str, Any] = {}  # changes of classifier.json
    read: Callable[[Path], object] = sk.Classifier.load


NO_MATCH = "model.safetensors: missing or damaged: it does not match classifier.json. Copy the whole folder"
DAMAGES = [
    Damage("damaged: not JSON", {"classifier.json": "{"}),
    Damage("damaged: not JSON", {"classifier.json": "[" * 200_000}),
    Damage("damaged: format must be 1; got None", {"classifier.json": "{}"}),
    Damage("no such file", {"classifier.json": None}),
    # A method has more arguments than the settings of a run, such as a folder that it writes.
    Damage("settings.text_cache.*skip_layers", {}, {"settings": {"text_cache": "x"}}),
    Damage("methods skip, .*; got 'later'. Upgrade", {}, {"method": "later"}),
    Damage(
        r"^/.*classifier\.json: model: local-dir:/moved: no folder /moved",
        {"open_clip_config.json": None},
        {"model": "local-dir:/moved"},
        lambda run: sk.Classifier.load(run, trust=True),
    ),
    Damage(NO_MATCH, {"model.safetensors": "x"}),
    Damage(NO_MATCH, {"model.safetensors": "x"}, read=evaluate_run),
    Damage(r"head.safetensors: missing or damaged \(.*Copy the whole folder", {}, {"head_xxh3": "0"}),
    Damage(
        r"head.safetensors: missing or damaged \(it does not match classifier.json",
        {"head.safetensors": "x"},
        {"head_xxh3": "0"},
    ),
    Damage(r"metrics.json: damaged \(.*not a JSON object.*\)\. Restore it", {"metrics.json": "[]"}, read=read_metrics),
    Damage(
        r"metrics.json: damaged \(.*Unterminated.*\)\. Restore it",
        {"metrics.json": '{"status": "com'},
        read=read_metrics,
    ),
    Damage(r"metrics.jsonl: damaged \(Expecting", {"metrics.jsonl": "{"}, read=run_report),
    Damage(r"candidates.json: damaged \(not a JSON object\)", {"candidates.json": "[]"}, read=Choice.read),
    Damage(r"candidates.json: damaged \(asked: Field required\)", {"candidates.json": "{}"}, read=Choice.read),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.error for damage in DAMAGES])
def test_damaged_run_is_refused(run, tmp_path, damage):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    values = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps(values | damage.described))
    for name, content in damage.files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
    with pytest.raises(InputError, match=damage.error):
        damage.read(folder)


@pytest.mark.parametrize(
    ("alpha", "error"),
    [(1.5, "alpha must be from 0 to 1"), (True, "alpha must be from 0 to 1"), ("best", 'or "auto"')],
)
def test_alpha_is_refused(run, alpha, error):
    with pytest.raises(InputError, match=error):
        sk.blend(run.folder, alpha=alpha)


class Folders(NamedTuple):
    """Folders of a run, of another run, of photos, and an empty one."""

    run: Path
    other: Path
    photos: Path
    empty: Path


@pytest.fixture
def folders(run, photos, tmp_path) -> Folders:
    for name in ("other", "empty"):
        (tmp_path / name).mkdir()
    shutil.copy(run.folder / "config.yaml", tmp_path / "other")
    return Folders(run.folder, tmp_path / "other", photos, tmp_path / "empty")


def test_blend_into_the_run_is_refused(folders):
    with pytest.raises(InputError, match="must not be the folder of the run"):
        sk.blend(folders.run, out=folders.run)


@pytest.mark.parametrize(
    ("out", "overwrite", "error"),
    [
        ("{run}", True, "out must not be the folder of a run"),
        ("{other}", True, "out must not be the folder of a run"),
        ("{photos}", False, "out must be a new or an empty folder"),
        ("{photos}/notes.txt", False, "notes.txt is a file; choose a folder"),
        ("{photos}/notes.txt", True, "notes.txt is a file; choose a folder"),
    ],
)
def test_folder_of_an_export_is_refused(folders, out, overwrite, error):
    with pytest.raises(InputError, match=error):
        sk.export(folders.run, "open-clip", out.format(**folders._asdict()), overwrite=overwrite)


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
def test_command_is_refused(folders, capsys, command):
    if command.startswith("serve"):
        pytest.importorskip("uvicorn", reason="serve needs the extra web")
    if "/proc" in command and sys.platform != "linux":
        pytest.skip("needs a folder in which root can't write either")
    words = [word.format(**folders._asdict()) for word in command.split(" ")]
    assert COMMANDS[command] in fails([*words, "--device", "cpu"], capsys)
    assert not list(folders.empty.iterdir())
