"""Result of `Classifier.predict`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """The best classes of N images, best first, also of an image that has none of the classes.

    Attributes:
        names: Path of each image; its number for an image without a path.
        ids: Classes, int64 [N, k], as positions in `classes`.
        probabilities: Their probabilities, fp32 [N, k]. They sum to 1 over all classes, not over these k; with a
            threshold, over all classes and "none of these".
        embeddings: Unit-norm embeddings of the images, fp32 [N, D].
        classes: Names of all classes.
        unreadable: Reason by path for files that were skipped.
        threshold: The smallest probability of the best class of an image that has a class; None for no threshold.
        calibrated: `Classifier.calibrated`: False for other classes or prompts than those of the run.
    """

    names: list[str]
    ids: Tensor
    probabilities: Tensor
    embeddings: Tensor
    classes: list[str]
    unreadable: dict[str, str] = field(default_factory=dict)
    threshold: float | None = None
    calibrated: bool = False

    def __repr__(self) -> str:
        facts = [f"{len(self)} images", f"top {self.ids.shape[1]} of {len(self.classes)} classes"]
        facts += [f"{len(self.unreadable)} unreadable"] if self.unreadable else []
        facts += [] if self.threshold is None else [f"threshold {self.threshold:g}"]
        facts.append("calibrated" if self.calibrated else "not calibrated")
        return f"Predictions({', '.join(facts)})"

    @property
    def known(self) -> Tensor:
        """False for an image that has none of the classes: its best probability is below the threshold. Bool [N]."""
        return self.probabilities[:, 0] >= (self.threshold or 0.0)

    @property
    def labels(self) -> list[list[str]]:
        """Names of the classes, k for each image."""
        return [[self.classes[class_id] for class_id in row] for row in self.ids.tolist()]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        """Iterate over (name, [(label, probability), …])."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> tuple[str, list[tuple[str, float]]]:
        """Return (name, [(label, probability), …]) of an image."""
        labels = [self.classes[class_id] for class_id in self.ids[index].tolist()]
        return self.names[index], list(zip(labels, self.probabilities[index].tolist(), strict=True))

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Join the predictions of batches."""
        return replace(
            parts[0],
            names=[name for part in parts for name in part.names],
            ids=torch.cat([part.ids for part in parts]),
            probabilities=torch.cat([part.probabilities for part in parts]),
            embeddings=torch.cat([part.embeddings for part in parts]),
            unreadable={name: reason for part in parts for name, reason in part.unreadable.items()},
        )
