"""Accuracy over the base classes, and over the new ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from ..cache import collect
from ..clip import SkipCLIP
from ..data import BaseToNew, InputError, SizedDataset, load_base_to_new
from .config import TuneConfig
from .model import load_model, load_weights

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
        autocast: The precision of the run, for its steps too.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, task: BaseToNew, config: TuneConfig):
        self.device = torch.device(config.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        skip_layers = config.skip_layers if config.method == "skip" else 0

        def over(tokens: Tensor) -> SkipCLIP:
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
                )
            except (ValueError, RuntimeError) as error:
                raise InputError(str(error)) from error

        self.base_tokens, new_tokens = (tokenizer(split.prompts).to(self.device) for split in (task.base, task.new))
        self.base, self.new = over(self.base_tokens), over(new_tokens)
        self._test_sets = {"base": task.base.test, "new": task.new.test}
        self._test: dict[str, TensorDataset] = {}

    def prepare(self, on_batch: Callable[[int], None] = lambda images: None) -> None:
        """Compute what is frozen of the test images; `on_batch` is told how many are done."""
        self._test = {name: self.keep(dataset, on_batch) for name, dataset in self._test_sets.items()}

    def keep(self, dataset: SizedDataset, on_batch: Callable[[int], None] = lambda images: None) -> TensorDataset:
        """A dataset as `predict` takes it: features at the cut, or images where nothing is skipped."""
        frozen = self.base.skip_layers[0] > 0

        def encode(images: Tensor) -> Tensor:
            images = images.to(self.device)
            with self.autocast:
                return self.base.encode_lower(images) if frozen else images

        return collect(dataset, encode, batch_size=_BATCH, on_batch=on_batch)

    def predictions(self) -> dict[str, Tensor]:
        """For "base" and "new": the class [n] that comes first for each test image."""
        found = {}
        for name, clip in (("base", self.base), ("new", self.new)):
            inputs = self._test[name].tensors[0]
            with self.autocast:
                found[name] = torch.cat([clip.predict(batch).argmax(dim=1).cpu() for batch in inputs.split(_BATCH)])
        return found

    def labels(self, split: str) -> Tensor:
        """Classes [n] of the test images of "base" or "new"."""
        return self._test[split].tensors[1]

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
    evaluator = Evaluator(model, tokenizer, load_task(config, transform), config)
    evaluator.prepare()
    return evaluator.accuracy()


def load_task(config: TuneConfig, transform=None) -> BaseToNew:
    """The task of a run."""
    return load_base_to_new(
        config.data, shots=config.shots, classes=config.classes, seed=config.seed, transform=transform
    )
