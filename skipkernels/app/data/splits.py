"""Splits and classes of datasets that list images with labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import get_args

from .files import format_names
from .images import Images
from .shots import hash_order
from .source import Source, Split, normalize_class_names
from .templates import Templates, resolve_templates

SPLIT_NAMES: dict[str, Split] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= {"val": "val", "valid": "val", "validation": "val"}
"""Names of splits in lower case, as folders, columns and file names have them."""
# Tenths of the images of a class, as in CoOp's splits; the rest are training images.
_TEST_TENTHS, _VAL_TENTHS = 3, 2

# Columns and fields with the class of an image, the best one first.
LABEL_NAMES = ("class_name", "classname", "label_name", "category", "class", "label", "target", "caption", "text")
CAPTIONS = ("caption", "text")


def hash_splits(
    images: Images, classes: Sequence[str], remedy: str = "make train/ and test/"
) -> tuple[dict[Split, Images], dict[Split, str]]:
    """Split the images of each class into train, val and test by a hash of their names.

    Without test images if a class has only one image, which must train. Returns the images of each split that has some,
    and the reason and remedy for each missing split.

    >>> from skipkernels.app.data import DatasetImages
    >>> splits, _ = hash_splits(DatasetImages([("", 0)] * 10, names=[f"cat/{n}.jpg" for n in range(10)]), ["cat"])
    >>> {split: len(part) for split, part in splits.items()}
    {'train': 5, 'val': 2, 'test': 3}
    """
    names, missing = images.names, dict[Split, str]()
    of_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(images.labels):
        of_class[label].append(index)
    single = [classes[label] for label, indices in sorted(of_class.items()) if len(indices) == 1]
    if single:
        have = f"class {single[0]} has" if len(single) == 1 else f"classes {format_names(single)} have"
        missing["test"] = (
            f"{have} 1 image, and train and test need one each. Add some, {remedy}, or train on all images with "
            "`test=none`."
        )
    chosen: dict[Split, list[int]] = {"train": [], "val": [], "test": []}
    for indices in of_class.values():
        order = sorted(indices, key=lambda index: hash_order("split", 0, names[index]))
        tests = 0 if missing else (_TEST_TENTHS * len(order) + 5) // 10  # 1 if there are 2 images
        vals = (_VAL_TENTHS * len(order) + 5) // 10
        chosen["test"] += order[:tests]
        chosen["val"] += order[tests : tests + vals]
        chosen["train"] += order[tests + vals :]
    if not chosen["val"]:
        missing["val"] = "its classes have too few images. Add some, or make a val split."
    return {split: images.subset(sorted(part)) for split, part in chosen.items() if split not in missing}, missing


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
) -> Source:
    """Return a source of listed images.

    Without splits, or with train alone, the images of each class are split by a hash of their names. With val and
    without test, the images of val are the test images. `how` names the place of the splits, such as "no column split",
    and `remedy` how to give some, both for messages.
    """
    notes = list(notes)
    if all(map(is_number, classes)):
        notes.append(f"{name}: the classes have numbers and no names, and prompts are made of names.")
    parts: dict[Split, Images]
    missing: dict[Split, str] = {}
    hashed = splits is None or set(splits) == {"train"}
    if splits is None or hashed:
        parts, missing = hash_splits(images, classes, remedy)
        counts = ", ".join(f"{len(part)} {split}" for split, part in parts.items())
        notes.append(f"{name}: {how}, so the images of each class are split by a hash of their names: {counts}.")
    else:
        indices: dict[Split, list[int]] = defaultdict(list)
        for index, split in enumerate(splits):
            indices[split].append(index)
        parts = {split: images.subset(indices[split]) for split in get_args(Split) if split in indices}
        if "test" not in parts:
            parts["test"] = parts.pop("val")
            notes.append(f"{name}: no test images, so the val images are the test images.")
            missing["val"] = "without test images, the val images are the test images. Add test images to have both."
    chosen = resolve_templates(None, templates)
    return Source(name, tuple(classes), chosen, splits=parts, notes=tuple(notes), missing=missing, hashed=hashed)


def is_number(text: str) -> bool:
    """Return True for a class id in decimal digits.

    >>> is_number("007"), is_number("²"), is_number("-1"), is_number("٣")
    (True, False, False, False)
    """
    return text.isascii() and text.isdigit() and len(text) < 19  # an int64


def labels_by_name(name: str, kind: str, found: Sequence[str], alternative: str) -> tuple[list[int], tuple[str, ...]]:
    """Return the label of each image, and the class names by label, in the order of the sorted names.

    The arguments are those of `normalize_class_names`; `found` is the class of each image, as text.
    """
    ids = sorted(set(found), key=lambda text: (not is_number(text), int(text) if is_number(text) else 0, text))
    names = normalize_class_names(f"open_source: {name}", "data", kind, ids, ids, alternative)
    label_of = {one: label for label, one in enumerate(ids)}
    return [label_of[one] for one in found], names
