"""Datasets as CoOp keeps them on the disk: `coop:NAME` with `--root`, the folder of all of them.

Eleven datasets to train and test on, and four variants of ImageNet to test on. A split is a JSON file,
`{"train"|"val"|"test": [[path, label, class name], …]}`; ImageNet and its variants are folders named by WordNet id,
with names in `classnames.txt`, which a variant may have for itself; Aircraft has text files of its own. ImageNet is
tested on its validation images and so has no others. It has 1000 classes, as ImageNetV2 and ImageNet-Sketch have.
ImageNet-A and ImageNet-R have 200 of them, labelled by the rank of their own folders, and are scored among these 200
names alone, as CoOp and all who follow it do.

Paths in the files may not lead out of the folder they start from; a link in it may.
CoOp's few-shot pickles are not read: a pickle can execute anything.
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
from typing import Any, NamedTuple, get_args

from .base import InputError
from .files import absolute, check_files, check_inside, images_below, read_json, read_text, shown, subfolders
from .images import Images, LabelledImages
from .source import Protocol, Split, SplitSource, can_be_named, tidy
from .templates import Templates, templates_of


@dataclass(frozen=True)
class Layout:
    """Where a dataset is below the root.

    Attributes:
        folder: Its folder.
        images: The folder in it that paths start from.
        split: Its JSON file, if it has one.
    """

    folder: str
    images: str = ""
    split: str = ""


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


class _Found(NamedTuple):
    """What was read of a dataset; see `SplitSource`."""

    names: list[str]
    parts: Mapping[Split, Callable[[], Images]]
    absent: Mapping[Split, str] = {}
    ids: tuple[str, ...] | None = None
    notes: Sequence[str] = ()


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_KEYS = {_bare(name): name for name in DATASETS} | {"describabletextures": "dtd"}


def open_coop(name: str, root: str | Path | None, templates: Templates = None) -> SplitSource:
    """Read a dataset in the layout of CoOp; see the head of this module.

    Args:
        name: A key of `DATASETS`, in any case of letters, with or without "_" and "-".
        root: The folder of all datasets.
        templates: As for `open_source`.

    Raises:
        InputError: If there is no such dataset, or a file of it is not where it belongs; says which, and where.
    """
    key = _KEYS.get(_bare(name))
    if key is None:
        raise InputError(f"--data: CoOp has no dataset {name!r}; choose coop: and one of {', '.join(DATASETS)}.")
    spec, layout = f"coop:{key}", DATASETS[key]
    if root is None:
        raise InputError(f"--root: {spec} needs the folder of all datasets, in which {layout.folder} is.")
    base = absolute(root)
    if not os.path.isdir(base):
        raise InputError(f"--root: no folder {base}; it must be that of all datasets, with {layout.folder} in it.")
    _need_folder(spec, base / layout.folder)
    images = base / layout.folder / layout.images
    if key in VARIANTS:
        files = (base / folder / "classnames.txt" for folder in (layout.folder, DATASETS["imagenet"].folder))
        found = _variant(spec, images, _classnames(spec, *files), numbered=key == "imagenetv2")
    elif key == "imagenet":
        found = _imagenet(spec, images)
    elif key == "fgvc_aircraft":
        found = _aircraft(spec, images)
    else:
        found = _split_file(spec, images, base / layout.folder / layout.split)
    names = tuple(map(tidy, found.names))
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    same = (f"{spec}: several classes are named {shown(twice)}, as published; no prompt tells them apart.",)
    return SplitSource(
        spec,
        names,
        templates_of(key, templates),
        found.parts,
        notes=(*(same if twice else ()), *found.notes),
        absent=found.absent,
        ids=found.ids,
        targets=_IMAGENET_TARGETS if key == "imagenet" else {},
    )


def _need_folder(spec: str, folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"--root: {spec}: no folder {folder}. {_HELP}")


def _need_file(spec: str, file: Path) -> None:
    if not file.is_file():
        raise InputError(f"--root: {spec}: no file {file}. {_HELP}")


def _of_lists(spec: str, root: Path, names: list[str], listed: Mapping[Split, tuple[list[str], list[int]]]) -> _Found:
    """A dataset of lists of (paths, labels), and what is to be told of them."""
    counts = {split: Counter(map(posixpath.normpath, paths)) for split, (paths, _) in listed.items()}
    found = {
        f"listed twice in {split}": [path for path, count in of.items() if count > 1] for split, of in counts.items()
    }
    found |= {
        f"in {one} and in test": [path for path in counts[one] if path in counts["test"]] for one in ("train", "val")
    }
    notes = [f"{spec}: {where}: {len(paths)} images, such as {paths[0]}." for where, paths in found.items() if paths]
    parts: dict[Split, Callable[[], Images]] = {
        split: partial(_listed, root, paths, labels, f"--root: {spec}: {split}")
        for split, (paths, labels) in listed.items()
        if paths
    }
    return _Found(names, parts, notes=notes)


def _listed(root: Path, paths: list[str], labels: list[int], where: str) -> Images:
    """Images of a list, once it is known that all are there."""
    check_files(root, paths, where)
    return LabelledImages(root, paths, labels)


# ---- a JSON file -----------------------------------------------------------------------------------------------------


def _split_file(spec: str, root: Path, file: Path) -> _Found:
    _need_file(spec, file)
    _need_folder(spec, root)
    content = read_json(file)
    if not (isinstance(content, dict) and all(isinstance(content.get(split), list) for split in get_args(Split))):
        raise InputError(
            f'{file}: expected {{"train": […], "val": […], "test": […]}}, lists of [path, label, class name]. {_HELP}'
        )
    names: dict[int, str] = {}
    listed: dict[Split, tuple[list[str], list[int]]] = {}
    for split in get_args(Split):
        paths, labels = listed[split] = [], []
        for number, item in enumerate(content[split]):
            path, label, name = _item(item, f"{file}: entry {number} of {split}")
            if names.setdefault(label, name) != name:
                raise InputError(f"{file}: label {label} is {names[label]!r} and {name!r}. One label has one name.")
            paths.append(path)
            labels.append(label)
    lacking = next((label for label in range(len(names)) if label not in names), None)
    if lacking is not None or not names:
        raise InputError(
            f"{file}: labels must be from 0 on without a gap; there is no image of label {lacking or 0}. Renumber them."
        )
    return _of_lists(spec, root, [names[label] for label in range(len(names))], listed)


def _item(item: Any, where: str) -> tuple[str, int, str]:
    if not (isinstance(item, list) and len(item) == 3 and isinstance(item[0], str) and isinstance(item[2], str)):
        raise InputError(f"{where} must be [path, label, class name]; got {reprlib.repr(item)}. {_HELP}")
    path, label, name = item
    if type(label) is not int or label < 0:
        raise InputError(f"{where} must have a whole number from 0 on as its label; got {reprlib.repr(label)}. {_HELP}")
    if not can_be_named(tidy(name)):
        raise InputError(f"{where}: the class of label {label} can't be named {name!a:.80}. Rename it.")
    check_inside(path, where)
    return path, label, name


# ---- ImageNet and its variants ---------------------------------------------------------------------------------------


def _classnames(spec: str, *files: Path) -> dict[str, str]:
    """Names by WordNet id, of the first of some files that is there."""
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise InputError(f"--root: {spec}: no file {' or '.join(map(str, files))}. {_HELP}")
    names: dict[str, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip():
            wnid, _, name = line.strip().partition(" ")
            if not name.strip() or wnid in names:
                why = "is there twice" if wnid in names else "has no name"
                raise InputError(f"{file}: line {number}: expected a WordNet id and its name; {wnid!r} {why}. {_HELP}")
            names[wnid] = name.strip()
    return names


def _wnids(spec: str, folder: Path, names: dict[str, str]) -> list[str]:
    """The folders that are named by WordNet ids, sorted."""
    found = [name for name in subfolders(folder) if re.fullmatch(r"n\d+", name)]
    if not found:
        raise InputError(f"--root: {spec}: no folders n… in {folder}; images belong into one for each class.")
    unknown = [name for name in found if name not in names]
    if unknown:
        raise InputError(f"--root: {spec}: classnames.txt has no name for {shown(unknown)} in {folder}. Add it.")
    return found


def _in_folders(spec: str, root: Path, folders: list[str]) -> Images:
    """All images of some class folders; the label is a folder's place."""
    of_class = [images_below(root, folder)[0] for folder in folders]
    empty = [folder for folder, paths in zip(folders, of_class, strict=True) if not paths]
    if empty:
        raise InputError(f"--root: {spec}: no images in {shown(empty)} of {root}. Is it unpacked as a whole?")
    labels = [label for label, paths in enumerate(of_class) for _ in paths]
    return LabelledImages(root, [path for paths in of_class for path in paths], labels)


