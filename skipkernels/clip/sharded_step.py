"""Training step of SkipCLIP in several processes: each encodes its images and its share of the classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..parallel import ClassParallel, gather_rows, replicated_cross_entropy, sharded_cross_entropy
from ..selection import RankSampler, select_ranks
from .batch import check_label_range, one_batch
from .output import SkipOutput

if TYPE_CHECKING:
    from .training import Training


def sharded_step(clip: Training, batch: tuple[Any, Any, Any], labels: Any, return_logits: bool) -> SkipOutput:
    """Run one step with the images of all processes; collective. docs/many-processes.md lists the messages."""
    parallel = clip._parallel
    assert parallel is not None
    x = one_batch(*batch)
    x, labels, images = padded(x, labels)
    clip._check_step(x, labels)
    if labels.device != x.device:
        raise ValueError(f"SkipCLIP: labels must be on {x.device}, where x is; got {labels.device}.")
    if x.device.type == "cpu":
        check_label_range(labels, parallel.num_classes)
    if return_logits:
        raise ValueError(
            "SkipCLIP: return_logits must be False with process_group, since no process has the embeddings of all "
            "selected classes. Use clip.eval(), or SkipCLIP without process_group."
        )
    own_image = clip._image_encoder.encode(x)[:images]
    sizes, own = sizes_of(parallel, images, "clip", x.device, clip.sampler)
    # 1. All labels and image embeddings. Replicated texts need the latter for the scores only, without gradient.
    labels = gather_rows(labels[:images], sizes, parallel.group)  # [B]
    image = gather_rows(own_image.detach() if parallel.replicated else own_image, sizes, parallel.group)
    # 2. The same selection on every process, from the scores [C/W] of each
    ranks = clip.sampler.draw_on(x.device, parallel.num_classes, len(labels))
    selection = select_ranks(parallel.gather_classes(clip._scores(image)), labels, ranks)
    class_ids, targets = selection  # [K], [B]
    # 3. Texts and loss: own images with all K classes, or all images with the own K_r classes
    scale, group = clip.model.logit_scale.exp(), parallel.group
    weight, smoothing = None if clip.class_weight is None else clip.class_weight[class_ids], clip.label_smoothing
    if parallel.replicated:
        text = clip._text_encoder.encode(class_ids)
        total = sum(sizes) if weight is None else weight[targets].sum()
        loss = replicated_cross_entropy(own_image, text, targets[own], scale, group, total, weight, smoothing)
    else:
        own_selection = parallel.own_selection(selection)
        text = clip._text_encoder.encode(at_least_one(own_selection.class_ids))
        loss = sharded_cross_entropy(
            image, text, own_selection, scale, group, class_weight=weight, label_smoothing=smoothing
        )
    return SkipOutput(loss, None, class_ids, targets[own])


def padded(x: Any, labels: Any, row: Tensor | None = None) -> tuple[Any, Any, int]:
    """Return a batch and its number of images; for an empty batch, one image of zeros with label 0 or `row`, and 0.

    The weights of a process without images then get gradients of zero, not None.
    """
    empty = isinstance(x, Tensor) and isinstance(labels, Tensor) and x.numel() == labels.numel() == 0
    if not empty:
        return x, labels, len(x) if isinstance(x, Tensor) and x.ndim else 0
    one = labels.new_zeros(1, *labels.shape[1:]) if row is None else row[None].to(labels)
    return x.new_zeros(1, *x.shape[1:]), one, 0


def sizes_of(
    parallel: ClassParallel, images: int, call: str, device: torch.device, sampler: RankSampler | None = None
) -> tuple[list[int], slice]:
    """Return the number of images of each process, and the slice of this process among all images."""
    sizes = parallel.gather_sizes(images, call, device, b"" if sampler is None else sampler.fingerprint())
    if sum(sizes) == 0:
        raise ValueError("SkipCLIP: a batch must have at least one image on one of the processes; got none.")
    start = sum(sizes[: parallel.rank])
    return sizes, slice(start, start + images)


def at_least_one(ids: Tensor) -> Tensor:
    """Ids of a process; if it has none, one id that is not used, so that weights get gradients of zero, not None."""
    return ids if len(ids) else ids.new_zeros(1)
