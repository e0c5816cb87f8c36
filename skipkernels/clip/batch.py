"""Checks of a batch. Values are checked on the CPU only: on a GPU the check would be a host sync."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def one_batch(x: Any, pixel_values: Any, images: Any) -> Any:
    """Return the argument that was given, of three names of one argument."""
    given = [value for value in (x, pixel_values, images) if value is not None]
    if len(given) != 1:
        raise TypeError(
            "SkipCLIP: pass images or features as one of x, pixel_values and images; got "
            f"{'more than one' if given else 'none'}."
        )
    return given[0]


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
    if x.ndim < 3:
        raise ValueError(
            f"SkipCLIP: x must be images [B, 3, height, width] or features at the cut [B, N, W]; got {list(x.shape)}."
        )
    if len(x) == 0:
        raise ValueError(f"SkipCLIP: a batch must have at least one image; got {list(x.shape)}.")
    if x.device.type == "cpu" and not x.isfinite().all():
        bad = (~x.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"SkipCLIP: images and features must be finite; NaN or infinity in images {bad} of the batch.")


def check_features(x: Any, shape: Sequence[int]) -> None:
    """Raise unless x are features at the cut [B, N, W] of the model, [N, W] = shape; patches may have been dropped."""
    found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
    if not isinstance(x, Tensor) or x.ndim != 1 + len(shape) or x.shape[-1] != shape[-1] or len(x) == 0:
        raise ValueError(
            f"SkipCLIP.encode_upper: features must be features at the cut, [B, {', '.join(map(str, shape))}]; got "
            f"{found}. For images use encode_image."
        )


def refuse_export() -> None:
    """Raise a RuntimeError while `torch.export` or `torch.jit.trace` runs SkipCLIP."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise RuntimeError(
            "SkipCLIP: a step can be neither exported nor traced. Export the plain module clip.classifier(), from "
            "images to logits."
        )


def check_class_ids(class_ids: Any, classes: int) -> None:
    """Raise unless class ids are int64 or int32 [K]; their values are checked on the CPU only."""
    if not isinstance(class_ids, Tensor) or class_ids.dtype not in (torch.int64, torch.int32):
        kind = class_ids.dtype if isinstance(class_ids, Tensor) else type(class_ids).__name__
        raise TypeError(f"SkipCLIP: class_ids must be an int64 tensor [K]; got {kind}. Use torch.tensor(class_ids).")
    if class_ids.ndim != 1 or len(class_ids) == 0:
        raise ValueError(f"SkipCLIP: class_ids must be [K], at least one; got {list(class_ids.shape)}.")
    if class_ids.device.type == "cpu":
        low, high = (int(x) for x in torch.aminmax(class_ids))
        if low < 0 or high >= classes:
            raise ValueError(
                f"SkipCLIP: class_ids must be in [0, C={classes}); got {low} to {high}. Encode other texts with the "
                "model itself."
            )