def _imagenet(spec: str, images: Path) -> _Found:
    names = _classnames(spec, images.parent / "classnames.txt")
    inner: dict[Split, Path] = {"train": images / "train", "test": images / "val"}
    found = {split: _wnids(spec, path, names) for split, path in inner.items() if path.is_dir()}
    if not found:
        raise InputError(f"--root: {spec}: no folder {inner['train']} or {inner['test']}. {_HELP}")
    wnids = next(iter(found.values()))
    odd = sorted({wnid for other in found.values() for wnid in set(wnids) ^ set(other)})
    if odd:
        raise InputError(
            f"--root: {spec}: only one of images/train and images/val has {shown(odd)}. Is it unpacked as a whole?"
        )
    parts: dict[Split, Callable[[], Images]] = {
        split: partial(_in_folders, spec, inner[split], wnids) for split in found
    }
    absent: dict[Split, str] = {split: f"no folder {path}. {_HELP}" for split, path in inner.items()}
    absent["val"] = "it is tested on its validation images, and there are no others. Choose test."
    return _Found([names[wnid] for wnid in wnids], parts, absent, tuple(wnids))


def _variant(spec: str, images: Path, names: dict[str, str], *, numbered: bool) -> _Found:
    _need_folder(spec, images)
    if numbered:  # in the order of the WordNet ids
        wnids = sorted(names)
        folders = [str(label) for label in range(len(wnids))]
        lacking = sorted(set(folders) - set(subfolders(images)), key=int)
        if lacking:
            raise InputError(f"--root: {spec}: no folder {shown(lacking)} in {images}; one belongs to each class.")
    else:
        folders = wnids = _wnids(spec, images, names)
    why = "it is a variant of ImageNet, to test on alone. Train on coop:imagenet."
    parts: dict[Split, Callable[[], Images]] = {"test": partial(_in_folders, spec, images, folders)}
    return _Found([names[wnid] for wnid in wnids], parts, {"train": why, "val": why}, tuple(wnids))


# ---- Aircraft --------------------------------------------------------------------------------------------------------


def _aircraft(spec: str, images: Path) -> _Found:
    variants = images.parent / "variants.txt"
    _need_file(spec, variants)
    _need_folder(spec, images)
    names = [line.strip() for line in read_text(variants).splitlines() if line.strip()]
    label_of = {name: label for label, name in enumerate(names)}
    if not names or len(label_of) < len(names):
        raise InputError(f"{variants}: expected a name in each line, none twice. {_HELP}")
    listed: dict[Split, tuple[list[str], list[int]]] = {}
    for split in get_args(Split):
        file = images.parent / f"images_variant_{split}.txt"
        _need_file(spec, file)
        paths, labels = listed[split] = [], []
        for number, line in enumerate(read_text(file).splitlines(), 1):
            if line.strip():
                image, _, name = line.strip().partition(" ")
                if name.strip() not in label_of:
                    raise InputError(f"{file}: line {number}: {name!r} is not in {variants.name}. {_HELP}")
                check_inside(image, f"{file}: line {number}")
                paths.append(f"{image}.jpg")
                labels.append(label_of[name.strip()])
    return _of_lists(spec, images, names, listed)
