"""A folder of images, one folder in it for each class: `imagefolder:PATH`.

Either the class folders are in PATH, or PATH has `train/`, `val/` (or `valid/`, `validation/`) and `test/` (also
`training/`, `testing/`, in any case of letters) with the same class folders in each. A label is the rank of a class
folder among their sorted names. Images are the files that torchvision takes for some by their ending, in the class
folder or any folder in it; hidden ones are ignored, other files are counted.

Splits. What is there is used. With `val/` and no `test/`, the images of `val/` are tested on, as is usual for ImageNet.
With neither, the images of each class are divided by a hash of their paths: 30 % test, 20 % val, the rest train,
rounded to the nearest, with at least one of each class in train and in test. The order on the disk plays no part.

Class names. They are those of the folders, "_" for a space; or PATH has one of

- `classes.json`, {"folder": "name", …};
- `classes.txt` with a folder, a tab and its name in each line, in any order;
- `classes.txt` with a name in each line, in the order of the sorted folders.

The first two may name folders that are not there too. A line that begins with the name of a folder and a space could be
read either way: if all do, the file is refused.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from .base import InputError
from .few_shot import place
from .files import absolute, images_below, is_image_name, read_json, read_text, shown, subfolders
from .images import LabelledImages
from .source import Split, SplitSource, at_hand, class_names, tidy
from .templates import Templates, templates_of

_ROLES: dict[str, Split] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_ROLES |= {"val": "val", "valid": "val", "validation": "val"}
# Tenths of the images of a class, as CoOp divides; the rest is for training.
_TEST_TENTHS, _VAL_TENTHS = 3, 2


def open_image_folder(path: str | Path, templates: Templates = None) -> SplitSource:
    """Read a folder of images; see the head of this module.

    Args:
        path: The folder.
        templates: As for `open_source`.

    Raises:
        InputError: If it is no such folder; one line that says why.
    """
    name = f"imagefolder:{path}"
    root = absolute(path)
    if not str(path) or not os.path.isdir(root):
        raise InputError(
            f"--data: {name}: no folder {root if str(path) else 'given'}; it must hold one folder for each class."
        )
    split_folders = _split_folders(name, root)
    folders = _class_folders(name, root, list(split_folders.values()))
    names = _class_names(name, root, folders)
    notes: list[str] = []
    found: dict[str, dict[str, list[str]]] = {}  # of each split folder, of each class folder: paths of images
    others: Counter[str] = Counter()
    for part in split_folders.values() or [""]:
        found[part] = {}
        for folder in folders:
            found[part][folder], skipped = images_below(root, f"{part}/{folder}" if part else folder)
            others += skipped
    empty = [f"{part}/{folder}".lstrip("/") for part in found for folder in folders if not found[part][folder]]
    if empty:
        raise InputError(f"--data: {name}: no images in {shown(empty)}. Add some, or remove what is empty.")
    if others:
        endings = ", ".join(f"{ending} {count}" for ending, count in sorted(others.items()))
        notes.append(f"{name}: skipped, as they are no images: {endings}.")
    paths_of: dict[str, list[str]] = defaultdict(list)
    for part in found:
        for folder in folders:
            paths_of[os.path.realpath(root / part / folder)].append(f"{part}/{folder}".lstrip("/"))
    same = [" and ".join(sorted(paths)) for paths in paths_of.values() if len(paths) > 1]
    if same:
        notes.append(f"{name}: the same folder, so the same images: {shown(same)}.")
    beside = sum(is_image_name(file.name) and file.name[0] != "." and os.path.isfile(file) for file in root.iterdir())
    if beside:
        notes.append(f"{name}: skipped, as they are beside the class folders: images {beside}.")

    divided: dict[Split, dict[str, list[str]]] = {split: found[part] for split, part in split_folders.items()}
    absent: dict[Split, str] = {
        split: f"there is no folder {split}/ in {root}. Make one." for split in ("train", "val", "test")
    }
    if not {"val", "test"} & set(divided):
        divided = divide(name, found[split_folders.get("train", "")])
        counts = ", ".join(f"{sum(map(len, of_class.values()))} {split}" for split, of_class in divided.items())
        notes.append(f"{name}: no test/, so the images of each class are divided by a hash of their paths: {counts}.")
        if not any(divided["val"].values()):
            del divided["val"]
            absent["val"] = "its classes have too few images for that. Add some, or make val/."
    elif "test" not in divided:
        divided["test"] = divided.pop("val")
        notes.append(f"{name}: no test/, so {split_folders['val']}/ is tested on.")
        absent["val"] = f"there is no test/, so {split_folders['val']}/ is tested on. Add test/ to have both."
    parts = {}
    for split, of_class in divided.items():
        paths = [path for folder in folders for path in of_class[folder]]
        labels = [label for label, folder in enumerate(folders) for _ in of_class[folder]]
        parts[split] = at_hand(LabelledImages(root, paths, labels))
    return SplitSource(name, names, templates_of(None, templates), parts, notes=tuple(notes), absent=absent)


def _split_folders(name: str, root: Path) -> dict[Split, str]:
    """The folder of each split; empty if class folders are in the root."""
    folders = subfolders(root)
    if not folders:
        raise InputError(f"--data: {name}: no folders in {root}; it must hold one for each class.")
    splits = [folder for folder in folders if folder.lower() in _ROLES]
    others = [folder for folder in folders if folder.lower() not in _ROLES]
    if others and (len(splits) > 1 or any(subfolders(root / folder) for folder in splits)):
        raise InputError(
            f"--data: {name}: {shown(splits)} and {shown(others)} are side by side, so it can't be told whether they "
            "are splits or classes. Move what is neither elsewhere."
        )
    if others:  # and a class that is named like a split
        return {}
    roles: dict[Split, str] = {}
    for folder in splits:
        role = _ROLES[folder.lower()]
        if role in roles:
            raise InputError(f"--data: {name}: {roles[role]}/ and {folder}/ are both {role} images. Merge them.")
        roles[role] = folder
    if set(roles) == {"val"}:
        raise InputError(f"--data: {name}: {splits[0]}/ alone; add train/ or test/, or name PATH/{splits[0]}.")
    return roles


def _class_folders(name: str, root: Path, parts: list[str]) -> list[str]:
    """Sorted; the same in each part of the data."""
    found = {part: subfolders(root / part) for part in parts or [""]}
    folders = sorted({folder for of_part in found.values() for folder in of_part})
    for part, of_part in found.items():
        lacking = [folder for folder in folders if folder not in of_part]
        if lacking or not folders:
            what = f"no folder {shown(lacking)}, which another split has" if lacking else "no folders in it"
            raise InputError(f"--data: {name}: {part}/ has {what}. Each split must have a folder of every class.")
    return folders


def divide(name: str, paths: Mapping[str, list[str]]) -> dict[Split, dict[str, list[str]]]:
    """Divide the images of each class into train, val and test by a hash of their paths.

    Args:
        name: Of the dataset, for messages.
        paths: Of the images of each class.

    Raises:
        InputError: If a class has one image only.

    Example:
        >>> divided = divide("a", {"cat": [f"cat/{n}.jpg" for n in range(10)]})
        >>> {split: len(part["cat"]) for split, part in divided.items()}
        {'train': 5, 'val': 2, 'test': 3}
    """
    divided: dict[Split, dict[str, list[str]]] = {"train": {}, "val": {}, "test": {}}
    for folder, images in paths.items():
        if len(images) < 2:
            raise InputError(
                f"--data: {name}: class {folder} has 1 image, and one must be trained and one tested on. Add some, or "
                "make train/ and test/."
            )
        order = sorted(images, key=lambda path: place("split", 0, path))
        tests = (_TEST_TENTHS * len(images) + 5) // 10  # 1 of 2 images
        vals = (_VAL_TENTHS * len(images) + 5) // 10
        divided["train"][folder] = sorted(order[tests + vals :])
        divided["val"][folder] = sorted(order[tests : tests + vals])
        divided["test"][folder] = sorted(order[:tests])
    return divided


# ---- class names -----------------------------------------------------------------------------------------------------


def _class_names(name: str, root: Path, folders: list[str]) -> tuple[str, ...]:
    """Names by label, none twice."""
    text, mapping = root / "classes.txt", root / "classes.json"
    if text.is_file() and mapping.is_file():
        raise InputError(f"--data: {name}: both classes.txt and classes.json are there. Remove one.")
    if mapping.is_file():
        names = _of_folders(mapping, folders, read_json(mapping))
    elif text.is_file():
        names = _names_in_text(text, folders)
    else:
        names = folders
    return class_names(f"--data: {name}", "folder", folders, names, "name them in classes.json")


def _of_folders(file: Path, folders: list[str], named: object) -> list[str]:
    if not isinstance(named, dict) or not all(isinstance(value, str) for value in named.values()):
        raise InputError(f'{file}: expected {{"folder": "name", …}}, a name for each class folder.')
    unnamed = [folder for folder in folders if folder not in named]
    if unnamed:
        raise InputError(f"{file}: no name for folder {shown(unnamed)}. Add it.")
    return [named[folder] for folder in folders]


def _names_in_text(file: Path, folders: list[str]) -> list[str]:
    lines = [line.rstrip() for line in read_text(file).splitlines() if line.strip()]
    if any("\t" in line for line in lines):
        pairs = [line.partition("\t") for line in lines]
        of_folder = {folder.strip(): of_class for folder, _, of_class in pairs}
        if len(of_folder) < len(pairs):
            raise InputError(f"{file}: a folder is named twice. Name each once, with a tab after the folder.")
        return _of_folders(file, folders, of_folder)
    if len(lines) != len(folders):
        raise InputError(
            f"{file}: expected a name for each of {len(folders)} class folders; got {len(lines)} lines. Write one in "
            "each line, in the order of the sorted folders, or each folder, a tab and its name."
        )
    if all(any(line.startswith(f"{folder} ") for folder in folders) for line in lines):
        raise InputError(
            f"{file}: {lines[0]!r} is a name, or a folder and its name. Put a tab after the folder, or write "
            "classes.json."
        )
    of_name = {tidy(folder).casefold(): folder for folder in folders}
    for line, folder in zip(lines, folders, strict=True):
        meant = of_name.get(tidy(line).casefold(), folder)
        if meant != folder:
            raise InputError(
                f"{file}: by its place {line!r} is the name of folder {folder}, but there is a folder {meant}. Sort "
                "the lines as the folders are, or write each folder, a tab and its name."
            )
    return lines
