"""SkipCLIP in several processes: the agreement at construction, steps and losses, and evaluation.

Functions that send messages are collective: every process must call them equally often, with an empty batch if it has
no images. docs/many-processes.md lists the messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..digests import digest_json, digest_tensors, digests
from ..parallel import (
    ClassParallel,
    gather_rows,
    sharded_binary_cross_entropy,
    sharded_contrastive_loss,
    sharded_cross_entropy,
    sharded_pairwise_sigmoid_loss,
)
from ..parallel.gathers import all_gather
from ..retrieval import check_k, largest, top_k_logits
from ..selection import RankSampler, classes_at_ranks, select_ranks
from ..towers import UnsupportedModel
from ..towers.base import Tower
from .base import SkipOutput

if TYPE_CHECKING:
    from .base import SkipCLIPBase


def refuse_batch_norms(tower: Tower) -> None:
    """Raise if a module above the cut is a batch norm other than `SyncBatchNorm`."""
    for part in (*tower.blocks[tower.skip :], *tower.head):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                raise UnsupportedModel(
                    "SkipCLIP: with process_group, batch norms above the cut must use the images of all processes; got "
                    f"{type(module).__name__}. Convert the model with "
                    "torch.nn.SyncBatchNorm.convert_sync_batchnorm, on a GPU, or raise skip_layers."
                )


def check_agreement(clip: SkipCLIPBase) -> None:
    """Raise a ValueError on every process unless all have the same inputs and weights.

    Also raises an UnsupportedModel for batch norms that use the images of one process only.
    """
    parallel, sampler, model = clip._parallel, clip.sampler, clip.model
    assert parallel is not None
    if parallel.size > 1:
        refuse_batch_norms(clip._image)
        refuse_batch_norms(clip._text)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights = [] if clip.class_weight is None else [("class_weight", clip.class_weight)]
    tensors = [x.detach() for x in (*model.parameters(), *model.buffers())]
    digest_of = {
        "tokens": clip._prompts,
        "skip_layers and the trained parameters": digest_json([clip.skip_layers, trained]),
        "options of the selection": digest_json(sampler.options()),
        "generator": digest_tensors(sorted(sampler.state_dict().items())),
        "label_smoothing and class_weight": digest_json([clip.label_smoothing, digest_tensors(weights)]),
        "weights": digest_json(digests(tensors)),
    }
    parallel.check_equal(list(digest_of.items()), next(model.parameters()).device)


# ---- steps


def sharded_step(clip: SkipCLIPBase, x: Tensor, labels: Tensor, images: int, return_logits: bool) -> SkipOutput:
    """Run one step on the images of all processes. The first `images` rows of x are images, the others padding."""
    parallel = clip._parallel
    assert parallel is not None
    if return_logits:
        raise ValueError(
            "SkipCLIP: return_logits must be False with process_group, since no process has the embeddings of all "
            "selected classes. Use clip.eval(), or SkipCLIP without process_group."
        )
    own_image = clip._image_encoder.encode(x)[:images]
    sizes, own = sizes_of(parallel, images, "clip", x.device, clip.sampler)
    # 1. The labels and image embeddings of all processes
    labels = gather_rows(labels[:images], sizes, parallel.group)  # [B]
    image = gather_rows(own_image, sizes, parallel.group)  # [B, D]
    # 2. The same selection on every process, from the scores [C], gathered from [C/W] on each
    ranks = clip.sampler.draw_on(x.device, parallel.num_classes, len(labels))
    selection = select_ranks(parallel.gather_classes(clip._scores(image)), labels, ranks)
    class_ids, targets = selection  # [K], [B]
    # 3. Text embeddings of the selected classes that this process owns, [K_r, D], and the loss over all images
    own_selection = parallel.own_selection(selection)
    text = clip._encode_classes(at_least_one(own_selection.class_ids), image.dtype)
    loss = sharded_cross_entropy(
        image,
        text,
        own_selection,
        clip.model.logit_scale.exp(),
        parallel.group,
        class_weight=None if clip.class_weight is None else clip.class_weight[class_ids],
        label_smoothing=clip.label_smoothing,
    )
    return SkipOutput(loss, None, class_ids, targets[own])


def padded(x: Any, labels: Any, row: Tensor | None = None) -> tuple[Any, Any, int]:
    """Return x, labels and the number of images.

    An empty batch is replaced by one image of zeros with label 0 or `row`, so that the gradients of a process without
    images are zeros, not None; its number of images is 0. An invalid batch is left to the checks that follow.
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


