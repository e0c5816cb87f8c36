"""Options of a task, and the choice of its images that train, and of those that are held out for validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from ...options import Protocol, Shots, Test, Validation
from .base import InputError, check_choice
from .files import format_names
from .images import Images
from .shots import few_shot, hold_out
from .source import Source, Split
from .templates import Templates

VALIDATION_SHARE = 0.2
"""Share of the images of each class that are held out for validation by default."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of `load_task`: settings of `TuneConfig`, with other defaults, and two more.

    Attributes:
        max_classes: See `TuneConfig`. They are evenly spaced.
        train_on_validation: Append the validation images to the training images, as the last `held_out` ones.
        templates: The setting `template`.
        train: False: without training and validation images, to test a model on other data.
    """

    protocol: Protocol
    shots: Shots
    max_classes: int | None = None
    seed: int = 0
    validation: Validation = "none"
    train_on_validation: bool = False
    test: Test = "split"
    root: str | Path | None = None
    templates: Templates = None
    train: bool = True

    def validates_on_split(self, source: Source) -> bool:
        """Return True if the val split of a source validates."""
        return self.validation == "split" or (self.validation == "auto" and source.has_split("val"))

    def check(self) -> None:
        """Raise an InputError if a value can't be used."""
        check_choice(self.protocol, Protocol, "protocol", "load_task")
        check_choice(self.test, Test, "test", "load_task")
        if isinstance(self.validation, str):
            check_choice(self.validation, get_args(Validation)[0], "validation", "load_task")
        elif not (isinstance(self.validation, float) and 0 < self.validation < 1):
            raise InputError(
                f"must be a share between 0 and 1, or a text; got {self.validation!r}.", "validation", "load_task"
            )
        for name, value, every, least in (("shots", self.shots, "all", 1), ("max_classes", self.max_classes, None, 2)):
            if value != every and not (type(value) is int and value >= least):
                raise InputError(f"must be a whole number, at least {least}; got {value!r}.", name, "load_task")
        if self.test == "none" and self.protocol != "few-shot":
            raise InputError(
                f"none needs `protocol=few-shot`; {self.protocol} is a comparison of tests.", "test", "load_task"
            )


class Chosen(NamedTuple):
    """Images that train, those that are held out for validation, and notes on the choice."""

    train: Images
    held_out: Images
    notes: list[str]


NOTHING = Chosen(Images([]), Images([]), [])


def choose_images(source: Source, options: TaskOptions) -> Chosen:
    """Choose the training images, and the images that are held out for validation."""
    source, notes = _with_unused_images(source, options)
    images = source.images("train")
    sizes = Counter(images.labels)
    without = [name for label, name in enumerate(source.classes) if not sizes[label]]
    if without:
        raise InputError(f"{source.name} has no training images of {format_names(without)}. Add some.", "data")
    shots = max(sizes.values()) if options.shots == "all" else options.shots
    if options.train_on_validation and options.validates_on_split(source):
        sizes.update(source.images("val").labels)
    if options.shots != "all" and (note := _few_shot_note(sizes, source.classes, shots)) is not None:
        notes.append(note)

    if options.validates_on_split(source):
        train, held_out, where = _few(images, shots, options.seed), source.images("val"), "its val split"
        if not len(held_out):
            raise InputError(f"{source.name} has no val images. Use `validation=auto`, or add some.", "validation")
    elif options.validation == "none":
        train, held_out, where = _few(images, shots, options.seed), Images([]), ""
    else:
        share = VALIDATION_SHARE if isinstance(options.validation, str) else options.validation
        train, held_out = map(images.subset, hold_out(images.labels, images.names, shots, options.seed, share))
        where = "its train split, which don't train"
        if not len(held_out):
            notes.append("no validation: no class has a second training image.")
    if len(held_out) and not options.train_on_validation:
        notes.append(f"validation on {len(held_out)} images of {where}.")
    return Chosen(train, held_out, notes)


def _few(images: Images, shots: int, seed: int) -> Images:
    return images.subset(few_shot(images.labels, images.names, shots, seed))


def _with_unused_images(source: Source, options: TaskOptions) -> tuple[Source, list[str]]:
    """Let images train that neither validate nor test, unless the source has splits of its own; with a note."""
    used: dict[Split, bool] = {"val": options.validates_on_split(source), "test": options.test == "split"}
    unused = [split for split in used if source.has_split(split) and not used[split]]
    if not unused or not (source.hashed or options.test == "none"):
        return source, []
    counts = " and ".join(f"{len(source.images(split))} {split}" for split in unused)
    return source.train_on(unused), [f"the {counts} images train too, as they are not used otherwise."]


def _few_shot_note(sizes: Mapping[int, int], classes: Sequence[str], shots: int) -> str | None:
    """Return a note that lists the classes with fewer than `shots` images; None if there are none.

    >>> _few_shot_note({0: 2, 1: 1}, ["cat", "dog"], shots=2)
    '1 of 2 classes have fewer than 2 training images, all of which are used: dog (1).'
    """
    short = [f"{name} ({sizes[label]})" for label, name in enumerate(classes) if sizes[label] < shots]
    if not short:
        return None
    few = f"{len(short)} of {len(classes)} classes have fewer than {shots} training images"
    return f"{few}, all of which are used: {format_names(short)}."
