"""`pair_loss` and `sigmoid_loss` of a `ShardedSkipCLIP`, over the images of all processes; collective."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import pairs
from ..clip import SkipOutput
from ..clip.step import select_and_encode
from ..pairs.checks import bias_of, check_captions, check_many_labels, pair_bias, refuse_loss_options
from ..pairs.losses import encoded_loss
from .gathers import count_of, filled, gather_rows
from .loss import sharded_binary_cross_entropy, sharded_contrastive_loss, sharded_pairwise_sigmoid_loss
from .own_texts import OwnTexts
from .sharded_clip import ShardedSkipCLIP, check_sharded


@torch.compiler.disable  # as SkipCLIP
def pair_loss(
    clip: ShardedSkipCLIP,
    pixel_values: Tensor,
    captions: Tensor,
    *,
    loss: pairs.PairLoss = "softmax",
    logit_bias: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Contrastive loss [] of the pairs of all processes; see `pairs.pair_loss`.

    Captions of tokens are encoded by the process that has their images, those of ids by the process that owns the
    classes.
    """
    check_sharded("pair_loss", clip)
    count, shards = count_of(pixel_values), clip.shards
    ndim = captions.ndim if isinstance(captions, Tensor) else 0

    def check() -> tuple[Tensor, Tensor, Tensor | float | None]:
        refuse_loss_options("pair_loss", clip)
        bias = pair_bias(clip, loss, logit_bias)
        x, texts = filled(pixel_values, captions)
        if ndim == 2 and texts is not captions:  # a prompt, of which a token can be pooled
            texts = clip.texts.tokens.flatten(0, -2)[:1].to(captions)
        clip.check_inputs(x)
        check_captions(texts, len(x), clip.num_classes, clip.texts.tower.vocabulary)
        return x, texts.to(x.device, torch.int64), bias

    call = f"pair_loss with loss={loss!r} and captions of {ndim} dimensions"
    (pixel_values, captions, bias), sizes = clip.begin(call, count, check)
    if ndim == 2:  # pairs with a caption encoded here, [n]
        pair_ids = torch.arange(count, device=captions.device) + shards.own_rows(sizes).start
    else:
        caption_ids = gather_rows(captions[:count], sizes, shards.group)  # [B]
        pair_ids, own_ids = shards.own_of(caption_ids)  # [n]
        (captions,) = filled(own_ids)

    def loss_of(image: Tensor, text: Tensor) -> Tensor:
        image, scale = gather_rows(image[:count], sizes, shards.group), clip.scale  # [B, D]
        if bias is None:
            return sharded_contrastive_loss(image, text, pair_ids, scale, shards.group)
        return sharded_pairwise_sigmoid_loss(image, text, pair_ids, scale, bias, shards.group)

    return encoded_loss(clip, pixel_values, captions, loss_of, bias, chunk)


@torch.compiler.disable
def sigmoid_loss(
    clip: ShardedSkipCLIP,
    pixel_values: Tensor,
    labels: Tensor,
    *,
    max_labels: int,
    logit_bias: Tensor | float | None = None,
) -> SkipOutput:
    """Binary cross-entropy over the images of all processes, in training without logits; see `pairs.sigmoid_loss`."""
    check_sharded("sigmoid_loss", clip)
    if not clip.training:
        clip.evaluation_embeddings()  # collective: before an error of this process
        return pairs.sigmoid_loss(clip, pixel_values, labels, max_labels=max_labels, logit_bias=logit_bias)
    count, shards = count_of(pixel_values), clip.shards

    def check() -> tuple[Tensor, Tensor, Tensor | float]:
        refuse_loss_options("sigmoid_loss", clip)
        x, y = filled(pixel_values, labels)
        clip.check_inputs(x)
        check_many_labels(y, x, clip.num_classes, max_labels)
        return x, y != 0, bias_of("sigmoid_loss", clip, logit_bias)

    call = f"sigmoid_loss with max_labels={max_labels}"
    (x, labels, bias), sizes = clip.begin(call, count, check, draws=True)
    # 1. The image embeddings of all processes, [B, D]
    image, labels = gather_rows(clip.images.encode(x)[:count], sizes, shards.group), labels[:count]  # [b, C]
    # 2. The same selection on every process, and text embeddings of own selected classes: [K_r, D], [K], [b, K]
    texts = OwnTexts(clip.texts, shards)
    text, class_ids, own_targets = select_and_encode(image, labels, texts, clip.sampler, len(image) * max_labels)
    # 3. The loss over all images
    targets = gather_rows(own_targets.byte(), sizes, shards.group)[:, texts.positions]  # [B, K_r]
    elements, text = len(image) * len(class_ids), text.to(image.dtype)
    loss = sharded_binary_cross_entropy(image, text, targets, bias, clip.scale, elements, shards.group)
    return SkipOutput(loss, None, class_ids, own_targets)
