"""Embedding of images, or of their features at the cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..boundary import LSkipBoundary
from ..towers import ImageTower
from ..towers.watch import Watched


class ImageEncoder:
    """The image tower: below the cut in chunks without gradient, above it with."""

    features: tuple[torch.Size, torch.dtype]  # shape [N, W] of one image's features at the cut, and their dtype

    def __init__(self, tower: ImageTower, chunk: int):
        self.tower, self.chunk = tower, chunk
        self._watched: Watched | None = None  # what computed features at the cut, once these were computed or used

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Images [B, 3, height, width], or features at the cut [B, N, W], to embeddings [B, D], not normalised."""
        if self.are_images(pixel_values):
            return self.upper(self.lower(pixel_values))
        self.watch()
        if self.is_stale():
            raise RuntimeError(
                "SkipCLIP: modules or weights below the cut have changed since features at the cut were first computed "
                "or used, so these do not match the model. Compute them again, then call clip.refresh()."
            )
        return self.upper(pixel_values)

    def upper(self, features: Tensor) -> Tensor:
        """Features at the cut [B, N, W], in any dtype, to embeddings [B, D].

        Under autocast the features may be in 16 bits. The residual stream above the cut is in the dtype of the model,
        as that of the texts, so that features from a cache give the same result as images.
        """
        return self.tower.upper(features.to(self.features[1]))

    def lower(self, images: Tensor) -> Tensor:
        """Images [B, 3, height, width] to features at the cut [B, N, W]."""
        x = images.to(self.tower.dtype)
        try:
            if self.tower.skip == 0:
                return self.tower.lower(x)
            x = x.to(self.tower.lower_device or x.device)
            x = x if torch.is_grad_enabled() else x.detach()
            return LSkipBoundary.apply(self.tower.lower, x, self.chunk).to(images.device)
        except RuntimeError as error:
            height, width = self.tower.image_size
            if tuple(images.shape[1:]) == (3, height, width):
                raise
            raise ValueError(
                f"SkipCLIP: images must be [B, 3, {height}, {width}], the size that the model takes; got "
                f"{list(images.shape)}. Use the model's image transform."
            ) from error

    def are_images(self, pixel_values: Tensor) -> bool:
        """Return True for images, False for features at the cut; raise a ValueError for anything else."""
        shape, _ = self.features
        if pixel_values.shape[1:] == shape and self.tower.skip > 0:
            return False
        if pixel_values.ndim == 4 and pixel_values.shape[1] == 3:
            return True
        features = f" or features at the cut [B, {', '.join(map(str, shape))}]"
        if self.tower.skip == 0:
            features = ", as nothing is skipped (skip_layers=0), so that features can't be cached"
        raise ValueError(
            f"SkipCLIP: pixel_values must be images [B, 3, height, width]{features}; got {list(pixel_values.shape)}."
        )

    def lower_copy(self) -> Callable[[Tensor], Tensor]:
        """Return `lower` of copied modules that share the weights and stay in evaluation mode."""
        self.watch()
        copied = copy.copy(self)
        copied.tower = sharing_weights(self.tower, self.tower.model)
        for part in copied.tower.lower_parts():
            if isinstance(part, nn.Module):
                part.eval()
        return copied.lower

    # ---- changes of the modules below the cut ------------------------------------------------------------------------

    def watch(self) -> None:
        """Compare from now on what computes features at the cut, unless it is compared already."""
        if self._watched is None:
            self._watched = Watched(self.tower.lower_parts)

    def forget(self) -> None:
        """Take the modules as they are: features computed before are not compared any more."""
        self._watched = None

    def compare(self) -> None:
        """Compare contents and settings below the cut; the next use of features raises an error if they differ."""
        if self._watched is not None:
            self._watched.compare()

    def is_stale(self) -> bool:
        """Return True if features at the cut were computed with other modules or weights."""
        return self._watched is not None and self._watched.is_stale()

    def moved(self, *, keep: bool) -> None:
        """Follow a conversion of the tower by SkipCLIP; features stay valid if `keep`."""
        shape, _ = self.features
        self.features = shape, self.tower.dtype
        if keep and self._watched is not None:
            self._watched = Watched(self.tower.lower_parts)  # digests of another dtype differ


def sharing_weights(part: Any, model: nn.Module) -> Any:
    """Copy a part of a model: the copies have their own mode, and share the parameters and buffers of the model."""
    return copy.deepcopy(part, {id(x): x for x in (*model.parameters(), *model.buffers())})
