"""Sources of images that are listed with labels, and perhaps with splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from .files import format_names
from .images import Images
from .shots import shuffled_by_class
from .source import Source, Split
from .templates import Templates, resolve_templates

SPLIT_NAMES: dict[str, Split] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= {"val": "val", "valid": "val", "validation": "val"}
"""Names of splits in lower case, as folders, columns and file names have them."""
# Tenths of the images of a class, as in CoOp's splits; the rest are training images.
_TEST_TENTHS, _VAL_TENTHS = 3, 2

_CAPTIONS = ("caption", "text")  # columns with classes that are prompts


def listed_source(
    name: str,
    images: Images,
    classes: Sequence[str],
    splits: Sequence[Split] | None,
    templates: Templates,
    *,
    column: str = "",
    notes: Sequence[str] = (),
) -> Source:
    """Return a source of listed images; a caption, if that is the `column` of the classes, is its own prompt.

    Without splits, or with train alone, the images of each class are split by a hash of their names. With val and
    without test, the images of val are the test images.
    """
    notes = list(notes)
    if all(each.isdecimal() for each in classes):
        notes.append(f"{name}: the classes have numbers and no names, and prompts are made of names.")
    without_test = ""
    hashed = splits is None or set(splits) == {"train"}
    if splits is None or hashed:
        splits, without_test = _hash_splits(images, classes)
        counts = ", ".join(f"{splits.count(split)} {split}" for split in get_args(Split) if split in splits)
        notes.append(
            f"{name}: no test images, so the images of each class are split by a hash of their names: {counts}."
        )
    elif "val" in splits and "test" not in splits:
        splits = ["test" if split == "val" else split for split in splits]
        notes.append(f"{name}: no test images, so the val images are the test images.")
    chosen = resolve_templates(None, "{}" if templates is None and column.lower() in _CAPTIONS else templates)
    parts = _parts(images, splits)
    return Source(name, tuple(classes), chosen, parts, notes=tuple(notes), hashed=hashed, without_test=without_test)


def _parts(images: Images, splits: Sequence[Split]) -> dict[Split, Images]:
    """Return the images of each split by the split of each image."""
    indices: dict[Split, list[int]] = {split: [] for split in get_args(Split) if split in splits}
    for index, split in enumerate(splits):
        indices[split].append(index)
    return {split: images.subset(of_split) for split, of_split in indices.items()}


def _hash_splits(images: Images, classes: Sequence[str]) -> tuple[list[Split], str]:
    """Split the images of each class by a hash of their names: 30 % test, 20 % val, rounded, and the rest train.

    If a class has only one image, which must train, there are no test images. Returns the split of each image, and why
    there are no test images; "" if there are.
    """
    orders = shuffled_by_class(images.labels, images.names, "split")
    single = [classes[images.labels[order[0]]] for order in orders if len(order) == 1]
    found: list[Split] = ["train"] * len(images)
    for order in orders:
        tests = 0 if single else (_TEST_TENTHS * len(order) + 5) // 10  # 1 if there are 2 images
        vals = (_VAL_TENTHS * len(order) + 5) // 10
        for place, index in enumerate(order[: tests + vals]):
            found[index] = "test" if place < tests else "val"
    if not single:
        return found, ""
    have = f"class {single[0]} has" if len(single) == 1 else f"classes {format_names(single)} have"
    return found, (
        f"{have} 1 image, and train and test need one each. Add some, give test images of all classes, or train on all "
        "images with `test=none`."
    )
