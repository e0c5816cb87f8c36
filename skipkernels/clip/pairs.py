"""Contrastive loss of image–caption pairs, with both towers cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from ..parallel import ClassParallel, gather_rows, sharded_contrastive_loss
from .classes import refuse_loss_options
from .settings import check_vocabulary
from .sharded_step import at_least_one, padded, sizes_of

if TYPE_CHECKING:
    from .training import Training


def pair_loss(clip: Training, x: Tensor, captions: Tensor) -> Tensor:
    """Loss [] of B images and their captions; see `SkipCLIP.pair_loss`."""
    if clip._parallel is not None:
        return _sharded_pair_loss(clip, clip._parallel, x, captions)
    _check(clip, x, captions)
    image = clip._image_encoder.encode(x)
    encoder = clip._text_encoder
    captions = captions.to(image.device, torch.int64)
    text = encoder.encode(captions, exact=True) if captions.ndim == 1 else encoder.encode_tokens(captions)
    return functional.contrastive_loss(image, text, clip.model.logit_scale.exp())


def _sharded_pair_loss(clip: Training, parallel: ClassParallel, x: Tensor, captions: Tensor) -> Tensor:
    """Loss [] of all pairs; collective. A process encodes the captions of its images or, of ids, those that it owns."""
    prompt = clip._tokens.flatten(0, -2)[0]
    x, captions, pairs = padded(x, captions, prompt if isinstance(captions, Tensor) and captions.ndim > 1 else None)
    _check(clip, x, captions)
    own_image = clip._image_encoder.encode(x)[:pairs]
    captions = captions.to(x.device, torch.int64)
    sizes, own = sizes_of(parallel, pairs, f"pair_loss with captions of {captions.ndim} dimensions", x.device)
    image = gather_rows(own_image, sizes, parallel.group)
    numbers = torch.arange(len(image), device=x.device)[own]
    encoder = clip._text_encoder
    if captions.ndim == 2:
        text = encoder.encode_tokens(captions)
    elif parallel.replicated:
        text = encoder.encode(captions, exact=True)
    else:
        every = gather_rows(captions[:pairs], sizes, parallel.group)
        numbers = (every % parallel.size == parallel.rank).nonzero().flatten()
        text = encoder.encode(at_least_one(parallel.ids_of_held(every[numbers])), exact=True)
    return sharded_contrastive_loss(image, text, numbers, clip.model.logit_scale.exp(), parallel.group)


def _check(clip: Training, x: Any, captions: Any) -> None:
    refuse_loss_options("SkipCLIP.pair_loss", clip.label_smoothing, clip.class_weight)
    clip._check_batch(x)
    _check_captions(clip, captions, len(x))


def _check_captions(clip: Training, captions: Any, batch_size: int) -> None:
    """Raise unless captions are ids [B] or tokens [B, L]; their values are checked on the CPU only."""
    if not isinstance(captions, Tensor):
        raise TypeError(
            "SkipCLIP.pair_loss: captions must be a tensor, ids [B] or tokens [B, L]; got "
            f"{type(captions).__name__}. Tokenise texts with the model's own tokenizer."
        )
    if captions.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"SkipCLIP.pair_loss: captions must be int64, ids [B] or tokens [B, L]; got {captions.dtype}. Use "
            "captions.long()."
        )
    if captions.ndim not in (1, 2) or len(captions) != batch_size or captions.numel() == 0:
        raise ValueError(
            f"SkipCLIP.pair_loss: captions must be ids [B={batch_size}] or tokens [B={batch_size}, L], one caption for "
            f"each image; got {list(captions.shape)}. Draw one of several captions of an image."
        )
    if captions.device.type != "cpu":
        return
    if captions.ndim == 2:
        check_vocabulary(captions, clip._text.vocabulary)
        return
    low, high = (int(x) for x in torch.aminmax(captions))
    count = clip._num_classes
    if low < 0 or high >= count:
        raise ValueError(
            f"SkipCLIP.pair_loss: captions must be rows of the tokens of SkipCLIP, 0 to {count - 1}; got {low} to "
            f"{high}. Pass tokens [B, L] for other captions."
        )
