"""Evaluation of a method on the tests of its task, and of the checkpoint of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor

from ...features import FeatureCache
from ...folders import restored
from ...options import CacheDtype, Protocol
from ..config import TuneConfig
from ..console import plain
from ..data import InputError, SizedDataset, Source
from ..data.files import format_names
from ..data.tasks import summarise
from ..methods import Method
from . import checkpoint, weights
from .model import LOCAL_DIR, load_weights
from .own_dataset import own_data
from .plain_config import OPEN_CLIP
from .precision import REMEDY
from .predictions import TOP, TopClasses
from .processes import Processes, join
from .run_folder import CONFIG
from .setup import BATCH, RunSetup, build_run
from .sources import check_source
from .validation import has_stalled

Accuracies = dict[str, float | None]
"""Accuracy in per cent by test and by summary of the protocol."""
Result = TypeVar("Result")


class Evaluator:
    """Evaluator of a method on all tests of its task.

    Args:
        setup: The run.
        features: Features of the test images, by test; see `RunSetup.test_features`.
        validation: Features of the validation images; see `RunSetup.validation_features`.

    Attributes:
        top: Classes with the largest probabilities in the last evaluation, by test.
        validation: The images of `task.validation`, or None.
    """

    def __init__(self, setup: RunSetup, features: Mapping[str, FeatureCache], validation: FeatureCache | None = None):
        self._setup, task = setup, setup.task
        self.top: dict[str, TopClasses] = {}
        self._tests = {
            test.name: EvaluatedImages(setup, test.name, features[test.name], len(test.images))
            for test in task.tests
            if len(test.images)
        }
        self.validation: EvaluatedImages | None = None
        if validation is not None and task.validation is not None:
            count = len(task.validation.images)
            self.validation = EvaluatedImages(setup, task.tests[0].name, validation, count)

    def zero_shot(self) -> dict[str, Tensor]:
        """Return the `predictions` of the zero-shot model. Call it before training."""
        return self._predictions(
            self._setup.zero_shot, 'for the pretrained weights. Check `pretrained`, or use precision="fp32".'
        )

    def predictions(self) -> dict[str, Tensor]:
        """Return the top-1 class [n] of each image, by test. Tests that the method can't classify are left out.

        Raises:
            FloatingPointError: If a logit is not finite.
        """
        return self._predictions(self._setup.method, f"after this epoch, though its loss and weights are. {REMEDY}")

    def validation_accuracy(self, method: Method | None = None) -> float | None:
        """Return the accuracy in per cent of a method (default: the run's) on the validation images; None without any.

        Raises:
            FloatingPointError: If a logit is not finite.
        """
        if self.validation is None:
            return None
        predicted = self._found(method or self._setup.method, self.validation, "on the validation images")
        return None if predicted is None else _accuracy(predicted, self.validation.labels)

    def _predictions(self, method: Method, when: str) -> dict[str, Tensor]:
        found = {name: self._found(method, images, when) for name, images in self._tests.items()}
        return {name: predicted for name, predicted in found.items() if predicted is not None}

    def _found(self, method: Method, images: EvaluatedImages, when: str) -> Tensor | None:
        method.train(False)
        top = images.top(method)
        if top is None:
            return None
        if not top.probabilities.isfinite().all():  # NaN if a logit is
            raise FloatingPointError(f"tune: logits of the test {images.test!r} are not finite {when}")
        if images is not self.validation:
            self.top[images.test] = top
        return top.classes[:, 0]

    def labels(self, test: str) -> Tensor:
        """Labels [n] of the images of a test."""
        return self._tests[test].labels

    def accuracies(self, predictions: Mapping[str, Tensor]) -> Accuracies:
        """Return the accuracies of `predictions`; None for tests without predictions, and for their summaries."""
        task = self._setup.task

        def accuracy(name: str) -> float:
            return _accuracy(predictions[name], self.labels(name))

        known = {test.name: accuracy(test.name) for test in task.tests if test.name in predictions}
        if len(known) == len(task.tests):
            return dict(summarise(task.protocol, known))
        names = summarise(task.protocol, {test.name: 0.0 for test in task.tests})
        return {name: known.get(name) for name in names}


class EvaluatedImages:
    """Features of images, to be classified over the classes of a test.

    With several processes each classifies its share of the images; the results cover all images.

    Args:
        setup: The run.
        test: Name of the test with the classes and prompts.
        features: Features of all images, or of the share of this process.
        count: Number of all images.

    Attributes:
        labels: Labels of all images, [n].
    """

    def __init__(self, setup: RunSetup, test: str, features: FeatureCache, count: int):
        self._setup, self.test, self._features, self._count = setup, test, features, count
        self.labels = self._gathered(features.labels)

    def _gathered(self, rows: Tensor) -> Tensor:
        """Rows [n, …] of all images, from those of the share of each process."""
        return rows if len(rows) == self._count else self._setup.processes.gather(rows, self._count)

    def batches(self) -> Iterator[Tensor]:
        """Yield the inputs of `Method.logits` for the images of this process, in order."""
        share = self._setup.processes.share(self._count)
        own = range(len(share)) if len(self._features) == len(share) else share
        numbers = [list(own[start : start + BATCH]) for start in range(0, len(own), BATCH)]
        for inputs, _ in self._features.loader(sampler=numbers, device=self._setup.device):
            yield inputs

    @torch.no_grad()
    def top(self, method: Method) -> TopClasses | None:
        """Return the `TOP` best classes of each image, with NaN where a logit is; None if it can't be classified."""
        found = []
        for inputs in self.batches():
            with self._setup.precision.autocast():
                top = method.top_k(self.test, inputs, TOP)
            if top is None:
                return None
            found.append(top)
        probabilities, classes = (self._gathered(torch.cat(part).cpu()) for part in zip(*found, strict=True))
        return TopClasses(classes, probabilities)

    @torch.no_grad()
    def logits(self, method: Method) -> Tensor | None:
        """Return the logits [n, C] of all images, in the dtype of the class embeddings, on the CPU; None as above."""
        method.train(False)
        found = []
        for inputs in self.batches():
            with self._setup.precision.autocast():
                logits = method.logits(self.test, inputs)
            if logits is None:
                return None
            found.append(logits.cpu())
        return self._gathered(torch.cat(found))


def _accuracy(predictions: Tensor, labels: Tensor) -> float:
    return round(100.0 * (predictions == labels).float().mean().item(), 4)


def epochs_left(folder: Path) -> int:
    """Return the number of epochs that a run has not completed; 0 if there is no training state, or it stopped early.

    Raises:
        InputError: If the folder is not a run folder, or its checkpoint is damaged.
    """
    config, found = TuneConfig.from_yaml(folder / CONFIG, trust=True), checkpoint.find(folder)  # nothing is loaded
    if found is None or has_stalled(found.state["rows"], config.patience):
        return 0
    return (config.epochs or 0) - len(found.state["rows"])


def evaluate_run(
    folder: str | Path,
    *,
    device: str | None = None,
    data: str | None = None,
    root: Path | None = None,
    protocol: Protocol | None = None,
    dataset: SizedDataset | None = None,
    test: SizedDataset | None = None,
    classes: Sequence[str] | int | None = None,
    trust: bool = False,
    console: Console | None = None,
) -> Accuracies:
    """Compute the accuracy of the checkpoint of a run. Writes nothing, and does not read the feature cache.

    In processes that torchrun started, each classifies its share of the test images.

    Args:
        folder: Run folder of `tune`, which may be in progress.
        device: Device. Default: that of the run.
        data: Dataset of the test images. Default: that of the run.
        root: Folder of the datasets, for coop: and torchvision:. Default: that of the run.
        protocol: Protocol that selects test classes and images. Default: that of the run.
        dataset: Training images that were passed to `tune`, or others of the same classes.
        test: Test images; see `tune`.
        classes: Class names by label; see `tune`. Or the largest number of classes; default: all of other `data`, and
            the setting of the run for its own.
        trust: Load what config.yaml names: models and datasets of the hub, models and weights in other folders.
        console: Console for the number of images and the classes of each test. Default: none.

    Raises:
        InputError: If the folder is not a run folder, its checkpoint is damaged, the run has no test images, or it is
            not trusted and names such a source.
        FloatingPointError: If a logit is not finite.
    """
    folder = restored(Path(folder))
    given = ("model", "pretrained", *(["data"] if data or dataset is not None else []))  # `_load_run` checks the model
    config = TuneConfig.from_yaml(folder / CONFIG, trust=trust, given=given)
    if config.test == "none" and data is None and test is None:
        raise InputError(f"evaluate_run: data must be given: all images of {config.data} trained or validated.", "data")
    limit = config.classes if data in (None, config.data) else None  # of other data, all classes
    if isinstance(classes, int):
        limit, classes = classes, None
    rounded_to = None if config.cache is None else config.cache_dtype
    config = replace(
        config,
        trust=trust,
        data=data or config.data,
        root=root or config.root,
        protocol=protocol or config.protocol,
        classes=limit,
        test="split",
        cache=None,
        views=1,
        refresh="never",
        validation="none",
        patience=None,
        workers=0,
        download=False,
    )
    if device is not None:  # xformers may not support this device
        config = replace(config, device=device, attention="sdpa")
    open_data = None
    if dataset is not None:
        config, open_data = own_data(config, dataset, test=test, classes=classes)
    processes = join()
    processes.set_device(config.device)
    setup = _load_run(config.resolved(open_data), folder, rounded_to, processes, open_data)
    shown = console if console is not None and processes.first else Console(quiet=True)
    for each in setup.task.tests:
        names = f"{len(each.classes)} classes: {format_names(each.classes)}"
        shown.print(plain(f"{each.name}: {len(each.images)} images of {names}"), soft_wrap=True)
    evaluator = Evaluator(setup, setup.test_features())
    return evaluator.accuracies(evaluator.predictions())


def _load_run(
    config: TuneConfig,
    folder: Path,
    rounded_to: CacheDtype | None,
    processes: Processes,
    open_data: Callable[[], Source] | None = None,
) -> RunSetup:
    """Build a run with the weights of its checkpoint."""
    contents = _read_weights(folder, weights.read_metadata).get("holds", weights.MODEL)
    if contents == weights.MODEL and (folder / OPEN_CLIP).is_file():  # the folder has the whole model
        config = replace(config, model=f"{LOCAL_DIR}{folder.absolute()}", pretrained=None)
    else:
        for name in ("model", "pretrained"):
            check_source(folder / CONFIG, name, getattr(config, name) or "", config.trust)
    build = partial(build_run, config, open_data=open_data, processes=processes, rounded_to=rounded_to)
    if contents == weights.MODEL:
        return build(load=lambda model: _read_weights(folder, partial(load_weights, model)))
    setup = build()
    _read_weights(folder, weights.WeightsFile(setup.method, setup.model, delta=False).load)
    return setup


def _read_weights(folder: Path, read: Callable[[Path], Result]) -> Result:
    """Call `read` with the weights file of a run; repeat it if a running process renamed the file meanwhile."""
    _, path = checkpoint.weights_of(folder)
    try:
        return read(path)
    except InputError:
        if path.exists():
            raise
        return read(checkpoint.weights_of(folder)[1])
