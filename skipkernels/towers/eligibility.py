"""Whether a block is what its type promises, so that it may run as one node, which sees its weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .fused_block import Weights, flattened

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ALTERED = {"forward", "attention", "__call__"}  # methods that someone may have put on the object itself


def unlike(block: nn.Module, kind: type, parts: Mapping[str, tuple[type, ...]]) -> str | None:
    """Why a block is not a plain `kind`, or None.

    Args:
        block: The caller's.
        kind: The type of the block itself.
        parts: Every module in it, by its name there, and which types it may have. No other may be in it.
    """
    if type(block) is not kind:
        return f"a block is a {type(block).__name__}, not a {kind.__name__}"
    modules = dict(block.named_modules())
    del modules[""]
    if modules.keys() != parts.keys():
        return f"a block has other parts than a {kind.__name__}"
    for name, module in modules.items():
        if type(module) not in parts[name]:
            return f"a block has a {type(module).__name__} for its {name}"
    for module in (block, *modules.values()):
        if not _ALTERED.isdisjoint(vars(module)) or parametrize.is_parametrized(module):
            return f"a {type(module).__name__} of a block was altered"
    hooked = any(getattr(module, hooks) for module in (block, *modules.values()) for hooks in _HOOKS)
    return "a block has hooks" if hooked else None


def scaled(layer: nn.Linear, scale: Any) -> tuple[Tensor, Any]:
    """Weight and bias of a layer, with the layer scale behind it, if it is one, multiplied in."""
    if isinstance(scale, nn.Identity) or layer.bias is None:
        return layer.weight, layer.bias
    return scale.gamma[:, None] * layer.weight, scale.gamma * layer.bias


def lacks(weights: Weights) -> str | None:
    """Why a block with these weights cannot run as one node, or None."""
    tensors = flattened(weights)
    if any(x is None for x in tensors):
        return "a layer of a block has no bias, or a norm no weight"
    if len({x.dtype for x in tensors if x.ndim == 2}) > 1:
        return "the weights of a block are of more than one dtype"
    return None
