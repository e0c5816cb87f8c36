"""A pre-norm transformer block as one autograd node that saves little for backward.

    hidden = stream + branch of the previous block
    mid = hidden + attention(LN₁(hidden)) · W_o + b_o
    branch = act(LN₂(mid) · W_fc + b_fc) · W_p + b_p

The result is the sum of mid and branch, returned as `Hidden`, so that the norm of the next block adds them.

Options, as some families have them: a norm of each head of query and key (`query_norm`, `key_norm`), rotary position
embeddings of query and key (`Rotary`), a norm of the result of attention and one of the activation (`attention_norm`,
`mlp_norm`), SwiGLU, where W_fc has gate and value side by side, RMSNorm in place of LayerNorm, and no biases.

    weights.py    weights and settings of a block, read from its modules, and prepared for the stages
    node.py       `fused_block`, by a `torch.autograd.Function`; imported by the first block that runs
    stages.py     norm_1 → in_proj → attention → out_proj → norm_2 → mlp, each with its backward, and what each saves
    gradients.py  gradients of the weights, as products and as sums over rows

Here is what a tower passes to a block.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...options import FusedMemory
from ..attention import BlockAttention


class Hidden(NamedTuple):
    """Hidden states as a sum that is not computed yet: the next norm adds it.

    Both terms must have the same gradient up to rounding, as those of a sum: a fused block takes its residual gradient
    from `stream` and that of its product from `branch`. (A NamedTuple, since hooks of FSDP2 look for tensors in it.)
    """

    stream: Tensor
    branch: Tensor | None = None

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
    rotary: Rotary | None = None  # Of sequences of equal length, the query rows being the first of each
