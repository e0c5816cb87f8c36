"""Retrieval in bounded memory: recall at k of images and captions, and the k best classes of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_features, check_ids
from .dtypes import without_autocast
from .reference import unit_norm

_SCORES = 1 << 22  # scores in memory at once: 16 MiB in fp32, or 64 images of 65,536 classes


class Recall(NamedTuple):
    """Recall at each k, from 0 to 1.

    Attributes:
        image_to_text: Share of the images with a caption that have one of their captions among the first k.
        text_to_image: Share of the captions that have their image among the first k.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


@torch.no_grad()
def recall(image: Tensor, text: Tensor, image_of_text: Tensor, *, ks: Sequence[int] = (1, 5, 10)) -> Recall:
    """Compute recall at k by cosine, in both directions.

    An image may have several captions, as in COCO and Flickr30k, and is found by any of them. An image without a
    caption is only a candidate. Candidates with a cosine of NaN, or equal up to rounding, are counted before the right
    one: a model with the same embedding for everything finds nothing. Bounded memory: 16 MiB of cosines at a time.

    Args:
        image: [n, D] image embeddings of any norm, in fp32, bf16, fp16 or fp64.
        text: [m, D] text embeddings of any norm, in one of the same dtypes.
        image_of_text: int64 [m], index of the image of each caption.
        ks: Numbers of candidates, at least 1; default: 1, 5, 10.

    Returns:
        Recall: `image_to_text` and `text_to_image`, each k → share.

    Example:
        >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> text = torch.tensor([[3.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
        >>> recall(image, text, torch.tensor([0, 1, 1]), ks=(1, 2))
        Recall(image_to_text={1: 1.0, 2: 1.0}, text_to_image={1: 0.6666666666666666, 2: 1.0})
    """
    name = "recall"
    for argument, value in (("image", image), ("text", text), ("image_of_text", image_of_text)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: {argument} must be a tensor; got {type(value).__name__}. Use torch.as_tensor({argument})."
            )
    check_features(name, "image", image, n=None, D=None)
    check_features(name, "text", text, ("image", image), m=None, D=image.shape[1])
    check_ids(name, "image_of_text", image_of_text, ("text", text), m=len(text))
    low, high = (int(x) for x in torch.aminmax(image_of_text))
    if low < 0 or high >= len(image):
        raise ValueError(f"{name}: image_of_text must be rows of image, 0 to {len(image) - 1}; got {low} to {high}.")
    if min(ks, default=1) < 1:
        raise ValueError(f"{name}: ks must be at least 1; got {list(ks)}.")
    with without_autocast(image.device):
        image, text = (unit_norm(x) for x in (image, text))
        dtype = torch.promote_types(image.dtype, text.dtype)
        image, text = image.to(dtype), text.to(dtype)
        ids = torch.arange(len(image), device=image.device)
        with_text = image_of_text.unique()
        of_images = _ahead(image[with_text], with_text, text, image_of_text)
        of_texts = _ahead(text, image_of_text, image, ids)
    return Recall(*({k: (ahead < k).double().mean().item() for k in ks} for ahead in (of_images, of_texts)))


def _ahead(queries: Tensor, ids: Tensor, candidates: Tensor, ids_of_candidates: Tensor) -> Tensor:
    """Number of candidates with another id before the best one with the id of the query, int64 [n]."""
    counts = []
    rows = max(_SCORES // len(candidates), 1)
    # A matrix product sums the terms of equal cosines in different orders, depending on the column.
    rounding = queries.shape[1] ** 0.5 * torch.finfo(queries.dtype).eps
    for part, part_ids in zip(queries.split(rows), ids.split(rows), strict=True):
        scores = part @ candidates.T
        right = ids_of_candidates == part_ids[:, None]
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        counts.append((~(scores < best - rounding) & ~right).sum(dim=1))
    return torch.cat(counts)


def top_k_logits(image: Tensor, text: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits x_b · t_c, descending, and their classes; of equal ones, the lower class first.

    Args:
        image: Scaled image embeddings [B, D].
        text: Class embeddings [C, D] of the same dtype.
        k: From 1 to C.

    Returns:
        Logits [B, k], and class ids int64 [B, k].

    >>> image, text = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    >>> top_k_logits(image, text, 2)
    (tensor([[2., 2.]]), tensor([[1, 2]]))
    """
    check_k(k, len(text))
    chunk = max(_SCORES // max(len(image), 1), k)
    logits = image.new_empty(len(image), 0)
    class_ids = torch.empty(len(image), 0, dtype=torch.int64, device=image.device)
    for start in range(0, len(text), chunk):
        part = image @ text[start : start + chunk].T
        found, positions = largest(part, k)
        del part  # before the next chunk is computed
        # The classes found so far are in front, so that a lower position is a lower class among equal logits.
        logits, class_ids = torch.cat([logits, found], dim=1), torch.cat([class_ids, start + positions], dim=1)
        logits, positions = largest(logits, k)
        class_ids = class_ids.gather(1, positions)
    return logits, class_ids


def check_k(k: int, classes: int) -> None:
    """Raise a ValueError unless k is in [1, C]."""
    if not 1 <= k <= classes:
        raise ValueError(f"top_k: k must be in [1, C={classes}]; got {k}.")


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row [B, n] (all if n < k), and their positions; among equals the lower is first."""
    n = logits.shape[1]
    if k == 1:
        return logits.max(dim=1, keepdim=True)
    values, positions = logits.topk(min(k + 1, n), dim=1)
    if k < n and bool((values[:, k - 1] == values[:, k]).any()):  # topk returns any of the equal logits
        values, positions = logits.sort(dim=1, descending=True, stable=True)
        return values[:, :k], positions[:, :k]
    positions, order = positions.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :k], positions.gather(1, order)[:, :k]
