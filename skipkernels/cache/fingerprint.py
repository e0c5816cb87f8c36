"""What features at the cut depend on, by name, and whether a model still gives the features that a store holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..store import Layout, StoreError

if TYPE_CHECKING:
    from ..clip import SkipCLIP

_PROBED = 64  # numbers of the probe that are kept
# How far a probe may be off, relative to its norm. Another device, another number of threads and TF32 round otherwise;
# another activation, mask or number of heads is off by more, even with small random weights.
_PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}


def of_model(clip: SkipCLIP) -> dict[str, str | int]:
    """What of the model features of images depend on: what is below the cut."""
    return {f"image {name}": value for name, value in clip.lower_identity("image").items()}


def probe(clip: SkipCLIP) -> list[float]:
    """Some numbers of the features of one image, the same each time: what weights do not tell of a model."""
    return _probed(clip).double().tolist()


def _probed(clip: SkipCLIP) -> Tensor:
    height, width = clip.image_size
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(clip.prototypes.device)
    with torch.autocast(image.device.type, enabled=False):
        features = clip.lower_copy()(image).flatten()  # a copy: the model may be training meanwhile
    return features.cpu()[torch.linspace(0, len(features) - 1, _PROBED).long()]


def check(layout: Layout, wanted: dict[str, Any], folder: Any) -> None:
    """Refuse a store whose fingerprint differs in one of `wanted`.

    Raises:
        StoreError: Names what differs.
    """
    for name, value in wanted.items():
        if layout.fingerprint.get(name) != value:
            raise StoreError(
                f"{folder}: made with another {name} ({layout.fingerprint.get(name, 'nothing')} there, {value} here), "
                "so its features are not this model's and these images'. Build another one, or replace it with "
                "overwrite=True (--overwrite)."
            )


def check_probe(layout: Layout, clip: SkipCLIP, folder: Any) -> None:
    """Refuse a model that gives other features than those of the store although its weights are the same.

    Raises:
        StoreError: If so.
    """
    try:
        kept = torch.tensor(layout.notes["probe"], dtype=torch.float64)
        expected = kept if kept.shape == (_PROBED,) else None
    except (KeyError, TypeError, ValueError, RuntimeError):
        expected = None
    if expected is None:
        raise StoreError(f"{folder}: its manifest has no probe of the model. Build it again with overwrite=True.")
    got = _probed(clip)
    distance = ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    if not distance <= _PROBE_TOLERANCE[got.dtype]:
        raise StoreError(
            f"{folder}: this model computes other features from the same weights ({distance:.1e} off on a probe): "
            "another activation, number of heads or hook below the cut. Build another store with it."
        )
