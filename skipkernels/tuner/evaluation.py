"""Accuracy on the tests of a task, as often as asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import torch
from torch import Tensor, nn

from ..data import InputError
from ..data.tasks import Protocol, Task, load_task, summarise
from ..features import FeatureCache, Progress, Refresh
from ..store import rounded
from . import checkpoint, weights
from .config import CacheDtype, TuneConfig
from .methods import Method, ZeroShot
from .methods.base import FrozenModel
from .model import augmentation, load_model, load_weights
from .precision import REMEDY, Arithmetic
from .run_folder import CONFIG

Accuracies = dict[str, float | None]
"""Per cent of the test images whose class comes first, by test, and what the protocol reports of that."""
Result = TypeVar("Result")
BATCH = 64
"""Images at once where nothing trains."""


class Evaluator:
    """Tests a method on all tests of its task; what is frozen is computed once.

    Args:
        method: What is tuned.
        task: The task.
        config: The run.
        arithmetic: Its precision.
        resume: Go on with stores that are in the cache.
        overwrite: Replace them.
        zero_shot: The model as it came, if the method before tuning does not answer as that.
        rounded_to: Features in memory are rounded as a cache of this type would; None: they are not.

    Attributes:
        method: What is tuned.
        task: The task.
        arithmetic: The precision of the run.
        device: Where it computes.

    Raises:
        InputError: If features are to be kept, and the method has none.
    """

    def __init__(
        self,
        method: Method,
        task: Task,
        config: TuneConfig,
        arithmetic: Arithmetic,
        *,
        resume: bool = True,
        overwrite: bool = False,
        zero_shot: Method | None = None,
        rounded_to: CacheDtype | None = None,
    ):
        if config.cache is not None and method.cut is None:
            raise InputError("--cache: nothing below a cut is kept where every layer trains; leave it out.")
        self.method, self.task, self.device = method, task, torch.device(config.device)
        self._config, self.arithmetic = config, arithmetic
        self._resume, self._overwrite, self._zero_shot = resume, overwrite, zero_shot or method
        self._rounded_to = rounded_to
        self._test: dict[str, FeatureCache] = {}

    @classmethod
    def of(cls, config: TuneConfig, model: nn.Module, transform, tokenizer, **how: Any) -> Evaluator:
        """For a run and its model, just loaded; `how`: resume, overwrite and rounded_to."""
        arithmetic = Arithmetic(config.precision, torch.device(config.device))
        arithmetic.prepare(model)
        task = task_of(config, transform, augmentation(model, config.preset) if config.augments else None)
        method = make_method(config, model, tokenizer, task)
        zero_shot = ZeroShot(model, tokenizer, task) if isinstance(method, FrozenModel) else None
        return cls(method, task, config, arithmetic, zero_shot=zero_shot, **how)

    @property
    def images(self) -> int:
        """How many `prepare` and `training_images` compute together."""
        return len(self.task.train) * self._config.views + sum(len(test.images) for test in self.task.tests)

    def prepare(self, progress: Progress = False) -> None:
        """Compute what is frozen of the test images; progress as for `FeatureCache.build`."""
        self._test = {
            test.name: self._keep(f"test-{quote(test.name, safe=' ')}", test.images, progress)
            for test in self.task.tests
        }

    def training_images(self, progress: Progress = False) -> FeatureCache:
        """The training images as the steps take them; progress as for `FeatureCache.build`."""
        config = self._config
        return self._keep("train", self.task.train, progress, views=config.views, refresh=config.refresh)

    def _keep(
        self, name: str, dataset: Any, progress: Progress, *, views: int = 1, refresh: Refresh = "never"
    ) -> FeatureCache:
        """A dataset as the method takes it, in memory, or in the folder `name` of the run's cache."""
        config = self._config
        if config.cache is not None and self.method.cut is not None:
            with self.arithmetic.autocast():
                return FeatureCache.build(
                    config.cache / name,
                    self.method.cut,
                    dataset,
                    dtype=config.cache_dtype,
                    batch_size=BATCH,
                    views=views,
                    refresh=refresh,
                    workers=config.workers,
                    resume=self._resume,
                    overwrite=self._overwrite,
                    progress=progress,
                )

        def encode(images: Tensor) -> Tensor:
            with self.arithmetic.autocast():
                features = self.method.encode_frozen(images.to(self.device))
            return features if self._rounded_to is None else rounded(features, self._rounded_to)

        return FeatureCache.in_memory(dataset, encode, batch_size=BATCH, workers=config.workers, progress=progress)

    def zero_shot(self) -> dict[str, Tensor]:
        """As `predictions`, of the model as it came; to be called before tuning."""
        return self._predictions(self._zero_shot, "as the model came. Look at --pretrained, or use --precision fp32.")

    def predictions(self) -> dict[str, Tensor]:
        """By test: the class [n] that comes first for each image. Tests that the method can't answer are left out.

        Raises:
            FloatingPointError: If a logit is not finite: then no class comes first.
        """
        return self._predictions(
            self.method, f"with the weights of this epoch, though these and its loss are. {REMEDY}"
        )

    def _predictions(self, method: Method, when: str) -> dict[str, Tensor]:
        method.train(False)
        found = {test.name: self._predicted(method, test.name, when) for test in self.task.tests}
        return {name: predicted for name, predicted in found.items() if predicted is not None}

    @torch.no_grad()
    def _predicted(self, method: Method, test: str, when: str) -> Tensor | None:
        answers, finite = [], torch.ones((), dtype=torch.bool, device=self.device)
        for inputs, _ in self._test[test].loader(BATCH, "sequential", device=self.device):
            with self.arithmetic.autocast():
                logits = method.logits(test, inputs)
            if logits is None:
                return None
            answers.append(logits.argmax(dim=1))
            finite &= logits.isfinite().all()
        if not finite:
            raise FloatingPointError(f"tune: logits of the test {test!r} are not finite {when}")
        return torch.cat(answers).cpu()

    def labels(self, test: str) -> Tensor:
        """Classes [n] of the images of a test."""
        return self._test[test].labels

    def accuracies(self, predictions: dict[str, Tensor]) -> Accuracies:
        """Of `predictions`; None for tests without them, and for what is made of those."""

        def accuracy(name: str) -> float:
            return round(100.0 * (predictions[name] == self.labels(name)).float().mean().item(), 4)

        known = {test.name: accuracy(test.name) for test in self.task.tests if test.name in predictions}
        if len(known) == len(self.task.tests):
            return dict(summarise(self.task.protocol, known))
        names = summarise(self.task.protocol, {test.name: 0.0 for test in self.task.tests})
        return {name: known.get(name) for name in names}


