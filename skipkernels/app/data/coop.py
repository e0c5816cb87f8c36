"""Datasets in CoOp's layout: `coop:NAME` in the folder `root`, which holds all of them.

Eleven datasets are for training and testing, and four variants of ImageNet for testing. There are three layouts:

- Most have a JSON file, `{"train"|"val"|"test": [[path, label, class name], …]}`.
- Aircraft has text files: the class names, and for each split the images with their class.
- ImageNet and its variants have folders named by WordNet id, and class names in `classnames.txt`; a variant without
  this file uses that of ImageNet. ImageNet's validation images are the test images. ImageNet-A and ImageNet-R have 200
  of the 1000 classes, labelled in the order of their sorted folders, and are evaluated over these only, as in CoOp.

Paths in the files must stay in the folder that they are relative to. CoOp's few-shot pickles are not read: a pickle can
execute any code.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from .base import InputError, open_error
from .class_names import normalize_class_name
from .files import absolute_path, find_images, format_names, path_inside, read_json, read_text, subfolders
from .images import Images
from .source import Source, Split
from .templates import Templates, resolve_templates


@dataclass(frozen=True)
class Layout:
    """Location of a dataset below the root."""

    folder: str
    images: str = ""  # Image folder below `folder`; paths are relative to it
    split_file: str = ""  # JSON file below `folder`; "" in the other layouts


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
Item = tuple[str, int, str]
"""Path, label and class name of an image in a list."""
Content = tuple[list[str], dict[Split, Images]]
"""Class names by label, and the images of each split."""
_HELP = "CoOp's DATASETS.md says where to get it."


def open_coop(name: str, root: str | Path | None, templates: Templates = None) -> Source:
    """Open a dataset in CoOp's layout; `name` is a key of `DATASETS`."""
    if name not in DATASETS:
        raise open_error(f"CoOp has no dataset {name!r}; choose coop: and one of {', '.join(DATASETS)}.")
    dataset, layout = f"coop:{name}", DATASETS[name]
    if root is None:
        raise open_error(f"{dataset} needs the folder of all datasets, which contains {layout.folder}.", "root")
    base = absolute_path(root)
    folder = base / layout.folder
    images = folder / layout.images
    absent = next((path for path in (base, folder, images) if not os.path.isdir(path)), None)
    if absent is not None:
        raise open_error(f"{dataset}: no folder {absent}. {_HELP}", "root")
    if layout.split_file:
        file = folder / layout.split_file
        names, splits = _listed(file, images, read_json(file, dict[str, list[Item]]))
    elif name == "fgvc_aircraft":
        names, splits = _listed(folder, images, _aircraft(folder))
    else:
        own = folder / "classnames.txt"
        name_of = _wordnet_names(own if own.is_file() else base / "imagenet" / "classnames.txt")
        names, splits = _imagenet(name, images, name_of)
    classes = tuple(map(normalize_class_name, names))
    notes = []
    if repeated := sorted(name for name, count in Counter(classes).items() if count > 1):
        notes = [f"{dataset}: more than one class is named {format_names(repeated)}; their prompts are equal."]
    return Source(dataset, classes, resolve_templates(name, templates), splits=splits, notes=tuple(notes))


# ---- lists of images -------------------------------------------------------------------------------------------------


def _listed(file: Path, root: Path, content: Mapping[str, list[Item]]) -> Content:
    """Check the paths and labels of lists; the labels must be 0, 1, … with one name each."""
    name_of: dict[int, str] = {}
    splits: dict[Split, Images] = {}
    for split in get_args(Split):
        items = content.get(split, [])
        for path, label, name in items:
            if path_inside(root, path) is None:
                raise InputError(
                    f"{file}: {split}: {path!r} leads out of the folder of the dataset, {root}. Correct it."
                )
            if name_of.setdefault(label, name) != name:
                raise InputError(f"{file}: label {label} is {name_of[label]!r} and {name!r}. Give each label one name.")
        if items:
            splits[split] = Images.of_files(root, [path for path, _, _ in items], [label for _, label, _ in items])
    if not name_of:
        raise InputError(f"{file}: no images. {_HELP}")
    if sorted(name_of) != list(range(len(name_of))):
        raise InputError(f"{file}: labels must be 0, 1, … without a gap; got {sorted(name_of)!r:.80}. Renumber them.")
    return [name_of[label] for label in range(len(name_of))], splits


def _aircraft(folder: Path) -> dict[str, list[Item]]:
    """Read the lists of Aircraft, in the form of the JSON files."""
    label_of = {name: label for label, name in enumerate(_lines(folder / "variants.txt"))}
    content: dict[str, list[Item]] = {}
    for split in get_args(Split):
        file = folder / f"images_variant_{split}.txt"
        content[split] = []
        for image, _, name in (line.partition(" ") for line in _lines(file)):
            if name not in label_of:
                raise InputError(f"{file}: {name!r} is not in variants.txt. {_HELP}")
            content[split].append((f"{image}.jpg", label_of[name], name))
    return content


def _lines(file: Path) -> list[str]:
    """Lines of a text file, without blank ones."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


# ---- ImageNet and its variants ---------------------------------------------------------------------------------------


def _wordnet_names(file: Path) -> dict[str, str]:
    """Read the class names by WordNet id."""
    names = {wnid: name for wnid, _, name in (line.partition(" ") for line in _lines(file))}
    if not all(names.values()):
        raise InputError(f"{file}: expected a WordNet id and its name in each line. {_HELP}")
    return names


def _imagenet(name: str, images: Path, name_of: Mapping[str, str]) -> Content:
    """Return the class names and the images of ImageNet or a variant; `name_of` has the names by WordNet id."""
    paths: dict[Split, Path] = {"test": images}
    if name == "imagenet":
        paths = {"train": images / "train", "test": images / "val"}
    paths = {split: path for split, path in paths.items() if path.is_dir()}
    if name == "imagenetv2":  # its folders are 0, 1, …, in the order of the sorted WordNet ids
        wnids = sorted(name_of)
        folders = [str(label) for label in range(len(wnids))]
    else:
        found = {folder for path in paths.values() for folder in subfolders(path) if re.fullmatch(r"n\d+", folder)}
        wnids = folders = sorted(found)
    unnamed = [wnid for wnid in wnids if wnid not in name_of]
    if unnamed or not wnids:
        problem = f"classnames.txt has no name for {format_names(unnamed)}" if wnids else f"no folders n… in {images}"
        raise open_error(f"coop:{name}: {problem}. {_HELP}", "root")
    splits = {split: _folder_images(name, path, folders) for split, path in paths.items()}
    return [name_of[wnid] for wnid in wnids], splits


def _folder_images(name: str, root: Path, folders: list[str]) -> Images:
    """Return all images of some class folders, labelled by the position of the folder."""
    found, _ = find_images(root, {folder: label for label, folder in enumerate(folders)})
    labels = [label for _, label in found]
    present = set(labels)
    empty = [folder for label, folder in enumerate(folders) if label not in present]
    if empty:
        raise open_error(
            f"coop:{name}: no images in {format_names(empty)} of {root}. Is it unpacked completely?", "root"
        )
    return Images.of_files(root, [path for path, _ in found], labels)
