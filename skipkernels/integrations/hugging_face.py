"""Arguments of `transformers.Trainer` for training a SkipCLIP, which is passed to it as the model.

Nothing is imported from transformers; `skipkernels[hugging-face]` installs it. The `state_dict` of a SkipCLIP contains
the state of its class sampler, so a run that is resumed from a checkpoint of the trainer draws the same classes.
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

    The optimizer is created by the trainer, for its own model. The result can be passed to several trainers, also with
    `model_init`.

    Args:
        args: `TrainingArguments` of the trainer. `learning_rate` and `optim` have no effect. A `weight_decay` that is
            not 0 applies to all trainable parameters, including norms and biases; do not pass it in `options` too.
        text_lr: Learning rate of the text tower.
        image_lr: Learning rate of the image tower.
        optimizer: Class of the optimizer; default SGD.
        options: Further arguments of the optimizer, such as `momentum`. For `FusedSGD`, `in_backward` defaults to
            False: the trainer clips gradients after backward (`max_grad_norm=1.0`), which updates in backward exclude.

    Example:
        >>> from transformers import TrainingArguments
        >>> arguments = trainer_arguments(TrainingArguments("runs"), text_lr=2e-5, image_lr=5e-6, momentum=0.9)
        >>> sorted(arguments)
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
        # A factory instead of a class: the trainer calls it, then its result with the model.
        "optimizer_cls_and_kwargs": (lambda: make_optimizer, {}),
        "data_collator": collate,
        "preprocess_logits_for_metrics": class_logits,
        "compute_metrics": accuracy,
    }


def collate(items: Sequence[tuple[Tensor, int] | dict[str, Any]]) -> dict[str, Tensor]:
    """Stack items of a dataset into the batch {"pixel_values": [B, …], "labels": int64 [B]}.

    Args:
        items: Pairs (image, label), or dictionaries with these keys. Features at the cut, such as those of a
            `FeatureCache`, may replace the image.

    Example:
        >>> batch = collate([(torch.zeros(3, 32, 32), 7), (torch.ones(3, 32, 32), 1)])
        >>> batch["pixel_values"].shape, batch["labels"]
        (torch.Size([2, 3, 32, 32]), tensor([7, 1]))
    """
    if isinstance(items[0], dict) and not items[0].keys() >= {"pixel_values", "labels"}:
        raise ValueError(
            f"collate: items must have the keys pixel_values and labels; got {', '.join(map(str, items[0]))}. Rename "
            "the columns of the dataset."
        )
    pairs = [(item["pixel_values"], item["labels"]) if isinstance(item, dict) else item for item in items]
    images, labels = zip(*pairs, strict=True)
    if not isinstance(images[0], Tensor):
        raise TypeError(
            "collate: images must be tensors, as the model's image transform returns; got "
            f"{type(images[0]).__name__}. Apply the transform in the dataset."
        )
    class_ids = list(map(whole_number, labels))
    if None in class_ids:
        raise TypeError(
            "collate: labels must be class ids, one whole number for each image; got "
            f"{labels[class_ids.index(None)]!r:.80}. For several labels per image, use clip.sigmoid_loss in your "
            "own training loop."
        )
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(class_ids)}


def class_logits(outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the logits [B, C] from the outputs (logits, class ids, targets) of an evaluation step."""
    return outputs[0]


def accuracy(predictions: Any) -> dict[str, float]:
    """Return {"accuracy": …} of an `EvalPrediction` with logits [n, C] and labels [n], both numpy arrays."""
    return {"accuracy": float((predictions.predictions.argmax(axis=1) == predictions.label_ids).mean())}
