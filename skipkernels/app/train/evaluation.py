"""Evaluation of a method on the tests of its task, and of the model of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from ...features import FeatureCache
from ...folders import restored
from ...options import Protocol
from ..config import TuneConfig
from ..console import plain
from ..data import InputError, SizedDataset
from ..data.files import format_names
from ..data.tasks import summarise
from ..methods import Method
from ..untrusted import check_source
from . import weights
from .class_metrics import VALIDATION, metrics_of_test
from .model import LOCAL_DIR, load_weights
from .own_dataset import check_no_parts, own_data
from .plain_config import OPEN_CLIP
from .precision import REMEDY
from .predictions import TOP, TopClasses
from .processes import join
from .run_folder import CONFIG, read_model
from .setup import BATCH, RunSetup, build_run

Accuracies = dict[str, float | None]
"""Accuracy in per cent by test and by summary of the protocol; None where a method can't classify the images."""
_AFTER_EPOCH = f"after this epoch, though its loss and weights are. {REMEDY}"


class Evaluation(NamedTuple):
    """Results of a method on all tests."""

    accuracies: Accuracies
    top: dict[str, TopClasses]  # by test and `VALIDATION`, without those that the method can't classify
    validation: float | None  # accuracy in per cent on the validation images; None without any


class Evaluator:
    """Evaluator of methods on all tests of a task, with the features of a `RunSetup`.

    With several processes each classifies its share of the images; the results cover all images.
    """

    def __init__(self, setup: RunSetup, features: Mapping[str, FeatureCache], validation: FeatureCache | None = None):
        self._setup, task = setup, setup.task
        self._features, self._counts = dict(features), {test.name: len(test.images) for test in task.tests}
        if validation is not None and task.validation is not None:
            self._features[VALIDATION], self._counts[VALIDATION] = validation, len(task.validation.images)
        self.labels = {name: self._gathered(found.labels, self._counts[name]) for name, found in self._features.items()}

    def evaluate(self, method: Method, when: str = _AFTER_EPOCH) -> Evaluation:
        """Evaluate a method."""
        top, accuracies = {}, {}
        for name in self._features:
            found = self._predicted(method, name, partial(method.top_k, k=TOP))
            if found is None:
                continue
            top[name] = TopClasses(found[1], found[0])
            if not found[0].isfinite().all():  # NaN if a logit is
                raise FloatingPointError(f"tune: logits of the test {name!r} are not finite {when}")
            correct = top[name].classes[:, 0] == self.labels[name]
            accuracies[name] = round(100.0 * correct.float().mean().item(), 4)
        validation = accuracies.pop(VALIDATION, None)
        return Evaluation(self._summarised(accuracies), top, validation)

    def by_class(self, found: Evaluation) -> dict[str, dict[str, Any]]:
        """Return the metrics by class of each test with predictions, and of the validation images."""
        tests = {test.name: test.classes for test in self._setup.task.tests}
        tests[VALIDATION] = self._setup.task.tests[0].classes
        return {name: metrics_of_test(self.labels[name], top, tests[name]) for name, top in found.top.items()}

    def validation_logits(self, method: Method) -> tuple[Tensor, Tensor] | None:
        """Return logits [n, C] and labels [n] of the validation images; None if there are none."""
        if VALIDATION not in self._features:
            return None
        found = self._predicted(method, VALIDATION, method.logits)
        return None if found is None else (found[0], self.labels[VALIDATION])

    @torch.no_grad()
    def _predicted(self, method: Method, name: str, predict: Callable[..., Any]) -> list[Tensor] | None:
        """Tensors [n, …] that `predict` returns for all images, in evaluation mode; None if it can't classify them."""
        features, count = self._features[name], self._counts[name]
        test = self._setup.task.tests[0].name if name == VALIDATION else name  # with the classes of the images
        share = self._setup.processes.share(count)
        own = range(len(share)) if len(features) == len(share) else share
        batches = [list(own[start : start + BATCH]) for start in range(0, len(own), BATCH)]
        parts = []
        method.train(False)
        for inputs, _ in features.loader(sampler=batches, device=self._setup.device):
            with self._setup.precision.autocast():
                found = predict(test, inputs)
            if found is None:
                return None
            parts.append([tensor.cpu() for tensor in (found if isinstance(found, tuple) else (found,))])
        return [self._gathered(torch.cat(part), count) for part in zip(*parts, strict=True)]

    def _gathered(self, rows: Tensor, count: int) -> Tensor:
        """Rows [count, …] of all images, from those of the share of each process."""
        return rows if len(rows) == count else self._setup.processes.gather(rows, count)

    def _summarised(self, known: dict[str, float]) -> Accuracies:
        """Add the summaries of the protocol; None for tests without predictions, and for their summaries."""
        task = self._setup.task
        if len(known) == len(task.tests):
            return dict(summarise(task.protocol, known))
        return {name: known.get(name) for name in summarise(task.protocol, {test.name: 0.0 for test in task.tests})}


