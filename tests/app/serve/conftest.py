"""A run and a folder of images that the tests share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import skipkernels as sk
from skipkernels.app.config import TuneConfig
from skipkernels.app.serve.exporting import Exported
from skipkernels.app.train import tune
from skipkernels.app.train.setup import build_task
from tests.app.runs import published_optimizer

CONFIG = TuneConfig(
    data="pictograms:food", method="skip", shots=2, max_classes=40, epochs=1, device="cpu", cache_dtype="fp32"
)


NATIVE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
ATOL = 1e-4  # of logits up to the logit scale, in fp32
PREPROCESS = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic"}


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
    with published_optimizer():
        metrics = tune(dataclasses.replace(CONFIG, out=folder, cache=folder.parent / "cache"))
        return Run(folder, metrics, build_task(CONFIG.resolved()))


@pytest.fixture(scope="session")
def classifier(run) -> sk.Classifier:
    return sk.Classifier.load(run.folder, device="cpu")


@pytest.fixture(scope="session")
def native_run(tmp_path_factory) -> Path:
    """Run of a small CLIP of open_clip's own blocks with random weights, which CLIPModel of transformers can hold."""
    folder = tmp_path_factory.mktemp("native")
    clip = open_clip.CLIP(**NATIVE)
    open_clip.set_model_preprocess_cfg(clip, PREPROCESS)
    config = {"model_cfg": NATIVE, "preprocess_cfg": clip.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    with published_optimizer():
        tune(dataclasses.replace(CONFIG, model=f"local-dir:{folder}", max_classes=4, out=folder / "run"))
    return folder / "run"


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


def rotated(picture: Image.Image, path: Path) -> Path:
    """Write an image as a phone does that was turned: its metadata say how it is shown."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)
    return path


def card_names(done: Exported, picture: Path) -> dict[str, Any]:
    """Run the code of the model card on an image; returns its variables."""
    code = (done.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(done.folder)).replace("photo.jpg", str(picture)), names)
    return names
