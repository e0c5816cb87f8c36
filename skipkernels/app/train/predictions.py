"""Predictions of a run for its test images, and thumbnails of some of them: what the report is made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...folders import replace_tensors
from ...formatting import csv_line, first_line
from ..data import InputError

if TYPE_CHECKING:
    from torch import Tensor

TOP = 3
"""Classes per image that are kept."""
PREDICTIONS = "predictions.safetensors"
_FORMAT = "1"


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
    images: list[str] = field(default_factory=list)  # names of the images; not kept in the file
    thumbnails: dict[int, bytes] = field(default_factory=dict)  # PNG or JPEG files by the index of the image

    @property
    def last(self) -> TopClasses:
        """Predictions after tuning, or those before if there are none."""
        return self.zero_shot if self.tuned is None else self.tuned


def save(path: Path, tests: Sequence[TestPredictions]) -> None:
    """Write predictions.safetensors, replacing an earlier one."""
    import torch

    tensors: dict[str, Tensor] = {}
    for number, test in enumerate(tests):
        tensors[f"{number}.labels"] = test.labels.int()
        for when, top in (("zero_shot", test.zero_shot), ("tuned", test.tuned)):
            if top is not None:
                tensors[f"{number}.{when}.classes"] = top.classes.int().contiguous()
                tensors[f"{number}.{when}.probabilities"] = top.probabilities.float().contiguous()
        for index, image in test.thumbnails.items():
            tensors[f"{number}.thumbnails.{index}"] = torch.frombuffer(bytearray(image), dtype=torch.uint8)
    names = [{"name": test.name, "classes": test.classes} for test in tests]
    metadata = {"format": _FORMAT, "tests": json.dumps(names)}
    replace_tensors(path, tensors, metadata)


def load(path: Path) -> list[TestPredictions]:
    """Read the result of `save`."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path}: no such file; run the command again that made the run, with `overwrite=True`.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}, not {_FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return [_test(number, entry, tensors) for number, entry in enumerate(json.loads(metadata["tests"]))]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}).") from error


def prediction_lines(tests: Sequence[TestPredictions]) -> Iterator[str]:
    """Yield the lines of predictions.csv: the classes with the largest probabilities of each test image, best first."""
    most = max((test.last.classes.shape[1] for test in tests), default=1)
    numbers = ["", *(f"_{n}" for n in range(2, most + 1))]
    yield csv_line(
        ["test", "image", "label", "zero_shot", *(f"{x}{n}" for n in numbers for x in ("predicted", "probability"))]
    )
    for test in tests:
        names, top = test.classes, test.last
        known = zip(test.images, test.labels.tolist(), test.zero_shot.classes[:, 0].tolist(), strict=True)
        for (image, label, before), ids, shares in zip(
            known, top.classes.tolist(), top.probabilities.tolist(), strict=True
        ):
            cells = [cell for i, p in zip(ids, shares, strict=True) for cell in (names[i], f"{p:.6g}")]
            yield csv_line([test.name, image, names[label], names[before], *cells])


def _test(number: int, entry: dict, tensors: dict[str, Tensor]) -> TestPredictions:
    def top(when: str) -> TopClasses:
        part = f"{number}.{when}"
        return TopClasses(tensors[f"{part}.classes"].long(), tensors[f"{part}.probabilities"].float())

    tuned = top("tuned") if f"{number}.tuned.classes" in tensors else None
    prefix = f"{number}.thumbnails."
    thumbnails = {
        int(key[len(prefix) :]): bytes(tensor.numpy()) for key, tensor in tensors.items() if key.startswith(prefix)
    }
    labels = tensors[f"{number}.labels"].long()
    return TestPredictions(
        str(entry["name"]), list(entry["classes"]), labels, top("zero_shot"), tuned, thumbnails=thumbnails
    )
