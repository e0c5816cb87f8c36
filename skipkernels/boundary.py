"""LSkip, layer-wise skipping: each tower has a cut, below which the blocks are frozen.

They run a bounded number of samples at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEFAULT_CHUNK = 256  # samples; each takes about 0.6 MB of hidden states and 2.4 MB in the MLP of a ViT-B/16


class LostGradient(RuntimeError):
    """A gradient that would have to pass the cut."""


def run_frozen(lower: Callable[[Tensor], Tensor], inputs: Tensor, chunk: int = DEFAULT_CHUNK) -> Tensor:
    """Run `lower` over `inputs` in chunks of at most `chunk` samples. Its output is a constant: backward stops there.

    The first block above the cut then computes no gradient of its input.

    Args:
        lower: Function of [n, …] to [n, …] that treats samples independently.
        inputs: [B, …], any dtype.
        chunk: Largest number of samples in one call of `lower`; 256 by default.

    Returns:
        [B, …]: the output of `lower`, with `requires_grad` False.

    Raises:
        LostGradient: If a tensor that `lower` uses requires grad; with grad mode on, also if the input does.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509, section 4.

    Example:
        >>> layer = torch.nn.Linear(3, 2).requires_grad_(False)
        >>> hidden = run_frozen(layer, torch.ones(5, 3), 2)
        >>> hidden.shape, hidden.requires_grad
        (torch.Size([5, 2]), False)
    """
    if inputs.requires_grad and torch.is_grad_enabled():
        raise _lost_gradient("its input")
    first, *others = inputs.detach().split(chunk)  # [≤ chunk, …] each
    output = _run_chunk(lower, first)
    if not others:
        return output
    whole = output.new_empty(len(inputs), *output.shape[1:])  # [B, …]
    whole[:chunk] = output
    for i, samples in enumerate(others, start=1):
        whole[i * chunk : (i + 1) * chunk] = _run_chunk(lower, samples)
    return whole


def _run_chunk(lower: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    # Frozen blocks record nothing, but with grad mode on, `hidden` requires grad if `lower` uses a tensor that does,
    # such as a learned context.
    with torch.enable_grad():
        hidden = lower(samples)
    if hidden.requires_grad:
        raise _lost_gradient("a tensor used below it")
    return hidden


def _lost_gradient(of: str) -> LostGradient:
    return LostGradient(
        f"run_frozen: no gradient passes the cut, and {of} requires grad. To train it, use skip_layers=0 for this "
        "tower, (0, …) for images or (…, 0) for texts; otherwise detach it, or set its requires_grad to False. A model "
        "of transformers with gradient_checkpointing_enable() makes its embeddings require grad: call its "
        'gradient_checkpointing_disable() and disable_input_require_grads(), and use memory="min".'
    )
