"""A problem for all trainers.

A module of `runners/` has `train(clip, problem, folder)`, which trains for `problem.steps` steps in one process, in
fp32, with `problem.optimizer` and without evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import skipkernels as sk
from bench.inputs import class_names
from bench.measure import CPU
from skipkernels.app.train.model import RANDOM, load_model


class Problem(NamedTuple):
    """A model, and the batches of a run, in their order unless the trainer shuffles; one class in a batch."""

    model: Any  # an open_clip CLIP, of which each run trains a copy
    tokens: Tensor  # [C, L]
    images: Tensor  # [steps · batch_size, 3, height, width]
    labels: Tensor  # [steps · batch_size]
    batch_size: int
    skip_layers: int
    keep_ratio: float
    learning_rate: float  # of the text tower; the image tower has half of it

    @property
    def steps(self) -> int:
        return len(self.images) // self.batch_size

    @property
    def dataset(self) -> TensorDataset:
        """(image, label) pairs."""
        return TensorDataset(self.images, self.labels)

    def clip(self) -> sk.SkipCLIP:
        """SkipCLIP with a copy of the model, in training mode."""
        options = {"skip_layers": self.skip_layers, "keep_ratio": self.keep_ratio, "memory": "fast"}
        return sk.SkipCLIP(copy.deepcopy(self.model), self.tokens, **options).train()

    def rates(self) -> dict[str, float]:
        """Arguments of `parameter_groups`."""
        return {"text_lr": self.learning_rate, "image_lr": self.learning_rate / 2}

    def settings(self) -> dict[str, float]:
        """Arguments of SGD, the optimizer of every trainer."""
        return {"momentum": 0.9, "weight_decay": 5e-4}

    def optimizer(self, module: Any) -> torch.optim.Optimizer:
        """SGD with two learning rates."""
        return torch.optim.SGD(module.parameter_groups(**self.rates()), **self.settings())

    def loop(self, clip: sk.SkipCLIP, batches: Iterable[Sequence[Tensor]]) -> None:
        """Train in a plain loop."""
        optimizer = self.optimizer(clip)
        for images, labels in batches:
            clip(images, labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def small_problem(steps: int = 20, classes: int = 12, batch_size: int = 2) -> Problem:
    """vit-tiny with random weights and images; all classes are kept."""
    model, _, tokenizer = load_model("vit-tiny", RANDOM, CPU)
    tokens = tokenizer([f"a photo of a {name}." for name in class_names(classes)])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(steps * batch_size, 3, *model.visual.image_size, generator=generator)
    labels = torch.randint(classes, (steps,), generator=generator).repeat_interleave(batch_size)
    return Problem(model, tokens, images, labels, batch_size, 2, 1.0, 1e-2)


def trained(module: nn.Module) -> Tensor:
    """All parameters that train, by name, in one vector."""
    named = sorted((name, p) for name, p in module.named_parameters() if p.requires_grad)
    return torch.cat([parameter.detach().flatten() for _, parameter in named])
