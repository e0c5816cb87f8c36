"""xformers as an optional attention backend: `memory_efficient_attention` on a GPU.

Suffixes behind a shared prefix are one block-diagonal call, in which the keys of each suffix follow a copy of the
prefix and the causal mask is aligned to the bottom right. `shared_prefix_attention` needs no copies of the prefix.

The package is imported by the functions, so that `check_available` can say that it is missing.
"""

from __future__ import annotations

import textwrap

import torch
from torch import Tensor

from .. import reference
from .base import Tower
from .block import FusedBlock
from .rows import AttentionBackend


def _full(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers import ops

    return ops.memory_efficient_attention(query, key, value)


def _shared_prefix(
    packed: Tensor, *, heads: int, prefix_length: int, max_length: int, offsets: Tensor | None = None
) -> Tensor:
    """See `functional.shared_prefix_attention`. Suffixes are padded: their lengths would need a host sync."""
    from xformers import ops

    P, T = prefix_length, len(packed) - prefix_length
    prefix, suffixes = packed.unflatten(1, (3, heads, -1)).split([P, T])  # [tokens, 3, H, E]
    if offsets is None:
        padded = suffixes.unflatten(0, (-1, max_length))
    else:
        padded = reference.padded_suffixes(suffixes, offsets, max_length)
    K = len(padded)
    mask = ops.fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
        [P, *[max_length] * K], [P, *[P + max_length] * K]
    )

    def keys(part: int) -> Tensor:
        """The prefix, then each suffix behind a copy of it, [1, tokens, H, E]."""
        first = prefix[:, part]
        behind = torch.cat([first.expand(K, *first.shape), padded[:, :, part]], dim=1)
        return torch.cat([first, behind.flatten(0, 1)])[None]

    query = torch.cat([prefix[:, 0], padded[:, :, 0].flatten(0, 1)])[None]
    out = ops.memory_efficient_attention(query, keys(1), keys(2), attn_bias=mask)[0].flatten(1)
    if offsets is None:
        return out
    rows = reference.packed_suffixes(out[P:].unflatten(0, (K, max_length)), offsets, T)
    return torch.cat([out[:P], rows])


XFORMERS = AttentionBackend(_full, _shared_prefix)


def check_available(*towers: Tower) -> None:
    """Raise a ValueError unless xformers runs on the device of these towers, with their heads."""
    for tower in towers:
        block = tower.blocks[0]
        if not isinstance(block, FusedBlock) or block.why_not_fused() is not None:
            continue
        weights, settings = block.read_weights()
        out_proj = weights["out_proj"]
        reason = _why_unavailable(out_proj.device, out_proj.dtype, len(out_proj) // settings.heads)
        if reason is not None:
            raise ValueError(
                f'SkipCLIP: attention="xformers" cannot be used here: {reason} Leave it at "sdpa", or use a GPU '
                "and an xformers that was built for this PyTorch."
            )


def _why_unavailable(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Return why xformers cannot be used, or None if a forward and a backward pass succeed."""
    try:
        packed = torch.zeros(4, 3 * head_width, device=device, dtype=dtype).requires_grad_()
        full = XFORMERS.full(*packed.view(1, 4, 3, 1, head_width).unbind(2))
        suffixes = XFORMERS.shared_prefix(packed, heads=1, prefix_length=2, max_length=2)
        (full.sum() + suffixes.sum()).backward()
    except Exception as error:  # of any type: xformers without its attention has an AttributeError
        return textwrap.shorten(str(error), 300, placeholder=" ….")
    return None
