"""A pre-norm transformer block as one autograd node that saves little for backward.

    hidden = stream + branch
    mid = hidden + attention(LN₁(hidden)) · W_o + b_o
    out = mid + act(LN₂(mid) · W_fc + b_fc) · W_p + b_p

Input and output are sums that the next norm computes: a `Hidden` with a stream and a branch. The stream of the output
is mid, and its branch the MLP's result. A sum has one gradient, which backward takes and returns once for each term: in
the dtype of the stream, and in that of the branch.

Options, as some families have them: a norm of each head of query and key (`query_norm`, `key_norm`), rotary position
embeddings of query and key (`Rotary`), a norm of the result of attention and one of the activation (`attention_norm`,
`mlp_norm`), SwiGLU, where W_fc has gate and value side by side, RMSNorm in place of LayerNorm, and no biases.

    weights.py    weights and settings of a block, read from its modules, and prepared for the stages
    node.py       `fused_block`, by a `torch.autograd.Function`; imported by the first block that runs
    stages.py     norm_1 → in_proj → attention → out_proj → norm_2 → mlp, forward and backward, and what each saves
    gradients.py  gradients of the weights, as products and as sums over rows

Here is what a tower passes to a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...options import FusedMemory
from ...reference import autocast_dtype
from ..attention import BlockAttention


class Hidden(NamedTuple):
    """Hidden states [R, W] as a sum that is not computed yet. (A NamedTuple, in which hooks of FSDP2 find tensors.)

    The reader uses the sum of both terms, so that both have the same gradient up to rounding.
    """

    stream: Tensor
    branch: Tensor | None = None  # in the dtype of products; None in front of the first block

    def sum(self) -> Tensor:
        """Compute the sum in the dtype of the stream."""
        return self.stream if self.branch is None else (self.stream + self.branch).to(self.stream.dtype)


class Rotary(NamedTuple):
    """Rotary position embeddings of the tokens of a sequence, see `functional.rotary_embedding`."""

    cos: Tensor  # [tokens, E/2]; 1 for a token without a position, such as the class token
    sin: Tensor  # [tokens, E/2]
    interleaved: bool


class RowsOptions(NamedTuple):
    """Second argument of a fused block that is called with rows, `block(hidden, options)`; the first is a `Hidden`."""

    attention: BlockAttention
    memory: FusedMemory = "fast"  # What is saved for backward; table in `stages.py`
    rotary: Rotary | None = None  # Of sequences of equal length


# Values per token that `memory="auto"` counts, in multiples of W. A fused block saves 2 in the dtype of the stream and
# 8 in that of the products (table in `stages.py`), and 3 more with norms of heads: attention reads and saves normed
# copies of query, key and value. SwiGLU with M = 4·W adds 4, which are not counted: half of the free memory is left.
STREAM_WIDTHS, PRODUCT_WIDTHS = 2, 8 + 3
OWN_FORWARD_WIDTHS = 20  # saved by PyTorch for a block's own forward: 16, or 20 with QuickGELU


def most_saved_bytes(hidden: Tensor, *, fused: bool) -> int:
    """Bytes that a block over hidden states [..., W] saves for backward at most, with memory="fast" if it is fused."""
    stream = hidden.element_size()
    if not fused:
        return hidden.numel() * OWN_FORWARD_WIDTHS * stream
    autocast = autocast_dtype(hidden.device)
    if autocast is None or hidden.dtype == torch.float64:  # which autocast leaves as it is
        return hidden.numel() * (STREAM_WIDTHS + PRODUCT_WIDTHS) * stream
    casts = 12 * hidden.shape[-1] ** 2  # of the weights: (3 + 1 + 4 + 4) · W²
    return hidden.numel() * STREAM_WIDTHS * stream + (hidden.numel() * PRODUCT_WIDTHS + casts) * autocast.itemsize
