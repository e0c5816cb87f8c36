"""Training step of SkipCLIP in several processes: images shared out by batch, classes by process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..parallel import gather_rows, sharded_cross_entropy
from ..selection import select_ranks
from ..store import digest_json, digest_tensors, digests
from ..towers import UnsupportedModel
from ..towers.base import Tower
from .batch import check_label_range, one_batch
from .output import SkipOutput

if TYPE_CHECKING:
    from .skip_clip import SkipCLIP

# What every process must have in common.
_AGREED = (
    "tokens",
    "skip_layers and the trained parameters",
    "options of the selection",
    "generator",
    "label_smoothing and class_weight",
    "weights",
)


def sharded_step(clip: SkipCLIP, batch: tuple[Any, Any, Any], labels: Any, return_logits: bool) -> SkipOutput:
    """Run one step with the images of all processes; see `SkipCLIP.forward`. Collective.

    The messages of each process: its number of images, labels, embeddings [b, D] (in backward their gradients), scores
    [C/W] of own classes, and [2, B] numbers of the loss.
    """
    parallel = clip._parallel
    assert parallel is not None and clip.sampler.generator is not None
    group, device = parallel.group, clip.prototypes.device
    try:
        x = one_batch(*batch)
        empty = isinstance(x, Tensor) and isinstance(labels, Tensor) and x.numel() == labels.numel() == 0
        if empty:  # encode an image all the same: weights get gradients of zero, not none
            x, labels = x.new_zeros(1, *x.shape[1:]), labels.new_zeros(1)
        clip._check_step(x, labels)
        device = x.device
        if labels.device != device:
            raise ValueError(f"SkipCLIP: labels must be on {device}, where x is; got {labels.device}.")
        if device.type == "cpu":
            check_label_range(labels, parallel.num_classes)
        if return_logits:
            raise ValueError(
                "SkipCLIP: return_logits must be False with process_group, since no process has the embeddings of all "
                "selected classes. Use clip.eval(), or SkipCLIP without process_group."
            )
    except Exception:
        parallel.report_error(device)
        raise
    images = 0 if empty else len(x)
    sizes = parallel.gather_sizes(images, clip.sampler.generator, device)
    if sum(sizes) == 0:
        raise ValueError("SkipCLIP: a batch must have at least one image on one of the processes; got none.")
    labels = gather_rows(labels[:images], sizes, group)
    image, scale = gather_rows(clip._image_encoder.encode(x)[:images], sizes, group), clip.model.logit_scale.exp()
    ranks = clip.sampler.draw_on(device, parallel.num_classes, len(labels))
    selection = select_ranks(parallel.gather_classes(clip._scores(image)), labels, ranks)
    own_selection = parallel.own_selection(selection)
    class_ids, targets = selection
    weight = None if clip.class_weight is None else clip.class_weight[class_ids]
    # A process without a selected class encodes one all the same: its weights get gradients of zero, not none.
    own_ids = own_selection.class_ids if len(own_selection.class_ids) else class_ids.new_zeros(1)
    text = clip._text_encoder.encode(own_ids)
    loss = sharded_cross_entropy(
        image, text, own_selection, scale, group, class_weight=weight, label_smoothing=clip.label_smoothing
    )
    start = sum(sizes[: parallel.rank])
    return SkipOutput(loss, loss.new_empty(images, 0), class_ids, targets[start : start + images])


@contextlib.contextmanager
def agreeing(clip: SkipCLIP) -> Iterator[None]:
    """Construct SkipCLIP in this context: an error is raised on every process, and so is a difference between them."""
    parallel = clip._parallel
    if parallel is None:
        yield
        return
    device = device_of(clip.model)
    try:
        yield
        if parallel.size > 1:
            refuse_batch_norms(clip._image)
            refuse_batch_norms(clip._text)
    except Exception:
        parallel.report_error(device, len(_AGREED))
        raise
    parallel.check_equal(_digests(clip), device)


def device_of(model: nn.Module) -> torch.device:
    """Device of the messages about a model: that of its first parameter."""
    return next(model.parameters()).device


def refuse_batch_norms(tower: Tower) -> None:
    """Raise if a part above the cut has batch norms over the images of one process."""
    for part in (*tower.blocks[tower.skip :], *tower.head):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                raise UnsupportedModel(
                    "SkipCLIP: with process_group, batch norms above the cut must use the images of all processes; got "
                    f"{type(module).__name__}. Convert the model with "
                    "torch.nn.SyncBatchNorm.convert_sync_batchnorm, on a GPU, or raise skip_layers."
                )


def _digests(clip: SkipCLIP) -> list[tuple[str, str]]:
    """Name and digest of what every process must have in common."""
    sampler, model = clip.sampler, clip.model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors = (x.detach() for x in (*model.parameters(), *model.buffers()))
    assert clip._prompts is not None
    weights = [] if clip.class_weight is None else [("class_weight", clip.class_weight)]
    values = (
        clip._prompts,
        digest_json([clip.skip_layers, trained]),
        digest_json([sampler.keep_ratio, sampler.max_keep, sampler.decay, sampler.tail, sampler.max_tail]),
        digest_tensors(sorted(sampler.tensors().items())),
        digest_json([clip.label_smoothing, digest_tensors(weights)]),
        digest_json(digests(tensors)),
    )
    return list(zip(_AGREED, values, strict=True))
