"""Checks that a block can be fused: expected types, no hooks, no overrides, weights of one dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch
from torch.nn.utils import parametrize

from .fused_block import BlockWeights
from .low_rank import low_rank_updates

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OVERRIDABLE = {"forward", "attention", "__call__"}  # methods that may have been set on the instance


def global_hooks() -> list[Any]:
    """Hooks of all modules, without those of PyTorch's own tools such as `FlopCounterMode`, which only observe."""
    of_kinds = (getattr(modules_of_torch, f"_global{hooks}") for hooks in HOOKS)
    return [
        x for hooks in of_kinds for x in hooks.values() if not str(getattr(x, "__module__", "")).startswith("torch.")
    ]


def why_not_fusable(block: nn.Module, block_type: type, submodule_types: Mapping[str, tuple[type, ...]]) -> str | None:
    """Return why a block differs from a plain `block_type`, or None if it does not.

    It must have exactly the submodules of `submodule_types`, which are the allowed types by name. A `LowRankUpdate` of
    a weight is accepted: reading the weight returns the sum.
    """
    if type(block) is not block_type:
        return f"a block is a {type(block).__name__}, not a {block_type.__name__}"
    modules = {name: module for name, module in block.named_modules() if "parametrizations" not in name.split(".")}
    del modules[""]
    if modules.keys() != submodule_types.keys():
        return f"the submodules of a block differ from those of a {block_type.__name__}"
    for name, module in modules.items():
        if parametrize.type_before_parametrizations(module) not in submodule_types[name]:
            return f"a block has a {type(module).__name__} for its {name}"
    for module in (block, *modules.values()):
        parametrized = parametrize.is_parametrized(module) and not low_rank_updates(module)
        if not _OVERRIDABLE.isdisjoint(vars(module)) or parametrized:
            return f"a {type(module).__name__} of a block was altered"
    hooked = any(getattr(module, hooks) for module in (block, *modules.values()) for hooks in HOOKS)
    return "a block has hooks" if hooked else None


def why_weights_not_fusable(weights: BlockWeights) -> str | None:
    """Return why a block with these weights cannot be fused, or None if it can."""
    tensors = weights.tensors()
    if any(x is None for x in tensors):
        return "a layer of a block has no bias, or a norm has no weight"
    if len({x.dtype for x in tensors if x.ndim == 2}) > 1:
        return "the weights of a block have more than one dtype"
    return None


def with_layer_scale(layer: nn.Linear, scale: Any) -> tuple[Tensor, Any]:
    """Weight and bias of a layer, multiplied by the layer scale that follows it, if there is one."""
    if isinstance(scale, nn.Identity) or layer.bias is None:
        return layer.weight, layer.bias
    return scale.gamma[:, None] * layer.weight, scale.gamma * layer.bias
