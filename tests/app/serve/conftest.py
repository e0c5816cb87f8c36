"""A run and a folder of images that the tests share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from skipkernels.app.config import TuneConfig
from skipkernels.app.train import tune
from skipkernels.app.train.setup import build_task

CONFIG = TuneConfig(data="pictograms:food", shots=2, classes=40, epochs=1, device="cpu", cache_dtype="fp32")


class Run(NamedTuple):
    """Folder of a run, its metrics, and its task with Pillow images."""

    folder: Path
    metrics: dict
    task: object

    @property
    def classes(self) -> list[str]:
        return self.task.tests[0].classes


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """A run of Skip Tuning; no test changes its folder."""
    folder = tmp_path_factory.mktemp("serve") / "run"
    metrics = tune(dataclasses.replace(CONFIG, out=folder, cache=folder.parent / "cache"))
    return Run(folder, metrics, build_task(CONFIG.resolved()))


@pytest.fixture(scope="session")
def photos(run, tmp_path_factory) -> Path:
    """Test images of the trained classes in two folders, named after their labels, and a damaged one."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (image, label) in enumerate(run.task.tests[0].images):
        inner = folder / f"part{number % 2}"
        inner.mkdir(exist_ok=True)
        image.save(inner / f"{label}-{number}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").touch()
    first = folder / "part0" / f"{run.task.tests[0].images.labels[0]}-0.png"
    first.rename(first.with_suffix(".jpg"))  # an image is read by its content, and not by its extension
    return folder


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
