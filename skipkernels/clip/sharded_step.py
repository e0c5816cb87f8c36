"""Training step of SkipCLIP in several processes: images shared out by batch, classes by process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional
from ..parallel import gather_rows, sharded_cross_entropy
from ..selection import select_ranks
from ..store import digest_json, digest_tensors, digests
from ..towers import ImageTower, TextTower, UnsupportedModel
from .batch import check_label_range, one_batch
from .output import SkipOutput

if TYPE_CHECKING:
    from .skip_clip import SkipCLIP

# What every process must have in common.
_AGREED = ("tokens", "skip_layers and the trained parameters", "options of the selection", "generator", "weights")


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
        clip._check_step(x, labels)
        device = x.device
        if labels.device.type == "cpu":
            check_label_range(labels, parallel.num_classes)
        if return_logits:
            raise ValueError(
                "SkipCLIP: return_logits must be False with process_group, since no process has the embeddings of all "
                "selected classes. Use clip.eval(), or SkipCLIP without process_group."
            )
    except Exception:
        parallel.report_error(device)
        raise
    sizes = parallel.gather_sizes(len(x), clip.sampler.generator, device)
    labels = gather_rows(labels, sizes, group)
    own = clip._image_encoder.encode(x)
    image, scale = gather_rows(own, sizes, group), clip.model.logit_scale.exp()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        scores = functional.class_scores(image.to(clip.prototypes.dtype), clip.prototypes)
        ranks = clip.sampler.draw_on(device, parallel.num_classes, len(labels))
        class_ids, targets = select_ranks(parallel.gather_classes(scores), labels, ranks)
        own_ids, own_labels = parallel.own_selection(class_ids, targets)
    # A process without a selected class encodes one all the same: its weights get gradients of zero, not none.
    selected = None if len(own_ids) else own_ids
    text = clip._text_encoder.encode(own_ids if len(own_ids) else own_ids.new_zeros(1))
    loss = sharded_cross_entropy(image, text, own_labels, scale, group, selected)
    start = sum(sizes[: parallel.rank])
    return SkipOutput(loss, loss.new_empty(len(x), 0), class_ids, targets[start : start + len(x)])


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
            _refuse_batch_norms(clip._image, clip._text)
    except Exception:
        parallel.report_error(device, len(_AGREED))
        raise
    parallel.check_equal(_digests(clip), device)


def device_of(model: nn.Module) -> torch.device:
    """Device of the messages about a model: that of its first parameter."""
    return next(model.parameters()).device


def refuse_options(**is_set: bool) -> None:
    """Raise if an option is set that is not supported with `process_group`."""
    for name, value in is_set.items():
        if value:
            raise ValueError(f"SkipCLIP: {name} is not supported with process_group. Leave out one of the two.")


def _refuse_batch_norms(image: ImageTower, text: TextTower) -> None:
    for tower in (image, text):
        for part in (*tower.blocks[tower.skip :], *tower.head):
            for module in part.modules() if isinstance(part, nn.Module) else ():
                if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                    raise UnsupportedModel(
                        "SkipCLIP: with process_group, batch norms above the cut must use the images of all processes; "
                        f"got {type(module).__name__}. Convert the model with "
                        "torch.nn.SyncBatchNorm.convert_sync_batchnorm, on a GPU, or raise skip_layers."
                    )


def _digests(clip: SkipCLIP) -> list[tuple[str, str]]:
    """Name and digest of what every process must have in common."""
    sampler, model = clip.sampler, clip.model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors = (x.detach() for x in (*model.parameters(), *model.buffers()))
    assert clip._prompts is not None
    values = (
        clip._prompts,
        digest_json([clip.skip_layers, trained]),
        digest_json([sampler.keep_ratio, sampler.max_keep, sampler.decay, sampler.tail]),
        digest_tensors(sorted(sampler.tensors().items())),
        digest_json(digests(tensors)),
    )
    return list(zip(_AGREED, values, strict=True))
