"""SkipCLIP in `transformers.Trainer`: arguments for the trainer. A SkipCLIP is itself a model for it.

Nothing is imported from transformers. A checkpoint holds the state of the sampler, so a resumed run draws the same
classes; `skipkernels[hugging-face]` installs what the trainer needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..clip import SkipCLIP, check_clip
from ..optimizer import FusedSGD


def trainer_arguments(
    clip: SkipCLIP,
    *,
    text_lr: float,
    image_lr: float,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of `Trainer` for a SkipCLIP: optimizer, data collator, and logits [B, C] for `compute_metrics`.

    Args:
        clip: Model of the trainer.
        text_lr: Learning rate of the text tower. `TrainingArguments(learning_rate=)` has no effect.
        image_lr: Learning rate of the image tower.
        optimizer: Class of the optimizer; default SGD.
        options: Further arguments of the optimizer, such as `momentum`. For `FusedSGD`, `in_backward` is False unless
            given: the trainer clips gradients after backward (`max_grad_norm=1.0`), when an update in backward is over.

    Returns:
        dict: `optimizer_cls_and_kwargs`, `data_collator`, `preprocess_logits_for_metrics` and `compute_metrics`
        (`accuracy`), to replace by your own.

    Raises:
        TypeError: If clip is not a SkipCLIP.

    Example:
        >>> import skipkernels as sk
        >>> from skipkernels.experiments import glyph_tiny
        >>> model, _, tokenizer = glyph_tiny.load()
        >>> clip = sk.SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
        >>> sorted(trainer_arguments(clip, text_lr=2e-5, image_lr=5e-6, momentum=0.9))
        ['compute_metrics', 'data_collator', 'optimizer_cls_and_kwargs', 'preprocess_logits_for_metrics']
    """
    if not hasattr(clip, "parameter_groups"):  # bench/trainers passes a plain module with this method
        check_clip("trainer_arguments", clip)
    if optimizer is FusedSGD:
        options.setdefault("in_backward", False)
    return {
        "optimizer_cls_and_kwargs": (optimizer, {"params": _ParameterGroups(clip, text_lr, image_lr), **options}),
        "data_collator": collate,
        "preprocess_logits_for_metrics": class_logits,
        "compute_metrics": accuracy,
    }


class _ParameterGroups:
    """Parameter groups, read when the trainer creates its optimizer, so that they include those of `add_lora`."""

    def __init__(self, clip: SkipCLIP, text_lr: float, image_lr: float):
        self._clip, self._rates = clip, {"text_lr": text_lr, "image_lr": image_lr}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._clip.parameter_groups(**self._rates))


def collate(items: Sequence[tuple[Tensor, int] | dict[str, Any]]) -> dict[str, Tensor]:
    """Stack items of a dataset into the batch {"pixel_values": [B, …], "labels": int64 [B]}.

    Args:
        items: (image, label), or features at the cut instead of the image, such as of a `FeatureCache`; or dictionaries
            with these keys.

    Raises:
        TypeError: If an image is not a tensor, or a label is not one class id.
        ValueError: If a dictionary has other keys.

    Example:
        >>> batch = collate([(torch.zeros(3, 32, 32), 7), (torch.ones(3, 32, 32), 1)])
        >>> batch["pixel_values"].shape, batch["labels"]
        (torch.Size([2, 3, 32, 32]), tensor([7, 1]))
    """
    pairs = [_pair(item) if isinstance(item, dict) else item for item in items]
    images, labels = zip(*pairs, strict=True)
    if not isinstance(images[0], Tensor):
        raise TypeError(
            f"collate: images must be tensors, by the model's image transform; got {type(images[0]).__name__}. Apply "
            "the transform in the dataset."
        )
    if any(isinstance(label, (list, tuple)) or (isinstance(label, Tensor) and label.numel() != 1) for label in labels):
        raise TypeError(
            "collate: labels must be class ids, one whole number for each image; got several for one. For several "
            "labels per image use clip.sigmoid_loss, in a loop of your own."
        )
    return {"pixel_values": torch.stack(images), "labels": torch.tensor([int(label) for label in labels])}


def _pair(item: dict[str, Any]) -> tuple[Any, Any]:
    """Image and label of an item."""
    if not item.keys() >= {"pixel_values", "labels"}:
        raise ValueError(
            f"collate: items must have the keys pixel_values and labels; got {', '.join(map(str, item))}. Rename the "
            "columns of the dataset."
        )
    return item["pixel_values"], item["labels"]


def class_logits(outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the logits [B, C] of the outputs (logits, class ids, targets) of an evaluation step."""
    return outputs[0]


def accuracy(predictions: Any) -> dict[str, float]:
    """Return {"accuracy": …} of an `EvalPrediction` with logits [n, C] and labels [n], both numpy arrays."""
    return {"accuracy": float((predictions.predictions.argmax(axis=1) == predictions.label_ids).mean())}
