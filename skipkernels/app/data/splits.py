"""Splits and classes of datasets that list images with labels: `csv:`, `wds:` and `hf:`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from .base import open_error
from .files import format_names
from .images import Images
from .shots import hash_order
from .source import Split, SplitSource, constant_split, normalize_class_names
from .templates import Templates, resolve_templates

SPLIT_NAMES: dict[str, Split] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= {"val": "val", "valid": "val", "validation": "val"}
"""Names of splits in lower case, as folders, columns and file names have them."""
# Tenths of the images of a class, as in CoOp's splits; the rest are training images.
_TEST_TENTHS, _VAL_TENTHS = 3, 2

# Columns and fields with the class of an image, the best one first.
LABEL_NAMES = ("class_name", "classname", "label_name", "category", "class", "label", "target", "caption", "text")
CAPTIONS = ("caption", "text")


def split_by_hash(
    paths: Mapping[str, list[str]], remedy: str = "make train/ and test/"
) -> tuple[dict[Split, dict[str, list[str]]], dict[Split, str]]:
    """Split the images of each class into train, val and test by a hash of their paths.

    Without test images if a class has only one image, which must train.

    Args:
        paths: For each class, the paths of its images.
        remedy: Remedy for a class with one image, other than to add some.

    Returns:
        For each split that has images, their paths by class; and the reason and remedy for each missing split.

    Example:
        >>> splits, _ = split_by_hash({"cat": [f"cat/{n}.jpg" for n in range(10)]})
        >>> {split: len(paths["cat"]) for split, paths in splits.items()}
        {'train': 5, 'val': 2, 'test': 3}
    """
    splits: dict[Split, dict[str, list[str]]] = {"train": {}, "val": {}, "test": {}}
    missing: dict[Split, str] = {}
    single = next((of_class for of_class, images in paths.items() if len(images) == 1), None)
    if single is not None:
        missing["test"] = (
            f"class {single} has 1 image, and train and test need one each. Add some, {remedy}, or train on all images "
            'with test="none".'
        )
    for of_class, images in paths.items():
        order = sorted(images, key=lambda path: hash_order("split", 0, path))
        tests = 0 if missing else (_TEST_TENTHS * len(images) + 5) // 10  # 1 if there are 2 images
        vals = (_VAL_TENTHS * len(images) + 5) // 10
        splits["train"][of_class] = sorted(order[tests + vals :])
        splits["val"][of_class] = sorted(order[tests : tests + vals])
        splits["test"][of_class] = sorted(order[:tests])
    if not any(splits["val"].values()):
        missing["val"] = "its classes have too few images. Add some, or make a val split."
    return {split: part for split, part in splits.items() if split not in missing}, missing


def hash_splits(images: Images, classes: Sequence[str], remedy: str) -> tuple[dict[Split, Images], dict[Split, str]]:
    """Split images into train, val and test by a hash of their names, as `split_by_hash` does."""
    of_class: dict[str, list[str]] = defaultdict(list)
    for path, label in zip(images.names, images.labels, strict=True):
        of_class[classes[label]].append(path)
    index_of = {path: index for index, path in enumerate(images.names)}
    splits, missing = split_by_hash(of_class, remedy)
    parts = {
        split: images.subset(sorted(index_of[path] for paths in part.values() for path in paths))
        for split, part in splits.items()
    }
    return parts, missing


def listed_source(
    name: str,
    images: Images,
    classes: Sequence[str],
    splits: Sequence[Split] | None,
    templates: Templates,
    *,
    notes: Sequence[str] = (),
    how: str,
    remedy: str,
) -> SplitSource:
    """Return a source of listed images.

    Without splits, or with train alone, the images of each class are split by a hash of their names. With val and
    without test, the images of val are the test images.

    Args:
        name: Name of the dataset, as `open_source` takes it.
        images: All images.
        classes: Names by label.
        splits: Split of each image; None if the dataset has none.
        templates: See `open_source`.
        notes: Remarks on how the dataset was read.
        how: Place of the splits, for messages, such as "no column split".
        remedy: How to give splits, for messages.

    Raises:
        InputError: If there are fewer than two classes, or no training images.
    """
    notes = list(notes)
    if len(classes) < 2:
        raise open_error(
            f"{name}: must have images of two classes or more; got {format_names(classes) or 'none'}. Add some."
        )
    if all(map(is_number, classes)):
        notes.append(f"{name}: the classes have numbers and no names, and prompts are made of names.")
    present = set() if splits is None else set(splits)
    parts: dict[Split, Images]
    missing: dict[Split, str] = {}
    hashed = splits is None or present == {"train"}
    if splits is None or hashed:
        parts, missing = hash_splits(images, classes, remedy)
        counts = ", ".join(f"{len(part)} {split}" for split, part in parts.items())
        notes.append(f"{name}: {how}, so the images of each class are split by a hash of their names: {counts}.")
    else:
        indices: dict[Split, list[int]] = defaultdict(list)
        for index, split in enumerate(splits):
            indices[split].append(index)
        parts = {split: images.subset(indices[split]) for split in ("train", "val", "test") if split in present}
        if "train" not in parts:
            raise open_error(f"{name}: has {' and '.join(parts)} images, and none to train on. Add some.")
        if "test" not in parts:
            parts["test"] = parts.pop("val")
            notes.append(f"{name}: no test images, so the val images are the test images.")
            missing["val"] = "without test images, the val images are the test images. Add test images to have both."
    splits_of: dict[Split, Callable[[], Images]] = {split: constant_split(part) for split, part in parts.items()}
    return SplitSource(
        name,
        tuple(classes),
        resolve_templates(None, templates),
        splits_of,
        notes=tuple(notes),
        missing=missing,
        hashed=hashed,
    )


def is_number(text: str) -> bool:
    """Return True for a class id in decimal digits.

    >>> is_number("007"), is_number("²"), is_number("-1"), is_number("٣")
    (True, False, False, False)
    """
    return text.isascii() and text.isdigit() and len(text) < 19  # an int64


def labels_by_name(name: str, kind: str, found: Sequence[str], alternative: str) -> tuple[list[int], tuple[str, ...]]:
    """Return the label of each image, and the class names by label, in the order of the sorted names.

    Args:
        name: Name of the dataset, for messages.
        kind: Kind of `found`, such as "label", for messages.
        found: Class of each image, as text.
        alternative: Remedy other than to rename a class; see `normalize_class_names`.

    Raises:
        InputError: If a name can't be used, or two are equal in lower case.
    """
    ids = sorted(set(found), key=lambda text: (not is_number(text), int(text) if is_number(text) else 0, text))
    names = normalize_class_names(f"open_source: {name}", "data", kind, ids, ids, alternative)
    label_of = {one: label for label, one in enumerate(ids)}
    return [label_of[one] for one in found], names
