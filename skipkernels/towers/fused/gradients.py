"""Gradients of the weights of a fused block: which are needed, and how products and sums over rows become them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ops import launching
from ...ops.row_sums import MAX_ROWS, column_sums
from .records import LowRankFactors, TensorName

# Norms within attention: autograd computes their gradients.
ATTENTION_NORMS = (
    *("query_norm", "query_norm_bias", "key_norm", "key_norm_bias"),
    *("attention_norm", "attention_norm_bias"),
)
_IN_FRONT_OF_ATTENTION = ("norm_1", "norm_1_bias", "in_proj_bias", *ATTENTION_NORMS)


@dataclass
class Gradients:
    """Gradients of weights: those that a backward pass has to compute, and those that it has computed, sometimes more.

    Those of matrices are in `dtype` or in that of the products, those of vectors in any dtype. With `partial` operators
    leave gradients of vectors as partial sums over rows, which `complete` adds, all by one launch.
    """

    needs_hidden: bool  # gradients of stream and branch
    needed: frozenset[str]  # names of fields of `BlockWeights`
    updates: Mapping[str, Sequence[LowRankFactors]]  # low-rank updates by field, of which the factors have gradients
    dtype: torch.dtype
    sums_dtype: torch.dtype  # of the sums that `complete` adds
    partial: bool
    weights: dict[str, Tensor] = field(default_factory=dict)  # by the fields of `BlockWeights`
    factors: dict[TensorName, Tensor] = field(default_factory=dict)  # of low-rank updates
    pending_widths: dict[str, int] = field(default_factory=dict)  # by field, in the order of the columns
    pending_matrices: list[Tensor] = field(default_factory=list)  # [rows, columns], side by side

    def needs(self, *names: str) -> bool:
        """Return True if the gradient of one of these fields is needed."""
        return not self.needed.isdisjoint(names)

    def needs_input_of(self, name: str) -> bool:
        """Return True if the input of this layer is read: for the gradient of its weight, or of the factors of one."""
        return name in self.needed or name in self.updates

    @property
    def needs_attention(self) -> bool:
        """True if a gradient depends on that of attention."""
        return self.needs_hidden or self.needs_input_of("in_proj") or self.needs(*_IN_FRONT_OF_ATTENTION)

    def set_product(self, name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Set the gradient of a matrix, and of its factors, if they are needed.

        A pair has d_out [R, out], the gradient of results of a layer, and their inputs [R, in]: d_W = d_outᵀ · inputs.
        Those of several pairs are one below the other.
        """
        if name in self.needed:
            self.weights[name] = joint_product(pairs, self.dtype)
        self._set_factors(name, *pairs)

    def _set_factors(self, name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Set the gradients of A and B of the low-rank updates of a matrix, if there are any.

        A weight W + s · B · A with frozen W gets no gradient itself. With y = x (W + s · B · A)ᵀ,

            d_A = s · (d_y B)ᵀ x,   d_B = s · d_yᵀ (x Aᵀ)

        are thin products, in place of one as large as the layer.
        """
        for update in self.updates.get(name, ()):
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
            self.factors[TensorName(name, update.part, "A")] = product(d_thin.T, inputs, down.dtype)  # [rank, in]
            self.factors[TensorName(name, update.part, "B")] = product(d_part.T, thin, up.dtype)  # [out, rank]

    def set_sums(self, sums: Mapping[str, Tensor], partial_sums: Tensor) -> None:
        """Set gradients of vectors of equal width that an operator has summed; empty ones were not asked for.

        Or `partial_sums` of them, if not empty: rows with those of all vectors side by side, in the order of `sums`.
        """
        if partial_sums.numel() > 0:
            self._add_pending(list(sums), [partial_sums])
        else:
            self.weights |= {name: total for name, total in sums.items() if total.numel() > 0}

    def set_column_sums(self, name: str, matrices: Sequence[Tensor]) -> None:
        """Set the gradient of a vector to the column sums of one or more matrices, side by side."""
        if self.partial and len(matrices[-1]) <= MAX_ROWS:
            self._add_pending([name], matrices)
            return
        # On a CPU a sum in another dtype would convert all rows first.
        dtype = matrices[0].dtype if matrices[0].is_cpu else self.sums_dtype
        sums = [x.sum(0, dtype=dtype) for x in matrices]  # `out=` has no batching rule
        self.weights[name] = torch.cat(sums) if len(sums) > 1 else sums[0]

    def _add_pending(self, names: Sequence[str], matrices: Sequence[Tensor]) -> None:
        width = sum(x.shape[1] for x in matrices) // len(names)
        self.pending_widths |= dict.fromkeys(names, width)
        self.pending_matrices += matrices

    def complete(self) -> None:
        """Add the pending sums, by one launch."""
        if self.pending_widths:
            totals = column_sums(self.pending_matrices, self.sums_dtype).split(list(self.pending_widths.values()))
            self.weights |= zip(self.pending_widths, totals, strict=True)
            self.pending_widths, self.pending_matrices = {}, []

    def of_tensors(self, names: Iterable[TensorName]) -> dict[TensorName, Tensor]:
        """Gradients by the names of the tensors: those of a field, of all its parts in `names`, and of factors."""
        parts = Counter(name.field for name in names if not name.factor)
        found = dict(self.factors)
        for name, gradient in self.weights.items():
            of_parts = gradient.chunk(parts[name]) if parts[name] > 1 else (gradient,)
            found |= {TensorName(name, part): x for part, x in enumerate(of_parts)}
        return found


def sums_together(device: torch.device) -> bool:
    """Return True if the sums of all operators are completed by one launch; on a CPU each completes its own."""
    return device.type != "cpu" and launching.installed


# ---- products of matrices, in a wider dtype where a device can write it ---------------------------------------------


def _product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype` if the device can write a product of tensors like `x` in it by one launch, else that of `x`."""
    is_16_bit = x.dtype in (torch.bfloat16, torch.float16)
    return dtype if is_16_bit and dtype == torch.float32 and launching.products_widen(x.device.type) else x.dtype


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
