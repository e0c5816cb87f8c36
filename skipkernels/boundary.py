"""LSkip: each tower has a cut, and the blocks below it are frozen.

`LSkipBoundary` runs them, a bounded number of samples at a time. Their output is a constant: backward stops at the
first block above the cut, which computes no gradient of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEFAULT_CHUNK = 256  # samples; each takes about 0.6 MB of hidden states and 2.4 MB in the MLP of a ViT-B/16


class LSkipBoundary(torch.autograd.Function):
    """Run `lower` over `inputs` in chunks of at most `chunk` samples, without gradient.

    Called as `LSkipBoundary.apply(lower, inputs, chunk)`. It is a Function although no gradient passes: by
    `needs_input_grad` it learns that the caller expects one, and raises an error.

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
        if ctx.needs_input_grad[1]:
            raise _lost_gradient("its input")

        def run(samples: Tensor) -> Tensor:  # [≤ chunk, …] -> [≤ chunk, …]
            # Frozen blocks record nothing, but with grad mode on, `hidden` requires grad if `lower` uses a tensor that
            # does, such as a learned context.
            with torch.enable_grad():
                hidden = lower(samples)
            if hidden.requires_grad:
                raise _lost_gradient("a tensor used below it")
            return hidden

        if len(inputs) <= chunk:
            output = run(inputs)  # [B, …]
        else:
            first = run(inputs[:chunk])  # [chunk, …]
            output = first.new_empty(len(inputs), *first.shape[1:])  # [B, …]
            output[:chunk] = first
            for start in range(chunk, len(inputs), chunk):
                output[start : start + chunk] = run(inputs[start : start + chunk])  # [≤ chunk, …]
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        """Return no gradients."""
        return None, None, None


def _lost_gradient(of: str) -> RuntimeError:
    return RuntimeError(
        f"LSkipBoundary: no gradient passes the cut, and {of} requires grad. To train it, use skip_layers=0 for this "
        "tower, (0, …) for images or (…, 0) for texts; otherwise detach it, or set its requires_grad to False."
    )
