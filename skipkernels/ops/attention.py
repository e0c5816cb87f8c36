"""What the kernels of the attention operators share: a head's rows of tokens, read and written a part at a time."""

from __future__ import annotations

from torch import Tensor

from .launching import tl, triton

BYTES_E = 64
"""Of a row at a time. Heads are of any width, and the registers of a program do not grow with it."""


def in_one_layout(*tokens: Tensor) -> tuple[Tensor, ...]:
    """Tensors of the same strides, the numbers of a head side by side: themselves where that is so.

    As parts of one projection are, and contiguous ones.
    """
    first = tokens[0].stride()
    return (
        tokens if first[-1] == 1 and all(x.stride() == first for x in tokens) else tuple(map(Tensor.contiguous, tokens))
    )


@triton.jit
def load_rows(head_ptr, offs, mask, stride, start_e, E, BLOCK_E: tl.constexpr):
    """Part of the rows `offs` of one head, [BLOCK, BLOCK_E]; zero where the mask or the width ends."""
    offs_e = start_e + tl.arange(0, BLOCK_E)
    rows_ptr = head_ptr + offs.to(tl.int64)[:, None] * stride + offs_e[None, :]
    return tl.load(rows_ptr, mask=mask[:, None] & (offs_e < E)[None, :], other=0.0)


@triton.jit
def store_rows(head_ptr, rows, offs, mask, stride, start_e, E, BLOCK_E: tl.constexpr):
    """Part of the rows `offs` of one head, rounded to its dtype."""
    offs_e = start_e + tl.arange(0, BLOCK_E)
    rows_ptr = head_ptr + offs.to(tl.int64)[:, None] * stride + offs_e[None, :]
    tl.store(rows_ptr, rows.to(head_ptr.dtype.element_ty), mask=mask[:, None] & (offs_e < E)[None, :])


@triton.jit
def load_lse(lse_ptr, offs, mask):
    """lse in fp32, and the factor on exp(score − lse) for what fp32 leaves of it; no weight where the mask ends.

    In fp32 a lse of 300 is known to 2e-5, and so is every weight; where one key has nearly all the weight that is more
    than the gradient of the scores. The factor is exp(rest) to first order: the rest is half a step of fp32 at most.
    """
    lse = tl.load(lse_ptr + offs, mask=mask, other=1e30)  # not infinity, which has no rest
    high = lse.to(tl.float32)
    return high, 1.0 - (lse - high.to(tl.float64)).to(tl.float32)


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
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """⟨a_i, b_j⟩ of rows of one head, [BLOCK_A, BLOCK_B]."""
    product = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for start_e in range(0, E, BLOCK_E):
        a = load_rows(a_ptr, offs_a, mask_a, stride_a, start_e, E, BLOCK_E)
        b = load_rows(b_ptr, offs_b, mask_b, stride_b, start_e, E, BLOCK_E)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def row_products(a_ptr, stride_a, b_ptr, stride_b, offs, mask, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """⟨a_i, b_i⟩ of rows of one head, [BLOCK]."""
    product = tl.zeros([BLOCK], tl.float32)
    for start_e in range(0, E, BLOCK_E):
        a = load_rows(a_ptr, offs, mask, stride_a, start_e, E, BLOCK_E)
        b = load_rows(b_ptr, offs, mask, stride_b, start_e, E, BLOCK_E)
        product += tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1)
    return product
