"""Images that the thresholds of `tune` keep: of the test images, and of classes that the run does not know.

    python -m bench.unknown

For each task of the pictograms and each seed, `tune` trains pictogram-tiny on half of the names, with one drawing of
each name held out for validation. Known are the test images of these names; unknown are those of the other half ("new
classes"), and those of the other tasks. An image is kept if the probability of its best class is at least a threshold.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import skipkernels as sk
from skipkernels.app.data.pictograms import TASKS, TEST, Drawings, names_of
from skipkernels.app.train.calibration import class_probabilities

from . import tables
from .rows import command, save

SEEDS = (0, 1, 2)
# A threshold, and per cent of images that it keeps; the accuracy is that of the known images that it keeps.
COLUMNS = ("threshold", "validation", "known", "accuracy", "new_classes", "other_tasks")


def rows_of(task: str, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Tune, and yield the thresholds for an accuracy."""
    options = {"protocol": "base-to-new", "validation": 0.5, "seed": seed, "device": "cpu"}
    metrics = sk.tune(data=f"pictograms:{task}", out=folder, **options)
    classifier = sk.Classifier.load(folder, device="cpu")
    names = {
        "known": classifier.classes,
        "new_classes": [name for name in names_of([task]) if name not in classifier.classes],
        "other_tasks": names_of([other for other in TASKS if other != task]),
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
        cells = dict.fromkeys(COLUMNS, "")
        if (threshold := row["threshold"]) is not None:
            kept = {group: 100 * (values >= threshold).double().mean() for group, values in best.items()}
            accuracy = 100 * correct[best["known"] >= threshold].double().mean()
            shares = {"validation": row["coverage"], "accuracy": accuracy, **kept}
            cells |= {"threshold": f"{threshold:.2f}"} | {name: f"{share:.1f}" for name, share in shares.items()}
        yield {"task": task, "seed": seed, "target": f"{row['target']:g}"} | cells


def main(arguments: Sequence[str] | None = None) -> None:
    args = command(__doc__).parse_args(arguments, argparse.Namespace(device=torch.device("cpu")))
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                rows += rows_of(task, seed, Path(folder, "run"))
    tables.show(list(rows[-1]), [list(row.values()) for row in rows])
    save(args, rows, "unknown")


if __name__ == "__main__":
    main()
