"""Logits of the images of each process over the classes of all, in messages that never hold [B, C] or [C, D]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..retrieval import largest, top_k_logits
from .class_shards import ClassShards
from .gathers import all_gather, own_rows


def sharded_logits(image: Tensor, text: Tensor, sizes: Sequence[int], shards: ClassShards) -> Tensor:
    """Logits [b, C] of the images of this process over the classes of all; collective.

    Each process sends every other process the logits [b, C/W] of that process's images for its own classes. `image` is
    [B, D], scaled embeddings of all images, `sizes` of them on each process; `text` [C/W, D], own classes.
    """
    sent = image.new_empty(shards.size, max(sizes), max(shards.sizes))  # padded: parts of one size
    for part, rows in zip(sent, image.split(list(sizes)), strict=True):
        part[: len(rows), : len(text)] = rows @ text.T
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=shards.group)
    logits = image.new_empty(sizes[shards.rank], shards.num_classes)
    for rank, (part, owned) in enumerate(zip(received, shards.sizes, strict=True)):
        logits[:, rank :: shards.size] = part[: len(logits), :owned]
    return logits


def sharded_top_k(
    image: Tensor, text: Tensor, k: int, sizes: Sequence[int], shards: ClassShards
) -> tuple[Tensor, Tensor]:
    """The k largest logits [b, k] of the images of this process, and their classes; collective; see `sharded_logits`.

    Each process sends the k best of its classes for the images of all processes: [B, k] logits and class ids.
    """
    # 1. The k best own classes, for the images of all processes: [B, width]; padding is sorted behind every class
    width = min(k, max(shards.sizes))
    logits, positions = top_k_logits(image, text, min(k, len(text)))
    class_ids = positions * shards.size + shards.rank
    missing = width - logits.shape[1]
    logits = pad(logits, (0, missing), value=-torch.inf)
    class_ids = pad(class_ids, (0, missing), value=shards.num_classes)
    # 2. The candidates of all processes, for the images of this one: [b, W · width]
    rows = own_rows(sizes, shards.group)
    logits = torch.cat(all_gather(logits, shards.group).unbind(), 1)[rows]
    class_ids = torch.cat(all_gather(class_ids, shards.group).unbind(), 1)[rows]
    # 3. The k best of them: [b, k]
    class_ids, order = class_ids.sort(dim=1)  # so that a lower position is a lower class among equal logits
    found, positions = largest(logits.gather(1, order), k)
    return found, class_ids.gather(1, positions)
