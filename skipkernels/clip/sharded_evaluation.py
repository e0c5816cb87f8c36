"""Evaluation in several processes: each compares the images of all processes with its own classes.

All functions are collective: every process must make the same number of calls, if necessary with an empty batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import ClassParallel, gather_rows
from ..parallel.gathers import all_gather
from .sharded_step import padded, sizes_of
from .top_k import check_k, largest, top_k_logits

if TYPE_CHECKING:
    from .inference import Inference


def sharded_predict(clip: Inference, parallel: ClassParallel, x: Tensor) -> Tensor:
    """Logits [b, C] of the images of this process; see `SkipCLIP.predict`.

    Each process sends every other process the logits [b, C/W] of that process's images for its own classes.
    """
    image, classes, sizes, _ = _compared(clip, parallel, x, "predict")
    longest, width = max(sizes), max(parallel.sizes)
    sent = image.new_empty(parallel.size, longest, width)
    with torch.autocast(image.device.type, enabled=False):
        for part, rows in zip(sent, image.split(sizes), strict=True):
            part[: len(rows), : len(classes)] = rows @ classes.T
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=parallel.group)
    logits = image.new_empty(sizes[parallel.rank], parallel.num_classes)
    for rank, (part, owned) in enumerate(zip(received, parallel.sizes, strict=True)):
        logits[:, rank :: parallel.size] = part[: len(logits), :owned]
    return logits


def sharded_top_k(clip: Inference, parallel: ClassParallel, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits [b, k] of the images of this process, and their classes; see `SkipCLIP.top_k`.

    Each process sends the k best of its classes for the images of all processes: [B, k] logits and class ids.
    """
    image, classes, _, own = _compared(clip, parallel, x, f"top_k with k={k}", k)
    width = min(k, max(parallel.sizes))
    with torch.autocast(image.device.type, enabled=False):
        logits, positions = top_k_logits(image, classes, min(k, len(classes)))
    class_ids = positions * parallel.size + parallel.rank
    missing = width - logits.shape[1]  # padding, sorted behind every class
    logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    class_ids = torch.nn.functional.pad(class_ids, (0, missing), value=parallel.num_classes)
    every, every_id = (torch.cat(tuple(all_gather(part, parallel.group)), 1)[own] for part in (logits, class_ids))
    every_id, order = every_id.sort(dim=1)  # so that a lower position is a lower class among equal logits
    found, positions = largest(every.gather(1, order), k)
    return found, every_id.gather(1, positions)


def _compared(
    clip: Inference, parallel: ClassParallel, x: Any, call: str, k: int = 1
) -> tuple[Tensor, Tensor, list[int], slice]:
    """Scaled image embeddings [B, D] of all processes, own class embeddings, image counts, and slice of own images."""
    check_k(k, parallel.num_classes)
    x, _, images = padded(x, x)
    own_image, classes = clip._compared(x)
    sizes, own = sizes_of(parallel, images, call, own_image.device)
    return gather_rows(own_image[:images], sizes, parallel.group), classes, sizes, own
