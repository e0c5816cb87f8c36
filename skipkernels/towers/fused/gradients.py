"""Gradients of the weights of a fused block: collected by the stages, completed at the end of backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import launching
from ...ops.row_sums import MAX_ROWS, column_sums
from .weights import ATTENTION_NORMS, field_of, split_into_parts


class Gradients:
    """Gradients of weights that a backward pass computes, by the fields of `BlockWeights`.

    Those of matrices are in `dtype` or in that of the products, those of vectors in any dtype.

    Args:
        needed: Whether each given weight needs a gradient. Those of others may be computed as well.
        needs_hidden: True if those of the inputs of the block are needed.
        dtype: Dtype of the matrices.
        sums_dtype: Dtype of sums over rows.
        partial: True where kernels are launched: operators leave their sums over rows partial, as rows of fewer terms,
            and `complete` adds those of all operators by one launch.
    """

    def __init__(
        self,
        needed: Mapping[str, bool],
        *,
        needs_hidden: bool,
        dtype: torch.dtype,
        sums_dtype: torch.dtype,
        partial: bool,
    ):
        self.needs_hidden, self.partial = needs_hidden, partial
        self._given, self._fields = needed, {field_of(name) for name, need in needed.items() if need}
        self._dtype, self._sums_dtype = dtype, sums_dtype
        self._found: dict[str, Tensor] = {}
        # Vectors that are column sums of the matrices, side by side: the width of each by its field
        self._widths: dict[str, int] = {}
        self._matrices: list[Tensor] = []

    def needs(self, *fields: str) -> bool:
        """Return True if the gradient of one of these fields is needed."""
        return not self._fields.isdisjoint(fields)

    @property
    def depend_on_attention(self) -> bool:
        """True if a gradient depends on that of the result of attention."""
        return self.needs_hidden or self.needs("norm_1", "norm_1_bias", "in_proj", "in_proj_bias", *ATTENTION_NORMS)

    def set(self, name: str, gradient: Tensor) -> None:
        """Set a gradient, if it is needed."""
        if self.needs(name):
            self._found[name] = gradient

    def set_product(self, name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Set the gradient of a matrix, if it is needed.

        A pair has d_out [R, out], the gradient of results of a layer, and their inputs [R, in]: d_W = d_outᵀ · inputs.
        Those of several pairs are one below the other.
        """
        if self.needs(name):
            self._found[name] = _joint_product(pairs, self._dtype)

    def set_sums(self, sums: Mapping[str, Tensor], partial_sums: Tensor) -> None:
        """Set gradients of vectors of equal width that an operator has summed.

        Or `partial_sums` of them, if not empty: rows with those of all vectors side by side, in the order of `sums`.
        """
        if partial_sums.numel() > 0:
            self._add(list(sums), [partial_sums])
        else:
            for name, total in sums.items():
                self.set(name, total)

    def set_column_sums(self, name: str, matrices: Sequence[Tensor]) -> None:
        """Set the gradient of a vector, if it is needed: the column sums of one or more matrices, side by side."""
        if not self.needs(name):
            return
        if self.partial and len(matrices[-1]) <= MAX_ROWS:
            self._add([name], matrices)
            return
        # On a CPU a sum in another dtype would convert all rows first.
        dtype = matrices[0].dtype if matrices[0].is_cpu else self._sums_dtype
        sums = [x.sum(0, dtype=dtype) for x in matrices]
        self._found[name] = torch.cat(sums) if len(sums) > 1 else sums[0]

    def _add(self, names: Sequence[str], matrices: Sequence[Tensor]) -> None:
        """Add vectors of equal width to those that `complete` sums."""
        width = sum(x.shape[1] for x in matrices) // len(names)
        self._widths |= dict.fromkeys(names, width)
        self._matrices += matrices

    def complete(self) -> list[Tensor | None]:
        """Return the gradients of the given weights in their order, None for those that need none."""
        if self._widths:
            totals = column_sums(self._matrices, self._sums_dtype).split(list(self._widths.values()))
            self._found |= zip(self._widths, totals, strict=True)
        split_into_parts(self._found, self._given)
        return [self._found[name] if need else None for name, need in self._given.items()]


def _joint_product(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
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
