"""Encoding of images, or of their features at the cut, to image embeddings; checks of a batch of images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..boundary import LSkipBoundary, refusing_lost_gradients
from ..towers import ImageTower
from ..towers.changes import Frozen


class ImageEncoder:
    """Image tower of SkipCLIP."""

    features: tuple[torch.Size, torch.dtype]  # Shape [N, W] of one image's features at the cut, and their dtype
    # Modules and weights below the cut when features at the cut were first computed or used
    weights: Frozen | None = None

    def __init__(self, tower: ImageTower, chunk: int):
        self.tower, self.chunk = tower, chunk

    def lower(self, images: Tensor) -> Tensor:
        """Images [B, 3, height, width] to features at the cut [B, N, W]."""
        x = images.to(self.tower.dtype)
        try:
            if self.tower.skip == 0:
                return self.tower.lower(x)
            checked = refusing_lost_gradients(self.tower.lower, "image", "(0, …)")
            return LSkipBoundary.apply(checked, x.to(self.tower.lower_device or x.device), self.chunk).to(images.device)
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
            return self.upper(self.lower(x))
        self.watch_weights()
        if self.is_stale():
            raise RuntimeError(
                "SkipCLIP: modules or weights below the cut have changed since features at the cut were first computed "
                "or used, so these do not match the model. Compute them again, then call clip.refresh()."
            )
        return self.upper(x)

    def upper(self, features: Tensor) -> Tensor:
        """Features at the cut [B, N, W], in any dtype, to embeddings [B, D].

        Under autocast the features may be in 16 bits. The residual stream above the cut is in the dtype of the model,
        as that of the texts, so that features from a cache give the same result as images.
        """
        return self.tower.upper(features.to(self.features[1]))

    def are_images(self, x: Tensor) -> bool:
        """Return True for images, False for features at the cut; raise a ValueError for anything else."""
        shape, _ = self.features
        if x.shape[1:] == shape and self.tower.skip > 0:
            return False
        if x.ndim == 4 and x.shape[1] == 3:
            return True
        features = f" or features at the cut [B, {', '.join(map(str, shape))}]"
        if self.tower.skip == 0:
            features = ", as nothing is skipped (skip_layers=0), so that features can't be cached"
        raise ValueError(f"SkipCLIP: x must be images [B, 3, height, width]{features}; got {list(x.shape)}.")

    def lower_copy(self) -> Callable[[Tensor], Tensor]:
        """Return `lower` of copied modules that share the weights and stay in evaluation mode."""
        self.watch_weights()
        copied = copy.copy(self)
        copied.tower = sharing_weights(self.tower, self.tower.model)
        for part in copied.tower.lower_parts():
            if isinstance(part, nn.Module):
                part.eval()
        return copied.lower

    def watch_weights(self) -> None:
        """Record the weights below the cut, unless features at the cut were computed or used before."""
        if self.weights is None:
            self.accept_weights()

    def accept_weights(self) -> None:
        """Record that features at the cut are computed with the current weights below the cut."""
        self.weights = Frozen(self.tower.lower_parts, with_global_hooks=False)

    def trains_below(self) -> bool:
        """Return True if a weight that computed features at the cut requires grad."""
        return self.weights is not None and self.weights.trains()

    def is_stale(self) -> bool:
        """Return True if features at the cut were computed with other modules or weights."""
        return self.weights is not None and self.weights.changed()

    def compare_weights(self) -> None:
        """Compare the weights below the cut by content; the next use of features raises an error if they differ."""
        if self.weights is not None:
            self.weights.content_changed()


def sharing_weights(part: Any, model: nn.Module) -> Any:
    """Copy a part of a model: the copies have their own mode, and share the parameters and buffers of the model."""
    return copy.deepcopy(part, {id(x): x for x in (*model.parameters(), *model.buffers())})


# ---- checks of images. Values are checked on the CPU only: on a GPU the check would be a host sync.


def check_images(x: Any) -> None:
    """Raise unless x can be images or features: floating point, not empty; on the CPU also finite."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"SkipCLIP: x must be a tensor, images [B, 3, height, width] or features at the cut; got "
            f"{type(x).__name__}. Stack a list of images with torch.stack."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"SkipCLIP: images must be floating-point, normalised by the model's image transform; got {x.dtype}. "
            "Apply the transform, or (images / 255 − mean) / std."
        )
    if x.ndim < 3 or len(x) == 0:
        raise ValueError(
            "SkipCLIP: x must be images [B, 3, height, width] or features at the cut [B, N, W], at least one image; "
            f"got {list(x.shape)}."
        )
    if x.device.type == "cpu" and not x.isfinite().all():
        bad = (~x.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"SkipCLIP: images and features must be finite; NaN or infinity in images {bad} of the batch.")


def refuse_export() -> None:
    """Raise a RuntimeError while `torch.export` or `torch.jit.trace` runs SkipCLIP."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise RuntimeError(
            "SkipCLIP: a step can be neither exported nor traced. Export the plain module clip.classifier(), from "
            "images to logits."
        )
