"""`pair_loss` and `sigmoid_loss` of a `ShardedSkipCLIP`, over the images of all processes; collective."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import pairs
from ..clip import SkipOutput
from ..pairs.checks import check_pair_loss, check_sigmoid_loss
from ..pairs.chunked import Part, encoded_loss
from ..pairs.losses import captions_part
from .checks import announced_errors, gather_sizes
from .gathers import filled, gather_rows, own_rows
from .loss import sharded_binary_cross_entropy, sharded_contrastive_loss, sharded_pairwise_sigmoid_loss
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
    # 1. Images and captions of this process; if it has none, an image and a caption that are not used
    with announced_errors(clip):
        x, given = filled(pixel_values, captions)
        if given is not captions and captions.ndim == 2:
            given = clip.texts.tokens.flatten(0, -2)[:1].to(captions)  # a prompt, of which a token can be pooled
        bias = check_pair_loss(clip, x, given, loss, logit_bias, chunk)
        texts = captions_part(clip, given)
    # 2. Captions that this process encodes, and their positions [n] among the pairs of all processes
    call = f"pair_loss with loss={loss!r}, logit_bias={_value(bias)} and captions of {captions.ndim} dimensions"
    count, group = len(pixel_values), clip.process_group
    sizes = gather_sizes(clip, call, count)
    if captions.ndim == 2:
        rows = own_rows(sizes, group)
        positions = torch.arange(rows.start, rows.stop, device=x.device)
    else:
        positions, own_ids = clip.shards.find_own(gather_rows(texts.batch[:count], sizes, group))
        texts = texts._replace(batch=filled(own_ids)[0])

    # 3. The loss over all pairs
    def loss_of(image: Tensor, text: Tensor) -> Tensor:
        image, scale = gather_rows(image[:count], sizes, group), clip.scale  # [B, D]
        if bias is None:
            return sharded_contrastive_loss(image, text, positions, scale, group)
        return sharded_pairwise_sigmoid_loss(image, text, positions, scale, bias, group)

    images = Part(clip.images.encode, x)
    return encoded_loss([images, texts], loss_of, [clip.model.logit_scale, bias], clip.parameters(), chunk)


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
        return pairs.sigmoid_loss(clip, pixel_values, labels, max_labels=max_labels, logit_bias=logit_bias)
    with announced_errors(clip):
        x, y = filled(pixel_values, labels)
        bias = check_sigmoid_loss(clip, x, y, max_labels, logit_bias)
    call = f"sigmoid_loss with max_labels={max_labels} and logit_bias={_value(bias)}"
    sizes, group = gather_sizes(clip, call, len(pixel_values), draws=True), clip.process_group
    # 1. The image embeddings of all processes, [B, D], and the labels of this one, [b, C]
    image, labels = gather_rows(clip.images.encode(x)[: len(pixel_values)], sizes, group), labels != 0
    # 2. The same selection on every process, and text embeddings of own selected classes: [K_r, D], [K], [b, K], [K_r]
    text, class_ids, own_targets, positions = clip.select_and_encode_own(image, labels, len(image) * max_labels)
    # 3. The loss over all images
    targets = gather_rows(own_targets.byte(), sizes, group)[:, positions]  # [B, K_r]
    elements, text = len(image) * len(class_ids), text.to(image.dtype)
    loss = sharded_binary_cross_entropy(image, text, targets, clip.scale, bias, elements, group)
    return SkipOutput(loss, None, class_ids, own_targets)


def _value(bias: Tensor | float | None) -> float | None:
    """Value of a bias, which processes compare; on a GPU a host sync."""
    return float(bias.detach()) if isinstance(bias, Tensor) else bias
