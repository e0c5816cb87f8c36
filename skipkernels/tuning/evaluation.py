"""Accuracy over the base classes, and over the new ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from ..cache import FeatureCache, Progress, Refresh
from ..clip import SkipCLIP
from ..data import BaseToNew, InputError, SizedDataset, load_base_to_new
from .config import TuneConfig
from .model import augmentation, load_model, load_weights

CHECKPOINT = "model.safetensors"
CONFIG = "config.yaml"
_BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """Per cent of the test images whose class comes first, of the base classes and of the new ones."""

    base: float
    new: float

    @property
    def harmonic(self) -> float:
        """Harmonic mean of base and new.

        >>> Accuracy(base=60.0, new=30.0).harmonic
        40.0
        """
        return 2 * self.base * self.new / (self.base + self.new) if self.base + self.new else 0.0

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"base": self.base, "new": self.new, "harmonic": self.harmonic}


class Evaluator:
    """Tests a model on base and new classes as often as asked; what is frozen is computed once.

    Attributes:
        base: SkipCLIP over the base classes, the one that is tuned.
        new: SkipCLIP over the new classes, on the same model.
        base_tokens: [C, L], the prompts of the base classes.
        task: The task.
        autocast: The precision of the run, for its steps too.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        task: BaseToNew,
        config: TuneConfig,
        *,
        resume: bool = True,
        overwrite: bool = False,
    ):
        self.device = torch.device(config.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        skip_layers = config.skip_layers if config.method == "skip" else 0

        def over(tokens: Tensor, name: str) -> SkipCLIP:
            try:
                return SkipCLIP(
                    model,
                    tokens,
                    skip_layers=skip_layers,
                    keep_ratio=config.keep_ratio,
                    max_keep=config.max_keep,
                    decay=config.decay,
                    tail=config.tail,
                    memory=config.memory,
                    attention=config.attention,
                    generator=torch.Generator().manual_seed(config.seed),
                    text_cache=None if config.cache is None else config.cache / f"texts-{name}",
                )
            except (ValueError, RuntimeError) as error:
                raise InputError(str(error)) from error

        self.base_tokens, new_tokens = (tokenizer(split.prompts).to(self.device) for split in (task.base, task.new))
        self.base, self.new = over(self.base_tokens, "base"), over(new_tokens, "new")
        self._config, self._resume, self._overwrite = config, resume, overwrite
        self.task = task
        self._test_sets = {"base": task.base.test, "new": task.new.test}
        self._test: dict[str, FeatureCache] = {}

    @classmethod
    def of(cls, config: TuneConfig, model: torch.nn.Module, transform, tokenizer, **how: bool) -> Evaluator:
        """For the task of a run; `how`: resume and overwrite."""
        task = load_task(config, transform, augmentation(model) if config.augments else None)
        return cls(model, tokenizer, task, config, **how)

    @property
    def images(self) -> int:
        """How many `prepare` and `training_images` compute together."""
        return len(self.task.train) * self._config.views + sum(map(len, self._test_sets.values()))

    def prepare(self, progress: Progress = False) -> None:
        """Compute what is frozen of the test images; progress as for `FeatureCache.build`."""
        self._test = {name: self._keep(f"test-{name}", data, progress) for name, data in self._test_sets.items()}

    def training_images(self, progress: Progress = False) -> FeatureCache:
        """The training images as the steps take them; progress as for `FeatureCache.build`."""
        config = self._config
        return self._keep("train", self.task.train, progress, views=config.views, refresh=config.refresh)

    def _keep(
        self,
        name: str,
        dataset: SizedDataset,
        progress: Progress,
        *,
        views: int = 1,
        refresh: Refresh = "never",
    ) -> FeatureCache:
        """A dataset as `predict` takes it: features at the cut, or images where nothing is skipped.

        They are in memory, or in the folder `name` of the run's cache.
        """
        frozen, config = self.base.skip_layers[0] > 0, self._config
        if config.cache is not None:
            with self.autocast:
                return FeatureCache.build(
                    config.cache / name,
                    self.base,
                    dataset,
                    dtype=config.cache_dtype,
                    batch_size=_BATCH,
                    views=views,
                    refresh=refresh,
                    workers=config.workers,
                    resume=self._resume,
                    overwrite=self._overwrite,
                    progress=progress,
                )

        def encode(images: Tensor) -> Tensor:
            images = images.to(self.device)
            with self.autocast:
                return self.base.encode_lower(images) if frozen else images

        return FeatureCache.in_memory(dataset, encode, batch_size=_BATCH, workers=config.workers, progress=progress)

    def predictions(self) -> dict[str, Tensor]:
        """For "base" and "new": the class [n] that comes first for each test image."""
        found = {}
        for name, clip in (("base", self.base), ("new", self.new)):
            batches = self._test[name].loader(_BATCH, "sequential", device=self.device)
            with self.autocast:
                found[name] = torch.cat([clip.predict(inputs).argmax(dim=1).cpu() for inputs, _ in batches])
        return found

    def labels(self, split: str) -> Tensor:
        """Classes [n] of the test images of "base" or "new"."""
        return self._test[split].labels

    def accuracy(self, predictions: dict[str, Tensor] | None = None) -> Accuracy:
        """Of `predictions`, or of the model as it is."""
        predictions = self.predictions() if predictions is None else predictions

        def of(name: str, clip: SkipCLIP) -> float:
            classes = max(2, len(clip.prototypes))  # torchmetrics knows no task of one class
            correct = multiclass_accuracy(predictions[name], self.labels(name), classes, average="micro")
            return round(100.0 * correct.item(), 4)

        return Accuracy(of("base", self.base), of("new", self.new))


def evaluate_run(folder: Path, *, device: str | None = None) -> Accuracy:
    """Accuracy of the checkpoint of a run, on the test images of that run.

    Args:
        folder: What `tune` wrote.
        device: Where to compute; by default where the run did.

    Raises:
        InputError: If the folder is not a run's, or its checkpoint is damaged.
    """
    config = TuneConfig.from_yaml(folder / CONFIG)
    if device is not None:  # on which xformers may not serve
        config = replace(config, device=device, attention="sdpa")
    config = config.resolved()
    if not (folder / CHECKPOINT).is_file():
        raise InputError(f"{folder / CHECKPOINT}: no such file; the run stopped before its first epoch was complete.")
    on = torch.device(config.device)
    model, transform, tokenizer = load_model(config.model, config.pretrained, on, architecture_only=True)
    load_weights(model, folder / CHECKPOINT)
    evaluator = Evaluator.of(config, model, transform, tokenizer)
    evaluator.prepare()
    return evaluator.accuracy()


def load_task(config: TuneConfig, transform=None, train_transform=None) -> BaseToNew:
    """The task of a run; with several views training images have `train_transform`, all others `transform`."""
    return load_base_to_new(
        config.data,
        shots=config.shots,
        classes=config.classes,
        seed=config.seed,
        transform=transform,
        train_transform=train_transform if config.augments else transform,
    )
