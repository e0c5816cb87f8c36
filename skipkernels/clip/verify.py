"""Comparison of both encoders with the model itself, at construction and `refresh`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, raise_if_above
from ..towers import deterministic_training, evaluating
from ..towers.block import unfused
from ..towers.text import representative_classes
from .images import ImageEncoder
from .texts import ClassTexts

_HALF = (torch.float16, torch.bfloat16)


class _Pair(NamedTuple):
    """The same embeddings, computed by the caller's model and by SkipCLIP."""

    inputs: str  # Name of the inputs, for messages
    reference: Callable[[], Tensor]  # Returns the embeddings [n, D] of the caller's model, normalised or not
    actual: Callable[[], Tensor]  # Returns the embeddings [n, D] of SkipCLIP
    parameters: list[nn.Parameter]


def verify(model: nn.Module, images: ImageEncoder, texts: ClassTexts, tokens: Tensor) -> None:
    """Compare embeddings and gradients of a random image and a few classes with those of the model, in both modes.

    The model runs with its own blocks. Sets `images.features`. `tokens` [C, L], or [C, T, L], are the prompts before
    cropping.
    """
    image_tower, text_tower, device = images.tower, texts.tower, texts.device
    image = torch.randn(1, 3, *image_tower.image_size, generator=torch.Generator().manual_seed(0)).to(device)
    text_parameters = list(text_tower.upper_parameters())
    # Cached features are rounded to half precision, unlike those of the model in this comparison.
    cached = all(torch.finfo(parameter.dtype).bits >= 32 for parameter in text_parameters)

    def pair_of_group(number: int) -> _Pair:
        class_ids = representative_classes(texts.groups[number])
        prompts = (tokens[:, number] if tokens.ndim == 3 else tokens)[class_ids.to(tokens.device)].to(device).long()
        return _Pair(
            "texts",
            lambda: text_tower.reference_forward(prompts),
            lambda: texts.encode_group(number, class_ids, cached=cached),
            text_parameters,
        )

    pairs = [
        *map(pair_of_group, range(len(texts.groups))),
        _Pair(
            "an image",
            lambda: image_tower.reference_forward(image.to(image_tower.dtype)),
            lambda: image_tower.upper(images.lower(image)),
            list(image_tower.upper_parameters()),
        ),
    ]
    modules = list(model.modules())
    with evaluating([model]):
        with torch.no_grad():
            features = images.lower(image)
        images.features = features.shape[1:], features.dtype
        # In half precision, rounding would hide a wrong activation.
        with _in_float32(model):
            for pair in pairs:
                _compare(modules, pair, "evaluation", [])
    with deterministic_training(model), _in_float32(model):
        for pair in pairs:
            trained = [p for p in pair.parameters if p.requires_grad]
            _compare(modules, pair, "training", [p for p in trained if p.ndim <= 1] or trained)


def _compare(modules: list[nn.Module], pair: _Pair, mode: str, parameters: list[nn.Parameter]) -> None:
    """Raise if the two embeddings, or their gradients, differ by more than rounding, or are not finite."""
    with torch.set_grad_enabled(bool(parameters)):
        with unfused(modules):
            expected, d_expected = _differentiated(pair, pair.reference, parameters)
        got, d_got = _differentiated(pair, pair.actual, parameters)
    what = f"SkipCLIP: its embeddings of {pair.inputs} differ from the model's in {mode} mode"
    distance = (expected - got).norm(dim=-1).max().item()
    raise_if_above(what, "unit-norm distance", distance, OUTPUT_TOLERANCE[got.dtype])
    if parameters:
        norm = d_expected.norm().clamp_min(torch.finfo(d_expected.dtype).tiny)
        error = ((d_got - d_expected).norm() / norm).item()
        raise_if_above(what, "relative error of the gradient", error, GRADIENT_TOLERANCE[got.dtype])


def _differentiated(
    pair: _Pair, compute: Callable[[], Tensor], parameters: list[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """Unit-norm embeddings [n, D], at least fp32, and the gradient of a random projection, in one vector."""
    raw = compute()
    unit = nn.functional.normalize(raw.to(torch.promote_types(raw.dtype, torch.float32)), dim=-1)
    if not unit.isfinite().all():
        raise RuntimeError(
            f"SkipCLIP: the model's embeddings of {pair.inputs} are not finite. Its weights are damaged, or too large "
            "for its dtype. Load other weights."
        )
    if not parameters:
        return unit, unit.new_empty(0)
    if not unit.requires_grad:
        raise RuntimeError(
            f"SkipCLIP: no parameter that trains has an effect on the model's embeddings of {pair.inputs}. "
            "torch.nn.MultiheadAttention reads the weight of its out_proj and does not call that layer, so an adapter "
            "of this layer has no effect. Adapt another layer."
        )
    upstream = torch.randn(unit.shape, generator=torch.Generator().manual_seed(1)).to(unit)
    gradients = torch.autograd.grad((unit * upstream).sum(), parameters, materialize_grads=True)
    return unit.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Convert half-precision parameters and buffers to fp32 in place, and back with the same bits."""
    tensors = [*model.parameters(), *model.buffers()]
    half = [(x, x.data) for x in tensors if x.dtype in _HALF and type(x.data) is Tensor]  # not quantised
    try:
        for x, values in half:
            x.data = values.float()
        yield
    finally:
        for x, values in half:
            x.data = values
