"""Images of a task that can't be read: an error that names all of them, or a task without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .base import InputError
from .files import format_names
from .images import Images
from .tasks import Task


def check_readable(task: Task, tell: Callable[[str], None]) -> None:
    """Raise an error that names all images of a task that can't be read; `tell` is called with the reason for each."""
    held_out = () if task.validation is None else (task.validation,)
    names = []
    for part in (task.train, *(part.images for part in (*task.tests, *held_out))):
        for index, reason in _unreadable(part).items():
            names.append(part.names[index])
            tell(reason)
    if names:
        raise InputError(
            f"{len(names)} of the images can't be read: {format_names(names)}. Replace or remove them, or leave "
            "them out with `unreadable=skip`."
        )


def without_unreadable(task: Task) -> Task:
    """Return a task without the images that can't be read, which a note names."""
    skipped: list[str] = []

    def readable(images: Images, classes: Sequence[str], what: str) -> Images:
        wrong = _unreadable(images)
        skipped.extend(images.names[index] for index in wrong)
        part = images.subset(index for index in range(len(images)) if index not in wrong)
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
    held_out = len(set(train.names) & set(task.train.names[len(task.train) - task.held_out :]))
    note = f"{task.name}: skipped {len(skipped)} images that can't be read: {format_names(skipped)}."
    return replace(task, train=train, tests=tests, validation=validation, notes=(*task.notes, note), held_out=held_out)


def _unreadable(images: Images) -> dict[int, str]:
    """Return the reason by index for each image that can't be read."""
    read = enumerate(images.each(lambda image: None))
    return {index: str(result) for index, result in read if isinstance(result, InputError)}
