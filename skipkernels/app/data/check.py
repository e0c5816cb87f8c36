"""Check of the images of a dataset: unreadable files, sizes, and duplicates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

from PIL import Image

from ...digests import digest_bytes
from .base import InputError
from .source import Source, Split


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


def nonempty_splits(source: Source) -> list[Split]:
    """Return the splits that have images."""
    return [split for split in get_args(Split) if source.has_split(split)]


def facts(source: Source, advance: Callable[[], object] = lambda: None) -> list[Fact]:
    """Read all images of a dataset; `advance` is called after each."""

    def examined(image: Image.Image) -> tuple[tuple[int, int], str]:
        return image.size, digest_bytes(image.tobytes() + repr(image.size).encode())

    found = []
    for split in nonempty_splits(source):
        images = source.images(split)
        for name, label, result in zip(images.names, images.labels, images.each(examined), strict=True):
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
