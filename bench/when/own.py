"""Own sets, which are not in the study: tried once, as they were found, as `skipkernels tune` reads a folder.

flags  of 193 countries, a drawing of each by two designers; tested on those of a third
tiles  of photographs in scikit-image, 8 of the left half of each; tested on 8 of the right half
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from recipes.pictograms import more
from skipkernels.app.data.pictograms import TEMPLATE
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.train import tune

METHODS: dict[str, dict[str, Any]] = {
    "zero-shot": {"method": "zero-shot", "validation": "none"},
    "the default": {},
    "Skip Tuning": {"method": "skip", "validation": "none"},
    "linear probe": {"method": "linear-probe", "validation": "none"},
}
PHOTOS = {
    "astronaut": "astronaut.png", "brick": "brick.png", "camera": "camera.png", "cat": "chelsea.png",
    "cell": "cell.png", "clock": "clock_motion.png", "coffee": "coffee.png", "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg", "grass": "grass.png", "gravel": "gravel.png", "moon": "moon.png",
    "motorcycle": "motorcycle_left.png", "page": "page.png", "retina": "retina.jpg", "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}  # fmt: skip
Images = list[tuple[Image.Image, int]]


class OwnRun(NamedTuple):
    """A run: a key of `SETS` and of `METHODS`, and a seed; `drawings` is the file of `recipes.pictograms.more`."""

    task: str
    method: str
    seed: int
    drawings: Path | None

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that identify the run among rows."""
        return {"task": self.task, "method": self.method, "phase": "report", "seed": str(self.seed), "setting": ""}


def flags(drawings: Path) -> tuple[list[str], Images, Images]:
    """Names of the classes, and training and test images with their labels."""
    classes = more.class_names(drawings, "flags")
    return classes, more.read(drawings, "flags", "train", classes), more.read(drawings, "flags", "test", classes)


def tiles(drawings: Path | None) -> tuple[list[str], Images, Images]:
    """Cut `PHOTOS` into 4 by 4 tiles; returns what `flags` does."""
    train, test = [], []
    for label, file in enumerate(PHOTOS.values()):
        with resources.files("skimage.data").joinpath(file).open("rb") as opened:
            photo = Image.open(opened).convert("RGB")
        width, height = photo.width // 4, photo.height // 4
        for column in range(4):
            for top in range(0, 4 * height, height):
                tile = photo.crop((column * width, top, (column + 1) * width, top + height))
                (train if column < 2 else test).append((tile, label))
    return list(PHOTOS), train, test


SETS: dict[str, Callable[[Any], tuple[list[str], Images, Images]]] = {"flags": flags, "tiles": tiles}


def planned(drawings: Path | None, seeds: int) -> list[OwnRun]:
    """The runs of all methods; without `drawings`, of the tiles alone."""
    sets = [name for name in SETS if drawings or name != "flags"]
    return [OwnRun(name, method, seed, drawings) for name in sets for seed in range(seeds) for method in METHODS]


def execute(run: OwnRun) -> list[dict[str, Any]]:
    """Tune as `skipkernels tune --shots all` does with own data. Returns a row."""
    classes, train, test = SETS[run.task](run.drawings)
    settings: dict[str, Any] = {"model": pictogram_tiny.NAME, "template": (TEMPLATE,), "shots": "all", "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"seed": run.seed, "precision": "fp32", "out": Path(folder, "run")}
        metrics = tune(dataset=train, test=test, classes=classes, **settings, **METHODS[run.method])
    return [run.columns | {"accuracy": metrics["tuned"]["all"], "chosen": metrics["classifier"]}]
