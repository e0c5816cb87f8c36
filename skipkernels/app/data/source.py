"""Data sources: the classes, prompts and splits of a dataset. `from_datasets` makes one of map-style datasets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .base import InputError, SizedDataset
from .class_names import class_names
from .images import Images, Transform, joined
from .templates import Templates, prompts, resolve_templates

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Source:
    """Images of some classes, in splits.

    Attributes:
        name: Name of the dataset, as `open_source` takes it.
        classes: Names by label, as in prompts.
        templates: Prompt templates. Training uses the first; evaluation averages the embeddings of all.
        splits: Images of each split.
        without_test: Why the user's data have no test images, and the remedy.
        notes: Remarks for the user on how the dataset was read.
        hashed: The user's data have no splits of their own, and were split by a hash.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    splits: Mapping[Split, Images] = field(repr=False)
    without_test: str = ""
    notes: tuple[str, ...] = ()
    hashed: bool = False

    @property
    def prompts(self) -> tuple[list[str], ...]:
        """Prompts of all classes, in a list for each template."""
        return prompts(self.templates, self.classes)

    def has_split(self, split: Split) -> bool:
        """Return True if the dataset has images in a split."""
        return len(self.splits.get(split, ())) > 0

    def images(self, split: Split, transform: Transform | None = None) -> Images:
        """Return the images of a split.

        Raises:
            InputError: If the dataset has no such split.
        """
        if split not in self.splits:
            others = f"it has {', '.join(self.splits)} images."
            reason = self.without_test if split == "test" and self.without_test else others
            raise InputError(f"{self.name} has no {split} images: {reason}", "data")
        return self.splits[split].with_transform(transform)

    def train_on(self, splits: Sequence[Split]) -> Source:
        """Return the source with the images of further splits as training images."""
        parts = [self.splits[split] for split in ("train", *splits) if split in self.splits]
        return replace(self, splits={**self.splits, "train": joined(parts)})

    def subset_classes(self, labels: Sequence[int]) -> Source:
        """Return some of the classes with their images, labelled from 0 in the order of `labels`."""
        return replace(
            self,
            classes=tuple(self.classes[label] for label in labels),
            splits={split: images.subset_classes(labels) for split, images in self.splits.items()},
        )


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
    own = (_names_of(dataset) for dataset in datasets)
    names = next((each for each in own if each is not None), None) if given is None else given
    if names is None:
        raise InputError(f"{name} has no class names. Give classes=[…], names by label.", "classes", "from_datasets")
    if isinstance(names, str) or not hasattr(names, "__len__"):
        raise InputError(f"{name}: classes must be names by label, a list; got {names!r}.", "classes", "from_datasets")
    return class_names(name, names, "give others as classes=[…]", "classes")


def _names_of(dataset: Any) -> Sequence[str] | None:
    """Names of the classes that a dataset has, or its feature "label", as in a dataset of Hugging Face."""
    features = getattr(dataset, "features", None)
    label = features.get("label") if isinstance(features, Mapping) else None
    return getattr(dataset, "classes", getattr(label, "names", None))


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
