"""Measure GD and FS of a model on a task, and suggest settings from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ...console import ignore_write_errors, progress
from ...data import SizedDataset, Task
from ...features import FeatureCache
from ...tuner import TuneConfig
from ...tuner.methods import METHODS
from ...tuner.methods.base import Tokenizer
from ...tuner.precision import MixedPrecision
from ...tuner.trainer import Trainer
from .advice import Advice, advise
from .feature_sensitivity import TEXT_CHUNK, Count, FeatureSensitivity, measure_feature_sensitivity
from .gradient_dependence import GradientDependence, measure_gradient_dependence

_BATCH = 32  # images per batch; the hidden states of both models are in memory


@dataclass(frozen=True)
class Analysis:
    """FS, GD and the settings they suggest."""

    sensitivity: FeatureSensitivity
    dependence: GradientDependence
    advice: Advice

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        shares = {name: getattr(self.dependence, name).tolist() for name in ("share", "cumulative")}
        advice = asdict(self.advice)
        for setting in (advice["advised"], advice["other"]):
            setting["kept"] = setting["kept"]._asdict()
        return {
            "feature_sensitivity": asdict(self.sensitivity),
            "gradient_dependence": {"images": self.dependence.images} | shares,
            "advice": advice,
        }


def analyze(
    model: Any,
    tokenizer: Tokenizer,
    task: Task,
    config: TuneConfig,
    compared: TuneConfig,
    *,
    images: int = 256,
    console: Console | None = None,
) -> Analysis:
    """Measure GD on the training images of a task, fine-tune every layer, and measure FS on its test images.

    Args:
        model: open_clip model on the device of `config`. It is fine-tuned in place.
        tokenizer: Tokenizer of the model.
        task: Task; its training images and first test set are used.
        config: Resolved configuration of the fine-tuning, with method "full".
        compared: Configuration with method "skip" that the suggested setting is compared with.
        images: Maximum number of images for each measurement, evenly spaced in the dataset.
        console: Console for progress bars; by default none.

    Raises:
        InputError: If the model or the task is not supported.
        MemoryError: If the training images would take more than half of the free memory.
        FloatingPointError: If the fine-tuning diverges.
    """
    task = replace(task, tests=task.tests[:1])
    test, device = task.tests[0], torch.device(config.device)
    tokens = tokenizer(test.prompts[0]).to(device)
    batches = partial(_batches, device=device, workers=config.workers)
    names = ("skip_layers", "keep_ratio", "max_keep", "decay", "max_tail")
    settings = {name: getattr(compared, name) for name in names}
    settings["batch_size"] = config.batch_size
    console = console or Console(quiet=True)
    with ignore_write_errors(console), progress(console=console) as bars:

        def bar(name: str, total: int) -> Callable[[int], None]:
            return partial(bars.advance, bars.add_task(name, total=total))

        some = _some(task.train, images)
        dependence = _gradient_dependence(model, batches(some), tokens, bar("gradients", len(some)))
        # Raise errors of the model and of `compared` before the fine-tuning, which takes long.
        zero = measure_feature_sensitivity(model, model, (inputs for inputs, _ in batches(_some(some, 1))), tokens)
        advise(replace(zero, image=[1.0] * len(zero.image), text=[1.0] * len(zero.text)), dependence, **settings)

        before = copy.deepcopy(model)
        _fine_tune(model, tokenizer, task, config, bar)
        some = _some(test.images, images)
        count = bar("hidden states", len(some) + len(tokens))
        inputs = (inputs for inputs, _ in batches(some))
        sensitivity = measure_feature_sensitivity(before, model, inputs, tokens, progress=count)
    return Analysis(sensitivity, dependence, advise(sensitivity, dependence, **settings))


@torch.no_grad()
def _gradient_dependence(
    model: Any, batches: Iterator[tuple[Tensor, Tensor]], tokens: Tensor, progress: Count
) -> GradientDependence:
    text = torch.cat([model.encode_text(chunk, normalize=False) for chunk in tokens.split(TEXT_CHUNK)])
    embeddings, labels = [], []
    for images, some_labels in batches:
        embeddings.append(model.encode_image(images, normalize=False))
        labels.append(some_labels)
        progress(len(images))
    return measure_gradient_dependence(torch.cat(embeddings), text, torch.cat(labels), model.logit_scale.exp().item())


def _fine_tune(
    model: Any, tokenizer: Tokenizer, task: Task, config: TuneConfig, bar: Callable[[str, int], Count]
) -> None:
    """Fine-tune every layer, without evaluation."""
    assert config.epochs is not None and config.precision != "auto"
    method = METHODS["full"](model, tokenizer, task)
    train = FeatureCache.in_memory(task.train, workers=config.workers, progress=bar("images", len(task.train)))
    precision = MixedPrecision(config.precision, torch.device(config.device))
    trainer = Trainer(config, method, precision, train, task.tests[0].classes)
    step = bar("fine-tuning", config.epochs * trainer.steps)
    for _ in range(config.epochs):
        trainer.epoch(on_step=lambda: step(1), on_loss=lambda loss: None)


def _batches(dataset: Subset, *, device: torch.device, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) on a device."""
    for images, labels in DataLoader(dataset, batch_size=_BATCH, num_workers=workers):
        yield images.to(device), labels.to(device)


def _some(dataset: SizedDataset, count: int) -> Subset:
    """Select at most `count` evenly spaced images."""
    count = min(count, len(dataset))
    return Subset(dataset, [item * len(dataset) // count for item in range(count)])  # type: ignore[arg-type]
