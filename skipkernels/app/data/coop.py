"""Datasets in CoOp's layout: `coop:NAME` in the folder `root`, which holds all of them.

Eleven datasets are for training and testing, and four variants of ImageNet for testing. Most have a JSON file,
`{"train"|"val"|"test": [[path, label, class name], …]}`. ImageNet and its variants have folders named by WordNet id,
and class names in `classnames.txt`; a variant without this file uses that of ImageNet. Aircraft has text files.

ImageNet's validation images are the test images. ImageNet-A and ImageNet-R have 200 of the 1000 classes, labelled in
the order of their sorted folders, and are evaluated only among these, as in CoOp. Paths in the files must stay in the
folder that they are relative to. CoOp's few-shot pickles are not read: a pickle can execute any code.
"""

from __future__ import annotations

import os
import posixpath
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

from .base import InputError, open_error
from .files import (
    absolute_path,
    check_inside,
    find_images,
    format_names,
    missing_files,
    read_json,
    read_text,
    subfolders,
)
from .images import Images, LabelledImages
from .source import Protocol, Split, SplitSource, is_valid_class_name, normalize_class_name
from .templates import Templates, resolve_templates


@dataclass(frozen=True)
class Layout:
    """Location of a dataset below the root."""

    folder: str
    images: str = ""  # Folder in it that paths are relative to
    split_file: str = ""  # JSON file in it, if any


