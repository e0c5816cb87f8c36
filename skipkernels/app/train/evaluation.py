"""Evaluation of a method on the tests of its task, and of the model of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from ...features import FeatureCache
from ..config import CONFIG, TuneConfig
from ..console import print_plain
from ..data import InputError
from ..data.base import SizedDataset
from ..data.files import format_names
from ..data.registry import IN_PYTHON
from ..data.tasks import VALIDATION, summarise
from ..methods import Method
from ..report.mistakes import predictions_with_thumbnails
from ..results.class_metrics import balanced_accuracy, metrics_of_test
from ..results.files import existing_run
from ..results.predictions import TestPredictions, TopClasses, top_classes
from .calibration import calibrate
from .own_dataset import OwnData
from .reading import read_model
from .setup import BATCH, RunSetup, build_run
from .trainer import REMEDY
from .weights import load_run_method, load_run_model

Accuracies = dict[str, float | None]
"""Accuracy in per cent by test and by summary of the protocol; None where a method can't classify the images."""
REPLACEABLE = ("device", "data", "root", "protocol", "max_classes")
"""Settings of a run that `evaluate_run` can replace."""
_AFTER_EPOCH = f"after this epoch, though its loss and weights are. {REMEDY}"


class Evaluation(NamedTuple):
    """Results of a method on all tests."""

    accuracies: Accuracies
    top: dict[str, TopClasses]  # by test and `VALIDATION`, without those that the method can't classify
    validation: float | None  # accuracy in per cent on the validation images; None without any


