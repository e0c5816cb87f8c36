"""Where images come from: a dataset by its name on the command line, with classes, prompts and splits.

A dataset of one's own in Python needs little: see `from_datasets`.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeVar

from .base import InputError, LabelledDataset, SizedDataset
from .few_shot import few_shot
from .files import shown
from .images import Images, PickedImages, Transform
from .templates import Templates, format_prompt, templates_of

Split = Literal["train", "val", "test"]
Protocol = Literal["base-to-new", "cross-dataset", "domain-generalization", "few-shot"]
Same = TypeVar("Same", bound="Source")


@dataclass(frozen=True)
class Source(ABC):
    """Images of some classes, in splits.

    Attributes:
        name: As `open_source` takes it.
        classes: Names by label, as they go into a prompt.
        templates: The first is for training; with others, embeddings can be averaged in evaluation.
        notes: What a user should be told of how the dataset was read.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def prompts(self) -> tuple[list[str], ...]:
        """For each template, one for each class."""
        return tuple([format_prompt(template, name) for name in self.classes] for template in self.templates)

    @property
    def keys(self) -> tuple[str, ...]:
        """What tells a class from the others in another dataset too, by label: its name, in any case of letters."""
        return tuple(name.casefold() for name in self.classes)

    @property
    def domains(self) -> Mapping[str, Source]:
        """The same classes in each domain of the dataset, by name; empty if it has no domains.

        The first is the domain to train on for domain generalization, the others are the targets.
        """
        return {}

    def default_targets(self, protocol: Protocol) -> Sequence[str]:
        """Names of the datasets, or of the domains, that a protocol tests on by default.

        Raises:
            InputError: If the dataset has no default targets.
        """
        if protocol == "domain-generalization" and self.domains:
            return list(self.domains)[1:]
        kind = "datasets" if protocol == "cross-dataset" else "datasets of the same classes"
        raise InputError(f"--targets: {protocol} of {self.name} needs {kind} to test on. Name some.")

    @abstractmethod
    def images(self, split: Split, transform: Transform | None = None) -> LabelledDataset:
        """The images of a split.

        Raises:
            InputError: If there are none; says why.
        """

    @abstractmethod
    def few_shot(self, shots: int, seed: int, transform: Transform | None = None) -> LabelledDataset:
        """Some training images of each class, class by class; all of a class that has fewer.

        Raises:
            InputError: If there are none of a class, or an argument is out of its range.
        """

    @abstractmethod
    def of_classes(self: Same, labels: Sequence[int]) -> Same:
        """Some of the classes, labelled from 0 in this order, with their images."""


@dataclass(frozen=True)
class SplitSource(Source):
    """Images that are there, such as files.

    Attributes:
        parts: Of each split that there is: what gives its images.
        absent: Of a split that there isn't: why, and what to do.
        ids: By label, what a class has in place of its name as its key.
        targets: Default targets of a protocol, as `open_source` takes them.
    """

    parts: Mapping[Split, Callable[[], Images]] = field(repr=False)
    absent: Mapping[Split, str] = field(default_factory=dict, repr=False, kw_only=True)
    ids: tuple[str, ...] | None = field(default=None, repr=False, kw_only=True)
    targets: Mapping[Protocol, Sequence[str]] = field(default_factory=dict, repr=False, kw_only=True)

    @property
    def keys(self) -> tuple[str, ...]:
        """Its ids, if it has some; see `Source`."""
        return super().keys if self.ids is None else self.ids

    def default_targets(self, protocol: Protocol) -> Sequence[str]:
        """Its `targets`; see `Source`."""
        return self.targets[protocol] if protocol in self.targets else super().default_targets(protocol)

    def images(self, split: Split, transform: Transform | None = None) -> Images:
        """The images of a split; see `Source`."""
        if split not in self.parts:
            why = self.absent.get(split, f"it has {', '.join(self.parts)} images.")
            raise InputError(f"--data: {self.name} has no {split} images: {why}")
        return self.parts[split]().with_transform(transform)

    def few_shot(self, shots: int, seed: int, transform: Transform | None = None) -> Images:
        """Some training images of each class; see the function `few_shot` for which."""
        images = self.images("train", transform)
        labels = images.labels
        there = set(labels)
        without = [name for label, name in enumerate(self.classes) if label not in there]
        if without:
            raise InputError(f"--data: {self.name} has no training images of {shown(without)}. Add some.")
        return images.subset(few_shot(labels, images.names, shots, seed))

    def of_classes(self, labels: Sequence[int]) -> SplitSource:
        """Some of the classes; see `Source`."""

        def some(part: Callable[[], Images]) -> Images:
            return part().of_classes(labels)

        return replace(
            self,
            classes=tuple(self.classes[label] for label in labels),
            parts={split: partial(some, part) for split, part in self.parts.items()},
            ids=None if self.ids is None else tuple(self.ids[label] for label in labels),
        )


def at_hand(images: Images) -> Callable[[], Images]:
    """Images, as a part of a `SplitSource`."""
    return lambda: images


