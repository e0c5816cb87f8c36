"""Gradients of a fused block: what a backward pass has to compute, and what it has computed.

A weight W + s · B · A with frozen W (`LowRankFactors`) gets no gradient itself. With y = x (W + s · B · A)ᵀ,

    d_A = s · (d_y B)ᵀ x,   d_B = s · d_yᵀ (x Aᵀ)

are thin products, in place of one as large as the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ops import launching
from ...ops.launching import products_widen
from ...ops.row_sums import MAX_ROWS, column_sums
from .records import ATTENTION_NORMS, LowRankFactors

NORM_1_AND_IN_PROJ = ("norm_1", "norm_1_bias", "in_proj", "in_proj_bias")


@dataclass(frozen=True)
class Needed:
    """Gradients that a backward pass has to compute."""

    hidden: bool  # those of stream and branch
    fields: frozenset[str]  # names of fields of `BlockWeights`
    updates: Mapping[str, Sequence[LowRankFactors]]  # low-rank updates by field, of which A and B have gradients

    def any_of(self, *names: str) -> bool:
        """Return True for a gradient of one of these fields."""
        return not self.fields.isdisjoint(names)

    def input_of(self, name: str) -> bool:
        """Return True if the input of this layer is read: for the gradient of its weight, or of the factors of one."""
        return name in self.fields or name in self.updates

    @property
    def of_attention(self) -> bool:
        """True if a gradient depends on that of attention."""
        return self.hidden or self.input_of("in_proj") or self.any_of(*NORM_1_AND_IN_PROJ, *ATTENTION_NORMS)


@dataclass
class Gradients:
    """Gradients of weights that the stages of a backward pass have computed, more than needed in some.

    Those of matrices are in `dtype` or in that of the products, those of vectors in any dtype.
    """

    needed: Needed
    dtype: torch.dtype
    pending: PendingSums
    weights: dict[str, Tensor] = field(default_factory=dict)  # by the fields of `BlockWeights`
    factors: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # A and B by field and part

    def set(self, name: str, gradient: Tensor) -> None:
        """Set the gradient of a field of `BlockWeights`."""
        self.weights[name] = gradient

    def set_product(self, name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Set the gradient of a matrix, and of its factors, if they are needed.

        A pair has d_out [R, out], the gradient of results of a layer, and their inputs [R, in]: d_W = d_outᵀ · inputs.
        Those of several pairs are one below the other.
        """
        if name in self.needed.fields:
            self.set(name, joint_product(pairs, self.dtype))
        self.set_factors(name, *pairs)

    def set_factors(self, name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Set the gradients of A and B of the low-rank updates of a matrix, if there are any."""
        for update in self.needed.updates.get(name, ()):
            scale, down, up = update.scale, update.down, update.up
            # First row of the part in the weight, then in the pair that has it: of the pairs (query), (key, value), key
            # begins at row W of the weight, which is row 0 of the second pair.
            row, pair = update.part * len(up), 0
            while row >= (height := pairs[pair][0].shape[1]):
                row, pair = row - height, pair + 1
            d_out, inputs = pairs[pair]
            d_part = d_out[:, row : row + len(up)]  # [R, out]
            d_thin = d_part @ (scale * up).to(d_part.dtype)  # [R, out] @ [out, rank] -> [R, rank]
            thin = inputs @ (scale * down).to(inputs.dtype).T  # [R, in] @ [in, rank] -> [R, rank]
            self.factors[name, update.part] = (
                product(d_thin.T, inputs, down.dtype),  # [rank, R] @ [R, in] -> [rank, in]
                product(d_part.T, thin, up.dtype),  # [out, R] @ [R, rank] -> [out, rank]
            )

    def set_vectors(self, partial_sums: Tensor | None, **totals: Tensor | None) -> None:
        """Set gradients of vectors of equal width: their totals, or partial sums of all of them, side by side."""
        if partial_sums is not None:
            self.pending.add(list(totals), [partial_sums])
        else:
            self.weights |= {name: total for name, total in totals.items() if total is not None}

    def set_column_sums(self, name: str, matrices: Sequence[Tensor]) -> None:
        """Set the gradient of a vector to the column sums of one or more matrices, side by side."""
        if self.pending.partial and len(matrices[-1]) <= MAX_ROWS:
            self.pending.add([name], matrices)
            return
        # On a CPU a sum in another dtype would convert all rows first.
        dtype = matrices[0].dtype if matrices[0].is_cpu else self.pending.dtype
        sums = [x.sum(0, dtype=dtype) for x in matrices]  # `out=` has no batching rule
        self.set(name, torch.cat(sums) if len(sums) > 1 else sums[0])

    def complete(self) -> None:
        """Compute the pending sums, by one launch."""
        self.weights |= self.pending.complete()


@dataclass
class PendingSums:
    """Gradients of vectors that are left as partial sums over rows, to be completed together."""

    dtype: torch.dtype
    partial: bool  # Operators return partial sums; False: each completes its own
    names: list[str] = field(default_factory=list)  # fields of `BlockWeights`, in the order of the columns
    widths: list[int] = field(default_factory=list)
    matrices: list[Tensor] = field(default_factory=list)

    def add(self, names: Sequence[str], matrices: Sequence[Tensor]) -> None:
        """Add vectors of equal width. Their columns are side by side in these matrices."""
        width = sum(x.shape[1] for x in matrices)
        self.matrices += matrices
        self.names += names
        self.widths += [width // len(names)] * len(names)

    def complete(self) -> dict[str, Tensor]:
        """Compute the sums that were added, by one launch, and forget them."""
        if not self.names:
            return {}
        totals = column_sums(self.matrices, self.dtype).split(self.widths)
        found = dict(zip(self.names, totals, strict=True))
        self.names, self.widths, self.matrices = [], [], []
        return found


def sums_together(device: torch.device) -> bool:
    """Return True if the sums of all operators are completed by one launch; on a CPU each completes its own."""
    return device.type != "cpu" and launching.installed


# ---- products --------------------------------------------------------------------------------------------------------


def _product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype` if the device can write a product of tensors like `x` in it by one launch, else that of `x`."""
    is_16_bit = x.dtype in (torch.bfloat16, torch.float16)
    return dtype if is_16_bit and dtype == torch.float32 and products_widen(x.device.type) else x.dtype


def _multiply(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left · right in a dtype of `_product_dtype`."""
    if dtype == left.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=dtype, out=out)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left · right, in `dtype` if the device can write it without another launch, else in the dtype of both."""
    return _multiply(left, right, _product_dtype(left, dtype))


def joint_product(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """d_outᵀ · inputs of pairs [R, out], [R, in], one below the other, [sum of out, in]; dtype as in `product`."""
    if len(pairs) == 1:
        ((d_out, inputs),) = pairs
        return product(d_out.T, inputs, dtype)
    heights, inputs = [d_out.shape[1] for d_out, _ in pairs], pairs[0][1]
    dtype = _product_dtype(inputs, dtype)
    joint = inputs.new_empty(sum(heights), inputs.shape[1], dtype=dtype)
    for (d_out, inputs), out in zip(pairs, joint.split(heights), strict=True):
        _multiply(d_out.T, inputs, dtype, out)
    return joint
