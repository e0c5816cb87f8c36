"""Evaluation of a method on the tests of its task, and the results of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...features import FeatureCache
from ..data.tasks import VALIDATION, summarise
from ..methods import Method
from ..results.class_metrics import balanced_accuracy, metrics_of_test
from ..results.predictions import TestPredictions, TopClasses, top_classes
from ..results.thumbnails import predictions_with_thumbnails
from .calibration import calibrate
from .candidates import Choice
from .setup import BATCH, RunSetup

Accuracies = dict[str, float | None]
"""Accuracy in per cent by test and by summary of the protocol; None where a method can't classify the images."""


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

    def evaluate(self, method: Method, when: str = "for these weights. Use `precision=fp32`.") -> Evaluation:
        """Evaluate a method; `when` is the end of the error for logits that are not finite."""
        top, accuracies = {}, {}
        for name in self._features:
            batches = [top_classes(logits) for logits in self._logits(method, name)]
            if not batches:
                continue
            top[name] = TopClasses(*(torch.cat(part).cpu() for part in zip(*batches, strict=True)))
            if not top[name].probabilities.isfinite().all():  # NaN if a logit is
                raise FloatingPointError(f"logits of the test {name!r} are not finite {when}")
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


class Trained(NamedTuple):
    """A trained model with its results."""

    setup: RunSetup  # its method has the trained weights, and the head
    choice: Choice | None  # between candidates
    rows: list[dict[str, Any]]  # of metrics.jsonl
    evaluator: Evaluator
    zero_shot: Evaluation
    tuned: Evaluation
    l2: float  # penalty of the head; 0 without one
    calibration: dict[str, Any]  # fields of a `Description`
    thresholds: list[dict[str, Any]]  # by accuracy on the validation images

    @classmethod
    def measured(
        cls,
        setup: RunSetup,
        evaluator: Evaluator,
        zero_shot: Evaluation,
        *,
        l2: float,
        choice: Choice | None = None,
        rows: Sequence[dict[str, Any]] = (),
    ) -> Trained:
        """Test the method of a setup, and calibrate its probabilities; after a choice they are that of the choice."""
        calibration, thresholds = evaluator.calibrate(setup.method) if choice is None else (choice.calibration, [])
        tuned = evaluator.evaluate(setup.method)
        return cls(setup, choice, [*rows], evaluator, zero_shot, tuned, l2, calibration, thresholds)
