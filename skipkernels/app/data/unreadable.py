"""Tasks without the images that can't be read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from .base import InputError
from .files import format_names
from .images import Images
from .tasks import Task


def without_unreadable(task: Task) -> Task:
    """Return a task without the images that can't be read, which a note names."""
    skipped: list[str] = []

    def readable(images: Images, classes: Sequence[str], what: str) -> Images:
        wrong = [isinstance(result, InputError) for result in images.each(lambda image: None)]
        skipped.extend(itertools.compress(images.names, wrong))
        part = images.subset(index for index, is_wrong in enumerate(wrong) if not is_wrong)
        lost = set(images.labels) - set(part.labels) if what == "training" or not len(part) else set()
        if lost:
            names = format_names([classes[label] for label in sorted(lost)])
            raise InputError(f"{task.name}: no {what} image of {names} can be read. Replace them.", "data")
        return part

    train = readable(task.train, task.tests[0].classes, "training")
    tests = tuple(replace(test, images=readable(test.images, test.classes, "test")) for test in task.tests)
    validation = task.validation
    if validation is not None:
        validation = replace(validation, images=readable(validation.images, validation.classes, "validation"))
    if not skipped:
        return task
    last = task.train.names[len(task.train) - task.held_out :]  # of the images that were chosen for validation
    held_out = len(set(train.names) & set(last))
    names = f"skipped {len(skipped)} images that can't be read: {format_names(skipped)}."
    note = f"{task.name}: {names} The numbers in other notes include them."
    return replace(task, train=train, tests=tests, validation=validation, notes=(*task.notes, note), held_out=held_out)
