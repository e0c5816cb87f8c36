"""Fingerprint of a model below the cut, and checks of a store against a model and a dataset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..store import Layout, StoreError

if TYPE_CHECKING:
    from ..clip import SkipCLIP

_PROBED = 64  # numbers of the probe that are stored
# Tolerance of the probe, relative to its norm. Rounding differs with the device, number of threads and TF32; another
# activation, mask or number of heads changes more, even with small random weights.
_PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}

_HINTS = {  # by the entry that differs
    "autocast": "Open it under the same autocast. ",
    "dataset key": "Pass the same `key` as to build. ",
    "images": "The name, size or modification time of a file differs (cp -p keeps times), or the choice of images. ",
    "image transform": "Its repr differs. ",
}


def of_model(clip: SkipCLIP) -> dict[str, str | int]:
    """Fingerprint of a model below the cut: everything that image features depend on."""
    return {f"image {name}": value for name, value in clip.lower_identity("image").items()}


def probe(clip: SkipCLIP) -> list[float]:
    """Some features of one fixed image, to detect changes that leave the weights equal, such as another activation."""
    return _probed(clip).tolist()


def _probed(clip: SkipCLIP) -> Tensor:
    height, width = clip.image_size
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(clip.prototypes.device)
    with torch.autocast(image.device.type, enabled=False):
        features = clip.lower_copy()(image).flatten()  # a copy: the model may be in use by training
    return features.cpu()[torch.linspace(0, len(features) - 1, _PROBED).long()]


def check(layout: Layout, expected: dict[str, Any], folder: Path) -> None:
    """Raise a StoreError if an entry of the fingerprint of a store differs from `expected`."""
    difference = layout.difference(replace(layout, fingerprint=layout.fingerprint | expected))
    if difference is not None:
        hint = _HINTS.get(difference.partition(" (")[0], "")
        raise StoreError(
            f"{folder}: holds a store that differs in {difference}. {hint}Build another cache, or replace this one "
            "with `overwrite=True`."
        )


def check_probe(layout: Layout, clip: SkipCLIP, folder: Path) -> None:
    """Raise a StoreError if the probe of a model differs from that of the store, or the store has none."""
    try:
        stored = torch.tensor(layout.notes["probe"], dtype=torch.float64)
        expected = stored if stored.shape == (_PROBED,) else None
    except (KeyError, TypeError, ValueError, RuntimeError):
        expected = None
    if expected is None:
        raise StoreError(f"{folder}: its manifest has no probe of the model. Build it again with `overwrite=True`.")
    found = _probed(clip)
    distance = ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    if not distance <= _PROBE_TOLERANCE[found.dtype]:
        raise StoreError(
            f"{folder}: this model computes other features from the same weights (relative distance {distance:.1e} on "
            "a probe): another activation, number of heads or hook below the cut. Build another cache with it."
        )
