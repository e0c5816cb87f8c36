"""Check of the images of a dataset: unreadable files, sizes, classes with few images, and duplicates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...digests import digest_bytes
from .base import InputError
from .files import format_names
from .images import Images, read_all, reason_of, unreadable
from .source import Source, Split
from .tasks import Task

_ALIKE = 3  # different bits of two similar images
_FLAT = 4  # bits of a hash; images with fewer have no structure to compare


class Fact(NamedTuple):
    """Result for one image: `reason` if it is unreadable, else its size in pixels, digest of its pixels, and hash."""

    split: Split
    name: str
    label: str
    reason: str | None
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    hash: int = 0


class Finding(NamedTuple):
    """An unreadable image, with the reason, or an image that is equal or similar to another one."""

    kind: str
    split: Split
    label: str
    name: str
    detail: str


def unreadable_images(task: Task) -> dict[str, str]:
    """Return the reason by name for each image of a task that can't be read."""
    held = () if task.validation is None else (task.validation,)
    parts: Any = (task.train, *(part.images for part in (*task.tests, *held)))
    return {part.names[index]: reason for part in parts for index, reason in unreadable(part).items()}


def without_unreadable(task: Task) -> Task:
    """Return a task without the images that can't be read, which a note names."""
    skipped: dict[str, None] = {}

    def readable(images: Any, classes: Sequence[str], what: str) -> Any:
        wrong = unreadable(images)
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
    note = f"{task.name}: skipped {len(skipped)} images that can't be read: {format_names(list(skipped))}."
    notes = (*task.notes, note) if skipped else task.notes
    return replace(task, train=train, tests=tests, validation=held, notes=notes)


def facts(source: Source, advance: Callable[[], object] = lambda: None) -> list[Fact]:
    """Read all images of a dataset; `advance` is called after each."""
    found = []
    for split in get_args(Split):
        images = source.images(split) if source.has_split(split) else None
        if not isinstance(images, Images):
            continue
        for name, label, result in zip(images.names, images.labels, read_all(images, _examined), strict=True):
            about = split, name, source.classes[label]
            error = isinstance(result, Exception)
            found.append(Fact(*about, reason_of(result, name)) if error else Fact(*about, None, *result))
            advance()
    return found


def _examined(image: Image.Image) -> tuple[tuple[int, int], str, int]:
    """Size, digest of the pixels, and dHash: the signs of the differences between neighbours in 9 × 8 grey pixels."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    return image.size, digest_bytes(image.tobytes() + repr(image.size).encode()), int.from_bytes(bits.tobytes(), "big")


def findings(images: Sequence[Fact]) -> list[Finding]:
    """Return the unreadable images, equal images, and similar ones in different classes or splits."""
    found = [
        Finding("unreadable", one.split, one.label, one.name, one.reason) for one in images if one.reason is not None
    ]
    first: dict[str, Fact] = {}
    readable = [one for one in images if one.reason is None]
    for one in readable:
        other = first.setdefault(one.digest, one)
        if other is not one:
            where = _difference(one, other)
            found.append(_finding(f"duplicate in {where}" if where else "duplicate", one, other))
    distinct = list(first.values())
    for i, j in similar_pairs(np.array([one.hash for one in distinct], np.uint64)):
        if where := _difference(distinct[i], distinct[j]):
            found.append(_finding(f"similar in {where}", distinct[j], distinct[i]))
    return found


def _finding(kind: str, one: Fact, other: Fact) -> Finding:
    return Finding(kind, one.split, one.label, one.name, f"{other.name} ({other.split}, {other.label})")


def _difference(one: Fact, other: Fact) -> str:
    different = {"another class": one.label != other.label, "another split": one.split != other.split}
    return " and ".join(name for name, differs in different.items() if differs)


def similar_pairs(hashes: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Return the pairs of hashes that differ in at most three bits, as ascending indices; flat images have none.

    One of their four bands of 16 bits is then equal, so only hashes with an equal band are compared.
    """

    def ones(values: NDArray[np.uint64]) -> Any:
        return np.unpackbits(values[:, None].view(np.uint8), axis=1).sum(1)

    pairs: set[tuple[int, int]] = set()
    usable = np.flatnonzero((ones(hashes) >= _FLAT) & (ones(~hashes) >= _FLAT))
    for shift in range(0, 64, 16):
        groups = defaultdict(list)
        for index, band in zip(usable, hashes[usable] >> np.uint64(shift) & np.uint64(0xFFFF), strict=True):
            groups[int(band)].append(index)
        for group in map(np.array, groups.values()):
            for place, first in enumerate(group[:-1], 1):
                others = group[place:]
                close = others[ones(hashes[others] ^ hashes[first]) <= _ALIKE]
                pairs.update((int(first), int(other)) for other in close)
    return sorted(pairs)
