"""Images that the thresholds of `tune` keep: of the test images, and of classes that the run does not know.

    python -m bench.unknown

For each task of the pictograms and each seed, `tune` trains pictogram-tiny on half of the names, with one drawing of
each name held out for validation. Known are the test images of these names; unknown are those of the other half ("new
classes"), and those of the other tasks. An image is kept if the probability of its best class is at least a threshold.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import skipkernels as sk
from skipkernels.app.data.pictograms import TASKS, TEST, Drawings, names_of
from skipkernels.app.train.calibration import class_probabilities

from . import tables
from .rows import RESULTS, command

TABLE = RESULTS / "unknown.csv"
SEEDS = (0, 1, 2)


class Row(NamedTuple):
    """A threshold of a run, and per cent of images that it keeps: of validation, of test, and of unknown images."""

    task: str
    seed: int
    target: str
    threshold: str
    validation: str
    known: str
    accuracy: str  # of the known images that are kept
    new_classes: str
    other_tasks: str


def rows_of(task: str, seed: int, folder: Path) -> Iterator[Row]:
    """Tune, and yield the thresholds for an accuracy."""
    options = {"protocol": "base-to-new", "validation": 0.5, "seed": seed, "device": "cpu"}
    metrics = sk.tune(data=f"pictograms:{task}", out=folder, **options)
    classifier = sk.Classifier.load(folder, device="cpu")
    names = {
        "known": classifier.classes,
        "new classes": [name for name in names_of([task]) if name not in classifier.classes],
        "other tasks": names_of([other for other in TASKS if other != task]),
    }
    probabilities = {}
    for group, classes in names.items():
        batches = torch.stack([classifier.transform(image) for image, _ in Drawings(classes, TEST)]).split(64)
        logits = torch.cat([classifier.logits(batch) for batch in batches])
        probabilities[group] = class_probabilities(logits, classifier.temperature, classifier.none_logit)
    correct = probabilities["known"].argmax(dim=1) == torch.arange(len(classifier.classes))
    best = {group: found.amax(dim=1) for group, found in probabilities.items()}
    for row in metrics["validation"]["thresholds"]:
        if row["wanted"] != "accuracy":
            continue
        threshold, cells = row["threshold"], ("",) * 6
        if threshold is not None:
            known, *unknown = (100 * (values >= threshold).double().mean() for values in best.values())
            accuracy = 100 * correct[best["known"] >= threshold].double().mean()
            cells = (f"{threshold:.2f}", *(f"{value:.1f}" for value in (row["coverage"], known, accuracy, *unknown)))
        yield Row(task, seed, f"{row['target']:g}", *cells)


def main(arguments: Sequence[str] | None = None) -> None:
    args = command(__doc__).parse_args(arguments)
    rows: list[Row] = []
    for task in TASKS:
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                rows += rows_of(task, seed, Path(folder, "run"))
    tables.show(Row._fields, rows)
    if not args.no_save:
        tables.write(TABLE, rows)


if __name__ == "__main__":
    main()
