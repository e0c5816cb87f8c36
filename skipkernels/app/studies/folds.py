"""Cross-validation: every image is a test image once, of a run that did not train on it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...folders import replace_text
from ...formatting import csv_line, csv_text
from ..config import TuneConfig
from ..data import InputError
from ..report.intervals import wilson
from ..report.words import name_of_method, title_of
from ..train import predictions
from ..train.class_metrics import confusion_lines, metrics_of_test
from ..train.predictions import TestPredictions, TopClasses
from ..train.run_folder import CONFUSION_CSV, METRICS, PREDICTIONS_CSV
from ..train.setup import build_task
from .runs import Variant, mean_and_deviation, run_variants
from .study import ACCURACY, Column, Study

_TEST = "all"  # name of the test of few-shot


def cross_validate(config: TuneConfig, folds: int, folder: Path, console: Console, *, overwrite: bool = False) -> Study:
    """Run each fold of a stratified cross-validation, and pool the predictions of all images.

    Writes metrics.json with the accuracy of all images and by class, predictions.csv and confusion.csv to `folder`.
    """
    if folds < 2:
        raise InputError(f"cross_validate: folds must be at least 2; got {folds}.", "folds")
    if config.fold is not None:
        raise InputError("cross_validate: folds are all folds, and fold is one; leave one of them out.", "folds")
    variants = []
    for number in range(1, folds + 1):
        cache = None if config.cache is None else config.cache / f"fold-{number}-of-{folds}"
        variants.append(Variant(f"fold {number}", dataclasses.replace(config, fold=f"{number}/{folds}", cache=cache)))
    build_task(variants[0].config.resolved())  # raises errors of the data before a process is started
    results = run_variants(variants, [config.seed], folder, console, overwrite=overwrite)
    whole = _joined([predictions.load(folder / result.folder / predictions.PREDICTIONS)[0] for result in results])
    pooled: dict[str, Any] = {"folds": folds, "seed": config.seed, "method": config.method, "images": len(whole.labels)}
    for key, top in (("zero_shot", whole.zero_shot), ("tuned", whole.last)):
        accuracy = round(100 * (top.classes[:, 0] == whole.labels).double().mean().item(), 4)
        over = mean_and_deviation(result.metrics[key][_TEST] for result in results)
        pooled[key] = {"accuracy": accuracy, "interval": wilson(accuracy, len(whole.labels)), "over_folds": over}
        pooled[key] |= metrics_of_test(whole.labels, top, whole.classes)
    texts = {
        METRICS: json.dumps(pooled, indent=2) + "\n",
        PREDICTIONS_CSV: "".join(_prediction_lines([folder / result.folder / PREDICTIONS_CSV for result in results])),
        CONFUSION_CSV: "".join(confusion_lines([whole])),
    }
    for name, text in texts.items():
        replace_text(folder / name, text)
    columns = [
        Column(ACCURACY, "test images", ("images", "tests", _TEST)),
        Column(ACCURACY, "zero-shot", ("zero_shot", _TEST)),
        Column(ACCURACY, "tuned", ("tuned", _TEST)),
    ]
    title = title_of(config, name_of_method(config.method), f"{folds} folds")
    return Study("folds", title, results, columns, "folds", more={"pooled": pooled})


def _joined(tests: Sequence[TestPredictions]) -> TestPredictions:
    """Predictions of all folds, without images."""

    def top(parts: Iterable[TopClasses]) -> TopClasses:
        return TopClasses(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    labels = torch.cat([test.labels for test in tests])
    return TestPredictions(
        _TEST, tests[0].classes, labels, top(test.zero_shot for test in tests), top(test.last for test in tests)
    )


def _prediction_lines(files: Sequence[Path]) -> Iterator[str]:
    """Yield the lines of the predictions.csv of all folds, with a column for the fold."""
    for fold, file in enumerate(files, 1):
        header, *rows = csv.reader(io.StringIO(file.read_text("utf-8"), newline=""))
        if fold == 1:
            yield csv_line(["fold", *header])
        for row in rows:
            yield csv_line([fold, *map(csv_text, row)])
