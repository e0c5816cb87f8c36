"""Checks of what a head is fitted to."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import FEATURE_DTYPES, check_dtype, check_shape
from ...dtypes import in_accumulation_dtype


def check_labels(function: str, labels: Tensor, classes: int) -> None:
    """Raise unless labels are [n ≥ 1] class ids int64 below `classes`."""
    check_shape(function, "labels", labels, n=None)
    check_dtype(function, "labels", labels, [torch.int64], "Use labels.long().")
    low, high = (int(extreme) for extreme in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"{function}: labels must be in [0, {classes - 1}], the classes; got {low} to {high}.")


def unit_rows(function: str, argument: str, embeddings: Tensor) -> Tensor:
    """Unit-norm rows of embeddings [n, D], in fp64 if the device has it; raise unless they are finite and not zero."""
    check_dtype(function, argument, embeddings, FEATURE_DTYPES, f"Use {argument}.float().")
    check_shape(function, argument, embeddings, n=None, D=None)
    wide = in_accumulation_dtype(embeddings.detach()).contiguous()  # one order of summation for all layouts
    norm = wide.norm(dim=1, keepdim=True)
    bad = ~(norm.isfinite() & (norm > 0)).squeeze(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{function}: {argument} must be finite with a norm above 0; row {row} is not. Leave it out.")
    return wide / norm


def check_positive(function: str, **values: float) -> None:
    """Raise unless all values are positive and finite."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{function}: {name} must be positive and finite; got {value}.")