def from_datasets(
    name: str,
    *,
    train: SizedDataset | None = None,
    val: SizedDataset | None = None,
    test: SizedDataset | None = None,
    classes: Sequence[str] | None = None,
    templates: Templates = None,
) -> Source:
    """A source of datasets of one's own, for `load_task`.

    What a dataset needs:

    - `len(dataset)` and `dataset[i]`, which gives (image, label): map-style. `sk.FeatureCache.build` takes it as it is,
      if its images are tensors [3, height, width] as the model takes them, so with the model's own preprocessing as
      its transform.
    - labels that are whole numbers from 0 to classes − 1.
    - here, images of any kind that the transform takes, such as Pillow's: the source applies it. Images that are
      tensors already are left as they are.

    What it may have:

    - `labels` (or `targets`): the label of every item. Without it, all images are loaded to find out.
    - `classes`: their names by label. Without it, give them here.
    - `names`: one for each image, such as its path. By them `few_shot` chooses, whatever the order; without them it
      chooses by number.
    - public attributes that say what it is: a cache knows a dataset by them, such as `root`, `samples` and `transform`.
      Those that begin with an underscore are taken for its own business.

    Args:
        name: Of the dataset, for messages and results.
        train: Images to train on.
        val: Images to choose settings by.
        test: Images to test on.
        classes: Names by label; by default the `classes` of a dataset.
        templates: As for `open_source`.

    Raises:
        InputError: If there is no dataset, there are no class names, two are the same, or a label has none.

    Example:
        >>> from PIL import Image
        >>> from skipkernels.data import load_task
        >>> class Squares:
        ...     classes = ["black_square", "white_square"]
        ...
        ...     def __init__(self, count):
        ...         self.labels = [number % 2 for number in range(count)]
        ...
        ...     def __len__(self):
        ...         return len(self.labels)
        ...
        ...     def __getitem__(self, item):
        ...         return Image.new("RGB", (32, 32), self.classes[self.labels[item]].split("_")[0]), self.labels[item]
        >>> squares = from_datasets("squares", train=Squares(32), test=Squares(10))
        >>> task = load_task(squares, protocol="few-shot", shots=4, classes=None, seed=0)
        >>> len(task.train), task.tests[0].prompts[0]
        (8, ['a photo of a black square.', 'a photo of a white square.'])
    """
    choices: dict[Split, SizedDataset | None] = {"train": train, "val": val, "test": test}
    given = {split: dataset for split, dataset in choices.items() if dataset is not None}
    if not given:
        raise InputError(f"from_datasets: {name} must have a dataset; got none. Give train=, val= or test=.")
    if classes is None:
        classes = next((found for d in given.values() if (found := getattr(d, "classes", None)) is not None), None)
    if classes is None:
        raise InputError(f"from_datasets: {name} has no class names. Give classes=[…], names by label.")
    names = class_names(f"from_datasets: {name}", "label", range(len(classes)), classes, "give others as classes=[…]")
    parts: dict[Split, Callable[[], Images]] = {}
    for split, dataset in given.items():
        own = getattr(dataset, "names", None)
        images = PickedImages(dataset, names=own if isinstance(own, (list, tuple)) else None)
        outside = [(i, label) for i, label in enumerate(images.labels) if not 0 <= label < len(classes)]
        if outside:
            raise InputError(
                f"from_datasets: labels of {name} must be from 0 to {len(classes) - 1}, as there are {len(classes)} "
                f"classes; got {outside[0][1]} for item {outside[0][0]} of {split}. Name all classes, or relabel."
            )
        parts[split] = at_hand(images)
    absent: dict[Split, str] = {
        split: f"it has {', '.join(parts)} images. Give from_datasets {split}= too."
        for split in choices
        if split not in parts
    }
    return SplitSource(name, names, templates_of(None, templates), parts, absent=absent)


def class_names(where: str, kind: str, ids: Sequence[object], names: Sequence[str], instead: str) -> tuple[str, ...]:
    """Names of classes, `tidy`; none is empty, or another's in any case of letters.

    Args:
        where: How a message begins.
        kind: What the classes are told apart by, such as "folder".
        ids: Of each class, its own.
        names: Of each class.
        instead: What else can be done than to rename one.

    Raises:
        InputError: If a name can't be used; says of which class.

    Example:
        >>> class_names("--data", "folder", ["n01", "n02"], ["sea_lion", "owl"], "…")
        ('sea lion', 'owl')
    """
    if not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{where}: names of classes must be text; got {list(names)!r:.80}. Write them out, or {instead}."
        )
    seen: dict[str, object] = {}
    found = tuple(map(tidy, names))
    for own, name in zip(ids, found, strict=True):
        if not can_be_named(name):
            raise InputError(f"{where}: the class of {kind} {own!a} can't be named {name!a}. Rename it, or {instead}.")
        other = seen.setdefault(name.casefold(), own)
        if other != own:
            raise InputError(
                f"{where}: {kind}s {other} and {own} have the same class name, {name!r}, so no prompt could tell them "
                f"apart. Rename one, or {instead}."
            )
    return found


def can_be_named(name: str) -> bool:
    """Whether a class can have a name, once it is `tidy`: not an empty one, or one of bytes that are no text."""
    return bool(name) and name == name.encode(errors="ignore").decode()


def tidy(name: str) -> str:
    """The name of a class as it goes into a prompt; letters with accents are one character, as tokenizers know them.

    >>> tidy("sea_lion ")
    'sea lion'
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())
