"""SkipCLIP in `transformers.Trainer`: arguments for the trainer. A SkipCLIP is itself a model for it.

Nothing is imported from transformers. A checkpoint holds the state of the sampler, so a resumed run draws the same
classes; `skipkernels[hugging-face]` installs what the trainer needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import whole_number
from ..clip import check_clip
from ..optimizer import FusedSGD


def trainer_arguments(
    args: Any,
    *,
    text_lr: float,
    image_lr: float,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of `Trainer` for a SkipCLIP: optimizer, data collator, and logits [B, C] for `compute_metrics`.

    The trainer creates the optimizer from its own model, so one result serves several trainers, and `model_init`.

    Args:
        args: `TrainingArguments` of the trainer. `learning_rate` and `optim` have no effect. A `weight_decay` that is
            not 0 applies to every parameter that trains, norms and biases too; it excludes the option `weight_decay`.
        text_lr: Learning rate of the text tower.
        image_lr: Learning rate of the image tower.
        optimizer: Class of the optimizer; default SGD.
        options: Further arguments of the optimizer, such as `momentum`. For `FusedSGD`, `in_backward` is False unless
            given: the trainer clips gradients after backward (`max_grad_norm=1.0`), when an update in backward is over.

    Returns:
        dict: `args`, `optimizer_cls_and_kwargs`, `data_collator`, `preprocess_logits_for_metrics` and
        `compute_metrics` (`accuracy`), to replace by your own.

    Raises:
        TypeError: If args are not `TrainingArguments`; in training, if the model of the trainer is not a SkipCLIP.

    Example:
        >>> from transformers import TrainingArguments
        >>> ours = trainer_arguments(TrainingArguments("runs/trainer"), text_lr=2e-5, image_lr=5e-6, momentum=0.9)
        >>> sorted(ours)
        ['args', 'compute_metrics', 'data_collator', 'optimizer_cls_and_kwargs', 'preprocess_logits_for_metrics']
    """
    if not hasattr(args, "weight_decay"):
        raise TypeError(
            f"trainer_arguments: args must be transformers.TrainingArguments; got {type(args).__name__}. Pass the "
            "model to Trainer only."
        )
    if optimizer is FusedSGD:
        options.setdefault("in_backward", False)

    def make_optimizer(model: Any) -> torch.optim.Optimizer:
        if not hasattr(model, "parameter_groups"):  # bench/trainers passes a plain module with this method
            check_clip("trainer_arguments", model)
        decay = {"weight_decay": args.weight_decay} if args.weight_decay else {}
        return optimizer(model.parameter_groups(text_lr=text_lr, image_lr=image_lr), **options, **decay)

    return {
        "args": args,
        "optimizer_cls_and_kwargs": (lambda: make_optimizer, {}),  # no class: the trainer calls it with its model
        "data_collator": collate,
        "preprocess_logits_for_metrics": class_logits,
        "compute_metrics": accuracy,
    }


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
    class_ids = list(map(whole_number, labels))
    if None in class_ids:
        raise TypeError(
            "collate: labels must be class ids, one whole number for each image; got "
            f"{labels[class_ids.index(None)]!r:.80}. For several labels per image use clip.sigmoid_loss, in a loop of "
            "your own."
        )
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(class_ids)}


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
