"""Checks of the arguments of SkipCLIP. Values of a batch are checked on the CPU only: elsewhere that is a host sync.

A check that other functions share takes the names of function and argument; others name SkipCLIP and their argument.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checks import check_choice, check_device, check_range
from ..options import AttentionName, Memory, Trainable

# ---- construction ----------------------------------------------------------------------------------------------------


def described(value: Any) -> str:
    """Dtype and shape of a tensor, or the type of another value, for messages."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def as_tokens(tokens: Any) -> Tensor:
    """Return tokens as SkipCLIP keeps them, int32 [C, L], or [C, T, L] of T ≥ 2 templates, on the CPU."""
    if (
        not isinstance(tokens, Tensor)
        or tokens.ndim not in (2, 3)
        or tokens.numel() == 0
        or tokens.dtype not in (torch.int64, torch.int32)
    ):
        raise ValueError(
            "SkipCLIP: tokens must be an int64 or int32 tensor [C, L], or [C, T, L] for T templates, with C, T and L ≥ "
            f"1; got {described(tokens)}. Tokenise a prompt of each class with the model's own tokenizer (from "
            "transformers: input_ids)."
        )
    tokens = tokens[:, 0] if tokens.ndim == 3 and tokens.shape[1] == 1 else tokens
    # A copy; ids beyond int32 stay outside of every vocabulary
    of_int32 = torch.iinfo(torch.int32)
    return tokens.clamp(of_int32.min, of_int32.max).to("cpu", torch.int32)


def check_vocabulary(function: str, argument: str, tokens: Tensor, vocabulary: int | None) -> None:
    """Raise if a token id is outside the vocabulary of the model."""
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or (vocabulary is not None and largest >= vocabulary):
        raise ValueError(
            f"{function}: {argument} must be ids in [0, {vocabulary}), the model's vocabulary; got {smallest} to "
            f"{largest}. Use the model's own tokenizer."
        )


def as_label_smoothing(label_smoothing: Any) -> float:
    """Return the label smoothing as a float, or raise if it is not in [0, 1]."""
    number = isinstance(label_smoothing, Real) and not isinstance(label_smoothing, bool)
    if not number or not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"SkipCLIP: label_smoothing must be a number in [0, 1]; got {label_smoothing!r}.")
    return float(label_smoothing)


