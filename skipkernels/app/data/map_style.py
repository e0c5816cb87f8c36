"""Images, labels and class names of map-style datasets, as PyTorch, torchvision and Hugging Face have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ...labels import whole_number
from .base import InputError


class SizedDataset(Protocol):
    """A map-style dataset of (image, label) with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


def image_and_label(dataset: Any, index: int) -> tuple[Any, Any]:
    """Return the image and the label of an item; a label of NumPy or PyTorch as a number."""
    item = dataset[index]
    if isinstance(item, Mapping) and "image" in item and "label" in item:
        item = item["image"], item["label"]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = f"the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
        raise InputError(
            f"{type(dataset).__name__}: item {index} must be (image, label), or have the keys image and label; got "
            f"{got}. Rename or convert them."
        )
    image, label = item
    return image, label.item() if hasattr(label, "item") and getattr(label, "ndim", 0) == 0 else label


def read_labels(dataset: Any) -> list[int]:
    """Return the label of every item of a dataset.

    Labels are read from the attribute `labels` or `targets`, as torchvision's datasets have, or from the column "label"
    of a dataset of Hugging Face. Without them, every item is loaded.

    >>> read_labels([("an image", 2), ("another", 0)])
    [2, 0]
    """
    name = type(dataset).__name__
    attributes = (getattr(dataset, attribute, None) for attribute in ("labels", "targets", "_labels"))
    found = next((values for values in attributes if values is not None), None)
    if found is None and "label" in (getattr(dataset, "column_names", None) or ()):
        found = dataset["label"]
    if found is None:
        found = [image_and_label(dataset, index)[1] for index in range(len(dataset))]
    values = found.tolist() if hasattr(found, "tolist") else list(found)
    labels = []
    for index, value in enumerate(values):
        label = whole_number(value)
        if label is None:
            raise InputError(
                f"{name}: the label of item {index} must be an integer; got {value!r}. Number the classes from 0."
            )
        labels.append(label)
    if len(labels) != len(dataset):
        raise InputError(f"{name}: {len(dataset)} items have {len(labels)} labels. Give each item one.")
    return labels


def names_of(dataset: Any) -> Sequence[str] | None:
    """Return the class names of a dataset, or of its feature "label", as one of Hugging Face has; None without any."""
    features = getattr(dataset, "features", None)
    label = features.get("label") if isinstance(features, Mapping) else None
    classes = getattr(dataset, "classes", None)
    return getattr(label, "names", None) if classes is None else classes
