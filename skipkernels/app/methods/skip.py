"""Skip Tuning: train the blocks above a cut, on the classes kept for each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import published
from ...graphs import graphed
from ..data import Task
from .base import StepOutput, Tokenizer
from .recipe import Recipe, TrainingData
from .tuned import TunedModel, step_output


class Skip(TunedModel):
    """Skip Tuning (Wu et al., CVPR 2025), with `SkipCLIP`, which has the other options.

        loss = mean over b of −log softmax_k(exp(logit_scale) · ⟨x̂_b, t̂_k⟩)[label_b],   k over the kept classes

    Trains the blocks above the cut and the heads of both towers, from features at the cut that are computed once.
    `cache` has a folder of texts for each test. Before training the logits are the zero-shot ones.

    Source: Wu et al., "Skip Tuning: Pre-trained Vision-Language Models are Effective and Efficient Adapters
    Themselves", CVPR 2025, arXiv 2412.11509.
    """

    name = "skip"
    settings = tuple("skip_layers keep_ratio max_keep decay tail max_tail train_text class_weight memory cache".split())

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, skip_layers: int | float = 0.5, **options: Any
    ):
        super().__init__(model, tokenizer, task, skip_layers=skip_layers, **options)
        self.caches = self.clip if self.clip.skip_layers[0] > 0 else None

    @classmethod
    def _published(cls, data: TrainingData) -> Recipe:
        return Recipe(
            batch_size=published.BATCH_SIZE,
            optimizer="sgd",
            momentum=published.MOMENTUM,
            weight_decay=published.WEIGHT_DECAY,
            sampler="random" if data.reference and data.shots < 4 else "class_pure",
            tail="fixed" if data.reference else "resample",
            **published.rates(data.protocol, data.name.removeprefix("coop:"))._asdict(),
        )

    @torch.no_grad()
    def encode_frozen(self, images: Tensor) -> Tensor:
        """Features [B, N, W] at the cut of images [B, 3, H, W]; the images if the image tower has no cut."""
        return images if self.caches is None else self.caches.encode_lower(images)

    def graphed(
        self, optimizer: torch.optim.Optimizer, batch_size: int
    ) -> Callable[[Tensor, Tensor], StepOutput] | None:
        """Return a whole training step, captured in a CUDA graph by `graphs.graphed`."""
        graphed_step = graphed(self.clip, optimizer, batch_size)
        return lambda inputs, labels: step_output(graphed_step(inputs, labels))
