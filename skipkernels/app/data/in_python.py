"""Sources of map-style datasets that are passed in Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .base import InputError
from .class_names import class_names
from .images import Images
from .map_style import SizedDataset, names_of
from .source import Source, Split
from .templates import Templates, resolve_templates


def from_datasets(
    name: str,
    *,
    train: SizedDataset | None = None,
    val: SizedDataset | None = None,
    test: SizedDataset | None = None,
    classes: Sequence[str] | None = None,
    templates: Templates = None,
) -> Source:
    """Make a source from map-style datasets, for `load_task`.

    A dataset has `len(dataset)`, and `dataset[i]` returns (image, label) or {"image": image, "label": label}, with
    labels from 0 to the number of classes − 1. Images are of any type that the transform takes; Pillow's are made
    upright and RGB before, and tensors are not transformed. A dataset may also have:

    - `labels` or `targets`: the label of every item; or a column `label`, as datasets of Hugging Face have. Otherwise
      all images are loaded to read their labels.
    - `classes`: names by label, or a feature `label` with `names`. Otherwise `classes` must be given here.
    - `names`: a name for each image, such as its path, so that the choice of `few_shot` does not depend on the order.
    - `samples` or `paths`, files of the images, and `transform`: a feature cache identifies it by them.

    Args:
        name: Name of the dataset, for messages and results.
        train: Training images.
        val: Validation images.
        test: Test images.
        classes: Names by label; default: the `classes` of a dataset.
        templates: Prompt templates; see `open_source`.

    Raises:
        InputError: If there is no dataset, there are no class names, two are equal, or a label has no name.

    Example:
        >>> from PIL import Image
        >>> from skipkernels.app.data import TaskOptions, load_task
        >>> items = [(Image.new("RGB", (32, 32), ("black", "white")[n % 2]), n % 2) for n in range(32)]
        >>> squares = from_datasets("squares", train=items, test=items[:10], classes=["black_square", "white_square"])
        >>> task = load_task(squares, TaskOptions(protocol="few-shot", shots=4))
        >>> len(task.train), task.tests[0].prompts[0]
        (8, ['a photo of a black square.', 'a photo of a white square.'])
    """
    given: dict[Split, SizedDataset | None] = {"train": train, "val": val, "test": test}
    datasets = {split: dataset for split, dataset in given.items() if dataset is not None}
    if not datasets:
        raise InputError(f"{name} must have a dataset; got none. Give train=, val= or test=.", function="from_datasets")
    names = _class_names(name, datasets.values(), classes)
    splits = {split: _labelled_images(name, split, dataset, len(names)) for split, dataset in datasets.items()}
    return Source(name, names, resolve_templates(None, templates), splits=splits)


def _class_names(name: str, datasets: Iterable[Any], given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the given names of the classes, or those of the first dataset that has some."""
    own = (names_of(dataset) for dataset in datasets)
    names = next((each for each in own if each is not None), None) if given is None else given
    if names is None:
        raise InputError(f"{name} has no class names. Give classes=[…], names by label.", "classes", "from_datasets")
    if isinstance(names, (str, Mapping)) or not hasattr(names, "__len__"):
        raise InputError(f"{name}: classes must be names by label, a list; got {names!r}.", "classes", "from_datasets")
    return class_names(name, names, "give others as classes=[…]", "classes")


def _labelled_images(name: str, split: Split, dataset: SizedDataset, classes: int) -> Images:
    """Return the images of a dataset, with labels from 0 to `classes` − 1."""
    own = getattr(dataset, "names", None)
    images = Images(dataset, names=own if isinstance(own, (list, tuple)) else None)
    for index, label in enumerate(images.labels):
        if not 0 <= label < classes:
            raise InputError(
                f"{name}: labels must be from 0 to {classes - 1}, as there are {classes} "
                f"classes; got {label} for item {index} of {split}. Name all classes, or relabel.",
                split,
                "from_datasets",
            )
    return images
