"""Zero-shot: the model as it came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...data import Protocol, Task
from .base import FrozenModel, Recipe, Tokenizer


class ZeroShot(FrozenModel):
    """Zero-shot classification (Radford et al. 2021): nothing trains.

        z_bc = exp(logit_scale) · ⟨x̂_b, t̂_c⟩,   t̂_c the unit-norm mean of the class's prompts

    What is kept of an image is its embedding.

    Args:
        model: An open_clip model, of which nothing changes, `requires_grad` neither.
        tokenizer: Its tokenizer.
        task: What it is tested on.
        generator: Not used: nothing is drawn.

    Raises:
        InputError: If it is no model of open_clip.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv
    2103.00020.

    Example:
        >>> ZeroShot.recipe("ViT-B-16", "few-shot", shots=16).epochs
        0
    """

    name = "zero-shot"

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        super().__init__(model, tokenizer, task, keep_embeddings=True, generator=generator)

    @classmethod
    def _published(cls, protocol: Protocol, shots: int, classes: int) -> Recipe:
        return Recipe(epochs=0)

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """There is nothing to do."""

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """None: nothing trains."""
        return []

    def _tensors(self) -> dict[str, Tensor]:
        return {}