DATASETS = {
    "imagenet": Layout("imagenet", "images"),
    "caltech101": Layout("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": Layout("oxford_pets", "images", "split_zhou_OxfordPets.json"),
    "stanford_cars": Layout("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "oxford_flowers": Layout("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
    "food101": Layout("food-101", "images", "split_zhou_Food101.json"),
    "fgvc_aircraft": Layout("fgvc_aircraft", "images"),
    "sun397": Layout("sun397", "SUN397", "split_zhou_SUN397.json"),
    "dtd": Layout("dtd", "images", "split_zhou_DescribableTextures.json"),
    "eurosat": Layout("eurosat", "2750", "split_zhou_EuroSAT.json"),
    "ucf101": Layout("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
    "imagenetv2": Layout("imagenetv2", "imagenetv2-matched-frequency-format-val"),
    "imagenet_sketch": Layout("imagenet-sketch", "images"),
    "imagenet_a": Layout("imagenet-adversarial", "imagenet-a"),
    "imagenet_r": Layout("imagenet-rendition", "imagenet-r"),
}
VARIANTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
_IMAGENET_TARGETS: Mapping[Protocol, list[str]] = {
    "cross-dataset": [f"coop:{name}" for name in DATASETS if name not in ("imagenet", *VARIANTS)],
    "domain-generalization": [f"coop:{name}" for name in VARIANTS],
}
_HELP = "CoOp's DATASETS.md says where to get it."

_Lists = dict[Split, tuple[list[str], list[int]]]  # paths and labels
_Splits = dict[Split, Callable[[], Images]]


class _Contents(NamedTuple):
    """Contents of a dataset; see `SplitSource`."""

    names: list[str]
    splits: _Splits
    missing: Mapping[Split, str] = {}
    class_ids: tuple[str, ...] | None = None
    notes: Sequence[str] = ()


def _error(dataset: str, problem: str) -> InputError:
    return open_error(f"{dataset}: {problem}", "root")


def _without_punctuation(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_KEYS = {_without_punctuation(name): name for name in DATASETS} | {"describabletextures": "dtd"}


def open_coop(name: str, root: str | Path | None, templates: Templates = None) -> SplitSource:
    """Open a dataset in CoOp's layout; `name` is a key of `DATASETS`, in any case, with or without "_" and "-"."""
    key = _KEYS.get(_without_punctuation(name))
    if key is None:
        raise open_error(f"CoOp has no dataset {name!r}; choose coop: and one of {', '.join(DATASETS)}.")
    dataset, layout = f"coop:{key}", DATASETS[key]
    if root is None:
        raise open_error(f"{dataset} needs the folder of all datasets, which contains {layout.folder}.", "root")
    base = absolute_path(root)
    folder = base / layout.folder
    images = folder / layout.images
    absent = next((path for path in (base, folder, images) if not os.path.isdir(path)), None)
    if absent is not None:
        raise _error(dataset, f"no folder {absent}. {_HELP}")
    if key in VARIANTS:
        class_names = _read_classnames(dataset, folder, base / DATASETS["imagenet"].folder)
        contents = _variant(dataset, images, class_names, numbered=key == "imagenetv2")
    elif key == "imagenet":
        contents = _imagenet(dataset, images)
    elif key == "fgvc_aircraft":
        contents = _aircraft(dataset, images)
    else:
        contents = _from_split_file(dataset, images, folder / layout.split_file)
    names = tuple(map(normalize_class_name, contents.names))
    duplicates = sorted(name for name, count in Counter(names).items() if count > 1)
    note = f"{dataset}: several classes are named {format_names(duplicates)}, so no prompt can tell them apart."
    return SplitSource(
        dataset,
        names,
        resolve_templates(key, templates),
        contents.splits,
        notes=(*([note] if duplicates else []), *contents.notes),
        missing=contents.missing,
        class_ids=contents.class_ids,
        targets=_IMAGENET_TARGETS if key == "imagenet" else {},
    )


def _read_lines(dataset: str, *files: Path) -> tuple[Path, list[str]]:
    """Return the first of some files that exists, and its lines, without blank ones."""
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise _error(dataset, f"no file {' or '.join(map(str, files))}. {_HELP}")
    return file, [line.strip() for line in read_text(file).splitlines() if line.strip()]


def _from_lists(dataset: str, root: Path, names: list[str], listed: _Lists) -> _Contents:
    """Return the contents of lists of (paths, labels), with notes on duplicates."""
    counts = {split: Counter(map(posixpath.normpath, paths)) for split, (paths, _) in listed.items()}
    duplicates = {
        f"listed twice in {split}": [path for path, count in paths.items() if count > 1]
        for split, paths in counts.items()
    }
    for split in ("train", "val"):
        duplicates[f"in {split} and in test"] = [path for path in counts[split] if path in counts["test"]]
    return _Contents(
        names,
        {
            split: partial(_listed_images, f"{dataset}: {split}", root, paths, labels)
            for split, (paths, labels) in listed.items()
            if paths
        },
        notes=[
            f"{dataset}: {problem}: {len(paths)} images, such as {paths[0]}."
            for problem, paths in duplicates.items()
            if paths
        ],
    )


def _listed_images(dataset: str, root: Path, paths: list[str], labels: list[int]) -> Images:
    missing = missing_files(root, paths)
    if missing:
        problem = f"{len(missing)} of {len(paths)} files are missing in {root}, such as {missing[0]!r}"
        raise _error(dataset, f"{problem}. Is it unpacked completely?")
    return LabelledImages(root, paths, labels)


def _from_split_file(dataset: str, root: Path, file: Path) -> _Contents:
    """Return the contents of a JSON file; its labels must be 0, 1, … with one name each."""
    if not file.is_file():
        raise _error(dataset, f"no file {file}. {_HELP}")
    content = read_json(file)
    if not (isinstance(content, dict) and all(isinstance(content.get(split), list) for split in get_args(Split))):
        raise InputError(
            f'{file}: expected {{"train": […], "val": […], "test": […]}}, lists of [path, label, class name]. {_HELP}'
        )
    names: dict[int, str] = {}
    listed: _Lists = {}
    for split in get_args(Split):
        paths, labels = listed[split] = [], []
        for number, item in enumerate(content[split]):
            location = f"{file}: entry {number} of {split}"
            if not (isinstance(item, list) and [type(part) for part in item] == [str, int, str]):
                raise InputError(f"{location} must be [path, label, class name]; got {reprlib.repr(item)}. {_HELP}")
            path, label, name = item
            check_inside(path, location)
            if names.setdefault(label, name) != name:
                raise InputError(f"{file}: label {label} is {names[label]!r} and {name!r}. Give each label one name.")
            paths.append(path)
            labels.append(label)
    gap = next((label for label in range(len(names) or 1) if label not in names), None)
    if gap is not None:
        raise InputError(f"{file}: labels must be 0, 1, … without a gap; there is no image of {gap}. Renumber them.")
    for label, name in names.items():
        if not is_valid_class_name(normalize_class_name(name)):
            raise InputError(f"{file}: the class of label {label} can't be named {name!a:.80}. Rename it.")
    return _from_lists(dataset, root, [names[label] for label in range(len(names))], listed)


def _aircraft(dataset: str, images: Path) -> _Contents:
    variants, names = _read_lines(dataset, images.parent / "variants.txt")
    label_of = {name: label for label, name in enumerate(names)}
    if not names or len(label_of) < len(names):
        raise InputError(f"{variants}: expected a name in each line, without duplicates. {_HELP}")
    listed: _Lists = {}
    for split in get_args(Split):
        file, lines = _read_lines(dataset, images.parent / f"images_variant_{split}.txt")
        paths, labels = listed[split] = [], []
        for line in lines:
            image, _, name = line.partition(" ")
            if name.strip() not in label_of:
                raise InputError(f"{file}: {line!r}: {name!r} is not in {variants.name}. {_HELP}")
            check_inside(image, f"{file}: {line!r}")
            paths.append(f"{image}.jpg")
            labels.append(label_of[name.strip()])
    return _from_lists(dataset, images, names, listed)


# ---- ImageNet and its variants ---------------------------------------------------------------------------------------


def _read_classnames(dataset: str, *folders: Path) -> dict[str, str]:
    """Read class names by WordNet id from the first classnames.txt in some folders."""
    file, lines = _read_lines(dataset, *(folder / "classnames.txt" for folder in folders))
    names: dict[str, str] = {}
    for line in lines:
        wnid, _, name = line.partition(" ")
        if not name.strip() or wnid in names:
            problem = "is a duplicate" if wnid in names else "has no name"
            raise InputError(f"{file}: expected a WordNet id and its name in each line; {wnid!r} {problem}. {_HELP}")
        names[wnid] = name.strip()
    return names


def _wnid_folders(dataset: str, folder: Path, names: dict[str, str]) -> list[str]:
    found = [wnid for wnid in subfolders(folder) if re.fullmatch(r"n\d+", wnid)]
    if not found:
        raise _error(dataset, f"no folders n… in {folder}; it must have one for each class.")
    unknown = [wnid for wnid in found if wnid not in names]
    if unknown:
        raise _error(dataset, f"classnames.txt has no name for {format_names(unknown)} in {folder}. Add it.")
    return found


def _folder_images(dataset: str, root: Path, folders: list[str]) -> Images:
    """Return all images of some class folders, labelled by the position of the folder."""
    found, _ = find_images(root, {folder: label for label, folder in enumerate(folders)})
    present = {label for _, label in found}
    empty = [folder for label, folder in enumerate(folders) if label not in present]
    if empty:
        raise _error(dataset, f"no images in {format_names(empty)} of {root}. Is it unpacked completely?")
    return LabelledImages(root, [path for path, _ in found], [label for _, label in found])


def _imagenet(dataset: str, images: Path) -> _Contents:
    names = _read_classnames(dataset, images.parent)
    folders: dict[Split, Path] = {"train": images / "train", "test": images / "val"}
    found = {split: _wnid_folders(dataset, path, names) for split, path in folders.items() if path.is_dir()}
    if not found:
        raise _error(dataset, f"no folder {folders['train']} or {folders['test']}. {_HELP}")
    wnids = next(iter(found.values()))
    in_one = sorted({wnid for others in found.values() for wnid in set(wnids) ^ set(others)})
    if in_one:
        problem = f"only one of images/train and images/val has {format_names(in_one)}"
        raise _error(dataset, f"{problem}. Is it unpacked completely?")
    splits: _Splits = {split: partial(_folder_images, dataset, folders[split], wnids) for split in found}
    missing: dict[Split, str] = {split: f"no folder {path}. {_HELP}" for split, path in folders.items()}
    missing["val"] = "its validation images are the test images. Choose test."
    return _Contents([names[wnid] for wnid in wnids], splits, missing, tuple(wnids))


def _variant(dataset: str, images: Path, names: dict[str, str], *, numbered: bool) -> _Contents:
    if numbered:  # folder i has the class of the i-th WordNet id
        wnids = sorted(names)
        folders = list(map(str, range(len(wnids))))
    else:
        folders = wnids = _wnid_folders(dataset, images, names)
    reason = "it is a variant of ImageNet, for testing only. Train on coop:imagenet."
    splits: _Splits = {"test": partial(_folder_images, dataset, images, folders)}
    return _Contents([names[wnid] for wnid in wnids], splits, {"train": reason, "val": reason}, tuple(wnids))
