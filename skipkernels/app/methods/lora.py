"""CLIP-LoRA: low-rank updates of the query, key and value weights of both towers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...clip import SkipCLIP
from ...lora import add_lora, merge_lora
from ...towers.low_rank import low_rank_updates
from ..data import InputError, Task
from .base import Tokenizer, check_open_clip
from .recipe import Recipe, TrainingData
from .tuned import ClipMethod

_RANK, _BATCH_SIZE = 2, 32


class LoRA(ClipMethod):
    """CLIP-LoRA (Zanella & Ben Ayed 2024): low-rank updates of q, k and v in every block of both towers, by `add_lora`.

        W' = W + 1/√2 · B A,   for W_q, W_k and W_v, each [width, width]
        loss = mean over b of −log softmax_c(exp(logit_scale) · ⟨x̂_b, t̂_c⟩)[label_b],   c over all classes

    Only A [2, width] and B [width, 2] train. B is initialised to zero, so before training the logits are those of
    zero-shot; A is uniform in ±1/√width. The scale is that of the published code. The published code also drops a
    quarter of the inputs of A; here nothing is dropped, since W' is one weight.

    Trains with AdamW at 2e-4 in batches of 32, for 500 steps per shot, rounded up to whole epochs.

    The blocks of the model must be ones that SkipCLIP fuses.

    Source: Zanella & Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models", CVPR workshops 2024, arXiv
    2405.18541.
    """

    name = "lora"

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        check_open_clip(self.name, model)
        super().__init__(model, tokenizer, task, generator=generator)
        try:
            # over the trained classes, with nothing skipped
            self.clip = SkipCLIP(model, self._tokens[self._train_test][0], skip_layers=0, keep_ratio=1)
            add_lora(self.clip, _RANK, ("q", "k", "v"), alpha=_RANK**0.5, generator=self._generator)
        except ValueError as error:
            raise InputError(f"{self.name}: {error}") from error

    @classmethod
    def _published(cls, data: TrainingData) -> Recipe:
        steps_per_epoch = math.ceil(data.shots * data.classes() / _BATCH_SIZE)
        return Recipe(
            epochs=math.ceil(500 * data.shots / steps_per_epoch),
            batch_size=_BATCH_SIZE,
            optimizer="adamw",
            text_lr=2e-4,
            image_lr=2e-4,
            weight_decay=1e-2,
            warmup_epochs=0,
            warmup_lr=0.0,
            sampler="random",
        )

    def merge(self) -> None:
        """Add the updates to the weights."""
        merge_lora(self.clip)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": factor
            for path, module in self.model.named_modules()
            for update in low_rank_updates(module).values()
            for name, factor in (("lora_A", update.lora_A), ("lora_B", update.lora_B))
        }
