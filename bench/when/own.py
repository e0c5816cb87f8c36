"""Own sets, as `skipkernels tune` reads a folder. All but the long tail were tried once, as they were found.

long tail  a class with 200 images and fourteen with 5, by two designers; tested on those of a third. A class is a word:
           the drawings of the names with this word and none of the others; the large one is the task food
flags      of 193 countries, a drawing of each by two designers; tested on those of a third
flagpack   the same images to train on; tested on the drawings of a fourth designer, of all but a few countries
tiles      of photographs in scikit-image, 8 of the left half of each; tested on 8 of the right half
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from recipes.pictograms import more
from skipkernels.app.data.pictograms import TASKS, TEMPLATE, TEST, TRAIN, Drawings, names_of
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.train import tune

LARGE = "food"
SMALL = ("face", "moon", "cloud", "ball", "car", "tree", "book", "medal", "umbrella", "mailbox", "camera", "banknote")
SMALL += ("envelope", "shoe")
COUNTS = {LARGE: 200} | dict.fromkeys(SMALL, 5)  # training images of the long tail
PHOTOS = {
    "astronaut": "astronaut.png", "brick": "brick.png", "camera": "camera.png", "cat": "chelsea.png",
    "cell": "cell.png", "clock": "clock_motion.png", "coffee": "coffee.png", "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg", "grass": "grass.png", "gravel": "gravel.png", "moon": "moon.png",
    "motorcycle": "motorcycle_left.png", "page": "page.png", "retina": "retina.jpg", "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}  # fmt: skip

Images = list[tuple[Image.Image, int]]


class OwnRun(NamedTuple):
    """A run: a set of `SETS`, one of its methods, and a seed; `drawings` is the file of `recipes.pictograms.more`."""

    task: str
    method: str
    seed: int
    drawings: Path | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that identify the run among rows."""
        return {"task": self.task, "method": self.method, "phase": "report", "seed": str(self.seed), "setting": ""}


def names_by_class() -> dict[str, list[str]]:
    """Names of the drawings of each class of the long tail."""
    others = names_of([task for task in TASKS if task != LARGE])
    words = {name: [word for word in SMALL if word in name.split()] for name in others}
    return {LARGE: names_of([LARGE])} | {word: [name for name in others if words[name] == [word]] for word in SMALL}


def drawn(sets: Sequence[str], seed: int | None = None) -> Images:
    """Images of the long tail by some designers: with a seed `COUNTS` of each class, else all."""
    found = []
    for label, (name, names) in enumerate(names_by_class().items()):
        drawings = [(image, label) for image, _ in Drawings(names, sets)]
        found += drawings if seed is None else random.Random(seed).sample(drawings, COUNTS[name])
    return found


def long_tail(run: OwnRun) -> tuple[list[str], Images, Images]:
    """Names of the classes, and training and test images with their labels."""
    return list(COUNTS), drawn(TRAIN, run.seed), drawn(TEST)


def flags(run: OwnRun) -> tuple[list[str], Images, Images]:
    """Read the drawings of flags, of either set for the test; returns what `long_tail` does."""
    assert run.drawings is not None
    classes = more.class_names(run.drawings, "flags")
    train = more.read(run.drawings, "flags", "train", classes)
    return classes, train, more.read(run.drawings, run.task, "test", classes)


def tiles(run: OwnRun) -> tuple[list[str], Images, Images]:
    """Cut `PHOTOS` into 4 by 4 tiles; returns what `long_tail` does."""
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


class OwnSet(NamedTuple):
    """A set: a function of a run that returns the names of the classes and images with their labels, to train on and to
    test on; and settings of `tune` by the name in the table."""

    read: Callable[[OwnRun], tuple[list[str], Images, Images]]
    methods: dict[str, dict[str, Any]]
    needs_drawings: bool = False


_ALL: dict[str, dict[str, Any]] = {
    "zero-shot": {"method": "zero-shot", "validation": "none"},
    "the default": {},
    "Skip Tuning": {"method": "skip", "validation": "none"},
}
_WITH_PROBE = _ALL | {"linear probe": {"method": "linear-probe", "validation": "none"}}
_WEIGHTED: dict[str, dict[str, Any]] = {
    **_ALL,
    "the default, --prior balanced": {"prior": "balanced"},
    "the default, --class-weight 0.5": {"class_weight": 0.5},
    "the default, --class-weight balanced": {"class_weight": "balanced"},
    "Skip Tuning, --class-weight 0.5": _ALL["Skip Tuning"] | {"class_weight": 0.5},
    "Skip Tuning, --class-weight balanced": _ALL["Skip Tuning"] | {"class_weight": "balanced"},
}
SETS = {
    "long tail": OwnSet(long_tail, _WEIGHTED),
    "flags": OwnSet(flags, _WITH_PROBE, needs_drawings=True),
    more.FLAGPACK: OwnSet(flags, _WITH_PROBE, needs_drawings=True),
    "tiles": OwnSet(tiles, _WITH_PROBE),
}


def planned(drawings: Path | None, seeds: int) -> list[OwnRun]:
    """All runs; without `drawings` none of flags."""
    sets = {task: own for task, own in SETS.items() if drawings or not own.needs_drawings}
    return [OwnRun(task, method, s, drawings) for task in sets for s in range(seeds) for method in sets[task].methods]


def execute(run: OwnRun) -> list[dict[str, Any]]:
    """Tune as `skipkernels tune --shots all` does with own data. Returns a row."""
    own = SETS[run.task]
    classes, train, test = own.read(run)
    settings: dict[str, Any] = {"model": pictogram_tiny.NAME, "template": (TEMPLATE,), "shots": "all", "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"seed": run.seed, "precision": "fp32", "out": Path(folder, "run")}
        metrics = tune(dataset=train, test=test, classes=classes, **settings, **own.methods[run.method])
    by_class = metrics["by_class"]["all"]
    first, *others = (each["recall"] for each in by_class["classes"])
    found = {"accuracy": metrics["tuned"]["all"], "balanced": by_class["balanced_accuracy"]}
    found |= {"large": first, "rare": round(statistics.fmean(others), 4)} if run.task == "long tail" else {}
    return [run.columns | found | {"chosen": metrics["classifier"]}]
