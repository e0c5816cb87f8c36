"""LSkip: the line in each tower below which nothing is trained and nothing is kept.

The blocks below it run with recording off, a bounded number of samples at a time, and their output is a constant:
the first block above computes no gradient for its input, and backward stops there.
Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEFAULT_CHUNK = 256  # samples; a ViT-B/16 holds about 0.6 MB of hidden states and 2.4 MB of MLP for each


class LSkipBoundary(torch.autograd.Function):
    """Run `lower` over `inputs` in chunks of at most `chunk` samples; the result takes part in no gradient.

    Called as `LSkipBoundary.apply(lower, inputs, chunk)`. Saves nothing for backward.

    Args:
        lower: Maps [n, …] to [n, …], sample by sample.
        inputs: [B, …].
        chunk: Most samples in memory at once.

    Returns:
        [B, …]: what `lower` gives, with `requires_grad` False.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> hidden = LSkipBoundary.apply(layer, torch.ones(5, 3), 2)
        >>> hidden.shape, hidden.requires_grad
        (torch.Size([5, 2]), False)
    """

    @staticmethod
    def forward(ctx: Any, lower: Callable[[Tensor], Tensor], inputs: Tensor, chunk: int = DEFAULT_CHUNK) -> Tensor:
        """Run the lower part; see the class."""
        with torch.no_grad():
            if len(inputs) <= chunk:
                output = lower(inputs)
            else:
                first = lower(inputs[:chunk])
                output = first.new_empty(len(inputs), *first.shape[1:])
                output[:chunk] = first
                for start in range(chunk, len(inputs), chunk):
                    output[start : start + chunk] = lower(inputs[start : start + chunk])
        ctx.mark_non_differentiable(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        """No gradient passes."""
        return None, None, None
