"""Tasks of the study: names of pictograms, and the designers of the training and test images.

A fifth of the names, drawn once, are for the search of learning rates, the others for the reported runs. A seed draws
base and new classes from them. Drawings are those in the package, or in the file of `recipes.pictograms.more`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.pictograms import more
from recipes.pictograms.names import has_word, held_out_words
from skipkernels.app.data import Source
from skipkernels.app.data.images import Images
from skipkernels.app.data.pictograms import TASKS, TEMPLATE, TEST, TRAIN, Drawings, names_of

Phase = Literal["search", "report"]

_SEARCHED = 0.2  # of the names


@dataclass(frozen=True)
class Shift:
    """A task.

    Attributes:
        name: Name in the tables.
        tasks: Tasks of pictograms with the names; none if the file of `recipes.pictograms.more` has the task.
        train: Sets of the training images.
        words: "all" names, or "known" or "unknown": those without or with a word that is held out of pre-training.
    """

    name: str
    tasks: tuple[str, ...] = TASKS
    train: tuple[str, ...] = TRAIN
    words: Literal["all", "known", "unknown"] = "all"

    @property
    def many(self) -> bool:
        """True for the task on which a method that trains through the whole text tower takes hours."""
        return self.name == "many classes"


SHIFTS = (
    *(Shift(task, (task,)) for task in TASKS),
    Shift("all", TASKS),
    Shift("one designer", train=TRAIN[:1]),
    Shift("known words", words="known"),
    Shift("unknown words", words="unknown"),
    *(Shift(task, ()) for task in more.TASKS),
)


def names(shift: Shift, phase: Phase, drawings: Path | None = None) -> list[str]:
    """The names of a task for a phase, sorted; `drawings` is the file for a task without `tasks`."""
    if shift.tasks:
        found = names_of(shift.tasks)
    else:
        assert drawings is not None, f"{shift.name} needs the file of its drawings"
        found = more.class_names(drawings, shift.name)
    held_out = held_out_words(names_of(TASKS))
    return [
        name
        for name in found
        if (random.Random(name).random() < _SEARCHED) == (phase == "search")
        and (shift.words == "all" or has_word(name, held_out) == (shift.words == "unknown"))
    ]


def source(shift: Shift, phase: Phase, seed: int, drawings: Path | None = None) -> Source:
    """Images of the classes of a seed, in its order: the first half is base. `drawings` as in `names`."""
    classes = names(shift, phase, drawings)
    random.Random(seed).shuffle(classes)
    if shift.tasks:
        train, test = (Images(Drawings(classes, sets)) for sets in (shift.train, TEST))
    else:
        assert drawings is not None, f"{shift.name} needs the file of its drawings"
        train, test = (Images(more.read(drawings, shift.name, split, classes)) for split in ("train", "test"))
    return Source(shift.name, tuple(classes), (TEMPLATE,), splits={"train": train, "test": test})
