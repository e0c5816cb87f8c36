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


@dataclass(frozen=True)
class NeededGradients:
    """Gradients that a backward pass has to compute."""

    hidden: bool  # those of stream and branch
    fields: frozenset[str]  # those of these fields of `BlockWeights`
    updates: Mapping[str, Sequence[LowRankFactors]]  # those of the factors of these low-rank updates, by field

    def any_of(self, *names: str) -> bool:
        """Return True if the gradient of one of these fields is needed."""
        return not self.fields.isdisjoint(names)

    def reads_input_of(self, name: str) -> bool:
        """Return True if the input of this layer is read: for the gradient of its weight, or of the factors of one."""
        return name in self.fields or name in self.updates

    @property
    def depends_on_attention(self) -> bool:
        """True if a gradient depends on that of the result of attention."""
        in_front = self.any_of("norm_1", "norm_1_bias", "in_proj_bias", *ATTENTION_NORMS)
        return self.hidden or self.reads_input_of("in_proj") or in_front


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
    pending: PendingSums | None  # On a GPU; None: each operator completes its sums
    weights: dict[str, Tensor] = field(default_factory=dict)  # by the fields of `BlockWeights`
    factors: dict[TensorName, Tensor] = field(default_factory=dict)  # of low-rank updates

    def set_product(self, name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Set the gradient of a matrix, and those of the factors of its low-rank updates, if they are needed.

        A pair has d_out [R, out], the gradient of results of a layer, and their inputs [R, in]: d_W = d_outᵀ · inputs.
        Those of several pairs are one below the other.
        """
        if name in self.needed.fields:
            self.weights[name] = joint_product(pairs, self.dtype)
        for update in self.needed.updates.get(name, ()):
            d_down, d_up = d_factors(update, pairs)
            self.factors[TensorName(name, update.part, "A")] = d_down
            self.factors[TensorName(name, update.part, "B")] = d_up

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
        sums = [x.sum(0, dtype=dtype) for x in matrices]  # `out=` has no batching rule
        self.weights[name] = torch.cat(sums) if len(sums) > 1 else sums[0]

    def of_tensors(self, names: Iterable[TensorName]) -> dict[TensorName, Tensor]:
        """Complete the sums, and return the gradients by the names of the tensors, of which `names` are all.

        The gradient of a field is split into those of its parts.
        """
        weights = self.weights | (self.pending.complete() if self.pending is not None else {})
        parts, found = Counter(name.field for name in names if not name.factor), dict(self.factors)
        for name, gradient in weights.items():
            of_parts = gradient.chunk(parts[name]) if parts[name] > 1 else (gradient,)
            found |= {TensorName(name, part): x for part, x in enumerate(of_parts)}
        return found


def sums_together(device: torch.device) -> bool:
    """Return True if the sums of all operators are completed by one launch; on a CPU each completes its own."""
    return device.type != "cpu" and launching.installed


def d_factors(update: LowRankFactors, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Gradients of A [rank, in] and B [out, rank] of a low-rank update of a matrix; for pairs see `set_product`.

    A weight W + s · B · A with frozen W gets no gradient itself. With y = x (W + s · B · A)ᵀ,

        d_A = s · (d_y B)ᵀ x,   d_B = s · d_yᵀ (x Aᵀ)

    are thin products, in place of one as large as the layer.
    """
    scale, down, up = update.scale, update.down, update.up
    # First row of the part in the weight, then in the pair that has it: of the pairs (query), (key, value), key begins
    # at row W of the weight, which is row 0 of the second pair.
    row, pair = update.part * len(up), 0
    while row >= (height := pairs[pair][0].shape[1]):
        row, pair = row - height, pair + 1
    d_out, inputs = pairs[pair]
    d_part = d_out[:, row : row + len(up)]  # [R, out]
    d_thin = d_part @ (scale * up).to(d_part.dtype)  # [R, out] @ [out, rank] -> [R, rank]
    thin = inputs @ (scale * down).to(inputs.dtype).T  # [R, in] @ [in, rank] -> [R, rank]
    return product(d_thin.T, inputs, down.dtype), product(d_part.T, thin, up.dtype)


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
