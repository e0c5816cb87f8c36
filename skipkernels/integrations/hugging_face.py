"""Arguments of `transformers.Trainer` for training a SkipCLIP, which is passed to it as the model.

Nothing is imported from transformers; `skipkernels[hugging-face]` installs it. The `state_dict` of a SkipCLIP contains
the state of its class sampler, so a run that is resumed from a checkpoint of the trainer draws the same classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..clip import SkipCLIP, check_clip
from ..labels import whole_number
from ..optimizer import FusedSGD


def trainer_arguments(
    args: Any,
    *,
    text_lr: float,
    image_lr: float,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of `Trainer` for a SkipCLIP: optimizer, data collator, predictions and their accuracy.

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


def collate(items: Sequence[Tensor | tuple[Tensor, int] | dict[str, Any]]) -> dict[str, Tensor]:
    """Stack items of a dataset into the batch {"pixel_values": [B, …], "labels": int64 [B]}.

    Args:
        items: Pairs (image, label), or dictionaries with these keys. Features at the cut, such as those of a
            `FeatureCache`, may replace the image. Or images alone, for a `Predictor`: the batch has no labels.

    Example:
        >>> batch = collate([(torch.zeros(3, 32, 32), 7), (torch.ones(3, 32, 32), 1)])
        >>> batch["pixel_values"].shape, batch["labels"]
        (torch.Size([2, 3, 32, 32]), tensor([7, 1]))
    """
    if isinstance(items[0], dict) and "pixel_values" not in items[0]:
        raise ValueError(
            "collate: items must have the keys pixel_values and, except for prediction, labels; got "
            f"{', '.join(map(str, items[0]))}. Rename the columns of the dataset."
        )
    pairs = [_image_and_label(item) for item in items]
    images, labels = zip(*pairs, strict=True)
    if not isinstance(images[0], Tensor):
        raise TypeError(
            "collate: images must be tensors, as the model's image transform returns; got "
            f"{type(images[0]).__name__}. Apply the transform in the dataset."
        )
    batch = {"pixel_values": torch.stack(images)}
    if all(label is None for label in labels):
        return batch
    class_ids = list(map(whole_number, labels))
    if None in class_ids:
        raise TypeError(
            "collate: labels must be class ids, one whole number for each image; got "
            f"{labels[class_ids.index(None)]!r:.80}. For several labels per image, use pairs.sigmoid_loss in your "
            "own training loop."
        )
    return batch | {"labels": torch.tensor(class_ids)}


def _image_and_label(item: Any) -> tuple[Any, Any]:
    """Return the image and the label of an item of a dataset; None for an item without label."""
    if isinstance(item, dict):
        return item["pixel_values"], item.get("labels")
    return (item, None) if isinstance(item, Tensor) else item


class Predictor(nn.Module):
    """Model for `Trainer.predict` of images without labels: its output is {"logits": [B, C]} of a SkipCLIP.

    Example:
        >>> import skipkernels as sk
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> from transformers import Trainer, TrainingArguments
        >>> model, _, tokenizer = pictogram_tiny.load()
        >>> clip = sk.SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
        >>> args = TrainingArguments("runs", use_cpu=True, disable_tqdm=True)
        >>> Trainer(Predictor(clip), args, data_collator=collate).predict(torch.rand(5, 3, 32, 32)).predictions.shape
        (5, 10)
    """

    main_input_name = "pixel_values"  # in `include_for_metrics=["inputs"]` of the trainer

    def __init__(self, clip: SkipCLIP):
        super().__init__()
        check_clip("Predictor", clip)
        self.clip = clip

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Logits over all classes of images, or of features at the cut."""
        return {"logits": self.clip.predict(pixel_values)}


def class_logits(outputs: tuple[Tensor, ...] | Tensor, labels: Tensor | None) -> Tensor:
    """Return the logits [B, C] from the outputs (logits, class ids, targets) of an evaluation step."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def accuracy(predictions: Any) -> dict[str, float]:
    """Return {"accuracy": …} of an `EvalPrediction` with logits [n, C] and labels [n]."""
    return {"accuracy": float((predictions.predictions.argmax(axis=1) == predictions.label_ids).mean())}
