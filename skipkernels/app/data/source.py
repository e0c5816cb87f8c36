"""Data sources: the classes, prompts and splits of a dataset. `from_datasets` makes one from map-style datasets."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

from .base import InputError, SizedDataset
from .files import format_names
from .images import DatasetImages, Images, Transform, joined
from .shots import few_shot, hold_out
from .templates import Templates, prompts, resolve_templates

Split = Literal["train", "val", "test"]
SourceT = TypeVar("SourceT", bound="Source")


@dataclass(frozen=True)
class Source:
    """Images of some classes, in splits.

    Attributes:
        name: Name of the dataset, as `open_source` takes it.
        classes: Names by label, as in prompts.
        templates: Prompt templates. Training uses the first; evaluation averages the embeddings of all.
        splits: Images of each split.
        missing: For missing splits, the reason and the remedy.
        notes: Remarks for the user on how the dataset was read.
        hashed: The user's data have no splits of their own, and were split by a hash.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    splits: Mapping[Split, Images] = field(default_factory=dict, repr=False, kw_only=True)
    missing: Mapping[Split, str] = field(default_factory=dict, repr=False, kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    hashed: bool = field(default=False, kw_only=True)

    @property
    def prompts(self) -> tuple[list[str], ...]:
        """Prompts of all classes, in a list for each template."""
        return prompts(self.templates, self.classes)

    def has_split(self, split: Split) -> bool:
        """Return True if the dataset has images in a split."""
        try:
            return len(self.images(split)) > 0
        except InputError:
            return False

    def images(self, split: Split, transform: Transform | None = None) -> Images:
        """Return the images of a split.

        Raises:
            InputError: If the dataset has no such split.
        """
        if split not in self.splits:
            reason = self.missing.get(split, f"it has {', '.join(self.splits)} images.")
            raise InputError(f"{self.name} has no {split} images: {reason}", "data")
        return self.splits[split].with_transform(transform)

    def few_shot(self, shots: int, seed: int, transform: Transform | None = None) -> Images:
        """Return `shots` training images of each class, class by class; all images of a class that has fewer."""
        images = self._train(transform)
        return images.subset(few_shot(images.labels, images.names, shots, seed))

    def hold_out(
        self, shots: int, seed: int, share: float, transform: Transform | None, train_transform: Transform | None
    ) -> tuple[Images, Images]:
        """Return training images as `few_shot` does, and validation images besides, as the function `hold_out` does.

        `transform` is applied to the validation images, `train_transform` to the training images.
        """
        images = self._train(train_transform)
        train, held = hold_out(images.labels, images.names, shots, seed, share)
        return images.subset(train), images.subset(held).with_transform(transform)

    def _train(self, transform: Transform | None) -> Images:
        """Training images, at least one of each class."""
        images = self.images("train", transform)
        present = set(images.labels)
        without = [name for label, name in enumerate(self.classes) if label not in present]
        if without:
            raise InputError(f"{self.name} has no training images of {format_names(without)}. Add some.", "data")
        return images

    def train_on(self: SourceT, splits: Sequence[Split]) -> SourceT:
        """Return the source with the images of further splits as training images."""
        parts = [self.splits[split] for split in ("train", *splits) if split in self.splits]
        return replace(self, splits={**self.splits, "train": joined(parts)})

    def subset_classes(self: SourceT, labels: Sequence[int]) -> SourceT:
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
    - public attributes that describe it, such as `root`, `samples` and `transform`: a feature cache identifies it by
      them, and ignores attributes that begin with an underscore.

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
        raise InputError(f"from_datasets: {name} must have a dataset; got none. Give train=, val= or test=.")
    if classes is None:
        classes = next((own for d in datasets.values() if (own := _class_names(d)) is not None), None)
    if classes is None:
        raise InputError(f"from_datasets: {name} has no class names. Give classes=[…], names by label.", "classes")
    if isinstance(classes, str) or not hasattr(classes, "__len__"):
        raise InputError(f"from_datasets: {name}: classes must be names by label, a list; got {classes!r}.", "classes")
    names = normalize_class_names(
        f"from_datasets: {name}", "classes", "label", range(len(classes)), classes, "give others as classes=[…]"
    )
    splits: dict[Split, Images] = {}
    for split, dataset in datasets.items():
        own = getattr(dataset, "names", None)
        images = DatasetImages(dataset, names=own if isinstance(own, (list, tuple)) else None)
        outside = [(i, label) for i, label in enumerate(images.labels) if not 0 <= label < len(classes)]
        if outside:
            raise InputError(
                f"from_datasets: labels of {name} must be from 0 to {len(classes) - 1}, as there are {len(classes)} "
                f"classes; got {outside[0][1]} for item {outside[0][0]} of {split}. Name all classes, or relabel.",
                split,
            )
        splits[split] = images
    missing: dict[Split, str] = {
        split: f"it has {', '.join(splits)} images. Give from_datasets {split}= too." for split in get_args(Split)
    }
    return Source(name, names, resolve_templates(None, templates), splits=splits, missing=missing)


def _class_names(dataset: Any) -> Sequence[str] | None:
    """Names of the classes that a dataset has, or its feature "label", as in a dataset of Hugging Face."""
    features = getattr(dataset, "features", None)
    label = features.get("label") if isinstance(features, Mapping) else None
    return getattr(dataset, "classes", getattr(label, "names", None))


def normalize_class_names(
    location: str, argument: str, kind: str, ids: Sequence[object], names: Sequence[str], alternative: str
) -> tuple[str, ...]:
    """Normalize the names of classes; none may be empty, or equal to another in lower case.

    `ids` are those of the classes, of a `kind` such as "folder"; `location`, `argument`, `kind` and the remedy
    `alternative` are for error messages.

    >>> normalize_class_names("open_source", "data", "folder", ["n01", "n02"], ["sea_lion", "owl"], "…")
    ('sea lion', 'owl')
    """

    def error(problem: str, remedy: str) -> InputError:
        return InputError(f"{location}: {problem}. {remedy}, or {alternative}.", argument)

    if not all(isinstance(name, str) for name in names):
        raise error(f"class names must be text; got {list(names)!r:.80}", "Write them out")
    id_of: dict[str, object] = {}
    normalized = tuple(map(normalize_class_name, names))
    for class_id, name in zip(ids, normalized, strict=True):
        if not name or name != name.encode(errors="ignore").decode():  # the bytes of a folder that is not in UTF-8
            raise error(f"the class of {kind} {class_id!a} can't be named {name!a}", "Rename it")
        other = id_of.setdefault(name.casefold(), class_id)
        if other != class_id:
            same = f"{kind}s {other} and {class_id} have the same class name, {name!r}: no prompt can tell them apart"
            raise error(same, "Rename one")
    return normalized


def normalize_class_name(name: str) -> str:
    """Compose accents (NFC), as tokenizers expect, and replace underscores and runs of white space by one space.

    >>> normalize_class_name("sea_lion ")
    'sea lion'
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())
