"""Digests of the settings and weights that must be equal on all processes; checks of models for several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..store import digest_json, digest_tensors, digests
from ..towers import UnsupportedModel
from ..towers.base import Tower

if TYPE_CHECKING:
    from .base import SkipCLIPBase

# What every process must have in common.
AGREED = (
    "tokens",
    "skip_layers, class_parallel and the trained parameters",
    "options of the selection",
    "generator",
    "label_smoothing and class_weight",
    "weights",
)


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


def digests_of_clip(clip: SkipCLIPBase) -> tuple[str, ...]:
    """Digests of what every process must have in common; refuses models that would differ from one process."""
    if clip._parallel is not None and clip._parallel.size > 1:
        refuse_batch_norms(clip._image)
        refuse_batch_norms(clip._text)
    sampler, model = clip.sampler, clip.model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors = (x.detach() for x in (*model.parameters(), *model.buffers()))
    assert clip._prompts is not None
    weights = [] if clip.class_weight is None else [("class_weight", clip.class_weight)]
    return (
        clip._prompts,
        digest_json([clip.skip_layers, trained, clip._parallel is not None and clip._parallel.replicated]),
        digest_json([sampler.keep_ratio, sampler.max_keep, sampler.decay, sampler.tail, sampler.max_tail]),
        digest_tensors(sorted(sampler.tensors().items())),
        digest_json([clip.label_smoothing, digest_tensors(weights)]),
        digest_json(digests(tensors)),
    )
