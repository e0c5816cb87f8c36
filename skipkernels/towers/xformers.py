"""Attention by xformers, for who asks for it: `memory_efficient_attention`, on a GPU.

Suffixes behind a shared prefix are one block-diagonal call, in which each suffix has the prefix in front of its keys;
its mask is causal as counted from the end of both. The copies of the prefix are what `suffix_attention` does without.
"""

from __future__ import annotations

import textwrap

import torch
from torch import Tensor

from .attention import Backend


def unusable(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why xformers cannot serve here, or None: a forward and a backward pass are tried."""
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


def backend() -> Backend:
    """xformers as `attention.py` calls it.

    Raises:
        ImportError: If it is not installed.
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
        """As `functional.suffix_attention`. Packed suffixes wait for their lengths; those of one length do not."""
        lengths = [query.shape[1]] * len(query) if offsets is None else offsets.diff().tolist()
        rows = query.flatten(0, 1) if offsets is None else query

        def together(front: Tensor, behind: Tensor) -> Tensor:
            """The prefix again in front of each suffix, [1, tokens, H, E]."""
            suffixes = behind if offsets is None else behind.split(lengths)
            return torch.cat([part for suffix in suffixes for part in (front, suffix)])[None]

        mask = ops.fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            lengths, [len(prefix_key) + length for length in lengths]
        )
        keys, values = together(prefix_key, key), together(prefix_value, value)
        return ops.memory_efficient_attention(rows[None], keys, values, attn_bias=mask)[0].view_as(query)

    return Backend(full, causal, behind_prefix)
