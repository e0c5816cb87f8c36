"""The operators as public functions: inputs checked, then handed to the fastest kernel for their device.

Shapes: B images, C classes, K classes kept in this step, D width of the joint embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import FEATURE_DTYPES, check_device, check_dtype, check_shape
from .ops.class_sampled_ce import class_sampled_ce as _class_sampled_ce
from .ops.class_scores import class_scores as _class_scores

__all__ = ["class_sampled_cross_entropy", "class_sampled_logits", "class_scores"]

_REDUCTIONS = ("mean", "sum", "none")


def class_sampled_cross_entropy(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    class_ids: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of images against a sample of the rows of a class bank.

    With z_bk = logit_scale · ⟨x_b/|x_b|, t_k/|t_k|⟩ over the rows k of the bank that take part, y_b the label,
    w the class weights and ε the smoothing:

        loss_b = (1 − ε) · w_y · (lse_b − z_by) + ε/K · Σ_k w_k · (lse_b − z_bk),   lse_b = log Σ_k exp(z_bk)

    The same numbers as `torch.nn.functional.cross_entropy` gives for the gathered logits, but the [B, K] logits are
    never written. Gradients flow to `image`, `text` (to the rows that took part; zero elsewhere) and `logit_scale`.

    Args:
        image: [B, D], image embeddings of any length, in fp32, bf16, fp16 or fp64. A row shorter than 1e-12 is divided
            by 1e-12 instead of its length, as `torch.nn.functional.normalize` does.
        text: [C, D] in the dtype of `image`, the class bank, rows of any length.
        labels: int64 [B], rows of the bank, or `ignore_index`.
        logit_scale: the factor itself, not its logarithm: a number, or a tensor of one element on the device of
            `image` (it is not read by the host).
        class_ids: int64 [K], the rows of the bank that take part, without duplicates; all of them by default.
        class_weight: [C], one weight for each row of the bank; 1 by default. A constant: no gradient flows to it.
        label_smoothing: ε in [0, 1].
        ignore_index: a label that stands for "no label": such an image has no loss and no gradient.
        reduction: "mean" (over the images that are not ignored, weighted by w_y), "sum" or "none".

    Returns:
        The loss: [] for "mean" and "sum", [B] for "none"; fp64 for fp64 features, else fp32.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape, device or option that does not fit. On the CPU also for a label that is no row of the
            bank or not among `class_ids`, for `class_ids` out of range or with duplicates, and for a `logit_scale`
            that is not finite.

    Source: Wu et al., Skip Tuning, arXiv 2412.11509, section 4.3 (class-wise skipping).

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [0.0, 2.0]])           # [B=2, D=2]
        >>> text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # [C=3, D=2]
        >>> labels = torch.tensor([0, 1])
        >>> loss = class_sampled_cross_entropy(image, text, labels, 10.0, class_ids=torch.tensor([0, 1]))
        >>> print(f"{loss:.6f}")
        0.000045
    """
    name = "class_sampled_cross_entropy"
    _check_features(name, image, "text", text)
    _check_ids(name, "labels", labels, image, B=image.shape[0])
    if class_ids is not None:
        _check_ids(name, "class_ids", class_ids, image, K=None)
    if class_weight is not None:
        _check_class_weight(name, class_weight, text)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1]; got {label_smoothing}.")
    if reduction not in _REDUCTIONS:
        raise ValueError(f'{name}: reduction must be "mean", "sum" or "none"; got {reduction!r}.')
    scale = _scale_tensor(name, logit_scale, image)
    return _class_sampled_ce(
        image, text, labels, scale, class_ids, class_weight, label_smoothing, ignore_index, reduction
    )[0]


