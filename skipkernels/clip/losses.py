"""Losses of SkipCLIP besides the cross-entropy: pairs and several labels; checks of labels."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..checks import check_device
from .base import SkipCLIPBase, SkipOutput, uncompiled
from .text import check_range, check_vocabulary

PairLoss = Literal["softmax", "sigmoid"]


class Losses(SkipCLIPBase):
    """Base of `SkipCLIP`: its loss of pairs and its sigmoid loss of several labels."""

    @uncompiled
    def pair_loss(
        self,
        x: Tensor,
        captions: Tensor,
        *,
        loss: PairLoss = "softmax",
        logit_bias: Tensor | float | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Contrastive loss [] of pairs of an image and a caption.

        No classes are selected; `label_smoothing` and `class_weight` are refused. A caption is a negative for every
        image of the batch but its own, as in open_clip; with `process_group`, of all processes. See docs/pairs.md.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            captions: [B] int64, the caption of each image as an index of the `tokens` that SkipCLIP was made with;
                their features at the cut are cached. Or tokens [B, L] of any captions, which run below the cut in each
                call, cropped to the longest. On a GPU both need a host sync, to read the number of tokens.
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
            >>> loss = clip.pair_loss(images, ids)
            >>> torch.allclose(loss, clip.pair_loss(images, captions[ids]), atol=1e-4)
            True
            >>> torch.allclose(loss, clip.pair_loss(images, ids, chunk=3), atol=1e-4)
            True
        """
        distributed, pairs = self._parallel is not None, 0
        if distributed:
            from .sharded import padded, sharded_pairs

            tokens = isinstance(captions, Tensor) and captions.ndim > 1
            x, captions, pairs = padded(x, captions, self._tokens.flatten(0, -2)[0] if tokens else None)
        self._refuse_loss_options("pair_loss")
        bias = self._pair_bias(loss, logit_bias)
        self._check_batch(x)
        _check_captions(captions, len(x), self._num_classes, self._text.vocabulary)
        if chunk is not None:
            from .chunked import Part, check_chunk, chunked_loss

            check_chunk(chunk, x, (self._image, self._text))
        captions = captions.to(x.device, torch.int64)
        if distributed:
            captions, loss_of = sharded_pairs(self, captions, pairs, loss, bias, x.device)
        else:
            loss_of = functools.partial(self._loss_of_pairs, bias)
        encoder = self._text_encoder
        encode_text = functools.partial(encoder.encode, exact=True) if captions.ndim == 1 else encoder.encode_tokens
        if chunk is None:
            return loss_of(self._image_encoder.encode(x), encode_text(captions))
        parts = Part(self._image_encoder.encode, x), Part(encode_text, captions)
        numbers = [self.model.logit_scale, *([bias] if isinstance(bias, Tensor) else [])]
        return chunked_loss(parts, loss_of, numbers, self.parameters(), chunk)

    def _pair_bias(self, loss: str, logit_bias: Any) -> Tensor | float | None:
        """Bias of the logits of the pairwise sigmoid loss, None for the softmax loss."""
        if loss not in get_args(PairLoss):
            raise ValueError(f"SkipCLIP.pair_loss: loss must be one of {', '.join(get_args(PairLoss))}; got {loss!r}.")
        if loss == "sigmoid":
            return self._bias("pair_loss", logit_bias)
        if logit_bias is not None:
            raise ValueError('SkipCLIP.pair_loss: logit_bias is for loss="sigmoid"; a softmax does not depend on it.')
        return None

    def _loss_of_pairs(self, bias: Tensor | float | None, image: Tensor, text: Tensor) -> Tensor:
        """Loss of embeddings [B, D] of images and their captions."""
        scale = self.model.logit_scale.exp()
        if bias is None:
            return functional.contrastive_loss(image, text, scale)
        return functional.pairwise_sigmoid_loss(image, text, scale, bias)

    @uncompiled
    def sigmoid_loss(
        self, x: Tensor, labels: Tensor, *, max_labels: int, logit_bias: Tensor | float | None = None
    ) -> SkipOutput:
        """Binary cross-entropy of each image with each selected class, for any number of labels per image.

            loss = −1/(B·K) · Σ_b Σ_k log σ(±(exp(logit_scale) · ⟨x̂_b, t̂_k⟩ + logit_bias)),  + for labels, else −

        The classes of a step are selected as in `forward`, with all labels of the batch: m is at least
        min(C, B · max_labels). In evaluation mode all classes are compared. The loss of SigLIP (Zhai et al., ICCV 2023,
        arXiv 2303.15343; of pairs: `pair_loss`) is K times this one. With `process_group` a training step is
        collective, without logits. `label_smoothing` and `class_weight` are refused.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
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
            >>> out = clip.sigmoid_loss(torch.rand(2, 3, 32, 32), labels, max_labels=2, logit_bias=-10.0)
            >>> out.loss.shape, out.class_ids[out.targets[0]].tolist(), out.class_ids[out.targets[1]].tolist()
            (torch.Size([]), [3, 7], [3])
        """
        distributed = self._parallel is not None and self.training
        if distributed:
            from .sharded import padded, sharded_sigmoid_loss

            x, labels, images = padded(x, labels)
        self._refuse_loss_options("sigmoid_loss")
        self._check_batch(x)
        _check_many_labels(labels, x, self._num_classes, max_labels)
        bias = self._bias("sigmoid_loss", logit_bias)
        if self.training:
            self._check_draw(len(x) * max_labels)
        image, labels = self._image_encoder.encode(x), labels != 0  # [B, D], [B, C]
        if distributed:
            return sharded_sigmoid_loss(self, image[:images], labels[:images], max_labels, bias)
        if self.training:
            class_ids = self._select_with(image, labels.any(dim=0), len(image) * max_labels)  # [K]
            text = self._encode_classes(class_ids, image.dtype)  # [K, D]
        else:
            class_ids = torch.arange(self._num_classes, device=image.device)
            text = self._embeddings_of_all(image)
        logits = functional.class_sampled_logits(image, text, self.model.logit_scale.exp()) + bias
        targets = labels.index_select(1, class_ids)  # [B, K]
        loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
        return SkipOutput(loss, logits, class_ids, targets)

    def _bias(self, function: str, logit_bias: Any) -> Tensor | float:
        """Bias of the logits, by default that of the model."""
        if logit_bias is None:
            bias = getattr(self.model, "logit_bias", None)
            logit_bias = 0.0 if bias is None else bias
        if isinstance(logit_bias, Tensor) and logit_bias.numel() == 1:
            return logit_bias.reshape(())  # that of transformers has one dimension
        if not isinstance(logit_bias, (int, float)):
            found = list(logit_bias.shape) if isinstance(logit_bias, Tensor) else repr(logit_bias)
            raise ValueError(
                f"SkipCLIP.{function}: logit_bias must be a number or a tensor of one element; got {found}."
            )
        return logit_bias

    def _refuse_loss_options(self, function: str) -> None:
        """Raise a ValueError if an option of the cross-entropy is set, for another loss."""
        options = {"label_smoothing": self.label_smoothing > 0, "class_weight": self.class_weight is not None}
        for name, given in options.items():
            if given:
                raise ValueError(
                    f"SkipCLIP.{function}: {name} of SkipCLIP is an option of the cross-entropy of clip(x, labels), "
                    "and has no meaning for this loss. Make SkipCLIP without it."
                )


