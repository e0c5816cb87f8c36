"""Gradients of a fused block: what a backward pass has to compute, and what it has computed.

A weight W + s · B · A with frozen W (`LowRankFactors`) gets no gradient itself. With y = x (W + s · B · A)ᵀ,

    d_A = s · (d_y B)ᵀ x,   d_B = s · d_yᵀ (x Aᵀ)

are thin products, in place of one as large as the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ops import launching
from ...ops.row_sums import MAX_ROWS, column_sums
from .weights import ATTENTION_NORMS, LowRankFactors

NORM_1_AND_IN_PROJ = ("norm_1", "norm_1_bias", "in_proj", "in_proj_bias")


@dataclass(frozen=True)
class Needed:
    """Gradients that a backward pass has to compute."""

    inputs: bool  # those of stream and branch
    weights: frozenset[str]  # fields of `BlockWeights`
    updates: dict[str, Sequence[LowRankFactors]]  # factors of the low-rank updates of these fields

    def any_of(self, *names: str) -> bool:
        """True for a gradient of one of these weights."""
        return not self.weights.isdisjoint(names)

    def product(self, name: str) -> bool:
        """True if a gradient of this weight, or of its factors, is a product with the input of its layer."""
        return name in self.weights or name in self.updates

    @property
    def of_attention(self) -> bool:
        """True if a gradient depends on that of attention."""
        return self.inputs or self.product("in_proj") or self.any_of(*NORM_1_AND_IN_PROJ, *ATTENTION_NORMS)


@dataclass
class Gradients:
    """Gradients that the stages of a backward pass have computed.

    Those of weights may be in `dtype` or in that of the products, and more than needed.
    """

    needed: Needed
    dtype: torch.dtype  # of the matrices
    sums: Sums  # gradients of vectors that are not complete yet
    stream: Tensor | None = None  # [R, W]
    branch: Tensor | None = None  # [R, W], in the dtype of the products
    weights: dict[str, Tensor] = field(default_factory=dict)  # by the fields of `BlockWeights`
    factors: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # A and B by field and part

    def add_product(self, name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Add the gradient of a weight, and of its factors, from gradients of results of its layer and their inputs.

        d_out [R, out] and input [R, in] of each pair give d_W = d_outᵀ · input, [out, in], one below the other.
        """
        if name in self.needed.weights:
            self.weights[name] = joint_product(pairs, self.dtype)
        self.add_factors(name, *pairs)

    def add_factors(self, name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Add the gradients of A and B of a weight; pair i has the parts of the weight from part i on."""
        for first, (d_out, inputs) in enumerate(pairs):
            for update in self.needed.updates.get(name, ()):
                scale, down, up = update.scale, update.down, update.up
                start = (update.part - first) * len(up)
                if not 0 <= start < d_out.shape[1]:
                    continue  # of another pair
                d_part = d_out[:, start : start + len(up)]  # [R, out]
                d_thin = d_part @ (scale * up).to(d_part.dtype)  # [R, out] @ [out, rank] -> [R, rank]
                thin = inputs @ (scale * down).to(inputs.dtype).T  # [R, in] @ [in, rank] -> [R, rank]
                self.factors[name, update.part] = (
                    product(d_thin.T, inputs, down.dtype),  # [rank, R] @ [R, in] -> [rank, in]
                    product(d_part.T, thin, up.dtype),  # [out, R] @ [R, rank] -> [out, rank]
                )

    def complete(self) -> None:
        """Complete the gradients of vectors that are left, by one launch."""
        self.weights |= self.sums.complete()

    def add_sums(self, sums: Tensor, **totals: Tensor) -> None:
        """Add the results of an operator: partial sums of vectors of equal width side by side, or else the totals."""
        if sums.numel() == 0:
            self.weights |= {name: total for name, total in totals.items() if total.numel() > 0}
        else:
            self.sums.add(list(totals), [sums])

    def add_column_sums(self, name: str, matrices: Sequence[Tensor]) -> None:
        """Add the column sums of one or more matrices, side by side."""
        if self.sums.partial and len(matrices[-1]) <= MAX_ROWS:
            self.sums.add([name], matrices)
            return
        # On a CPU a sum in another dtype would convert all rows first.
        dtype = matrices[0].dtype if matrices[0].is_cpu else self.sums.dtype
        sums = [x.sum(0, dtype=dtype) for x in matrices]  # `out=` has no batching rule
        self.weights[name] = torch.cat(sums) if len(sums) > 1 else sums[0]


@dataclass
class Sums:
    """Sums over rows, the gradients of vectors, to be completed together."""

    dtype: torch.dtype
    partial: bool  # Operators leave partial sums; False: each completes its own
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
    """True if the gradients of all vectors are completed by one launch; on a CPU each operator completes its own."""
    return device.type != "cpu" and launching.installed


# ---- products --------------------------------------------------------------------------------------------------------


@functools.cache
def _products_widen(device_type: str) -> bool:
    """True if a product of 16-bit matrices can be written in fp32."""
    try:
        one = torch.ones(8, 8, dtype=torch.bfloat16, device=device_type)
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


def _product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which `product` writes a product of tensors like `x`."""
    is_16_bit = x.dtype in (torch.bfloat16, torch.float16)
    return dtype if is_16_bit and dtype == torch.float32 and _products_widen(x.device.type) else x.dtype


def product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left · right, in `dtype` if the device can write it without another launch, else in the dtype of both."""
    if _product_dtype(left, dtype) == left.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=dtype, out=out)


def joint_product(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """d_outᵀ · input of pairs [R, out], [R, in], one below the other, [sum of out, in]."""
    if len(pairs) == 1:
        ((d_out, inputs),) = pairs
        return product(d_out.T, inputs, dtype)
    heights, inputs = [d_out.shape[1] for d_out, _ in pairs], pairs[0][1]
    joint = inputs.new_empty(sum(heights), inputs.shape[1], dtype=_product_dtype(inputs, dtype))
    for (d_out, inputs), out in zip(pairs, joint.split(heights), strict=True):
        product(d_out.T, inputs, dtype, out=out)
    return joint
