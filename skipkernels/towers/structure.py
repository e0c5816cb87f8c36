"""Detection of changes to the modules that SkipCLIP reads but does not call.

A fused block reads the weights and settings of the caller's block and never calls it. The containers around the blocks
(the model, `visual`, a stack of blocks) are not called either. What is changed in them after SkipCLIP was made (a hook,
a replaced layer, another number of heads) would be ignored, so each step compares them with a snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

from .base import Part, Tower, UnsupportedModel

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EMBEDDERS = ("encode_image", "encode_text", "get_image_features", "get_text_features")
# Attributes of every module, and those of PyTorch's layers that follow from the weights.
_IGNORED = {*vars(nn.Module()), "in_features", "out_features", "normalized_shape", "elementwise_affine"}


class Structure:
    """A snapshot of modules: types, settings, parameters, submodules, buffers, hooks and instance methods.

    Args:
        modules: The modules to compare.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._modules = list(dict.fromkeys(modules))
        self._dicts = [vars(module) for module in self._modules]
        self._parts = [x for module in self._modules for x in (module._parameters, module._modules) if x]
        self._hooks = [getattr(module, name) for module in self._modules for name in _HOOKS]
        settings = [(own, [name for name in own if name not in _IGNORED]) for own in self._dicts]
        self._settings = [(itemgetter(*names), own) for own, names in settings if names]
        self._tensors = [x for module in self._modules for x in module._buffers.values() if x is not None]
        self._tensors += [x for own, names in settings for name in names if isinstance(x := own[name], Tensor)]
        self._seen = [dict(part) for part in self._parts]
        self._counts = self._count()

    def _count(self) -> list[Any]:
        return [
            list(map(type, self._modules)),
            list(map(len, self._dicts)),  # an instance method or a new attribute makes it longer
            [get(own) for get, own in self._settings],
            list(map(_VERSION, self._tensors)),
            list(map(Tensor.data_ptr, self._tensors)),
        ]

    def is_unchanged(self) -> bool:
        """True if nothing differs from the snapshot. Numbers written past autograd (`.data`) are not seen."""
        try:
            return not any(self._hooks) and self._parts == self._seen and self._count() == self._counts
        except (RuntimeError, TypeError, KeyError):  # two tensors were compared by value, or an attribute is gone
            return False


_VERSION = attrgetter("_version")


def bypassed(model: nn.Module, towers: Sequence[Tower], blocks: Iterable[tuple[Tower, int]]) -> list[nn.Module]:
    """Modules that SkipCLIP reads or replaces and does not call: containers of the towers, and fused blocks.

    Args:
        model: The caller's.
        towers: Both.
        blocks: (tower, index) of the blocks to include, where they are fused.
    """
    called = {id(module) for tower in towers for part in _called(tower) for module in part.modules()}
    fused = [x for tower, index in blocks if tower.is_fused(index) for x in tower.blocks[index].modules()]
    every = {id(x) for tower in towers for block in tower.blocks for x in block.modules()} | called
    parameters = {id(part) for tower in towers for part in (*tower.embedding, *tower.head) if _is_parameter(part)}

    def holds_a_part(module: nn.Module) -> bool:
        inside = any(id(child) in every for child in module.modules())
        return inside or any(id(parameter) in parameters for parameter in module.parameters(recurse=False))

    containers = [x for x in model.modules() if id(x) not in every and (x is model or holds_a_part(x))]
    return [*containers, *fused]


def refuse_overrides(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Refuse hooks and instance methods on modules that are not called.

    Raises:
        UnsupportedModel: If there is one.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for module in modules:
        own, what = vars(module), None
        if module is not model and any(own[name] for name in _HOOKS):
            what = "hooks"
        methods = _EMBEDDERS if module is model else ("forward", *_EMBEDDERS)
        replaced = next((name for name in methods if name in own), None)
        if replaced is not None:
            what = f"its own {replaced}()"
        if what is not None:
            where = names.get(id(module)) or type(module).__name__
            raise UnsupportedModel(
                f"SkipCLIP: {where} has {what}, and SkipCLIP does not call this module, so that would be ignored. "
                "Remove it, or put it on a block, an embedding or a head, which SkipCLIP calls."
            )


def _is_parameter(part: Part) -> bool:
    return isinstance(part, nn.Parameter)


def _called(tower: Tower) -> list[nn.Module]:
    """Modules of a tower that SkipCLIP calls: embedding, head, and blocks that are not fused."""
    blocks = [block for index, block in enumerate(tower.blocks) if not tower.is_fused(index)]
    return [part for part in (*tower.embedding, *tower.head, *blocks) if isinstance(part, nn.Module)]
