"""Comparison of both encoders with the model itself, at construction and `refresh`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..reference import unit_norm
from ..towers.comparison import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, raise_if_above
from ..towers.fused_classes import unfused
from ..towers.modes import deterministic_training, evaluating
from ..towers.prompts import Prompts
from .images import ImageEncoder
from .texts import ClassTexts

_HALF = (torch.float16, torch.bfloat16)


class _Comparison(NamedTuple):
    """The same embeddings, computed by the caller's model and by SkipCLIP."""

    inputs: str  # Name of the inputs, for messages
    reference: Callable[[], Tensor]  # Returns the embeddings [n, D] of the caller's model, normalised or not
    actual: Callable[[], Tensor]  # Returns the embeddings [n, D] of SkipCLIP
    parameters: list[nn.Parameter]  # above the cut


def verify(model: nn.Module, texts: ClassTexts, images: ImageEncoder | None = None) -> None:
    """Compare embeddings and gradients of a few classes and a random image with those of the model, in both modes.

    The model runs with its own blocks, and with prompts that are not cropped.
    """
    comparisons = [_of_texts(texts, t) for t in range(len(texts.templates))]
    comparisons += [] if images is None else [_of_an_image(images)]
    with _in_float32(model):  # in half precision, rounding would hide a wrong activation
        with evaluating([model]):
            for comparison in comparisons:
                _check(model, comparison, "evaluation", None)
        with deterministic_training(model):
            for comparison in comparisons:
                _check(model, comparison, "training", _to_differentiate(comparison.parameters))


def _to_differentiate(parameters: list[nn.Parameter]) -> list[nn.Parameter] | None:
    """Return parameters of which the gradients are compared; None if no parameter trains.

    Norms and biases are in every block, and their gradients depend on every layer behind them; those of matrices would
    need as much memory as the weights.
    """
    trained = [p for p in parameters if p.requires_grad]
    return [p for p in trained if p.ndim <= 1] or trained or None


def _of_texts(texts: ClassTexts, template: int) -> _Comparison:
    """Compare the prompts of a few classes."""
    tower, prompts, tokens = texts.tower, texts.templates[template], texts.tokens
    class_ids = _representative_classes(prompts)
    tokens = (tokens[:, template] if tokens.ndim == 3 else tokens)[class_ids.to(tokens.device)]
    tokens = tokens.to(texts.device, torch.int64)
    parameters = list(tower.upper_parameters())
    # Features of a model in half precision are kept in it: here they are computed again, since both sides are in fp32.
    table_is_fp32 = all(x.dtype not in _HALF for x in parameters)

    def actual() -> Tensor:
        selected = prompts.select(class_ids)
        rows = texts.rows([selected]) if table_is_fp32 else [tower.lower(selected)]
        return tower.upper(rows, [selected])[0]

    return _Comparison("texts", lambda: tower.reference_forward(tokens), actual, parameters)


def _representative_classes(prompts: Prompts) -> Tensor:
    """Class ids [K] of the first and the last class, and of those with the shortest and the longest prompt."""
    ends = prompts.pooled
    return torch.unique(torch.stack([ends.new_zeros(()), ends.argmin(), ends.argmax(), ends.new_tensor(len(ends) - 1)]))


def _of_an_image(images: ImageEncoder) -> _Comparison:
    """Compare a random image."""
    tower, device = images.tower, images.tower.model.logit_scale.device
    image = torch.randn(1, 3, *tower.image_size, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    return _Comparison(
        "an image",
        lambda: tower.reference_forward(image.to(tower.dtype)),
        lambda: tower.upper(images.lower(image)),
        list(tower.upper_parameters()),
    )


def _check(model: nn.Module, both: _Comparison, mode: str, parameters: list[nn.Parameter] | None) -> None:
    """Raise if embeddings, or gradients of `parameters` unless None, differ by more than rounding or are not finite."""
    with torch.set_grad_enabled(parameters is not None):
        with unfused(model.modules()):
            expected, d_expected = _differentiated(both.inputs, both.reference, parameters)
        got, d_got = _differentiated(both.inputs, both.actual, parameters)
    what = f"SkipCLIP: its embeddings of {both.inputs} differ from the model's in {mode} mode"
    distance = (expected - got).norm(dim=-1).max().item()
    raise_if_above(what, "unit-norm distance", distance, OUTPUT_TOLERANCE[got.dtype])
    if d_expected is not None and d_got is not None:
        norm = d_expected.norm().clamp_min(torch.finfo(d_expected.dtype).tiny)
        error = ((d_got - d_expected).norm() / norm).item()
        raise_if_above(what, "relative error of the gradient", error, GRADIENT_TOLERANCE[got.dtype])


def _differentiated(
    inputs: str, compute: Callable[[], Tensor], parameters: list[nn.Parameter] | None
) -> tuple[Tensor, Tensor | None]:
    """Unit-norm embeddings [n, D], at least fp32, and the gradient of a random projection, in one vector, or None."""
    unit = unit_norm(compute())
    if not unit.isfinite().all():
        raise RuntimeError(
            f"SkipCLIP: the model's embeddings of {inputs} are not finite. Its weights are damaged, or too large "
            "for its dtype. Load other weights."
        )
    if parameters is None:
        return unit, None
    if not unit.requires_grad:
        raise RuntimeError(
            f"SkipCLIP: no parameter that trains has an effect on the model's embeddings of {inputs}. "
            "torch.nn.MultiheadAttention reads the weight of its out_proj and does not call that layer, so an adapter "
            "of this layer has no effect. Adapt another layer."
        )
    upstream = torch.randn(unit.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(unit)
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
