"""Pictograms: drawings of the same things by three designers, with nothing to download.

A class is a name that people know ("red apple", "rocket", "elephant"), and each set of emoji (Noto, Twemoji, Fluent)
has one drawing of it. Tasks train on the first two and test on the third, which no image of `pictogram-tiny`'s
pre-training is from. `open_source("pictograms:animals")` opens them.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from .base import open_error
from .images import Images
from .source import Source, Split
from .templates import Templates, resolve_templates

ARCHIVE = Path(__file__).with_name("pictograms.zip")
TEMPLATE = "an icon of a {}"
TRAIN, TEST = ("noto", "twemoji"), ("fluent-emoji-flat",)
TASKS = ("animals", "food", "objects", "travel", "activities")


@cache
def _files() -> dict[str, bytes]:
    """Contents of the archive by name."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def names_of(tasks: Collection[str]) -> list[str]:
    """Names of some tasks, sorted."""
    rows = csv.DictReader(io.StringIO(_files()["classes.csv"].decode()))
    return [row["name"] for row in rows if row["task"] in tasks]


class Drawings:
    """Drawings of some classes in some sets: item i is (image, label), an RGB image of 64 by 64 pixels.

    Example:
        >>> dataset = Drawings(["rocket", "elephant"], ["noto", "twemoji"])
        >>> image, label = dataset[1]
        >>> len(dataset), dataset.names[1], image.size, label
        (4, 'twemoji/rocket.png', (64, 64), 0)
    """

    def __init__(self, classes: Sequence[str], sets: Sequence[str]):
        self.classes, self.sets = list(classes), list(sets)
        self.names = [f"{prefix}/{name}.png" for name in self.classes for prefix in self.sets]
        self.labels = [label for label in range(len(self.classes)) for _ in self.sets]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(_files()[self.names[index]])).convert("RGB"), self.labels[index]


def open_pictograms(name: str, templates: Templates = None) -> Source:
    """Open tasks "TASK[+TASK…]" of `TASKS` as a source; if empty, all."""
    tasks = name.split("+") if name else TASKS
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise open_error(f"no task {unknown[0]!r} of pictograms; choose from {', '.join(TASKS)}.")
    data = f"pictograms:{name}" if name else "pictograms"
    classes, templates = tuple(names_of(tasks)), resolve_templates(None, templates, TEMPLATE)
    splits: dict[Split, Images] = {"train": _images(classes, TRAIN), "test": _images(classes, TEST)}
    return Source(data, classes, templates, splits=splits)


def _images(classes: Sequence[str], sets: Sequence[str]) -> Images:
    drawings = Drawings(classes, sets)
    return Images(drawings, names=drawings.names)
