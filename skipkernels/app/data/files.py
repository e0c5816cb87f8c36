"""List images in folders, and read text files; errors are one line."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .base import InputError

# Those of torchvision, and later formats.
IMAGE_EXTENSIONS: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
IMAGE_EXTENSIONS += (".gif", ".avif", ".heic", ".heif")
_MAX_NAMES = 5  # in a message
Json = TypeVar("Json")
Key = TypeVar("Key", bound=Any)  # with an order


def format_names(names: Sequence[str]) -> str:
    """Join names for a message; after the fifth, count them.

    >>> format_names(list("abcdefg"))
    'a, b, c, d, e and 2 more'
    """
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with "~" expanded, which a shell leaves in --out=~/run; "~USER" of an unknown user is kept."""
    return Path(os.path.expanduser(path))


def absolute_path(path: str | Path) -> Path:
    """Return an absolute path, with "~" expanded."""
    return expanded(path).absolute()


def file_name(text: str) -> str:
    """Return text as a name of a file or a folder.

    >>> file_name("imagefolder:my photos/2026-skip")
    'imagefolder-my-photos-2026-skip'
    """
    return re.sub(r"[^\w.+-]", "-", text)


def _is_visible(path: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def subfolders(folder: Path) -> list[str]:
    """List the names of the folders in a folder, sorted, without hidden ones; links are followed."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and _is_visible(entry.name))
    except OSError as error:
        raise InputError(f"{folder}: can't be listed ({error.strerror}). Is it a folder that you may read?") from error


def find_images(root: Path, folders: Mapping[str, Key]) -> tuple[list[tuple[str, Key]], Counter[str]]:
    """Find the images of folders in `root` and of their subfolders; links are followed, to each folder once.

    Args:
        root: Folder that contains the others.
        folders: Key of each folder, such as its label; "" is `root` itself.

    Returns:
        The path of each image relative to `root`, with "/", and the key of its folder, sorted by key and path; and the
        number of other files by extension. Hidden files are left out.
    """
    images: list[tuple[str, Key]] = []
    others: Counter[str] = Counter()
    top = os.path.join(root, "")
    for folder, key in folders.items():
        seen = set(map(str, Path(os.path.realpath(os.path.join(top, folder))).parents))
        for parent, inner, names in os.walk(os.path.join(top, folder), followlinks=True):
            if (real := os.path.realpath(parent)) in seen:  # by a link, such as one to a folder that it is in
                inner.clear()
                continue
            seen.add(real)
            inner.sort()  # of two links to a folder, the first by name
            for name in names:
                path = os.path.join(parent, name)[len(top) :].replace(os.sep, "/")
                extension = os.path.splitext(name)[1].lower()
                if _is_visible(path) and extension in IMAGE_EXTENSIONS:
                    images.append((path, key))
                elif _is_visible(path):
                    others[extension or "no extension"] += 1
    return sorted(images, key=lambda image: (image[1], image[0])), others


def format_others(others: Counter[str]) -> str:
    """Format the number of other files of `find_images` for a message."""
    counts = [f"{extension} {count}" for extension, count in sorted(others.items())]
    return f"skipped files that are not images: {format_names(counts)}"


def path_inside(folder: str | Path, path: str) -> str | None:
    """Return a path relative to the folder that it is in, with "/"; None if it leads out of the folder.

    >>> path_inside("/photos", "cat/../dog/./1.png"), path_inside("/photos", "../1.png")
    ('dog/1.png', None)
    """
    start = os.path.join(os.path.normpath(folder), "")
    full = os.path.normpath(os.path.join(start, path))
    inside = os.path.normcase(full).startswith(os.path.normcase(start))
    return full[len(start) :].replace(os.sep, "/") if inside else None


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). Is it a file that you may read?") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8 (byte {error.start}). Save it as UTF-8.") from error


def read_json(path: Path, kind: type[Json]) -> Json:
    """Read a JSON file with values of the types in `kind`, such as dict[str, str]."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(read_text(path), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{part!r}]" for part in first["loc"])
        raise InputError(f"{path}{where}: {first['msg']}. Correct the file, or get it again.") from error