def sharded_pairs(
    clip: SkipCLIPBase, captions: Tensor, pairs: int, loss: str, bias: Tensor | float | None, device: torch.device
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Return the captions that this process encodes, and the loss of its images and these captions; both collective.

    Captions of tokens are encoded by the process that has their images, those of ids by the process that owns the
    classes. The first `pairs` captions and image embeddings are pairs of this process, the others padding; the loss
    is that of the pairs of all processes.
    """
    parallel = clip._parallel
    assert parallel is not None
    group = parallel.group
    call = f"pair_loss with loss={loss!r} and captions of {captions.ndim} dimensions"
    sizes, own = sizes_of(parallel, pairs, call, device)
    if captions.ndim == 2:
        pair_ids = torch.arange(pairs, device=device) + own.start  # [n], pairs with a caption encoded here
        texts = captions
    else:
        caption_ids = gather_rows(captions[:pairs], sizes, group)  # [B]
        pair_ids = (caption_ids % parallel.size == parallel.rank).nonzero().flatten()  # [n]
        texts = at_least_one(caption_ids[pair_ids] // parallel.size)

    def loss_of(image: Tensor, text: Tensor) -> Tensor:
        image, scale = gather_rows(image[:pairs], sizes, group), clip.model.logit_scale.exp()  # [B, D]
        if bias is None:
            return sharded_contrastive_loss(image, text, pair_ids, scale, group)
        return sharded_pairwise_sigmoid_loss(image, text, pair_ids, scale, bias, group)

    return texts, loss_of


def sharded_sigmoid_loss(
    clip: SkipCLIPBase, own_image: Tensor, labels: Tensor, max_labels: int, bias: Tensor | float
) -> SkipOutput:
    """Run a training step of `sigmoid_loss` on own images [b, D], labels bool [b, C], with those of all processes."""
    parallel = clip._parallel
    assert parallel is not None
    group = parallel.group
    # 1. The image embeddings of all processes, [B, D]
    call = f"sigmoid_loss with max_labels={max_labels}"
    sizes, _ = sizes_of(parallel, len(own_image), call, own_image.device, clip.sampler)
    image = gather_rows(own_image, sizes, group)
    # 2. The same selection on every process: labels of any image score +∞
    with torch.no_grad():
        is_label = labels.any(dim=0).byte()  # [C]
        dist.all_reduce(is_label, dist.ReduceOp.MAX, group=group)
        ranks = clip.sampler.draw_on(image.device, parallel.num_classes, len(image) * max_labels)
        scores = parallel.gather_classes(clip._scores(image))
        class_ids = classes_at_ranks(scores.masked_fill(is_label.bool(), math.inf), ranks)  # [K]
    # 3. Text embeddings of the selected classes that this process owns, [K_r, D], and the loss over all images
    own_targets, positions = labels[:, class_ids], (class_ids % parallel.size == parallel.rank).nonzero().flatten()
    text = clip._encode_classes(at_least_one(class_ids[positions] // parallel.size), image.dtype)
    targets = gather_rows(own_targets.byte(), sizes, group)[:, positions]  # [B, K_r]
    scale, elements = clip.model.logit_scale.exp(), len(image) * len(class_ids)
    loss = sharded_binary_cross_entropy(image, text, targets, bias, scale, elements, group)
    return SkipOutput(loss, None, class_ids, own_targets)


# ---- evaluation


def sharded_predict(clip: SkipCLIPBase, parallel: ClassParallel, x: Tensor) -> Tensor:
    """Logits [b, C] of the images of this process; see `SkipCLIP.predict`.

    Each process sends every other process the logits [b, C/W] of that process's images for its own classes.
    """
    image, classes, sizes, _ = _gathered_embeddings(clip, parallel, x, "predict")
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


def sharded_top_k(clip: SkipCLIPBase, parallel: ClassParallel, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits [b, k] of the images of this process, and their classes; see `SkipCLIP.top_k`.

    Each process sends the k best of its classes for the images of all processes: [B, k] logits and class ids.
    """
    image, classes, _, own = _gathered_embeddings(clip, parallel, x, f"top_k with k={k}", k)
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


def _gathered_embeddings(
    clip: SkipCLIPBase, parallel: ClassParallel, x: Any, call: str, k: int = 1
) -> tuple[Tensor, Tensor, list[int], slice]:
    """Scaled image embeddings [B, D] of all processes, own class embeddings, image counts, and slice of own images."""
    check_k(k, parallel.num_classes)
    x, _, images = padded(x, x)
    own_image, classes = clip._scaled_embeddings(x)
    sizes, own = sizes_of(parallel, images, call, own_image.device)
    return gather_rows(own_image[:images], sizes, parallel.group), classes, sizes, own
