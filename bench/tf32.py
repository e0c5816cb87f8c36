"""Error of a training step in fp32 with products in TF32, emulated on the CPU, beside fp32 and bf16 under autocast.

    python -m bench.tf32

On an NVIDIA GPU `torch.set_float32_matmul_precision("high")` lets PyTorch's products round their inputs to TF32, 10
bits of mantissa, and add in fp32. Here the inputs of every product of PyTorch are rounded so, to nearest, forward and
backward; those within attention and in the loss are not. Errors are relative, |error| / |value|, against the same step
in fp64: of the loss, of all gradients together, and the largest of a weight. All classes are kept, so that rounding
selects no others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import skipkernels as sk
from skipkernels.testing import relative_error

from . import measure, tables
from .inputs import autocast, random_inputs
from .stand_in import PRODUCTS

TABLE = measure.RESULTS / "tf32.csv"
MODEL, SKIP_LAYERS, BATCH, CLASSES = "ViT-B-16", 6, 4, 50
PRECISIONS = ("fp32", "tf32", "bf16")
_CPU = torch.device("cpu")
_DROPPED = 13  # of the 23 bits of the mantissa


def to_tf32(x: Tensor) -> Tensor:
    """Round fp32 to TF32, to nearest and ties to even.

    >>> to_tf32(torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-12])).tolist()
    [1.0, 1.0009765625, 1.0, 1.0009765625]
    """
    bits = x.contiguous().view(torch.int32)
    half = (1 << (_DROPPED - 1)) - 1
    return ((bits + half + (bits >> _DROPPED & 1)) >> _DROPPED << _DROPPED).view(torch.float32)


class ProductsInTF32(TorchDispatchMode):
    """Round the inputs of products of PyTorch."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in PRODUCTS:
            *added, left, right = args  # `addmm` adds its first argument in fp32
            args = (*added, *tree_map_only(Tensor, to_tf32, (left, right)))
        return operator(*args, **(kwargs or {}))


class Row(NamedTuple):
    """One line of the table."""

    precision: str
    loss: str
    gradients: str
    largest: str
    weight: str  # with the largest error
    torch: str


def step(precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    inputs = random_inputs(MODEL, BATCH, CLASSES, _CPU)
    model, images = copy.deepcopy(inputs.model), inputs.images
    if precision == "fp64":
        model, images = model.double(), images.double()
    clip = sk.SkipCLIP(model, inputs.tokens, skip_layers=SKIP_LAYERS, keep_ratio=1.0, max_keep=CLASSES)
    features = clip.encode_lower(images)
    with ProductsInTF32() if precision == "tf32" else nullcontext():
        with autocast(_CPU, precision):
            loss = clip(features, inputs.labels).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main(arguments: Sequence[str] | None = None) -> None:
    args = measure.command(__doc__).parse_args(arguments)
    true_loss, truth = step("fp64")
    rows = []
    for precision in PRECISIONS:
        loss, found = step(precision)
        errors = {name: relative_error(found[name], gradient) for name, gradient in truth.items()}
        weight = max(errors, key=errors.__getitem__)
        together = (torch.cat([x.flatten() for x in gradients.values()]) for gradients in (found, truth))
        values = relative_error(loss, true_loss), relative_error(*together), errors[weight]
        version = ".".join(torch.__version__.split(".")[:2])
        rows.append(Row(precision, *(f"{value:.0e}" for value in values), weight, version))
    tables.show(Row._fields, rows)
    if not args.no_save:
        tables.write(TABLE, rows)


if __name__ == "__main__":
    main()