def evaluate_run(
    folder: str | Path,
    *,
    device: str | None = None,
    data: str | None = None,
    root: Path | None = None,
    protocol: Protocol | None = None,
    dataset: SizedDataset | None = None,
    test: SizedDataset | None = None,
    classes: Sequence[str] | None = None,
    max_classes: int | None = None,
    trust: bool = False,
    console: Console | None = None,
) -> Accuracies:
    """Compute the accuracy of the model of a run. Writes nothing, and does not read the feature cache.

    In processes that torchrun started, each classifies its share of the test images.

    Args:
        folder: Run folder of `tune`, which may be in progress.
        device: Device. Default: that of the run.
        data: Dataset of the test images. Default: that of the run.
        root: Folder of the datasets of coop:, or of the images of csv:. Default: that of the run.
        protocol: Protocol that selects test classes and images. Default: that of the run.
        dataset: Training images that were passed to `tune`, or others of the same classes.
        test: Test images; see `tune`.
        classes: Class names by label; see `tune`.
        max_classes: Largest number of classes. Default: all of other `data`, and the setting of the run for its own.
        trust: Load what config.yaml names: models and datasets of the hub, models and weights in other folders.
        console: Console for notes, and the number of images and the classes of each test. Default: none.

    Raises:
        InputError: If the folder is not a run folder, its model is damaged, the run has no test images, or it is not
            trusted and names such a source.
        FloatingPointError: If a logit is not finite.
    """
    folder = restored(Path(folder))
    given = ("model", "pretrained", *(["data"] if data or dataset is not None else []))  # the model is checked below
    config = TuneConfig.from_yaml(folder / CONFIG, trust=trust, given=given)
    if config.test == "none" and data is None and test is None:
        raise InputError(f"evaluate_run: data must be given: all images of {config.data} trained or validated.", "data")
    if max_classes is None and data in (None, config.data):  # of other data, all classes
        max_classes = config.max_classes
    changes: dict[str, Any] = {
        "data": data or config.data,
        "root": root or config.root,
        "protocol": protocol or config.protocol,
    }
    changes |= {"cache": None, "refresh": "never", "validation": "none", "patience": None, "test": "split"}
    if test is not None or data not in (None, config.data):
        changes["fold"] = None
    if device is not None:  # xformers may not support this device
        changes |= {"device": device, "attention": "sdpa"}
    rounded_to = None if config.cache is None else config.cache_dtype
    config = replace(config, trust=trust, max_classes=max_classes, workers=0, **changes)
    open_data = None
    if dataset is not None:
        config, open_data = own_data(config, dataset, test=test, classes=classes)
    else:
        check_no_parts("evaluate_run", test, classes)
    processes = join()
    processes.set_device(config.device)
    described, file = read_model(folder)
    whole = described.holds == weights.MODEL
    if whole and (folder / OPEN_CLIP).is_file():  # the folder has the whole model
        config = replace(config, model=f"{LOCAL_DIR}{folder.absolute()}", pretrained=None)
    else:
        for name in ("model", "pretrained"):
            check_source(folder / CONFIG, name, getattr(config, name) or "", trust)
    load = (lambda model: load_weights(model, file)) if whole else None
    setup = build_run(
        config.resolved(open_data), open_data=open_data, load=load, processes=processes, rounded_to=rounded_to
    )
    if not whole:
        weights.WeightsFile(setup.method, setup.model, delta=False).load(file)
    shown = console if console is not None and processes.first else Console(quiet=True)
    for note in setup.task.source_notes:
        shown.print(plain(f"note: {note}"), soft_wrap=True)
    for each in setup.task.tests:
        names = f"{len(each.classes)} classes: {format_names(each.classes)}"
        shown.print(plain(f"{each.name}: {len(each.images)} images of {names}"), soft_wrap=True)
    return Evaluator(setup, setup.test_features()).evaluate(setup.method).accuracies
