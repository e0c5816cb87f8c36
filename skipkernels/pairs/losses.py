"""Loss of pairs of images and captions, and sigmoid loss of images with several labels, as functions of a SkipCLIP."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..clip import SkipCLIP, SkipOutput, check_clip
from ..clip.texts import PromptEncoder
from .checks import PairLoss, check_pair_loss, check_sigmoid_loss, check_texts
from .chunked import Part, encoded_loss


@torch.compiler.disable  # as SkipCLIP
def pair_loss(
    clip: SkipCLIP,
    pixel_values: Tensor,
    captions: Tensor,
    *,
    loss: PairLoss = "softmax",
    logit_bias: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Contrastive loss [] of pairs of an image and a caption.

    No classes are selected; `label_smoothing` and `class_weight` are refused. A caption is a negative for every
    image of the batch but its own, as in open_clip. See docs/pairs.md; on several processes `parallel.pair_loss`.

    Args:
        clip: SkipCLIP.
        pixel_values: Images [B, 3, height, width], or features at the cut [B, N, W].
        captions: [B] int64, the caption of each image as an index of the `tokens` that SkipCLIP was made with;
            their features at the cut are cached. Or tokens [B, L] of any captions, which run below the cut in each
            call, cropped to the longest. On a GPU both need a host sync, to read the number of tokens. Equal ids are
            encoded once, so that dropout above the cut drops the same values.
        loss: "softmax", the symmetric cross-entropy of CLIP (`functional.contrastive_loss`), or "sigmoid", the
            pairwise sigmoid loss of SigLIP (`functional.pairwise_sigmoid_loss`).
        logit_bias: Bias of the logits of "sigmoid", as in `sigmoid_loss`.
        chunk: Largest number of images or captions in a forward pass above the cut: the loss and the gradients of
            the whole batch, with the activation memory of a chunk. Every chunk is encoded twice, the second time in
            backward. Default: the whole batch at once.

    Example:
        >>> import skipkernels as sk
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> model, _, tokenizer = pictogram_tiny.load()
        >>> captions = tokenizer([f"a small {n}" for n in range(10)])
        >>> clip = sk.SkipCLIP(model, captions, skip_layers=0.5)
        >>> images, ids = torch.rand(4, 3, 32, 32), torch.tensor([3, 0, 9, 1])
        >>> loss = sk.pairs.pair_loss(clip, images, ids)
        >>> torch.allclose(loss, sk.pairs.pair_loss(clip, images, captions[ids]), atol=1e-4)
        True
        >>> torch.allclose(loss, sk.pairs.pair_loss(clip, images, ids, chunk=3), atol=1e-4)
        True
    """
    check_texts("pair_loss", clip)
    bias = check_pair_loss(clip, pixel_values, captions, loss, logit_bias, chunk)
    images, texts = Part(clip.images.encode, pixel_values), captions_part(clip, captions)
    loss_of = functools.partial(_loss_of_pairs, clip, bias)
    return encoded_loss([images, texts], loss_of, [clip.model.logit_scale, bias], clip.parameters(), chunk)


def captions_part(clip: SkipCLIP, captions: Tensor) -> Part:
    """Captions, class ids [n] or tokens [n, L] cropped to the longest, as ids and what encodes these, with gradient."""
    if captions.ndim == 1:
        return Part(clip.texts.encode_repeated, captions.to(clip.texts.device, torch.int64))
    texts = PromptEncoder(clip.texts.tower, captions)
    return Part(texts.encode, texts.class_ids)


def _loss_of_pairs(clip: SkipCLIP, bias: Tensor | float | None, image: Tensor, text: Tensor) -> Tensor:
    """Loss of embeddings [B, D] of images and their captions."""
    if bias is None:
        return functional.contrastive_loss(image, text, clip.scale)
    return functional.pairwise_sigmoid_loss(image, text, clip.scale, bias)


