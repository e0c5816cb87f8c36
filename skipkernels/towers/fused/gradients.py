"""Gradients of the weights of a fused block: which are needed, and how products and sums over rows become them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...ops import launching
from ...ops.row_sums import MAX_ROWS, column_sums

# Norms within attention: autograd computes their gradients.
ATTENTION_NORMS = (
    *("query_norm", "query_norm_bias", "key_norm", "key_norm_bias"),
    *("attention_norm", "attention_norm_bias"),
)


@dataclass(frozen=True)
class NeededGradients:
    """Gradients that a backward pass has to compute."""

    hidden: bool  # those of stream and branch
    fields: frozenset[str]  # those of these fields of `BlockWeights`

    def any_of(self, *names: str) -> bool:
        """Return True if the gradient of one of these fields is needed."""
        return not self.fields.isdisjoint(names)

    @property
    def depends_on_attention(self) -> bool:
        """True if a gradient depends on that of the result of attention."""
        return self.hidden or self.any_of("norm_1", "norm_1_bias", "in_proj", "in_proj_bias", *ATTENTION_NORMS)


class PendingSums:
    """Sums over rows of a backward pass, which `complete` computes by one launch; several operators leave them partial.

    Args:
        dtype: Dtype of the sums.
    """

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._widths: dict[str, int] = {}  # by field, in the order of the columns
        self._matrices: list[Tensor] = []  # [rows, columns], side by side

    def add(self, names: Sequence[str], matrices: Sequence[Tensor]) -> None:
        """Add the sums of vectors of equal width, those of these fields: the columns of matrices, side by side."""
        width = sum(x.shape[1] for x in matrices) // len(names)
        self._widths |= dict.fromkeys(names, width)
        self._matrices += matrices

    def complete(self) -> dict[str, Tensor]:
        """Return the sums by field."""
        if not self._widths:
            return {}
        totals = column_sums(self._matrices, self._dtype).split(list(self._widths.values()))
        return dict(zip(self._widths, totals, strict=True))


@dataclass
class Gradients:
    """Gradients that a backward pass has computed: those that are needed, and sometimes more.

    Those of matrices are in `dtype` or in that of the products, those of vectors in any dtype.
    """

    needed: NeededGradients
    dtype: torch.dtype
    sums_dtype: torch.dtype
    pending: PendingSums | None  # Where kernels are launched; None: each operator completes its sums
    weights: dict[str, Tensor] = field(default_factory=dict)  # by the fields of `BlockWeights`

    def set_product(self, name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Set the gradient of a matrix, if it is needed.

        A pair has d_out [R, out], the gradient of results of a layer, and their inputs [R, in]: d_W = d_outᵀ · inputs.
        Those of several pairs are one below the other.
        """
        if self.needed.any_of(name):
            self.weights[name] = joint_product(pairs, self.dtype)

    def set_sums(self, sums: Mapping[str, Tensor], partial_sums: Tensor) -> None:
        """Set gradients of vectors of equal width that an operator has summed; empty ones were not asked for.

        Or `partial_sums` of them, if not empty: rows with those of all vectors side by side, in the order of `sums`.
        """
        if self.pending is not None and partial_sums.numel() > 0:
            self.pending.add(list(sums), [partial_sums])
        else:
            self.weights |= {name: total for name, total in sums.items() if total.numel() > 0}

    def set_column_sums(self, name: str, matrices: Sequence[Tensor]) -> None:
        """Set the gradient of a vector to the column sums of one or more matrices, side by side."""
        if self.pending is not None and len(matrices[-1]) <= MAX_ROWS:
            self.pending.add([name], matrices)
            return
        # On a CPU a sum in another dtype would convert all rows first.
        dtype = matrices[0].dtype if matrices[0].is_cpu else self.sums_dtype
        sums = [x.sum(0, dtype=dtype) for x in matrices]
        self.weights[name] = torch.cat(sums) if len(sums) > 1 else sums[0]

    def of_parts(self, names: Sequence[str]) -> list[Tensor | None]:
        """Complete the sums, and return the gradients of the parts of weights, given the names of these weights."""
        weights = self.weights | (self.pending.complete() if self.pending is not None else {})
        assert weights.keys() >= self.needed.fields
        counts = Counter(names)
        parts = {name: iter(x.chunk(counts[name])) for name, x in weights.items() if name in counts}
        return [next(parts[name]) if name in parts else None for name in names]


def joint_product(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """d_outᵀ · inputs of pairs [R, out], [R, in], one below the other, [sum of out, in].

    In `dtype` if that is fp32 and the device can write a product of 16-bit tensors in it by one launch, else in the
    dtype of the pairs.
    """
    d_out, inputs = pairs[0]
    is_16_bit = inputs.dtype in (torch.bfloat16, torch.float16)
    widens = is_16_bit and dtype == torch.float32 and launching.products_widen(inputs.device.type)
    options: dict[str, Any] = {"out_dtype": dtype} if widens else {}
    if len(pairs) == 1:
        return torch.mm(d_out.T, inputs, **options)
    heights = [d_out.shape[1] for d_out, _ in pairs]
    joint = inputs.new_empty(sum(heights), inputs.shape[1], dtype=dtype if widens else inputs.dtype)
    for (d_out, inputs), out in zip(pairs, joint.split(heights), strict=True):
        torch.mm(d_out.T, inputs, out=out, **options)
    return joint
