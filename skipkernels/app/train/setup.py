"""Setup of a run: model, task, method and features of a resolved configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torchvision.transforms import Compose, RandomHorizontalFlip

from ...features import FeatureCache, Progress
from ...options import Preset, Refresh
from ..config import TuneConfig
from ..data import Source
from ..data.tasks import Task, load_task
from ..data.unreadable import without_unreadable
from ..devices import autocast
from ..heads import Examples, fit_head
from ..methods import Method
from ..methods.frozen import FrozenModel
from ..methods.zero_shot import ZeroShot
from .model import Loaded, load_model

BATCH = 64
"""Images per batch without training."""


@dataclass(frozen=True)
class RunSetup:
    """Objects of a run, created by `build_run`."""

    config: TuneConfig  # resolved
    model: nn.Module  # on the device of the run
    tokenizer: Any
    task: Task
    method: Method
    zero_shot: Method  # predicts before tuning: `method`, or a `ZeroShot`

    @property
    def device(self) -> torch.device:
        """Device of the run."""
        return torch.device(self.config.device)

    def autocast(self) -> torch.autocast:
        """Return the autocast context of a forward."""
        return autocast(self.config.precision, self.device)

    @property
    def trained(self) -> list[Tensor]:
        """The weights that training changes."""
        groups = self.method.parameter_groups(text_lr=0.0, image_lr=0.0)
        return [weight for group in groups for weight in group["params"]]

    @property
    def num_images(self) -> int:
        """Number of images in `test_features`, `validation_features` and `train_features` together."""
        held_out = () if self.task.validation is None else (self.task.validation,)
        return len(self.task.train) + sum(len(test.images) for test in (*self.task.tests, *held_out))

    @torch.no_grad()
    def examples(self, features: FeatureCache) -> Examples:
        """Embed training images, by their features, and the texts of their classes, with the weights as they are."""
        method = self.method
        method.train(False)
        with self.autocast():
            batches = features.loader(BATCH, "sequential", device=self.device)
            image = torch.cat([method.embed(inputs) for inputs, _ in batches])
            text = method.class_embeddings(self.task.tests[0].name)
        return Examples(image, features.labels.to(image.device), text, method.model.logit_scale.exp().item())

    def fit_head(self, features: FeatureCache, l2: float) -> None:
        """Fit the head of the configuration to all training images, and classify the trained classes by it."""
        balanced = self.config.prior == "balanced"
        head = fit_head(self.config.head, self.examples(features), l2, equal_priors=balanced)
        self.method.use_head(head, self.task.tests[0].classes)

    def test_features(self, progress: Progress = False) -> dict[str, FeatureCache]:
        """Compute the features of the images of each test that has some."""
        tests = [test for test in self.task.tests if len(test.images)]
        return {test.name: self._features(f"test-{test.name}", test.images, progress) for test in tests}

    def validation_features(self, progress: Progress = False) -> FeatureCache | None:
        """Compute the features of the validation images; None if there are none."""
        validation = self.task.validation
        return None if validation is None else self._features("validation", validation.images, progress)

    def train_features(self, progress: Progress = False) -> FeatureCache:
        """Compute the features of the training images."""
        return self._features("train", self.task.train, progress, refresh=self.config.refresh)

    def _features(self, name: str, dataset: Any, progress: Progress, *, refresh: Refresh = "never") -> FeatureCache:
        """Features of a dataset, in memory or in the folder `name` of the cache."""
        config = self.config
        options: dict[str, Any] = {"batch_size": BATCH, "workers": config.workers, "progress": progress}
        # In memory also with a cache if each epoch has its own: these are read once.
        if config.cache is not None and self.method.caches is not None and refresh == "never":
            options |= {"dtype": config.cache_dtype, "resume": True}
            with self.autocast():
                return FeatureCache.build(config.cache / name, self.method.caches, dataset, **options)

        def encode(images: Tensor) -> Tensor:
            with self.autocast():
                return self.method.encode_frozen(images.to(self.device))

        return FeatureCache.in_memory(dataset, encode, refresh=refresh, **options)


def build_run(
    config: TuneConfig,
    *,
    open_data: Callable[[], Source] | None = None,
    loaded: Loaded | None = None,
    train: bool = True,
) -> RunSetup:
    """Load the model and the task of a resolved configuration, and construct its method.

    A model that is already `loaded` replaces that of the configuration. Without `train` there are only test images.
    """
    if loaded is None:
        device = torch.device(config.device)
        loaded = load_model(config.model, config.pretrained, device, seed=config.seed, trust=config.trust)
    model, transform, tokenizer = loaded
    crop = augmentation(model, config.preset) if config.refresh == "epoch" else None
    task = build_task(config, transform, crop, open_data=open_data, train=train)
    method = build_method(config, model, tokenizer, task)
    zero_shot = ZeroShot(model, tokenizer, task) if isinstance(method, FrozenModel) else method
    return RunSetup(config, model, tokenizer, task, method, zero_shot)


def augmentation(model: Any, preset: Preset = "default") -> Callable:
    """Return the transform of training images: open_clip's random crop, or the crop and flip of Wu et al."""
    cfg = PreprocessCfg(**getattr(model, "visual", model).preprocess_cfg)
    if preset == "default":
        return image_transform_v2(cfg, is_train=True)
    crop = image_transform_v2(cfg, is_train=True, aug_cfg=AugmentationCfg(scale=(0.08, 1.0)))
    return Compose([RandomHorizontalFlip(), crop])


def build_task(
    config: TuneConfig,
    transform: Callable | None = None,
    train_transform: Callable | None = None,
    *,
    open_data: Callable[[], Source] | None = None,
    train: bool = True,
) -> Task:
    """Load the task of a run; by default training images have the transform of the others.

    `train`: see `TaskOptions`.
    """
    source, options = (open_data or config.open_data)(), replace(config.task_options(), train=train)
    if options.train_on_validation and options.validation == "auto" and not source.has_split("val"):
        options = replace(options, validation="none")  # any part of all images is held out
    task = load_task(source, options, transform=transform, train_transform=train_transform)
    return without_unreadable(task) if config.unreadable == "skip" else task


def build_method(config: TuneConfig, model: nn.Module, tokenizer: Any, task: Task) -> Method:
    """Construct the method of a run, with the settings that it has."""
    method = config.method_class()
    settings = {name: getattr(config, name) for name in method.settings}
    if config.class_weight is not None:
        exponent = 1.0 if config.class_weight == "balanced" else config.class_weight
        labels, classes = torch.tensor(task.train.labels), len(task.tests[0].classes)
        settings["class_weight"] = class_weights(labels, classes, exponent).float()
    return method(model, tokenizer, task, generator=torch.Generator().manual_seed(config.seed), **settings)


def class_weights(labels: Tensor, classes: int, exponent: float = 1.0) -> Tensor:
    """Weights [C] of an image of each class: n_c^−exponent for n_c images, divided by their mean over all images.

    With exponent 1 all classes weigh the same.

    >>> import torch
    >>> labels = torch.tensor([0, 0, 0, 0, 1])
    >>> class_weights(labels, 2).float(), class_weights(labels, 2, exponent=0.5).float()
    (tensor([0.6250, 2.5000]), tensor([0.8333, 1.6667]))
    """
    counts = labels.bincount(minlength=classes).double()
    weights = counts.clamp(min=1) ** -exponent
    return weights * (len(labels) / (weights @ counts))
