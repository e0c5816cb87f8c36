"""Folders of images: `imagefolder:PATH`.

PATH has a folder for each class, or the folders `train/` (or `training/`), `val/` (`valid/`, `validation/`) and `test/`
(`testing/`), in upper or lower case, with the same class folders in each. Labels follow the sorted names of the class
folders. Images are the files in a class folder and its subfolders with the extension of one; hidden files are left out,
and other files are counted in a note.

Splits. Existing splits are used. With `val/` and without `test/`, the images of `val/` are the test images, as is usual
for ImageNet. With neither, the images of each class are split by a hash of their paths: 30 % test, 20 % val, the rest
train, rounded to the nearest. If a class has only one image, which must train, there is no test split. The order of
files on the disk has no effect.

Class names. They are the names of the folders, with "_" replaced by spaces, or are read from `classes.json` in PATH,
{"folder": "name", …}, which may also name folders that do not exist.
"""

from __future__ import annotations

import os
from pathlib import Path

from .base import InputError, open_error
from .class_names import class_names
from .files import absolute_path, find_images, format_names, format_others, read_json, subfolders
from .images import Images
from .source import Source, Split
from .splits import SPLIT_NAMES, listed_source
from .templates import Templates


def open_image_folder(path: str | Path, templates: Templates = None) -> Source:
    """Open a folder of images; see the docstring of this module."""
    name, root = f"imagefolder:{path}", absolute_path(path)
    if not os.path.isdir(root):
        raise open_error(f"{name}: no folder {root}; it must hold one folder for each class.")
    parts = _split_folders(name, root)
    folders = _class_folders(name, root, list(parts))
    classes = _class_names(name, root, folders)
    listed = {
        f"{part}{folder}": (label, split) for part, split in parts.items() for label, folder in enumerate(folders)
    }
    found, others = find_images(root, listed)
    with_images = {key for _, key in found}
    empty = [folder for folder, key in listed.items() if key not in with_images]
    if empty:
        skipped = f" ({format_others(others)})" if others else ""
        raise open_error(f"{name}: no images in {format_names(empty)}{skipped}. Add some, or remove the empty folders.")
    return listed_source(
        name,
        Images.of_files(root, [path for path, _ in found], [label for _, (label, _) in found]),
        classes,
        [split for _, (_, split) in found],
        templates,
        notes=[f"{name}: {format_others(others)}."] if others else [],
    )


def _split_folders(name: str, root: Path) -> dict[str, Split]:
    """Return the split of each folder of a split, such as "train/"; that of "" if the class folders are in the root."""
    folders = subfolders(root)
    candidates = [folder for folder in folders if folder.lower() in SPLIT_NAMES]
    others = [folder for folder in folders if folder.lower() not in SPLIT_NAMES]
    if others and (len(candidates) > 1 or any(subfolders(root / folder) for folder in candidates)):
        raise open_error(
            f"{name}: {format_names(candidates)} and {format_names(others)} are side by side, so they may be "
            "splits or classes. Move the folders that are neither elsewhere."
        )
    if others or not candidates:  # a class may have the name of a split
        return {"": "train"}
    splits = {f"{folder}/": SPLIT_NAMES[folder.lower()] for folder in candidates}
    if len(set(splits.values())) < len(splits):
        raise open_error(f"{name}: two of {format_names(candidates)} have images of one split. Merge them.")
    return splits


def _class_folders(name: str, root: Path, parts: list[str]) -> list[str]:
    """Return the sorted class folders, which must be the same in each split."""
    found = {part: subfolders(root / part) for part in parts}
    folders = sorted(set().union(*found.values()))
    for part, of_part in found.items():
        absent = [folder for folder in folders if folder not in of_part]
        if absent or not folders:
            problem = f"no folder {format_names(absent)}, which another split has" if absent else "no folders in it"
            raise open_error(f"{name}: {part or root} has {problem}. It must have a folder of every class.")
    return folders


def _class_names(name: str, root: Path, folders: list[str]) -> tuple[str, ...]:
    """Return the class names by label."""
    mapping, names = root / "classes.json", folders
    if mapping.is_file():
        name_of = read_json(mapping, dict[str, str])
        unnamed = [folder for folder in folders if folder not in name_of]
        if unnamed:
            raise InputError(f"{mapping}: no name for folder {format_names(unnamed)}. Add it.")
        names = [name_of[folder] for folder in folders]
    return class_names(name, names, "name the folders in classes.json")
