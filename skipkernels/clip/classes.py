"""Prompts of a task's classes, and options of the loss over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def prompts_of(tokens: Tensor) -> Tensor:
    """Tokens [C, L], or [C, T, L] for several templates, int32 on the CPU."""
    return (tokens[:, 0] if tokens.ndim == 3 and tokens.shape[1] == 1 else tokens).to("cpu", torch.int32)


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
    if not isinstance(class_weight, Tensor) or not class_weight.is_floating_point():
        kind = class_weight.dtype if isinstance(class_weight, Tensor) else type(class_weight).__name__
        raise TypeError(
            f"SkipCLIP: class_weight must be a floating-point tensor [C]; got {kind}. Convert it with torch.tensor and "
            ".float()."
        )
    if class_weight.shape != (num_classes,):
        raise ValueError(
            f"SkipCLIP: class_weight must be [C={num_classes}], one for each class; got {list(class_weight.shape)}."
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


def refuse_loss_options(function: str, label_smoothing: float, class_weight: Tensor | None) -> None:
    """Raise a ValueError if an option of the cross-entropy is set, for another loss."""
    for name, given in (("label_smoothing", label_smoothing > 0), ("class_weight", class_weight is not None)):
        if given:
            raise ValueError(
                f"{function}: {name} of SkipCLIP is an option of the cross-entropy of clip(x, labels), and has no "
                "meaning for this loss. Make SkipCLIP without it."
            )
