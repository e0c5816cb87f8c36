"""Contrastive loss of image–caption pairs, with both towers cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from .classes import refuse_loss_options
from .settings import check_vocabulary

if TYPE_CHECKING:
    from .skip_clip import SkipCLIP


def pair_loss(clip: SkipCLIP, x: Tensor, captions: Tensor) -> Tensor:
    """Loss [] of B images and their captions; see `SkipCLIP.pair_loss`."""
    refuse_loss_options("SkipCLIP.pair_loss", clip.label_smoothing, clip.class_weight)
    clip._check_batch(x)
    _check_captions(clip, captions, len(x))
    image = clip._image_encoder.encode(x)
    encoder = clip._text_encoder
    captions = captions.to(image.device, torch.int64)
    text = encoder.encode(captions, exact=True) if captions.ndim == 1 else encoder.encode_tokens(captions)
    return functional.contrastive_loss(image, text, clip.model.logit_scale.exp())


def _check_captions(clip: SkipCLIP, captions: Any, batch_size: int) -> None:
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
    count = len(clip.prototypes)
    if low < 0 or high >= count:
        raise ValueError(
            f"SkipCLIP.pair_loss: captions must be rows of the tokens of SkipCLIP, 0 to {count - 1}; got {low} to "
            f"{high}. Pass tokens [B, L] for other captions."
        )
