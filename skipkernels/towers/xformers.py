"""xformers as an optional attention backend: `memory_efficient_attention` on a GPU.

Suffixes behind a shared prefix are one block-diagonal call, in which the keys of each suffix follow a copy of the
prefix and the causal mask is aligned to the bottom right. `suffix_attention` needs no copies of the prefix.
"""

from __future__ import annotations

import textwrap

import torch
from torch import Tensor

from .attention import AttentionBackend


def why_unavailable(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Return why xformers cannot be used, or None if a forward and a backward pass succeed."""
    try:
        backend()
        prefix = torch.zeros(2, 1, head_width, device=device, dtype=dtype)
        query, key, value = (
            torch.zeros(2, 3, 1, head_width, device=device, dtype=dtype).requires_grad_() for _ in "qkv"
        )
        full = backend().full(query, key, value)
        (full + backend().behind_prefix(query, prefix, prefix, key, value)).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        return textwrap.shorten(str(error), 300, placeholder=" ….")
    return None


def backend() -> AttentionBackend:
    """Attention functions of xformers.

    Raises:
        ImportError: If xformers is not installed.
    """
    from xformers import ops

    def full(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.memory_efficient_attention(query, key, value)

    def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.memory_efficient_attention(query, key, value, attn_bias=ops.LowerTriangularMask())

    def behind_prefix(
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """See `functional.suffix_attention`. Packed suffixes need a host sync for their lengths; padded ones do not."""
        suffix_lengths = [query.shape[1]] * len(query) if offsets is None else offsets.diff().tolist()
        rows = query.flatten(0, 1) if offsets is None else query

        def with_prefix(prefix: Tensor, suffixes: Tensor) -> Tensor:
            """Concatenate each suffix behind a copy of the prefix, [1, tokens, H, E]."""
            parts = suffixes if offsets is None else suffixes.split(suffix_lengths)
            return torch.cat([part for suffix in parts for part in (prefix, suffix)])[None]

        mask = ops.fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            suffix_lengths, [len(prefix_key) + length for length in suffix_lengths]
        )
        keys, values = with_prefix(prefix_key, key), with_prefix(prefix_value, value)
        return ops.memory_efficient_attention(rows[None], keys, values, attn_bias=mask)[0].view_as(query)

    return AttentionBackend(full, causal, behind_prefix)
