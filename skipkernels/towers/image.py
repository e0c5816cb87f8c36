"""Image towers: from images, or from features at the cut, to image embeddings."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from .base import Tower, parameters_of, present
from .rows import SingleQuery


class ImageTower(Tower):
    """A tower over images [n, 3, height, width]."""

    image_size: tuple[int, int]  # Height and width

    def lower(self, images: Tensor) -> Tensor:
        """Map images [n, 3, height, width], in any dtype, to hidden states at the cut; with a cut constants."""
        return self._run_lower(lambda chunk: (self.embed(chunk), None), images.to(self.dtype))

    def upper(self, features: Tensor) -> Tensor:
        """Map hidden states at the cut, in any dtype, to image embeddings [n, D], not normalised.

        Under autocast the features may be in 16 bits. The residual stream above the cut is in the dtype of the model,
        as that of the texts, so that features from a cache give the same result as images.
        """
        features = features.to(self.dtype)
        if not self.takes_rows_above:
            return self.finish(self._call_upper_blocks(features))
        pools_first = self.why_not_pooled() is None
        last_attention = SingleQuery.of_first_tokens(features.shape[1]) if pools_first else None
        rows = self._run_upper_rows(features.flatten(0, 1), self._sequences(features), last_attention)
        return self.finish(rows.unflatten(0, (len(features), -1)))  # [n, 1 or tokens, W]

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Map images [n, 3, height, width] to the hidden states in front of the first block."""

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """Map hidden states behind the last block, of all tokens or only the pooled one, to embeddings [n, D]."""

    def why_not_pooled(self) -> str | None:
        """Return why the last block is needed for every token, or None if the head pools the first one."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the images that the embedding takes."""
        return next(parameter for parameter in parameters_of(present(self.embedding)) if parameter.ndim > 1).dtype

    def encoder(self) -> nn.Module:
        """The caller's image encoder, which returns embeddings [n, D] or a tuple that begins with them."""
        return self.model.visual

    def reference_forward(self, inputs: Tensor) -> Tensor:
        return self.model.encode_image(inputs)
