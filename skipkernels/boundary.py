"""LSkip: the cut in each tower. Blocks below it are frozen, and their output is a constant.

Blocks below the cut run without autograd, a bounded number of samples at a time. Backward stops at the first block
above the cut, which computes no gradient of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEFAULT_CHUNK = 256  # samples; each takes about 0.6 MB of hidden states and 2.4 MB in the MLP of a ViT-B/16


class LSkipBoundary(torch.autograd.Function):
    """Run `lower` over `inputs` in chunks of at most `chunk` samples, without gradient.

    Called as `LSkipBoundary.apply(lower, inputs, chunk)`. Saves nothing for backward.

    Args:
        lower: Function of [n, …] to [n, …] that treats samples independently.
        inputs: [B, …], any dtype.
        chunk: Largest number of samples in one call of `lower`; 256 by default.

    Returns:
        [B, …]: the output of `lower`, with `requires_grad` False.

    Raises:
        RuntimeError: If a gradient would be lost: the input, or a tensor that `lower` uses, requires grad.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509, section 4.

    Example:
        >>> layer = torch.nn.Linear(3, 2).requires_grad_(False)
        >>> hidden = LSkipBoundary.apply(layer, torch.ones(5, 3), 2)
        >>> hidden.shape, hidden.requires_grad
        (torch.Size([5, 2]), False)
    """

    @staticmethod
    def forward(ctx: Any, lower: Callable[[Tensor], Tensor], inputs: Tensor, chunk: int = DEFAULT_CHUNK) -> Tensor:
        """Run `lower`; see the class."""

        def run(samples: Tensor) -> Tensor:  # [≤ chunk, …] -> [≤ chunk, …]
            with torch.enable_grad():  # nothing is recorded: parameters below the cut are frozen
                hidden = lower(samples.detach())
            if hidden.requires_grad or ctx.needs_input_grad[1]:
                cause = "its input requires" if ctx.needs_input_grad[1] else "a tensor used below it requires"
                raise RuntimeError(
                    f"LSkipBoundary: no gradient passes the cut, and {cause} grad. To train it, use skip_layers=0 for "
                    "this tower, (0, …) for images or (…, 0) for texts; otherwise detach it, or set its requires_grad "
                    "to False."
                )
            return hidden

        if len(inputs) <= chunk:
            output = run(inputs)  # [B, …]
        else:
            first = run(inputs[:chunk])  # [chunk, …]
            output = first.new_empty(len(inputs), *first.shape[1:])  # [B, …]
            output[:chunk] = first
            for start in range(chunk, len(inputs), chunk):
                output[start : start + chunk] = run(inputs[start : start + chunk])  # [≤ chunk, …]
        ctx.mark_non_differentiable(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        """Return no gradients."""
        return None, None, None
