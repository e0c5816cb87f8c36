"""Which score tells images of unknown classes from those of the classes of a run, and what a threshold on it keeps.

    python -m bench.unknown

For each task of the pictograms and each seed, `tune` trains pictogram-tiny on half of the names, with one drawing of
each name held out for validation. Known are the test images of these names; unknown are those of the other half ("new
classes"), and those of the other tasks. An image is kept if its score is at least a threshold. AUROC is the probability
that a known image has a larger score than an unknown one, "unknown kept" the share of unknown images, in per cent, at
the threshold that keeps 95 % of the known, and "right" the AUROC of the known images that are classified correctly
against those that are not. A cosine ranks images as the logit does. The second table has the thresholds that `tune`
finds on the validation images for "probability with none", and the shares that they keep.

Predicted before the run: on images of other tasks the maximum probability is the best score or within 0.02 of its
AUROC, at about 0.85; the maximum logit is at least 0.03 below it; and each score keeps more than half of the unknown
images. "Probability with none", of `calibration.class_probabilities`, was added after these results.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import skipkernels as sk
from skipkernels.app.demo.pictograms import TASKS, TEST, Drawings, names_of
from skipkernels.app.train.calibration import class_probabilities

from . import measure, tables

SCORES_TABLE, THRESHOLDS_TABLE = (measure.RESULTS / name for name in ("unknown.csv", "unknown_thresholds.csv"))
SEEDS = (0, 1, 2)
UNKNOWN = ("new classes", "other tasks")
# Of logits z [n, C], the fitted temperature T and the logit b of "none of these".
SCORES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "probability": lambda z, T, b: (z / T).softmax(dim=1).amax(dim=1),
    "probability, T = 1": lambda z, T, b: z.softmax(dim=1).amax(dim=1),
    "energy": lambda z, T, b: (z / T).logsumexp(dim=1),
    "energy, T = 1": lambda z, T, b: z.logsumexp(dim=1),
    "logit": lambda z, T, b: z.amax(dim=1),
    "probability with none": lambda z, T, b: class_probabilities(z, T, b).amax(dim=1),
}


class Score(NamedTuple):
    """A score for the known and the unknown images of a run."""

    task: str
    seed: int
    unknown: str
    score: str
    auroc: str
    unknown_kept: str
    right: str


class Kept(NamedTuple):
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


def auroc(known: Tensor, unknown: Tensor) -> float:
    """The probability that a known image has a larger score than an unknown one; equal ones count half.

    >>> auroc(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0, 3.0]))
    0.5833333333333334
    """
    larger, equal = known[:, None] > unknown, known[:, None] == unknown
    return (larger.double() + 0.5 * equal).mean().item()


def kept_at_95(known: Tensor, unknown: Tensor) -> float:
    """Per cent of the unknown images at the largest threshold that keeps 95 % of the known ones.

    >>> kept_at_95(torch.arange(20.0), torch.tensor([0.0, 0.9, 1.0, 5.0]))
    50.0
    """
    threshold = known.sort().values[len(known) // 20]
    return 100 * (unknown >= threshold).double().mean().item()


def run(task: str, seed: int, folder: Path) -> tuple[list[Score], list[Kept]]:
    """Tune, and score the images."""
    options = {"protocol": "base-to-new", "validation": 0.5, "seed": seed, "device": "cpu", "log": ("none",)}
    metrics = sk.tune(data=f"pictograms:{task}", out=folder, **options)
    classifier = sk.Classifier.load(folder, device="cpu")
    new = [name for name in names_of([task]) if name not in classifier.classes]
    others = names_of([other for other in TASKS if other != task])
    fitted = classifier.temperature, classifier.none_logit
    logits = {}
    for group, names in (("known", classifier.classes), ("new classes", new), ("other tasks", others)):
        batches = torch.stack([classifier.transform(image) for image, _ in Drawings(names, TEST)]).split(64)
        logits[group] = torch.cat([classifier.logits(batch) for batch in batches])
    correct = logits["known"].argmax(dim=1) == torch.arange(len(classifier.classes))
    scores = []
    for name, score in SCORES.items():
        found = {group: score(z, *fitted) for group, z in logits.items()}
        right = auroc(found["known"][correct], found["known"][~correct])
        for group in UNKNOWN:
            values = auroc(found["known"], found[group]), kept_at_95(found["known"], found[group])
            scores.append(Score(task, seed, group, name, f"{values[0]:.3f}", f"{values[1]:.1f}", f"{right:.3f}"))
    kept = []  # by the last of the scores
    for row in metrics["validation"]["thresholds"]:
        if row["wanted"] != "accuracy":
            continue
        threshold, cells = row["threshold"], ("",) * 6
        if threshold is not None:
            shares = {group: 100 * (score >= threshold).double().mean() for group, score in found.items()}
            accuracy = 100 * correct[found["known"] >= threshold].double().mean()
            numbers = row["coverage"], shares["known"], accuracy, shares["new classes"], shares["other tasks"]
            cells = (f"{threshold:.2f}", *(f"{value:.1f}" for value in numbers))
        kept.append(Kept(task, seed, f"{row['target']:g}", *cells))
    return scores, kept


def main(arguments: Sequence[str] | None = None) -> None:
    args = measure.command(__doc__).parse_args(arguments)
    scores, kept = [], []
    for task in TASKS:
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                of_run = run(task, seed, Path(folder, "run"))
            scores += of_run[0]
            kept += of_run[1]
    tables.show(Score._fields, scores)
    tables.show(Kept._fields, kept)
    if not args.no_save:
        tables.write(SCORES_TABLE, scores)
        tables.write(THRESHOLDS_TABLE, kept)


if __name__ == "__main__":
    main()
