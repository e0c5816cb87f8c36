"""What features at the cut depend on, by name, and whether a model and a dataset still give what a store holds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..store import Layout, StoreError
from .extract import Batch, batches_of, is_gone_once_read, is_iterable_only

if TYPE_CHECKING:
    from ..clip import SkipCLIP

_PROBED = 64  # numbers of the probe that are kept
# How far a probe may be off, relative to its norm. Another device, another number of threads and TF32 round otherwise;
# another activation, mask or number of heads is off by more, even with small random weights.
_PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}

_BLOCKS = 8  # along each side of an image, whose means are kept
# How far a number of an image may be off, relative to the largest of that image's. It is not 0, since another version
# of a library decodes or resizes pixels by a unit of 255 otherwise. Measured at 224 × 224 on noise with a photograph's
# spectrum: that is 0.0016 at most, bilinear in place of bicubic 0.017, JPEG of quality 95 0.018, 8 pixels aside 0.15.
_SAMPLE_TOLERANCE = 5e-3
_DIGEST = re.compile("[0-9a-f]{32}")
_REMEDY = "Build another one, or replace it with overwrite=True (--overwrite)."
_WHY = {  # what it means that two digests differ, which say nothing themselves
    "images": "The dataset's class, a public attribute, or the name or size of a file differs. If that is harmless (a "
    "class that was in __main__ and is imported now, an attribute that counts what was read), build and open with "
    "identity=, a name for the dataset. ",
    "image files": "Files were changed since (or files= is another). ",
    "image transform": "Its class or its parameters differ. ",
}


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


def samples(dataset: Any, seed: int, workers: int = 0) -> list[dict[str, Any]]:
    """Some numbers of a few items as a build loads them: what attributes do not tell of a dataset.

    They are the first, the middle and the last item, in view 0; of an iterable the first, if it can be read again.

    Args:
        dataset: Of (image, label).
        seed: Of random transforms.
        workers: Whether other processes load images, and not this one, which may have to stay as it is for them.

    Raises:
        StoreError: If one of them can't be loaded, or is another each time.
    """
    if is_iterable_only(dataset):
        items, rows = [0], [] if is_gone_once_read(dataset) else [[0]]
    else:
        items = sorted({0, len(dataset) // 2, len(dataset) - 1})
        rows = [[item] for item in items * 2]
    found = [_sample(batch) for batch in batches_of(dataset, rows, seed=seed, workers=min(workers, 1))]
    found, again = found[: len(items)], found[len(items) :]
    for first, second in zip(found, again, strict=False):
        if not _alike(first, second):
            raise StoreError(
                f"FeatureCache: item {first['item']} of the dataset is another one each time it is loaded, even if "
                "PyTorch's, NumPy's and Python's generators begin the same. Draw from these, or pass identity=, a name "
                "that you change when its images or its transform change."
            )
    return found


def _sample(batch: Batch) -> dict[str, Any]:
    image = batch.images[0].double()
    blocks = adaptive_avg_pool2d(image, _BLOCKS)
    numbers = torch.cat([image.mean((1, 2)), image.std((1, 2), correction=0), blocks.flatten()])
    short = [float(f"{number:.5g}") for number in numbers.tolist()]
    return {"item": batch.rows[0], "label": int(batch.labels[0]), "numbers": short}


def _alike(kept: dict[str, Any], got: dict[str, Any]) -> bool:
    before, now = (torch.tensor(sample["numbers"], dtype=torch.float64) for sample in (kept, got))
    off = _SAMPLE_TOLERANCE * before.nan_to_num().abs().max().item()
    same = before.shape == now.shape and torch.allclose(now, before, rtol=0, atol=off, equal_nan=True)
    return same and (kept["item"], kept["label"]) == (got["item"], got["label"])


def check_samples(layout: Layout, found: list[dict[str, Any]], folder: Any) -> None:
    """Refuse a dataset of which a few items are others than those that a store was built from.

    Raises:
        StoreError: Names the first of them.
    """
    try:
        pairs = list(zip(layout.notes["samples"], found, strict=True))
        wrong = next((got["item"] for kept, got in pairs if not _alike(kept, got)), None)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise StoreError(f"{folder}: its manifest has no samples of such a dataset. {_REMEDY}") from None
    if wrong is not None:
        raise StoreError(
            f"{folder}: item {wrong} of the dataset has another image or label than when this was built, though the "
            "dataset's attributes are the same: files were replaced, or code, or what the code reads, has changed. "
            f"{_REMEDY}"
        )


def check(layout: Layout, wanted: dict[str, Any], folder: Any) -> None:
    """Refuse a store whose fingerprint differs in one of `wanted`.

    Raises:
        StoreError: Names what differs.
    """
    for name, here in wanted.items():
        there = layout.fingerprint.get(name, "nothing")
        if there != here:
            values, why = f" ({there} there, {here} here)", "Open it under the same. " if name == "autocast" else ""
            if all(_DIGEST.fullmatch(str(value)) for value in (there, here)):
                values, why = "", _WHY.get(name, "")
            raise StoreError(
                f"{folder}: made with another {name}{values}, so its features are not this model's and these images'. "
                f"{why}{_REMEDY}"
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
