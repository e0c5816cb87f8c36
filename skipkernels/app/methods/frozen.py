"""Methods that train nothing in the model itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import Task
from .base import Method, Tokenizer, check_open_clip


class FrozenModel(Method):
    """Method that freezes the weights of the model, in evaluation mode. The image tower runs once per image."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        check_open_clip(self.name, model)
        super().__init__(model, tokenizer, task, generator=generator)
        model.eval()

    @torch.no_grad()
    def encode_frozen(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images [B, 3, H, W] by the pretrained model; embeddings are returned as they are."""
        return images if images.ndim == 2 else self.model.encode_image(images, normalize=False)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.encode_frozen(inputs)

    def train(self, training: bool) -> None:
        """Do nothing: the model stays in evaluation mode."""
