"""Device assertions of ids, shared by the Triton kernels. A launch with `debug=True` compiles them."""

from __future__ import annotations

from .launching import tl, triton


@triton.jit
def assert_rows(ids, mask, n, MESSAGE: tl.constexpr):
    """Fail unless 0 ≤ id < n for all ids of the mask."""
    tl.device_assert((ids >= 0) & (ids < n) | ~mask, MESSAGE)


@triton.jit
def assert_different_rows(ids_ptr, begin, end, K, n, MESSAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Fail unless 0 ≤ id < n for ids number begin to end − 1, and each is once among all K."""
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        ids = tl.load(ids_ptr + offs, mask=mask, other=0)  # [BLOCK]
        assert_rows(ids, mask, n, MESSAGE)
        ids = ids.to(tl.int32)  # fewer registers
        found = tl.zeros([BLOCK], tl.int32)
        for start_k in range(0, K, BLOCK):
            offs_k = start_k + tl.arange(0, BLOCK)
            others = tl.load(ids_ptr + offs_k, mask=offs_k < K, other=-1).to(tl.int32)  # [BLOCK]
            found += tl.sum((ids[:, None] == others[None, :]).to(tl.int32), axis=1)
        tl.device_assert((found == 1) | ~mask, MESSAGE)
