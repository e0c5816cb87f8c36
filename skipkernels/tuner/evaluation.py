"""Evaluation of a method on the tests of its task, and of the checkpoint of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..data import InputError
from ..data.tasks import summarise
from ..features import FeatureCache
from ..options import CacheDtype, Protocol
from . import checkpoint, weights
from .config import TuneConfig
from .methods import Method
from .model import load_weights
from .precision import REMEDY
from .processes import Processes, joined
from .run_folder import CONFIG
from .setup import BATCH, RunSetup, build_run

Accuracies = dict[str, float | None]
"""Accuracy in per cent by test and by summary of the protocol."""
Result = TypeVar("Result")


class Evaluator:
    """Evaluator of a method on all tests of its task.

    Args:
        setup: The run.
        features: Features of the test images, by test; see `RunSetup.test_features`.
    """

    def __init__(self, setup: RunSetup, features: Mapping[str, FeatureCache]):
        self._setup, self._features = setup, features
        self._labels = {name: self._gathered(cache.labels, name) for name, cache in features.items()}

    def _own(self, test: str) -> range:
        """Images of a test that this process classifies, as numbers in their features."""
        share = self._setup.processes.share(self._count(test))
        in_memory = len(self._features[test]) == len(share)  # only those of the share
        return range(len(share)) if in_memory else share

    def _count(self, test: str) -> int:
        return next(len(other.images) for other in self._setup.task.tests if other.name == test)

    def _gathered(self, rows: Tensor, test: str) -> Tensor:
        """Rows [n, …] of all images of a test, from those of its share in each process."""
        count = self._count(test)
        return rows if len(rows) == count else self._setup.processes.gather(rows, count)

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

    def _predictions(self, method: Method, when: str) -> dict[str, Tensor]:
        method.train(False)
        found = {test.name: self._predict(method, test.name, when) for test in self._setup.task.tests}
        return {name: predicted for name, predicted in found.items() if predicted is not None}

    @torch.no_grad()
    def _predict(self, method: Method, test: str, when: str) -> Tensor | None:
        device = self._setup.device
        predictions, finite = [], torch.ones((), dtype=torch.bool, device=device)
        own = self._own(test)
        batches = [list(own[start : start + BATCH]) for start in range(0, len(own), BATCH)]
        for inputs, _ in self._features[test].loader(sampler=batches, device=device):
            with self._setup.precision.autocast():
                found = method.top_1(test, inputs)
            if found is None:
                return None
            predictions.append(found[1])
            finite &= found[0].isfinite().all()  # the largest is NaN if one of them is
        predicted = self._gathered(torch.where(finite, torch.cat(predictions), -1).cpu(), test)
        if predicted.min() < 0:
            raise FloatingPointError(f"tune: logits of the test {test!r} are not finite {when}")
        return predicted

    def labels(self, test: str) -> Tensor:
        """Labels [n] of the images of a test."""
        return self._labels[test]

    def accuracies(self, predictions: Mapping[str, Tensor]) -> Accuracies:
        """Return the accuracies of `predictions`; None for tests without predictions, and for their summaries."""
        task = self._setup.task

        def accuracy(name: str) -> float:
            return round(100.0 * (predictions[name] == self.labels(name)).float().mean().item(), 4)

        known = {test.name: accuracy(test.name) for test in task.tests if test.name in predictions}
        if len(known) == len(task.tests):
            return dict(summarise(task.protocol, known))
        names = summarise(task.protocol, {test.name: 0.0 for test in task.tests})
        return {name: known.get(name) for name in names}


def epochs_left(folder: Path) -> int:
    """Return the number of epochs that a run has not completed; 0 if there is no training state.

    Raises:
        InputError: If the folder is not a run folder, or its checkpoint is damaged.
    """
    config, found = TuneConfig.from_yaml(folder / CONFIG), checkpoint.find(folder)
    return (config.epochs or 0) - len(found.state["rows"]) if found is not None else 0


def evaluate_run(
    folder: Path,
    *,
    device: str | None = None,
    data: str | None = None,
    root: Path | None = None,
    protocol: Protocol | None = None,
) -> Accuracies:
    """Compute the accuracy of the checkpoint of a run. Writes nothing, and does not read the feature cache.

    In processes that torchrun started, each classifies its share of the test images.

    Args:
        folder: Run folder of `tune`, which may be in progress.
        device: Device. Default: that of the run.
        data: Dataset of the test images. Default: that of the run.
        root: Folder of the datasets, for coop: and torchvision:. Default: that of the run.
        protocol: Protocol that selects test classes and images. Default: that of the run.

    Raises:
        InputError: If the folder is not a run folder, or its checkpoint is damaged.
        FloatingPointError: If a logit is not finite.
        ProcessError: If another process ended without a report.
    """
    config = TuneConfig.from_yaml(folder / CONFIG)
    rounded_to = None if config.cache is None else config.cache_dtype
    config = replace(
        config,
        data=data or config.data,
        root=root or config.root,
        protocol=protocol or config.protocol,
        cache=None,
        views=1,
        refresh="never",
        workers=0,
        download=False,
    )
    if device is not None:  # xformers may not support this device
        config = replace(config, device=device, attention="sdpa")
    with joined() as processes:
        processes.set_device(config.device)
        setup = _load_run(config.resolved(), folder, rounded_to, processes)
        evaluator = Evaluator(setup, setup.test_features())
        return evaluator.accuracies(evaluator.predictions())


def _load_run(config: TuneConfig, folder: Path, rounded_to: CacheDtype | None, processes: Processes) -> RunSetup:
    """Build a run with the weights of its checkpoint."""
    contents = _read_weights(folder, weights.read_metadata).get("holds", weights.MODEL)
    if contents == weights.MODEL:
        return build_run(
            config,
            load=lambda model: _read_weights(folder, partial(load_weights, model)),
            processes=processes,
            rounded_to=rounded_to,
        )
    setup = build_run(config, processes=processes, rounded_to=rounded_to)
    _read_weights(folder, weights.WeightsFile(setup.method, setup.model, delta=False).load)
    return setup


def _read_weights(folder: Path, read: Callable[[Path], Result]) -> Result:
    """Call `read` with the weights file of a run; repeat it if a running process renamed the file meanwhile."""
    path = checkpoint.weights_of(folder)
    try:
        return read(path)
    except InputError:
        if path.exists():
            raise
        return read(checkpoint.weights_of(folder))
