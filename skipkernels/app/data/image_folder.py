"""Folders of images: `imagefolder:PATH`.

PATH has a folder for each class, or the folders of splits, with the same class folders in each: `train/` (`training/`),
`val/` (`valid/`, `validation/`) and `test/` (`testing/`), in upper or lower case. Without `test/`, the images of `val/`
are the test images, as is usual for ImageNet; without both, images are split by a hash (`splits.listed_source`).

A class has the name of its folder, with "_" replaced by spaces, or that in the file `classes.json` in PATH, {"folder":
"name", …}, which may also name folders that do not exist. Labels follow the sorted names of the folders.
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
    splits = _split_folders(name, root)
    folders = _class_folders(name, root, list(splits))
    classes = _class_names(name, root, folders)
    listed = {f"{part}{folder}": (label, splits[part]) for part in splits for label, folder in enumerate(folders)}
    found, others = find_images(root, listed)
    with_images = {key for _, key in found}
    if empty := [folder for folder, key in listed.items() if key not in with_images]:
        skipped = f" ({format_others(others)})" if others else ""
        raise open_error(f"{name}: no images in {format_names(empty)}{skipped}. Add some, or remove the empty folders.")
    images = Images.of_files(root, [path for path, _ in found], [label for _, (label, _) in found])
    notes = [f"{name}: {format_others(others)}."] if others else []
    return listed_source(name, images, classes, [split for _, (_, split) in found], templates, notes=notes)


def _split_folders(name: str, root: Path) -> dict[str, Split]:
    """Return the split of each folder, such as "train/"; {"": "train"} if the class folders are in the root."""
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
    """Return the class names by label: those of classes.json, or of the folders."""
    file = root / "classes.json"
    if file.is_file():
        name_of = read_json(file, dict[str, str])
        if unnamed := [folder for folder in folders if folder not in name_of]:
            raise InputError(f"{file}: no name for folder {format_names(unnamed)}. Add it.")
        folders = [name_of[folder] for folder in folders]
    return class_names(name, folders, "name the folders in classes.json")