def make_method(config: TuneConfig, model: nn.Module, tokenizer: Any, task: Task) -> Method:
    """The method of a run, on a model that is on its device.

    Raises:
        InputError: If a setting does not suit the model.
    """
    made = config.method_class()
    settings: dict[str, Any] = {
        "skip_layers": config.skip_layers,
        "keep_ratio": config.keep_ratio,
        "max_keep": config.max_keep,
        "decay": config.decay,
        "tail": config.tail,
        "memory": config.memory,
        "attention": config.attention,
        "keep_embeddings": config.keep_embeddings,
        "text_cache": config.cache,
        "generator": torch.Generator().manual_seed(config.seed),
    }
    takes = inspect.signature(made).parameters
    return made(model, tokenizer, task, **{name: value for name, value in settings.items() if name in takes})


def task_of(config: TuneConfig, transform=None, train_transform=None) -> Task:
    """The task of a run; with several views training images have `train_transform`, all others `transform`."""
    return load_task(
        config.data,
        protocol=config.chosen_protocol,
        shots=config.shots,
        classes=config.classes,
        seed=config.seed,
        root=config.root,
        templates=config.template,
        targets=config.targets,
        transform=transform,
        train_transform=train_transform,
        download=config.download,
    )


def epochs_left(folder: Path) -> int:
    """Of a run that was cut off; 0 of one whose weights are the last, or were copied without their state.

    Raises:
        InputError: If the folder is not a run's, or its checkpoint is damaged.
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
    """Accuracy of the checkpoint of a run. Nothing is written, and nothing is read of a cache.

    Args:
        folder: What `tune` wrote, or is writing.
        device: Where to compute; by default where the run did.
        data: Of which dataset the test images are; by default of the run's.
        root: Folder of the datasets, for coop: and torchvision:; by default the run's.
        protocol: Which classes and images are tested; by default the run's.

    Raises:
        InputError: If the folder is not a run's, or its checkpoint is damaged.
        FloatingPointError: If its answers are not finite.
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
    if device is not None:  # on which xformers may not serve
        config = replace(config, device=device, attention="sdpa")
    evaluator = _loaded(config.resolved(), folder, rounded_to)
    evaluator.prepare()
    return evaluator.accuracies(evaluator.predictions())


def _loaded(config: TuneConfig, folder: Path, rounded_to: CacheDtype | None) -> Evaluator:
    """The model and method of a run with the weights of its checkpoint."""
    whole = _of_weights(folder, weights.header).get("holds", weights.MODEL) == weights.MODEL
    model, transform, tokenizer = load_model(
        config.model, config.pretrained, torch.device(config.device), architecture_only=whole, seed=config.seed
    )
    if whole:
        _of_weights(folder, partial(load_weights, model))
    evaluator = Evaluator.of(config, model, transform, tokenizer, rounded_to=rounded_to)
    if not whole:
        _of_weights(folder, weights.Weights(evaluator.method, model, delta=False).load)
    return evaluator


def _of_weights(folder: Path, read: Callable[[Path], Result]) -> Result:
    """What `read` gives of the weights of a run. One that is going on may rename them before they are opened."""
    path = checkpoint.weights_of(folder)
    try:
        return read(path)
    except InputError:
        if path.exists():
            raise
        return read(checkpoint.weights_of(folder))