def as_class_weight(class_weight: Any, prototypes: Tensor, num_classes: int) -> Tensor | None:
    """Return a copy of the weights [C] in the dtype and on the device of the prototypes; None without weights."""
    if class_weight is None:
        return None
    valid = isinstance(class_weight, Tensor) and class_weight.is_floating_point()
    if not valid or class_weight.shape != (num_classes,):
        raise ValueError(
            f"SkipCLIP: class_weight must be a floating-point tensor [C={num_classes}], one per class; got "
            f"{described(class_weight)}."
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


def check_options(*, memory: Any, attention: Any, trainable: Any, chunk: Any) -> None:
    """Raise unless these arguments of SkipCLIP are among their choices, and chunk is a whole number, at least 1."""
    check_choice("SkipCLIP", "memory", memory, Memory)
    check_choice("SkipCLIP", "attention", attention, AttentionName)
    check_choice("SkipCLIP", "trainable", trainable, Trainable)
    if isinstance(chunk, bool) or not isinstance(chunk, Integral) or chunk < 1:
        raise ValueError(f"SkipCLIP: chunk must be a whole number, at least 1; got {chunk!r}.")


def as_pair(skip_layers: Any) -> tuple[Any, Any]:
    """Return `skip_layers` of the image tower and of the text tower."""
    pair = skip_layers if isinstance(skip_layers, tuple) else (skip_layers, skip_layers)
    if len(pair) != 2:
        raise ValueError(f"SkipCLIP: skip_layers must be one number or a pair (image, text); got {skip_layers!r}.")
    return pair


def blocks_to_skip(skip: int | float, depth: int, tower: str) -> int:
    """Number of skipped blocks among the `depth` blocks of a tower: a float up to 1.0 is a share, so 1 is one block.

    >>> blocks_to_skip(0.5, 12, "image"), blocks_to_skip(5, 12, "text")
    (6, 5)
    """
    number = not isinstance(skip, bool) and isinstance(skip, Real)
    is_share = number and not isinstance(skip, Integral) and 0.0 <= skip <= 1.0
    blocks = round(skip * depth) if is_share else skip
    if not (number and 0 <= blocks <= depth and blocks == int(blocks)):
        raise ValueError(
            f"SkipCLIP: skip_layers must be a whole number from 0 to {depth} for the {tower} tower, or a fraction of "
            f"its blocks such as 0.5, or a tuple (image, text) of either; got {skip!r}."
        )
    return int(blocks)


def refuse_inference_mode(what: str) -> None:
    """Raise a RuntimeError under `torch.inference_mode()`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} under torch.inference_mode(): its tensors could not train.")


# ---- a batch ---------------------------------------------------------------------------------------------------------


def check_pixel_values(pixel_values: Any) -> None:
    """Raise unless pixel_values can be images or features: floating point, not empty; on the CPU also finite."""
    if not isinstance(pixel_values, Tensor):
        raise TypeError(
            f"SkipCLIP: pixel_values must be a tensor, images [B, 3, height, width] or features at the cut; got "
            f"{described(pixel_values)}. Stack a list of images with torch.stack."
        )
    if not pixel_values.is_floating_point():
        raise TypeError(
            "SkipCLIP: images must be floating-point, normalised by the model's image transform; got "
            f"{pixel_values.dtype}. Apply the transform, or (images / 255 − mean) / std."
        )
    if pixel_values.ndim < 3 or len(pixel_values) == 0:
        raise ValueError(
            "SkipCLIP: pixel_values must be images [B, 3, height, width] or features at the cut [B, N, W], at least "
            f"one image; got {list(pixel_values.shape)}."
        )
    if pixel_values.device.type == "cpu" and not pixel_values.isfinite().all():
        bad = (~pixel_values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"SkipCLIP: images and features must be finite; NaN or infinity in images {bad} of the batch.")


def check_labels(labels: Any, batch: Tensor, num_classes: int) -> None:
    """Raise unless labels are class ids, int64 [B], or probabilities [B, C], on the device of the batch."""
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"SkipCLIP: labels must be an int64 tensor [B]; got {described(labels)}. Without labels use "
            "clip.predict(pixel_values)."
        )
    soft = labels.is_floating_point() and labels.shape == (len(batch), num_classes)
    if not soft and (labels.shape != (len(batch),) or labels.dtype != torch.int64):
        raise ValueError(
            f"SkipCLIP: labels must be class ids, int64 [B={len(batch)}], or probabilities of the classes, "
            f"floating-point [B={len(batch)}, C={num_classes}]; got {described(labels)}. For several labels per "
            "image use pairs.sigmoid_loss; for one-hot labels pass labels.argmax(dim=1)."
        )
    check_device("SkipCLIP", "labels", labels, ("images", batch))
    if labels.device.type != "cpu":
        return
    if soft:
        _check_probabilities(labels, num_classes)
    else:
        remedy = "Leave images without a class out of the batch; ignore_index is not handled."
        check_range("SkipCLIP", "labels", labels, num_classes, remedy)


def _check_probabilities(labels: Tensor, num_classes: int) -> None:
    sums = labels.detach().double().sum(dim=1)
    # bf16 rounds each of two probabilities by up to 2^-9.
    if not ((labels >= 0).all() and ((sums - 1).abs() < 0.01).all()):
        raise ValueError(
            f"SkipCLIP: labels [B, C={num_classes}] must be probabilities, not negative, that sum to 1 for each image; "
            f"got sums from {sums.min():.3g} to {sums.max():.3g} and values from {labels.min():.3g}. For labels of 0 "
            "and 1 use pairs.sigmoid_loss."
        )


def check_class_ids(class_ids: Any, num_classes: int) -> None:
    """Raise unless class ids are [K], at least one, and in range."""
    valid = isinstance(class_ids, Tensor) and class_ids.dtype in (torch.int64, torch.int32) and class_ids.ndim == 1
    if not valid or len(class_ids) == 0:
        raise ValueError(f"SkipCLIP: class_ids must be int64 or int32 [K], at least one; got {described(class_ids)}.")
    if class_ids.device.type == "cpu":
        check_range("SkipCLIP", "class_ids", class_ids, num_classes, "Encode other texts with the model itself.")


def check_features_at_cut(features: Any, shape: torch.Size) -> None:
    """Raise unless features are [B, …], at least one, those of an image of the given shape."""
    if not isinstance(features, Tensor) or features.shape[1:] != shape or len(features) == 0:
        raise ValueError(
            f"SkipCLIP.encode_upper: features must be features at the cut, [B, {', '.join(map(str, shape))}], at least "
            f"one; got {described(features)}. For images use encode_image."
        )


def check_image_embeddings(image: Any, D: int) -> None:
    """Raise unless image embeddings are [B, D], at least one."""
    expected = f"image embeddings, floating-point [B, D={D}], at least one"
    _check_embeddings("SkipCLIP.loss: image", image, D, expected, "Compute them with clip.encode_image(images).")


def as_class_embeddings(class_embeddings: Any, prototypes: Tensor) -> Tensor:
    """Return class embeddings [C', D] in the dtype of the prototypes, or raise unless they have unit norm."""
    D = prototypes.shape[1]
    expected = f"floating-point [C', D={D}], at least one"
    remedy = "Compute them with clip.class_embeddings(tokens), or pass tokens."
    _check_embeddings("SkipCLIP.predict: class_embeddings", class_embeddings, D, expected, remedy)
    check_device("SkipCLIP.predict", "class_embeddings", class_embeddings, ("prototypes", prototypes))
    norms = class_embeddings.detach().float().norm(dim=1)
    # bf16 rounds each element by up to 2^-9.
    if class_embeddings.device.type == "cpu" and not ((norms - 1).abs() < 0.01).all():
        low, high = norms.aminmax()
        raise ValueError(
            f"SkipCLIP.predict: class_embeddings must have unit norm; got norms from {low:.3g} to {high:.3g}. {remedy}"
        )
    return class_embeddings.to(prototypes.dtype)


def _check_embeddings(name: str, embeddings: Any, D: int, expected: str, remedy: str) -> None:
    valid = isinstance(embeddings, Tensor) and embeddings.is_floating_point()
    if not valid or embeddings.shape[1:] != (D,) or len(embeddings) == 0:
        raise ValueError(f"{name} must be {expected}; got {described(embeddings)}. {remedy}")


def refuse_moved_model(device: torch.device, model_device: torch.device) -> None:
    """Raise a RuntimeError if the model was moved alone, and the tensors of SkipCLIP are still on `device`."""
    if device != model_device:
        raise RuntimeError(
            f"SkipCLIP: the model was moved alone to {model_device}; prompts and prototypes are on {device}. Call "
            "clip.to(device), which moves both, in place of model.to(device)."
        )


def refuse_export() -> None:
    """Raise a RuntimeError while `torch.export` or `torch.jit.trace` runs SkipCLIP."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise RuntimeError(
            "SkipCLIP: neither a step nor an evaluation can be exported or traced. Export the plain module "
            "clip.classifier(), from images to logits."
        )


def refuse_data_parallel() -> NoReturn:
    """Raise a RuntimeError."""
    raise RuntimeError(
        "SkipCLIP: torch.nn.DataParallel copies the module in each step, so draws and cached texts would be lost. "
        "Use DistributedDataParallel, with a process for each GPU (torchrun, accelerate launch), or one GPU "
        "(CUDA_VISIBLE_DEVICES=0)."
    )
