"""Encoding of images, or of their features at the cut, to image embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..boundary import LSkipBoundary, refusing_lost_gradients
from ..towers import ImageTower
from ..towers.changes import Frozen


class ImageEncoder:
    """Image tower of SkipCLIP; `gave_features` is True after features at the cut were computed or used."""

    # Device of the modules below the cut, if it differs from the device above the cut
    lower_device: torch.device | None = None
    features: tuple[torch.Size, torch.dtype]  # Shape [N, W] of one image's features at the cut, and their dtype
    gave_features = False

    def __init__(self, tower: ImageTower, chunk: int):
        self.tower, self.chunk = tower, chunk
        self.weights = Frozen(tuple)  # Modules and weights below the cut that computed the features

    @property
    def towers(self) -> list[ImageTower]:
        """The tower."""
        return [self.tower]

    def lower(self, images: Tensor, *, drop_patches: bool = False) -> Tensor:
        """Images [B, 3, height, width] to features at the cut [B, N, W]."""
        lower, x = partial(self.tower.lower, drop_patches=drop_patches), images.to(self.tower.dtype)
        try:
            if self.tower.skip == 0:
                return lower(x)
            checked = refusing_lost_gradients(lower, "image", "(0, …)")
            return LSkipBoundary.apply(checked, x.to(self.lower_device or x.device), self.chunk).to(images.device)
        except RuntimeError as error:
            height, width = self.tower.image_size
            if tuple(images.shape[1:]) == (3, height, width):
                raise
            raise ValueError(
                f"SkipCLIP: images must be [B, 3, {height}, {width}], the size that the model takes; got "
                f"{list(images.shape)}. Use the model's image transform."
            ) from error

    def encode(self, x: Tensor) -> Tensor:
        """Images or features at the cut to embeddings [B, D], not normalised."""
        if self.are_images(x):
            return self.tower.upper(self.lower(x, drop_patches=True))
        self.gave_features = True
        if self.weights.changed():
            raise RuntimeError(
                "SkipCLIP: modules or weights below the cut have changed since SkipCLIP was made, so earlier features "
                "at the cut do not match the model. Compute them again, then call clip.refresh()."
            )
        return self.tower.upper(x.to(self.features[1]))

    def are_images(self, x: Tensor) -> bool:
        """Return True for images, False for features at the cut; raise a ValueError for anything else."""
        shape, _ = self.features
        some_patches = self.tower.patch_dropout is not None and x.ndim == 3 and x.shape[2] == shape[1]
        are_features = x.shape[1:] == shape or some_patches
        if x.ndim == 4 and x.shape[1] == 3 and not are_features:
            return True
        if self.tower.skip == 0:
            raise ValueError(
                "SkipCLIP: with skip_layers=0 the embedding trains, so features can't be cached; pass images "
                f"[B, 3, height, width]; got {list(x.shape)}."
            )
        if not are_features:
            raise ValueError(
                "SkipCLIP: x must be images [B, 3, height, width] or features at the cut "
                f"[B, {', '.join(map(str, shape))}]; got {list(x.shape)}."
            )
        return False

    def lower_copy(self) -> Callable[[Tensor], Tensor]:
        """Return `lower` of copied modules that share the weights and stay in evaluation mode."""
        self.gave_features = True
        copied = copy.copy(self)
        copied.tower = sharing_weights(self.tower, self.tower.model)
        for part in copied.tower.lower_parts():
            if isinstance(part, nn.Module):
                part.eval()
        return copied.lower

    def accept_weights(self) -> None:
        """Record that features at the cut are computed with the current weights below the cut."""
        self.weights = Frozen(self.tower.lower_parts, with_global_hooks=False)


def sharing_weights(part: Any, model: nn.Module) -> Any:
    """Copy a part of a model: the copies have their own mode, and share the parameters and buffers of the model."""
    return copy.deepcopy(part, {id(x): x for x in (*model.parameters(), *model.buffers())})
