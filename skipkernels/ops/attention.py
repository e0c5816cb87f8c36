"""Tiles of one head, shared by the Triton kernels of the attention operators."""

from __future__ import annotations

from torch import Tensor

from .launching import tl, triton


def in_one_layout(*tokens: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of equal strides with contiguous heads; copy them unless they already have these strides."""
    first = tokens[0].stride()
    return (
        tokens if first[-1] == 1 and all(x.stride() == first for x in tokens) else tuple(map(Tensor.contiguous, tokens))
    )


@triton.jit
def load_rows(head_ptr, offs, mask, stride, E, BLOCK_E: tl.constexpr, start_e=0):
    """Load the rows `offs` of one head, [BLOCK, BLOCK_E], from column start_e; 0 outside the mask and the width."""
    offs_e = start_e + tl.arange(0, BLOCK_E)
    rows_ptr = head_ptr + offs.to(tl.int64)[:, None] * stride + offs_e[None, :]  # [BLOCK, BLOCK_E]
    return tl.load(rows_ptr, mask=mask[:, None] & (offs_e < E)[None, :], other=0.0)  # [BLOCK, BLOCK_E]


@triton.jit
def store_rows(head_ptr, rows, offs, mask, stride, E, BLOCK_E: tl.constexpr):
    """Store the rows `offs` of one head, [BLOCK, BLOCK_E], rounded to the dtype of the tensor."""
    offs_e = tl.arange(0, BLOCK_E)
    rows_ptr = head_ptr + offs.to(tl.int64)[:, None] * stride + offs_e[None, :]  # [BLOCK, BLOCK_E]
    tl.store(rows_ptr, rows.to(head_ptr.dtype.element_ty), mask=mask[:, None] & (offs_e < E)[None, :])


@triton.jit
def load_lse(lse_ptr, offs, mask):
    """Load lse, rounded to fp32, and the factor of exp(score − lse) that corrects the rounding."""
    lse = tl.load(lse_ptr + offs, mask=mask, other=1e30)  # weights outside the mask are 0; infinity − infinity is NaN
    # fp32 rounds a lse of 300 by up to 2e-5, and with it every weight; if one key has nearly all the weight, that is
    # more than the gradient of the scores.
    high = lse.to(tl.float32)
    return high, 1.0 - (lse - high.to(tl.float64)).to(tl.float32)  # exp(high − lse) to first order


@triton.jit
def products(
    a_ptr,
    offs_a,
    mask_a,
    stride_a,
    b_ptr,
    offs_b,
    mask_b,
    stride_b,
    E,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute ⟨a_i, b_j⟩ of rows of one head, offs_a [BLOCK_A] and offs_b [BLOCK_B], as [BLOCK_A, BLOCK_B]."""
    product = tl.zeros([offs_a.shape[0], offs_b.shape[0]], tl.float32)
    for start_e in range(0, E, BLOCK_E):
        a = load_rows(a_ptr, offs_a, mask_a, stride_a, E, BLOCK_E, start_e)  # [BLOCK_A, BLOCK_E]
        b = load_rows(b_ptr, offs_b, mask_b, stride_b, E, BLOCK_E, start_e)  # [BLOCK_B, BLOCK_E]
        # [BLOCK_A, BLOCK_E] @ [BLOCK_E, BLOCK_B] -> [BLOCK_A, BLOCK_B]
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product
