"""Predictions of a run for its test images, and thumbnails of some of them: what the report is made from."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...digests import digest_json, digest_tensors
from ...folders import replace_tensors
from ...formatting import csv_line, first_line
from ..data import InputError

if TYPE_CHECKING:
    from torch import Tensor

TOP = 3
"""Classes per image that are kept."""
_FORMAT = "2"


class TopClasses(NamedTuple):
    """Classes with the largest probabilities of n images, descending: [n, k] each, with k ≤ `TOP`.

    The probabilities are the softmax over the classes of the test at the scale of the model; they are not calibrated.
    """

    classes: Tensor
    probabilities: Tensor


def top_classes(logits: Tensor) -> TopClasses:
    """Return the classes with the largest of logits [n, C]; probabilities are NaN if a logit is NaN or +inf."""
    from ...retrieval import largest

    probabilities, classes = largest(logits.softmax(dim=1), min(TOP, logits.shape[1]))
    return TopClasses(classes, probabilities)


@dataclass
class TestPredictions:
    """Predictions for the images of a test."""

    __test__ = False  # not a pytest class

    name: str
    classes: list[str]  # names by label
    labels: Tensor  # int64 [n]
    zero_shot: TopClasses
    tuned: TopClasses | None
    images: list[str]  # names of the images
    thumbnails: dict[int, bytes] = field(default_factory=dict)  # PNG or JPEG files by the index of the image

    @property
    def last(self) -> TopClasses:
        """Predictions after tuning, or those before if there are none."""
        return self.zero_shot if self.tuned is None else self.tuned

    def fixed(self) -> Tensor:
        """Mask [n] of the images that only the tuned model classifies correctly."""
        return (self.zero_shot.classes[:, 0] != self.labels) & (self.last.classes[:, 0] == self.labels)

    def broken(self) -> Tensor:
        """Mask [n] of the images that only the model before tuning classifies correctly."""
        return (self.zero_shot.classes[:, 0] == self.labels) & (self.last.classes[:, 0] != self.labels)


def save(path: Path, tests: Sequence[TestPredictions]) -> None:
    """Write predictions.safetensors, replacing an earlier one."""
    tensors: dict[str, Tensor] = {}
    entries = []
    for number, test in enumerate(tests):
        tensors[f"{number}.labels"] = test.labels.int()
        tensors |= _tensors_of(test.zero_shot, f"{number}.zero_shot")
        if test.tuned is not None:
            tensors |= _tensors_of(test.tuned, f"{number}.tuned")
        thumbnails = {index: base64.b64encode(image).decode() for index, image in test.thumbnails.items()}
        entries.append({"name": test.name, "classes": test.classes, "images": test.images, "thumbnails": thumbnails})
    metadata = {"format": _FORMAT, "tests": json.dumps(entries)}
    replace_tensors(path, tensors, metadata | {"digest": _digest(metadata, tensors)})


def _tensors_of(top: TopClasses, key: str) -> dict[str, Tensor]:
    return {f"{key}.classes": top.classes.int(), f"{key}.probabilities": top.probabilities.float()}


def load(path: Path) -> list[TestPredictions]:
    """Read the result of `save`."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path}: no such file; run the command again that made the run, with `overwrite=True`.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}, not {_FORMAT!r}")
        if metadata.pop("digest", None) != _digest(metadata, tensors):
            raise ValueError("it was changed after it was written")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}).") from error

    def top(key: str) -> TopClasses:
        return TopClasses(tensors[f"{key}.classes"].long(), tensors[f"{key}.probabilities"])

    tests = []
    for number, entry in enumerate(json.loads(metadata["tests"])):
        thumbnails = {int(index): base64.b64decode(image) for index, image in entry.pop("thumbnails").items()}
        labels, zero_shot = tensors[f"{number}.labels"].long(), top(f"{number}.zero_shot")
        tuned = top(f"{number}.tuned") if f"{number}.tuned.classes" in tensors else None
        tests.append(TestPredictions(**entry, labels=labels, zero_shot=zero_shot, tuned=tuned, thumbnails=thumbnails))
    return tests


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    return digest_json([metadata, digest_tensors(sorted(tensors.items()))])


def prediction_lines(tests: Sequence[TestPredictions]) -> Iterator[str]:
    """Yield the lines of predictions.csv: the classes with the largest probabilities of each test image, best first."""
    columns = ["test", "image", "label", "zero_shot", "predicted", "probability"]
    for place in range(2, 1 + max((test.last.classes.shape[1] for test in tests), default=1)):
        columns += [f"predicted_{place}", f"probability_{place}"]
    yield csv_line(columns)
    for test in tests:
        before, top = test.zero_shot.classes[:, 0].tolist(), test.last
        labels, ids, probabilities = test.labels.tolist(), top.classes.tolist(), top.probabilities.tolist()
        for index, image in enumerate(test.images):
            cells = [test.name, image, test.classes[labels[index]], test.classes[before[index]]]
            for class_id, probability in zip(ids[index], probabilities[index], strict=True):
                cells += [test.classes[class_id], f"{probability:.6g}"]
            yield csv_line(cells)
