"""Both measurements of a model on a task, one after the other, and what they advise."""

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
from .feature_sensitivity import TEXT_CHUNK, Count, FeatureShift, feature_shift
from .gradient_dependence import GradientSpread, gradient_spread

_BATCH = 32  # images of which all hidden states are kept, before and after


@dataclass(frozen=True)
class Analysis:
    """FS, GD, and what they advise."""

    shift: FeatureShift
    spread: GradientSpread
    advice: Advice

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        spread = {name: getattr(self.spread, name).tolist() for name in ("share", "cumulative")}
        advice = asdict(self.advice)
        for setting in (advice["advised"], advice["other"]):
            setting["kept"] = setting["kept"]._asdict()
        return {
            "feature_shift": asdict(self.shift),
            "gradient_spread": {"images": self.spread.images} | spread,
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
        model: An open_clip model on the device of `config`; it is fine-tuned.
        tokenizer: Its own.
        task: Of which the classes of the first test are compared.
        config: Resolved, of method "full": how to fine-tune.
        compared: Of method "skip": the settings to compare with.
        images: Most images that each of both is measured on; evenly spaced ones are taken.
        console: Where progress is shown; nowhere by default.

    Raises:
        InputError: If the model or the task can't be measured.
        MemoryError: If the training images would take more than half of the memory that is free.
        FloatingPointError: If the fine-tuning diverges.
    """
    task = replace(task, tests=task.tests[:1])
    test, device = task.tests[0], torch.device(config.device)
    tokens = tokenizer(test.prompts[0]).to(device)
    batches = partial(_batches, device=device, workers=config.workers)
    settings = {name: getattr(compared, name) for name in ("skip_layers", "keep_ratio", "max_keep", "decay")}
    settings["batch_size"] = config.batch_size
    console = console or Console(quiet=True)
    with ignore_write_errors(console), progress(console=console) as bars:

        def bar(name: str, total: int) -> Callable[[int], None]:
            return partial(bars.advance, bars.add_task(name, total=total))

        some = _some(task.train, images)
        spread = _spread(model, batches(some), tokens, bar("gradients", len(some)))
        # What would be refused after the fine-tuning is refused before it.
        nothing = feature_shift(model, model, (inputs for inputs, _ in batches(_some(some, 1))), tokens)
        advise(replace(nothing, image=[1.0] * len(nothing.image), text=[1.0] * len(nothing.text)), spread, **settings)

        before = copy.deepcopy(model)
        _fine_tune(model, tokenizer, task, config, bar)
        some = _some(test.images, images)
        count = bar("hidden states", len(some) + len(tokens))
        shift = feature_shift(before, model, (inputs for inputs, _ in batches(some)), tokens, progress=count)
    return Analysis(shift, spread, advise(shift, spread, **settings))


@torch.no_grad()
def _spread(model: Any, batches: Iterator[tuple[Tensor, Tensor]], tokens: Tensor, progress: Count) -> GradientSpread:
    """GD of a model as it is."""
    text = torch.cat([model.encode_text(chunk, normalize=False) for chunk in tokens.split(TEXT_CHUNK)])
    embeddings, labels = [], []
    for images, some_labels in batches:
        embeddings.append(model.encode_image(images, normalize=False))
        labels.append(some_labels)
        progress(len(images))
    return gradient_spread(torch.cat(embeddings), text, torch.cat(labels), model.logit_scale.exp().item())


def _fine_tune(
    model: Any, tokenizer: Tokenizer, task: Task, config: TuneConfig, bar: Callable[[str, int], Count]
) -> None:
    """All layers, for the epochs of `config`, and without a test."""
    assert config.epochs is not None and config.precision != "auto"
    method = METHODS["full"](model, tokenizer, task)
    train = FeatureCache.in_memory(task.train, workers=config.workers, progress=bar("images", len(task.train)))
    precision = MixedPrecision(config.precision, torch.device(config.device))
    trainer = Trainer(config, method, precision, train, task.tests[0].classes)
    step = bar("fine-tuning", config.epochs * trainer.steps)
    for _ in range(config.epochs):
        trainer.epoch(on_step=lambda: step(1), on_loss=lambda loss: None)


def _batches(dataset: Subset, *, device: torch.device, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) on a device."""
    for images, labels in DataLoader(dataset, batch_size=_BATCH, num_workers=workers):
        yield images.to(device), labels.to(device)


def _some(dataset: SizedDataset, count: int) -> Subset:
    """At most so many images, evenly spaced."""
    count = min(count, len(dataset))
    return Subset(dataset, [item * len(dataset) // count for item in range(count)])  # type: ignore[arg-type]
