"""Data sources: the classes, prompts and splits of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from .base import InputError
from .images import Images, Transform, joined
from .templates import prompts

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