# ---- checks of arguments. Values of a batch are checked on the CPU only: on a GPU each check would be a host sync


def check_labels(labels: Any, x: Tensor, classes: int) -> None:
    """Raise unless labels are class ids, int64 [B], or probabilities [B, C], on the device of x."""
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"SkipCLIP: labels must be an int64 tensor [B]; got {type(labels).__name__}. Without labels use "
            "clip.predict(x)."
        )
    soft = labels.is_floating_point() and labels.shape == (len(x), classes)
    if not soft and (labels.shape != (len(x),) or labels.dtype != torch.int64):
        raise ValueError(
            f"SkipCLIP: labels must be class ids, int64 [B={len(x)}], or probabilities of the classes, floating-point "
            f"[B={len(x)}, C={classes}]; got {labels.dtype} {list(labels.shape)}. For several labels per image use "
            "clip.sigmoid_loss; for one-hot labels pass labels.argmax(dim=1)."
        )
    check_device("SkipCLIP", "labels", labels, ("x", x))
    if labels.device.type == "cpu":
        check_values = _check_probabilities if soft else _check_label_range
        check_values(labels, classes)


def _check_label_range(labels: Tensor, classes: int) -> None:
    remedy = "Leave images without a class out of the batch; ignore_index is not handled."
    check_range("SkipCLIP", "labels", labels, classes, remedy)


