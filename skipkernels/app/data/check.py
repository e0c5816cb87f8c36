"""Check of the images of a dataset: unreadable files, sizes, classes with few images, and duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from PIL import Image

from ...digests import digest_bytes
from .base import InputError
from .files import format_names
from .images import ImageFiles, Images
from .reading import read_ahead
from .source import Source, Split
from .tasks import Task


def _read(images: Images, use: Callable[[Any], Any]) -> Iterator[Any]:
    """Read images in order, in threads if they are files; yield the results of `use`, or the InputError of an image."""
    used = images.with_transform(use)
    workers = None if isinstance(images.dataset, ImageFiles) else 1
    for index, result in enumerate(read_ahead(lambda n: used[n][0], len(images), workers=workers)):
        if isinstance(result, InputError):
            if result.argument is not None:  # about the label, not about the image
                raise result
        elif isinstance(result, Exception):  # from a dataset of the user
            result = InputError(f"{images.names[index]}: {result!r}")
        yield result


def _unreadable(images: Images) -> dict[int, str]:
    """Return the reason by index for each image that can't be read."""
    read = enumerate(_read(images, lambda image: None))
    return {index: str(result) for index, result in read if isinstance(result, InputError)}


def check_readable(task: Task, tell: Callable[[str], None]) -> None:
    """Raise an error that names all images of a task that can't be read; `tell` is called with the reason for each."""
    held = () if task.validation is None else (task.validation,)
    parts = (task.train, *(part.images for part in (*task.tests, *held)))
    found = {part.names[index]: reason for part in parts for index, reason in _unreadable(part).items()}
    for reason in found.values():
        tell(reason)
    if found:
        raise InputError(
            f"{len(found)} of the images can't be read: {format_names(list(found))}. Replace or remove them, or leave "
            "them out with `unreadable=skip`."
        )


def without_unreadable(task: Task) -> Task:
    """Return a task without the images that can't be read, which a note names."""
    skipped: dict[str, None] = {}

    def readable(images: Images, classes: Sequence[str], what: str) -> Images:
        wrong = _unreadable(images)
        if not wrong:
            return images
        skipped.update((images.names[index], None) for index in wrong)
        part = images.subset(index for index in range(len(images)) if index not in wrong)
        lost = set(images.labels) - set(part.labels) if what == "training" or not len(part) else set()
        if lost:
            names = format_names([classes[label] for label in sorted(lost)])
            raise InputError(f"{task.name}: no {what} image of {names} can be read. Replace them.", "data")
        return part

    train = readable(task.train, task.tests[0].classes, "training")
    tests = tuple(replace(test, images=readable(test.images, test.classes, "test")) for test in task.tests)
    held = task.validation
    if held is not None:
        held = replace(held, images=readable(held.images, held.classes, "validation"))
    held_out = len(set(train.names) & set(task.train.names[len(task.train) - task.held_out :]))
    note = f"{task.name}: skipped {len(skipped)} images that can't be read: {format_names(list(skipped))}."
    notes = (*task.notes, note) if skipped else task.notes
    return replace(task, train=train, tests=tests, validation=held, notes=notes, held_out=held_out)


# ---- skipkernels check -----------------------------------------------------------------------------------------------


class Fact(NamedTuple):
    """Result for one image: `reason` if it is unreadable, else its size in pixels, and digest of its pixels."""

    split: Split
    name: str
    label: str
    reason: str | None
    size: tuple[int, int] = (0, 0)
    digest: str = ""


class Finding(NamedTuple):
    """An unreadable image, with the reason, or an image that is equal to another one."""

    kind: str
    split: Split
    label: str
    name: str
    detail: str


def facts(source: Source, advance: Callable[[], object] = lambda: None) -> list[Fact]:
    """Read all images of a dataset; `advance` is called after each."""

    def examined(image: Image.Image) -> tuple[tuple[int, int], str]:
        return image.size, digest_bytes(image.tobytes() + repr(image.size).encode())

    found = []
    for split in (each for each in get_args(Split) if source.has_split(each)):
        images = source.images(split)
        for name, label, result in zip(images.names, images.labels, _read(images, examined), strict=True):
            about = split, name, source.classes[label]
            found.append(Fact(*about, str(result)) if isinstance(result, InputError) else Fact(*about, None, *result))
            advance()
    return found


def findings(images: Sequence[Fact]) -> list[Finding]:
    """Return the unreadable images, and the images that are equal to an earlier one."""
    found = []
    first: dict[str, Fact] = {}
    for one in images:
        if one.reason is not None:
            found.append(Finding("unreadable", one.split, one.label, one.name, one.reason))
            continue
        other = first.setdefault(one.digest, one)
        if other is not one:
            different = {"another class": one.label != other.label, "another split": one.split != other.split}
            where = " and ".join(name for name, differs in different.items() if differs)
            kind = f"duplicate in {where}" if where else "duplicate"
            detail = f"{other.name} ({other.split}, {other.label})"
            found.append(Finding(kind, one.split, one.label, one.name, detail))
    return sorted(found, key=lambda finding: finding.kind != "unreadable")
