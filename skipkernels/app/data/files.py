"""List folders, in an order that does not depend on the file system, and read text files; errors are one line."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...store import open_regular
from .base import InputError

# Those of torchvision, and of later formats. Files with another extension are images by their first bytes.
IMAGE_EXTENSIONS: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
IMAGE_EXTENSIONS += (".gif", ".avif", ".heic", ".heif")
HEAD = 64  # bytes that `image_format` reads
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIF")
_MAX_NAMES = 5  # in a message


def format_names(names: Sequence[str]) -> str:
    """Join names for a message; after the fifth, count them.

    >>> format_names(list("abcdefg"))
    'a, b, c, d, e and 2 more'
    """
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def absolute_path(path: str | Path) -> Path:
    """Return an absolute path, with "~" expanded; "~USER" of an unknown user is kept."""
    return Path(os.path.expanduser(path)).absolute()


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _raise_not_listed(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: can't be listed ({error.strerror}). Is it a folder that you may read?"
    ) from error


def subfolders(folder: Path) -> list[str]:
    """List the names of the folders in a folder, sorted, without hidden ones; links are followed."""
    return sorted(filter(_is_visible, next(os.walk(folder, onerror=_raise_not_listed))[1]))


def has_image_extension(name: str) -> bool:
    """Return True if the extension of a file name is that of an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def image_format(head: bytes) -> str | None:
    """Return Pillow's name of an image format by the first bytes of a file.

    BMP, PPM and TIFF are not recognised: a text may begin with the same letters, and raw photos are TIFFs.

    >>> image_format(b"GIF89a..."), image_format(b"BM")
    ('GIF', None)
    """
    if head[4:8] == b"ftyp":
        listed = head[16 : int.from_bytes(head[:4], "big")]  # compatible brands
        brands = [head[8:12], *(listed[start : start + 4] for start in range(0, len(listed), 4))]
        return min((_BRANDS[brand] for brand in brands if brand in _BRANDS), default=None)  # AVIFs are also mif1
    if head[:4] == b"RIFF":
        return "WEBP" if head[8:12] == b"WEBP" else None
    starts = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
    return next((name for start, name in starts.items() if head.startswith(start)), None)


def is_image(path: str | Path) -> bool:
    """Return True if a file has the extension, or else the first bytes, of an image."""
    if has_image_extension(os.path.basename(path)):
        return True
    try:
        with open_regular(path) as file:
            return image_format(file.read(HEAD)) is not None
    except OSError:
        return False


def format_others(others: Counter[str]) -> str:
    """Format the number of other files of `find_images` for a message."""
    counts = [f"{extension} {count}" for extension, count in sorted(others.items())]
    return f"skipped files that are not images: {format_names(counts)}"


def find_images(root: Path, folder: str) -> tuple[list[str], Counter[str]]:
    """Find the image files in a folder, relative to `root`, and its subfolders; count the other files by extension.

    Returns sorted paths with "/". Hidden files and folders are skipped. Links are followed, and each folder is visited
    once.
    """
    images: list[str] = []
    others: Counter[str] = Counter()
    top = os.path.join(root, folder)
    inside = Path(os.path.realpath(top))
    visited = {str(inside)}

    def is_new(path: str) -> bool:
        # make_dataset of torchvision follows a link to "." too: 42 paths of 2 images.
        target = os.path.realpath(path)
        if target in visited or (
            os.path.islink(path) and (inside in Path(target).parents or Path(target) in inside.parents)
        ):
            return False
        visited.add(target)
        return True

    for here, folders, files in os.walk(top, onerror=_raise_not_listed, followlinks=True):
        folders[:] = [name for name in sorted(folders) if _is_visible(name) and is_new(os.path.join(here, name))]
        for name in filter(_is_visible, files):
            path = os.path.join(here, name)
            if is_image(path):
                images.append(path[len(os.path.join(root, "")) :].replace(os.sep, "/"))
            else:
                others[PurePosixPath(name).suffix.lower() or "no extension"] += 1
    return sorted(images), others


def check_inside(path: str, location: str) -> None:
    """Raise an InputError if a path leads out of its folder; `location` is the file and the entry that it is from."""
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive or ".." in path.replace("\\", "/").split("/"):
        raise InputError(f"{location}: {path!r} leads out of the folder of the dataset. Paths must stay in it.")


def missing_files(root: Path, paths: list[str]) -> list[str]:
    """Return the paths below a root that do not exist. Lists each folder once, which is faster over a network."""
    listed: dict[str, frozenset[str]] = {}
    missing = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in listed:
            try:
                listed[folder] = frozenset(os.listdir(root / folder))
            except (OSError, ValueError):  # ValueError: a null character in the path
                listed[folder] = frozenset()
        if name not in listed[folder]:
            missing.append(path)
    return missing


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte-order mark."""
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). Is it a file that you may read?") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8 (byte {error.start}). Save it as UTF-8.") from error


def read_json(path: Path) -> Any:
    """Read a JSON file."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        duplicates = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if duplicates:
            raise ValueError(f"duplicate key {duplicates[0]!r}")
        return dict(pairs)

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not usable as JSON ({error}). Correct the file, or get it again.") from error
