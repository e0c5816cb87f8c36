"""Embedding of images, or of their features at the cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..boundary import LostGradient
from ..memory import out_of_memory
from ..towers.image import ImageTower
from ..towers.modes import evaluating
from ..towers.watch import Watch
from . import checks


class ImageEncoder:
    """The image tower: below the cut in chunks without gradient, above it with.

    Attributes:
        feature_shape: [N, W], shape of the features at the cut of one image.
        below: Watch of what computes features at the cut, from their first use on.
    """

    def __init__(self, tower: ImageTower):
        self.tower = tower
        self.below = Watch(tower.lower_parts)
        image = torch.zeros(1, 3, *tower.image_size, device=tower.model.logit_scale.device)
        with evaluating([tower.model]), torch.no_grad():
            features = self.lower(image)
            self.feature_shape = features.shape[1:]

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Images [B, 3, height, width], or features at the cut [B, N, W], to embeddings [B, D], not normalised."""
        if self.are_features(pixel_values):
            return self.upper(pixel_values)
        return self.tower.upper(self.lower(pixel_values))  # features of now are never stale

    def upper(self, features: Tensor) -> Tensor:
        """Features that the caller kept [B, N, W] to embeddings [B, D]; an error if modules below the cut changed."""
        self.watch()
        if self.below.is_stale():
            raise RuntimeError(
                "SkipCLIP: modules or weights below the cut have changed since features at the cut were first computed "
                "or used, so these do not match the model. Compute them again, then call clip.refresh()."
            )
        return self.tower.upper(features)

    def watch(self) -> None:
        """Detect changes below the cut from now on: features are computed or used that the caller keeps."""
        if not self.below.started:
            self.below.start()

    def lower(self, images: Tensor) -> Tensor:
        """Images [B, 3, height, width] to features at the cut [B, N, W]; `watch` first if the caller keeps them."""
        try:  # Sizes are not checked before: a convolutional model takes others too.
            return self.tower.lower(images)
        except LostGradient:
            raise
        except RuntimeError as error:
            height, width = self.tower.image_size
            if tuple(images.shape[1:]) == (3, height, width) or out_of_memory(error):
                raise
            raise ValueError(
                f"SkipCLIP: images must be [B, 3, {height}, {width}], the size that the model takes; got "
                f"{list(images.shape)}. Use the model's image transform."
            ) from error

    def are_features(self, pixel_values: Tensor) -> bool:
        """Return True for features at the cut, False for images."""
        return pixel_values.shape[1:] == self.feature_shape and self.tower.skip > 0

    def check(self, pixel_values: Any) -> None:
        """Raise unless pixel_values are images or features at the cut."""
        checks.check_pixel_values(pixel_values)
        if self.are_features(pixel_values) or (pixel_values.ndim == 4 and pixel_values.shape[1] == 3):
            return
        features = f" or features at the cut [B, {', '.join(map(str, self.feature_shape))}]"
        if self.tower.skip == 0:
            features = ", as nothing is skipped (skip_layers=0), so that features can't be cached"
        raise ValueError(
            f"SkipCLIP: pixel_values must be images [B, 3, height, width]{features}; got {list(pixel_values.shape)}."
        )