class Evaluator:
    """Evaluator of methods on all tests of a task, with the features of a `RunSetup`."""

    def __init__(self, setup: RunSetup, features: Mapping[str, FeatureCache], validation: FeatureCache | None = None):
        self._setup = setup
        self._features = dict(features)
        if validation is not None:
            self._features[VALIDATION] = validation
        self.labels = {name: features.labels for name, features in self._features.items()}

    def evaluate(self, method: Method, when: str = _AFTER_EPOCH) -> Evaluation:
        """Evaluate a method."""
        top, accuracies = {}, {}
        for name in self._features:
            batches = [top_classes(logits) for logits in self._logits(method, name)]
            if not batches:
                continue
            top[name] = TopClasses(*(torch.cat(part).cpu() for part in zip(*batches, strict=True)))
            if not top[name].probabilities.isfinite().all():  # NaN if a logit is
                raise FloatingPointError(f"tune: logits of the test {name!r} are not finite {when}")
            correct = top[name].classes[:, 0] == self.labels[name]
            accuracies[name] = round(100.0 * correct.float().mean().item(), 4)
        validation = accuracies.pop(VALIDATION, None)
        return Evaluation(self._summarised(accuracies), top, validation)

    def by_class(self, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
        """Return the metrics by class of each test with predictions, and of the validation images."""
        tests = {test.name: test.classes for test in self._setup.task.tests}
        tests[VALIDATION] = self._setup.task.tests[0].classes
        return {name: metrics_of_test(self.labels[name], top, tests[name]) for name, top in evaluation.top.items()}

    def balanced(self, evaluation: Evaluation) -> float | None:
        """Return the balanced accuracy in per cent on the validation images; None if epochs are not compared by it."""
        if not self._setup.config.balances or VALIDATION not in evaluation.top:
            return None
        return balanced_accuracy(self.labels[VALIDATION], evaluation.top[VALIDATION].classes[:, 0])

    def calibrate(self, method: Method) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Calibrate the probabilities on the validation images, see `calibration.calibrate`; empty without these."""
        if VALIDATION not in self._features:
            return {}, []
        batches = [logits.cpu() for logits in self._logits(method, VALIDATION)]
        return calibrate(torch.cat(batches), self.labels[VALIDATION]) if batches else ({}, [])

    def predictions(self, before: Evaluation, after: Evaluation) -> list[TestPredictions]:
        """Collect the predictions for each test, for the files of a run."""
        tests = [test for test in self._setup.task.tests if test.name in before.top]  # has images
        return [
            predictions_with_thumbnails(test, self.labels[test.name], before.top[test.name], after.top.get(test.name))
            for test in tests
        ]

    def _logits(self, method: Method, name: str) -> Iterator[Tensor]:
        """Yield the logits [B, C] of the batches of a test, in evaluation mode; none if the method has no logits."""
        test = self._setup.task.tests[0].name if name == VALIDATION else name  # with the classes of the images
        method.train(False)
        for inputs, _ in self._features[name].loader(BATCH, "sequential", device=self._setup.device):
            with self._setup.autocast():
                logits = method.logits(test, inputs)
            if logits is None:
                return
            yield logits

    def _summarised(self, known: dict[str, float]) -> Accuracies:
        """Add the summaries of the protocol; None for tests without predictions, and for their summaries."""
        task = self._setup.task
        if len(known) == len(task.tests):
            return dict(summarise(task.protocol, known))
        return {name: known.get(name) for name in summarise(task.protocol, {test.name: 0.0 for test in task.tests})}


def evaluate_run(
    folder: str | Path,
    *,
    dataset: SizedDataset | None = None,
    test: SizedDataset | None = None,
    classes: Sequence[str] | None = None,
    trust: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> Accuracies:
    """Compute the accuracy of the model of a run. Writes nothing, and does not read the feature cache.

    Args:
        folder: Run folder of `tune`, which may be in progress.
        dataset: Training images that were passed to `tune`, or others of the same classes.
        test: Test images; see `tune`.
        classes: Class names by label; see `tune`.
        trust: Load what config.yaml names: models and datasets of the hub, models and weights in other folders.
        console: Console for notes, and the number of images and the classes of each test. Default: none.
        **settings: Fields of `TuneConfig` that replace those of the run: those in `REPLACEABLE`. None: that of the run;
            of other data, all classes.

    Raises:
        InputError: If the folder is not a run folder, its model is damaged, the run has no test images, or it is not
            trusted and names such a source.
        FloatingPointError: If a logit is not finite.
    """
    if unknown := settings.keys() - set(REPLACEABLE):
        raise TypeError(f"evaluate_run: settings must be among {', '.join(REPLACEABLE)}; got {min(unknown)}.")
    folder, console = existing_run(folder, "evaluate_run", "folder"), console or Console(quiet=True)
    given = {name: value for name, value in settings.items() if value is not None}
    own = OwnData(dataset, test, classes=classes)
    config, open_data = own.applied(_config_of_run(folder, own, given, trust), "evaluate_run")
    config = config.resolved(open_data)
    described, file = read_model(folder)
    loaded = load_run_model(folder, described, file, torch.device(config.device), trust=config.trust)
    setup = build_run(config, open_data=open_data, loaded=loaded, train=False)
    load_run_method(setup.method, described, file)
    for note in setup.task.notes:
        print_plain(console, f"note: {note}")
    for each in setup.task.tests:
        names = f"{len(each.classes)} classes: {format_names(each.classes)}"
        print_plain(console, f"{each.name}: {len(each.images)} images of {names}")
    return Evaluator(setup, setup.test_features()).evaluate(setup.method).accuracies


def _config_of_run(folder: Path, own: OwnData, given: dict[str, Any], trust: bool) -> TuneConfig:
    """Return the configuration of a run with other settings, for its test images alone."""
    replaced = ("model", "pretrained", *(["data"] if "data" in given or own.dataset is not None else []))
    config = TuneConfig.from_yaml(folder / CONFIG, trust=trust, given=replaced)  # the model is checked later
    if config.test == "none" and "data" not in given and own.test is None:
        raise InputError(f"must be given: all images of {config.data} trained or validated.", "data", "evaluate_run")
    changes: dict[str, Any] = {"trust": trust, "workers": 0, "cache": None, "test": "split"}
    changes |= {"refresh": "never", "validation": "none", "class_weight": None}
    if own.dataset is not None and "data" not in given and config.data.partition(":")[0] != IN_PYTHON:
        changes["data"] = f"{IN_PYTHON}:"  # `OwnData.applied` adds the name of the dataset
    if (changes | given).get("data", config.data) != config.data:
        changes["max_classes"] = None
    return replace(config, **changes | given)