@torch.compiler.disable
def sigmoid_loss(
    clip: SkipCLIP,
    pixel_values: Tensor,
    labels: Tensor,
    *,
    max_labels: int,
    logit_bias: Tensor | float | None = None,
) -> SkipOutput:
    """Binary cross-entropy of each image with each selected class, for any number of labels per image.

        loss = −1/(B·K) · Σ_b Σ_k log σ(±(exp(logit_scale) · ⟨x̂_b, t̂_k⟩ + logit_bias)),  + for labels, else −

    The classes of a step are selected as in `forward`, with all labels of the batch: m is at least
    min(C, B · max_labels). In evaluation mode all classes are compared. The loss of SigLIP (Zhai et al., ICCV 2023,
    arXiv 2303.15343; of pairs: `pair_loss`) is K times this one. `label_smoothing` and `class_weight` are
    refused. On several processes: `parallel.sigmoid_loss`.

    Args:
        clip: SkipCLIP.
        pixel_values: Images [B, 3, height, width], or features at the cut [B, N, W].
        labels: [B, C] bool, integer or floating-point, 1 where an image has a class and 0 elsewhere. An image may
            have no label.
        max_labels: Largest number of labels of an image. On a GPU it is not compared with the labels, which would
            be a host sync: labels beyond it may be left out of the loss.
        logit_bias: Bias of the logits, a number or a tensor of one element that may train; default: that of the
            model, a constant, or 0; see docs/pairs.md.

    Returns:
        SkipOutput: the loss, the logits [B, K] with the bias, the selected classes, and their labels, bool [B, K].

    Example:
        >>> import skipkernels as sk
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> model, _, tokenizer = pictogram_tiny.load()
        >>> tokens = tokenizer([f"the digit {n}." for n in range(10)])
        >>> clip = sk.SkipCLIP(model, tokens, skip_layers=0.5, keep_ratio=0.2)
        >>> labels = torch.zeros(2, 10)
        >>> labels[0, [3, 7]] = labels[1, 3] = 1
        >>> out = sk.pairs.sigmoid_loss(clip, torch.rand(2, 3, 32, 32), labels, max_labels=2, logit_bias=-10.0)
        >>> out.loss.shape, out.class_ids[out.targets[0]].tolist(), out.class_ids[out.targets[1]].tolist()
        (torch.Size([]), [3, 7], [3])
    """
    check_clip("sigmoid_loss", clip)
    if not clip.training:
        return _evaluated_sigmoid_loss(clip, pixel_values, labels, max_labels, logit_bias)
    check_texts("sigmoid_loss", clip)
    bias = check_sigmoid_loss(clip, pixel_values, labels, max_labels, logit_bias)
    image, labels = clip.images.encode(pixel_values), labels != 0  # [B, D], [B, C]
    scores = clip.texts.scores(image, labels)  # [C]
    class_ids, targets = clip.sampler.select(scores, labels, len(labels) * max_labels)  # [K], [B, K]
    text = clip.texts.encode(class_ids)  # [K, D]
    return _binary_cross_entropy(image, text, class_ids, targets, clip.scale, bias)


def _evaluated_sigmoid_loss(
    clip: SkipCLIP, pixel_values: Tensor, labels: Tensor, max_labels: int, logit_bias: Tensor | float | None
) -> SkipOutput:
    """Compare the images with all classes."""
    # Before the checks: on several processes it is a message, for which others would wait after an error of this one.
    text = clip.evaluation_embeddings()  # [C, D]
    bias = check_sigmoid_loss(clip, pixel_values, labels, max_labels, logit_bias)
    class_ids = torch.arange(len(text), device=text.device)
    return _binary_cross_entropy(clip.images.encode(pixel_values), text, class_ids, labels != 0, clip.scale, bias)


def _binary_cross_entropy(
    image: Tensor, text: Tensor, class_ids: Tensor, targets: Tensor, scale: Tensor, bias: Tensor | float
) -> SkipOutput:
    """Loss of images [B, D] over classes [K, D]; targets are bool [B, K]."""
    logits = functional.class_sampled_logits(image, text.to(image.dtype), scale) + bias
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    return SkipOutput(loss, logits, class_ids, targets)