def _check_probabilities(labels: Tensor, classes: int) -> None:
    sums = labels.detach().double().sum(dim=1)
    # bf16 rounds each of two probabilities by up to 2^-9.
    if not ((labels >= 0).all() and ((sums - 1).abs() < 0.01).all()):
        raise ValueError(
            f"SkipCLIP: labels [B, C={classes}] must be probabilities, not negative, that sum to 1 for each image; got "
            f"sums from {sums.min():.3g} to {sums.max():.3g} and values from {labels.min():.3g}. For labels of 0 and 1 "
            "use clip.sigmoid_loss."
        )


def _check_many_labels(labels: Any, x: Tensor, classes: int, max_labels: int) -> None:
    """Raise unless labels are [B, C] of 0 and 1, with at most `max_labels` per image."""
    name, shape = "SkipCLIP.sigmoid_loss", (len(x), classes)
    if not isinstance(max_labels, int) or max_labels < 1:
        raise ValueError(f"{name}: max_labels must be a whole number, at least 1; got {max_labels!r}.")
    if not isinstance(labels, Tensor) or labels.shape != shape or labels.is_complex():
        found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"{name}: labels must be a tensor [B={shape[0]}, C={classes}], 1 where an image has a class; got {found}. "
            "For one class id per image call clip(x, labels)."
        )
    check_device(name, "labels", labels, ("x", x))
    if labels.device.type == "cpu":
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError(f"{name}: labels must be 0 or 1; got {labels.min().item()} to {labels.max().item()}.")
        most = int(labels.count_nonzero(dim=1).max())
        if most > max_labels:
            raise ValueError(f"{name}: max_labels must be at least {most}, the labels of an image; got {max_labels}.")


def _check_captions(captions: Any, batch_size: int, classes: int, vocabulary: int | None) -> None:
    """Raise unless captions are ids [B] or tokens [B, L]."""
    is_tensor = isinstance(captions, Tensor)
    valid = is_tensor and captions.dtype in (torch.int64, torch.int32) and captions.ndim in (1, 2)
    if not valid or len(captions) != batch_size or captions.numel() == 0:
        found = f"{captions.dtype} {list(captions.shape)}" if is_tensor else type(captions).__name__
        raise ValueError(
            f"SkipCLIP.pair_loss: captions must be int64, ids [B={batch_size}] or tokens [B={batch_size}, L], one "
            f"caption for each image; got {found}. Tokenise texts with the model's own tokenizer."
        )
    if captions.device.type == "cpu" and captions.ndim == 2:
        check_vocabulary(captions, vocabulary, "SkipCLIP.pair_loss: captions")
    elif captions.device.type == "cpu":
        remedy = "Ids are rows of the tokens of SkipCLIP. Pass tokens [B, L] for other captions."
        check_range("SkipCLIP.pair_loss", "captions", captions, classes, remedy)


def check_label_smoothing(label_smoothing: Any) -> float:
    """Return the label smoothing as a float, or raise if it is not in [0, 1]."""
    number = isinstance(label_smoothing, (int, float)) and not isinstance(label_smoothing, bool)
    if not number or not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"SkipCLIP: label_smoothing must be a number in [0, 1]; got {label_smoothing!r}.")
    return float(label_smoothing)


def check_class_weight(class_weight: Any, prototypes: Tensor, num_classes: int) -> Tensor | None:
    """Return a copy of the weights [C] in the dtype and on the device of the prototypes; None without weights."""
    if class_weight is None:
        return None
    is_tensor = isinstance(class_weight, Tensor)
    if not is_tensor or class_weight.shape != (num_classes,) or not class_weight.is_floating_point():
        found = f"{class_weight.dtype} {list(class_weight.shape)}" if is_tensor else type(class_weight).__name__
        raise ValueError(
            f"SkipCLIP: class_weight must be a floating-point tensor [C={num_classes}], one per class; got {found}."
        )
    if class_weight.requires_grad:
        raise ValueError("SkipCLIP: class_weight is a constant; got one that requires grad. Use class_weight.detach().")
    bad = ~(class_weight.isfinite() & (class_weight >= 0))
    if bad.any():
        raise ValueError(
            "SkipCLIP: class_weight must be finite and not negative; got "
            f"{class_weight[bad][0].item()} for class {int(bad.nonzero()[0])}."
        )
    return class_weight.to(prototypes.device, prototypes.dtype, copy=True)
