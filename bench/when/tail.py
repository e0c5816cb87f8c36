"""A long tail: a class with 200 training images and fourteen with 5, by two designers, tested on drawings of a third.

A class is a word, and its images are the drawings of the names with this word and none of the others; the large one is
the task food. The test has a drawing of each name.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from skipkernels.app.data.pictograms import TASKS, TEMPLATE, TEST, TRAIN, Drawings, names_of
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.train import tune

LARGE = "food"
SMALL = ("face", "moon", "cloud", "ball", "car", "tree", "book", "medal", "umbrella", "mailbox", "camera", "banknote")
SMALL += ("envelope", "shoe")
IMAGES = {LARGE: 200} | dict.fromkeys(SMALL, 5)
_SKIP = {"method": "skip", "validation": "none"}
VARIANTS: dict[str, dict[str, Any]] = {
    "zero-shot": {"method": "zero-shot", "validation": "none"},
    "the default": {},
    "the default, --prior balanced": {"prior": "balanced"},
    "the default, --class-weight 0.5": {"class_weight": 0.5},
    "the default, --class-weight balanced": {"class_weight": "balanced"},
    "Skip Tuning": _SKIP,
    "Skip Tuning, --class-weight 0.5": _SKIP | {"class_weight": 0.5},
    "Skip Tuning, --class-weight balanced": _SKIP | {"class_weight": "balanced"},
}
"""Settings of `tune`, by the name in the table."""


class TailRun(NamedTuple):
    """A run: a key of `VARIANTS`, and the seed of its training images."""

    variant: str
    seed: int

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that identify the run among rows."""
        return {"task": "long tail", "method": self.variant, "phase": "report", "seed": str(self.seed), "setting": ""}


def names_by_class() -> dict[str, list[str]]:
    """Names of the drawings of each class."""
    others = names_of([task for task in TASKS if task != LARGE])
    words = {name: [word for word in SMALL if word in name.split()] for name in others}
    return {LARGE: names_of([LARGE])} | {word: [name for name in others if words[name] == [word]] for word in SMALL}


def images(sets: Sequence[str], seed: int | None = None) -> list[tuple[Image.Image, int]]:
    """Images and labels by some designers: with a seed `IMAGES` of each class, else all."""
    found = []
    for label, (name, names) in enumerate(names_by_class().items()):
        drawings = [(image, label) for image, _ in Drawings(names, sets)]
        found += drawings if seed is None else random.Random(seed).sample(drawings, IMAGES[name])
    return found


def execute(run: TailRun) -> list[dict[str, Any]]:
    """Tune as `skipkernels tune --shots all` does with own data. Returns a row."""
    settings: dict[str, Any] = {"model": pictogram_tiny.NAME, "template": (TEMPLATE,), "shots": "all", "device": "cpu"}
    data: dict[str, Any] = {"dataset": images(TRAIN, run.seed), "test": images(TEST), "classes": list(IMAGES)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        metrics = tune(**data, **settings, seed=run.seed, precision="fp32", out=out, **VARIANTS[run.variant])
    by_class = metrics["by_class"]["all"]
    large, *small = (each["recall"] for each in by_class["classes"])
    found = {"accuracy": metrics["tuned"]["all"], "balanced": by_class["balanced_accuracy"]}
    found |= {"large": large, "rare": round(statistics.fmean(small), 4)}
    return [run.columns | found | {"chosen": metrics["classifier"]}]
