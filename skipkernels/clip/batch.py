"""Checks of a batch. Values are checked on the CPU only: on a GPU the check would be a host sync."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import warn_caller


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


def check_labels(labels: Any, batch_size: int) -> None:
    """Raise unless labels are int64 [B]."""
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"SkipCLIP: labels must be an int64 tensor [B]; got {type(labels).__name__}. Without labels use "
            "clip.predict(x)."
        )
    if labels.ndim == 2:
        raise ValueError(
            f"SkipCLIP: labels must be class ids, int64 [B={batch_size}]; got {labels.dtype} {list(labels.shape)}. "
            "For several labels per image use clip.sigmoid_loss; for one-hot labels pass labels.argmax(dim=1). Mixed "
            "labels are not handled."
        )
    if labels.shape != (batch_size,) or labels.dtype != torch.int64:
        raise ValueError(
            f"SkipCLIP: labels must be int64 [B={batch_size}], one for each image; got {labels.dtype} "
            f"{list(labels.shape)}."
        )


def check_label_range(labels: Tensor, classes: int) -> None:
    """Raise if a label is outside [0, classes). A host sync on a GPU."""
    low, high = (int(x) for x in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise ValueError(
            f"SkipCLIP: labels must be in [0, C={classes}); got {low} to {high}. Leave images without a class out of "
            "the batch; ignore_index is not handled."
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


class LabelOrder:
    """Warns once if training batches come in the order of their labels, as of a dataset that is not shuffled.

    Sees the batches up to the first label that is smaller than the one before it. Of n batches that begin with a label
    of class c n_c times each, shuffling gives this order with the chance Π n_c! / n!, also if batches have one class.
    """

    CHANCE = 1e-6  # below it, the warning: of ten classes with four batches each after the first 14 batches

    def __init__(self) -> None:
        self._chance, self._batches, self._of_class = 1.0, 0, 0
        self._first = self._last = -1  # labels of the previous batch
        self._watches = True

    def see(self, labels: Tensor) -> None:
        """Add a batch of labels, int64 [B]. On a GPU they are not read: that would be a host sync."""
        if not self._watches or labels.device.type != "cpu":
            return
        order = [self._last, *labels.tolist()]
        if order != sorted(order):
            self._watches = False
            return
        self._batches += 1
        self._of_class = self._of_class + 1 if order[1] == self._first else 1
        self._chance *= self._of_class / self._batches
        self._first, self._last = order[1], order[-1]
        if self._chance < self.CHANCE:
            self._watches = False
            warn_caller(
                f"SkipCLIP: the first {self._batches} training batches came in the order of their labels, as of a "
                "dataset that is sorted by class and not shuffled. Training on class after class is less accurate. "
                "Shuffle: DataLoader(dataset, shuffle=True)."
            )
