"""What is in folders and text files, in an order that does not depend on the disk, and refused in one line."""

from __future__ import annotations

import io
import json
import os
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..store import MANIFEST, open_regular
from .base import InputError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision has them
# Of a folder that skipkernels itself has written: what is in it, a file that it has, and others of which it has some.
_OWN = {
    ("results", "config.yaml"): {"metrics.json", "metrics.jsonl", "state.pt", "model.safetensors", "delta.safetensors"},
    ("features", MANIFEST): {"00000.safetensors"},
}
_SHOWN = 5  # of the names in a message


def shown(names: Sequence[str]) -> str:
    """Some names for a message.

    >>> shown(list("abcdefg"))
    'a, b, c, d, e and 2 more'
    """
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def absolute(path: str | Path) -> Path:
    """An absolute path; "~" is the home folder, and the name of a user that there isn't is left as it is."""
    return Path(os.path.expanduser(path)).absolute()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    except OSError as error:
        raise InputError(f"{folder}: can't be listed ({error.strerror}). Is it a folder that you may read?") from error
    return sorted(visible, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also of a link to one. Nothing is asked of the disk for what is no link."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are left out, links are followed.

    Raises:
        InputError: If it can't be listed.
    """
    return [entry.name for entry in _entries(folder) if _is_folder(entry)]


def is_image_name(name: str) -> bool:
    """Whether a file is an image, by its ending."""
    return name.lower().endswith(IMAGE_ENDINGS)


def images_below(root: Path, folder: str) -> tuple[list[str], Counter[str]]:
    """The image files of a folder and the folders in it, and how many files of what ending are none.

    Hidden files and folders are left out. Links are followed, but a folder that several paths lead to is visited once,
    by the path without links if there is one, and none that the class folder is in.

    Args:
        root: Paths are relative to it.
        folder: Where to look, from the root.

    Returns:
        Paths with "/", sorted; and the number of other files by ending.

    Raises:
        InputError: If a folder can't be listed, a link leads nowhere, an image is not a regular file, or one of the
            folders is of results or features.
    """
    images: list[str] = []
    others: Counter[str] = Counter()
    visited = {_identity(parent) for parent in (root / folder).resolve().parents}
    folders, links = deque([folder]), deque[str]()
    while folders or links:
        here = (folders or links).popleft()  # links come last, so that they change no path that is there without them
        identity = _identity(root / here)
        if identity in visited:
            continue
        visited.add(identity)
        entries = _entries(root / here)
        names = {entry.name for entry in entries}
        for (kind, first), more in _OWN.items():
            if first in names and names & more:
                raise InputError(f"{root / here}: a folder of {kind}, not of images. Move it out of the dataset.")
        for entry in entries:
            inner = f"{here}/{entry.name}"
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(inner)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise InputError(f"{entry.path}: a link to {os.readlink(entry.path)}, which is not there. Remove it.")
            elif not is_image_name(entry.name):
                others[PurePosixPath(entry.name).suffix.lower() or "no ending"] += 1
            elif entry.is_file():
                images.append(inner)
            else:
                raise InputError(f"{entry.path}: not a regular file, so it can't be an image. Remove it.")
    return sorted(images), others


def _identity(folder: Path) -> tuple[int, int]:
    """What tells a folder from others, whatever path leads to it."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise InputError(f"{folder}: can't be listed ({error.strerror}). Is it a folder that you may read?") from error
    return status.st_dev, status.st_ino


def check_inside(path: str, where: str) -> None:
    """Refuse a path that leads out of the folder it is meant to be in.

    Raises:
        InputError: If so.
    """
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive or ".." in path.replace("\\", "/").split("/"):
        raise InputError(f"{where}: {path!r} leads out of the folder of the dataset. Paths must stay in it.")


def check_files(root: Path, paths: list[str], where: str) -> None:
    """Refuse a list of files of which some are not there.

    Folders are listed once each: over a network that is quicker than to look for every file.

    Raises:
        InputError: If so; names the first, and says how many.
    """
    listed: dict[str, frozenset[str]] = {}
    missing = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in listed:
            try:
                listed[folder] = frozenset(os.listdir(root / folder))
            except (OSError, ValueError):  # ValueError: a text that no system takes for a path
                listed[folder] = frozenset()
        if name not in listed[folder]:
            missing.append(path)
    if missing:
        raise InputError(
            f"{where}: {len(missing)} of {len(paths)} files are missing, such as {missing[0]!r}: looked for in {root}. "
            "Is the dataset unpacked there as a whole?"
        )


def read_text(path: Path) -> str:
    """A text file, in UTF-8 with or without its mark.

    Raises:
        InputError: If it can't be read.
    """
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). Is it a file that you may read?") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8 (byte {error.start}). Save it as UTF-8.") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: If it can't be read, is no JSON, or has one key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is there twice")
        return dict(pairs)

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not usable as JSON ({error}). Mend the file, or get it again.") from error
