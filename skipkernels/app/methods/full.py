"""Full fine-tuning in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data import Task
from .base import StepOutput, Tokenizer, check_open_clip
from .recipe import Recipe, TrainingData
from .skip import Skip
from .tuned import TunedModel


class Full(TunedModel):
    """Full fine-tuning: every layer of both towers, every class and every token, from images.

        loss = mean over b of −log softmax_c(exp(logit_scale) · ⟨x̂_b, t̂_c⟩)[label_b],   c over all classes

    Only the logit scale is frozen. Training runs the model's own forward in plain PyTorch; tests use SkipCLIP without
    skipped layers, which embeds each class once. Trains with the recipe of the Skip Tuning paper, where it is the
    baseline, but with random batches.

    Source: Wu et al., CVPR 2025, arXiv 2412.11509, section 3 (the baseline).
    """

    name = "full"

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        check_open_clip(self.name, model)
        super().__init__(model, tokenizer, task, skip_layers=0, generator=generator)

    @classmethod
    def _published(cls, data: TrainingData) -> Recipe:
        return replace(Skip._published(data), sampler="random", tail=None)

    def step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """Compute the loss of images [B, 3, H, W] over all classes."""
        image = self.model.encode_image(inputs, normalize=False)
        return self._cross_entropy_step(image, self._encoded_texts(), labels)