def class_sampled_logits(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    class_ids: Tensor | None = None,
) -> Tensor:
    """Scaled cosines of images and a sample of the rows of a class bank.

        logits_bk = logit_scale · ⟨x_b/|x_b|, t_k/|t_k|⟩

    Args:
        image: [B, D], image embeddings of any length, in fp32, bf16, fp16 or fp64.
        text: [C, D] in the dtype of `image`, the class bank, rows of any length.
        logit_scale: the factor itself, not its logarithm: a number, or a tensor of one element on the device of
            `image`.
        class_ids: int64 [K], the rows of the bank that take part; all of them by default.

    Returns:
        [B, K] logits: fp64 for fp64 features, else fp32 (at a scale of 100, bf16 logits are half a unit apart).

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape or device that does not fit.

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [0.0, 2.0]])           # [B=2, D=2]
        >>> text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # [C=3, D=2]
        >>> class_sampled_logits(image, text, 10.0, class_ids=torch.tensor([0, 2]))
        tensor([[10.0000,  7.0711],
                [ 0.0000,  7.0711]])
    """
    name = "class_sampled_logits"
    _check_features(name, image, "text", text)
    if class_ids is not None:
        _check_ids(name, "class_ids", class_ids, image, K=None)
    scale = _scale_tensor(name, logit_scale, image)
    with torch.autocast(image.device.type, enabled=False):
        return reference.class_sampled_logits(image, text, scale, class_ids)


def class_scores(image: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Score of every class for a batch: its best cosine with an image; the classes in the batch come first of all.

        score_c = max_b ⟨x_b/|x_b|, p_c⟩,   score_c = +∞ where c is the label of an image

    Not differentiable: it selects.

    Args:
        image: [B, D], image embeddings of any length, B ≥ 1, in fp32, bf16, fp16 or fp64.
        prototypes: [C, D] in the dtype of `image`, one embedding per class, already of unit norm.
        labels: int64 [B], rows of `prototypes`.

    Returns:
        [C] scores: fp64 for fp64 features, else fp32.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape or device that does not fit; on the CPU also for a label that is no row of `prototypes`.

    Source: Wu et al., Skip Tuning, arXiv 2412.11509, section 4.3 (class-wise skipping).

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [3.0, 4.0]])                # [B=2, D=2]
        >>> prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # [C=3, D=2]
        >>> class_scores(image, prototypes, torch.tensor([0, 0]))
        tensor([    inf,  0.8000, -0.6000])
    """
    name = "class_scores"
    _check_features(name, image, "prototypes", prototypes)
    _check_ids(name, "labels", labels, image, B=image.shape[0])
    return _class_scores(image, prototypes, labels)


def _check_features(name: str, image: Tensor, bank_name: str, bank: Tensor) -> None:
    check_shape(name, "image", image, B=None, D=None)
    check_dtype(name, "image", image, FEATURE_DTYPES, "Convert it first.")
    check_shape(name, bank_name, bank, ("image", image), C=None, D=image.shape[1])
    if not torch.is_autocast_enabled(image.device.type):
        check_dtype(name, bank_name, bank, [image.dtype], "Convert one of them: image is in another.")
    check_device(name, bank_name, bank, ("image", image))


def _check_ids(name: str, argument: str, ids: Tensor, image: Tensor, **size: int | None) -> None:
    check_dtype(name, argument, ids, [torch.int64], f"Use {argument}.long().")
    check_shape(name, argument, ids, ("image", image) if all(size.values()) else None, **size)
    check_device(name, argument, ids, ("image", image))


def _check_class_weight(name: str, class_weight: Tensor, text: Tensor) -> None:
    check_shape(name, "class_weight", class_weight, ("text", text), C=text.shape[0])
    check_dtype(name, "class_weight", class_weight, FEATURE_DTYPES, "Use class_weight.float().")
    if class_weight.requires_grad:
        raise ValueError(f"{name}: class_weight is a constant; got one that requires grad. Use class_weight.detach().")
    check_device(name, "class_weight", class_weight, ("text", text))


def _scale_tensor(name: str, logit_scale: Tensor | float, image: Tensor) -> Tensor:
    """The logit scale as a tensor on the device of the images, without the host waiting for it."""
    if not isinstance(logit_scale, Tensor):
        dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        return torch.full((), logit_scale, dtype=dtype, device=image.device)
    if logit_scale.numel() != 1 or logit_scale.dim() > 1:
        raise ValueError(f"{name}: logit_scale must be a number, [] or [1]; got {list(logit_scale.shape)}.")
    check_dtype(name, "logit_scale", logit_scale, FEATURE_DTYPES, "Use logit_scale.float().")
    check_device(name, "logit_scale", logit_scale, ("image", image))
    return logit_scale
