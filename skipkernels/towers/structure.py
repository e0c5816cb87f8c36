"""Detection of changes to a model after SkipCLIP was made: to modules that it does not call, and to weights.

A fused block reads the weights and settings of the caller's block and never calls it. The containers around the blocks
(the model, `visual`, a stack of blocks) are not called either. What is changed in them after SkipCLIP was made (a hook,
a replaced layer, another number of heads) would be ignored, so each step compares them with a snapshot.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import starmap
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

from ..store import digests
from .base import Tower, UnsupportedModel

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METHODS = ("forward", "attention")  # a block of OpenAI and of open_clip has the second
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
        held = ("_parameters", "_modules", "_buffers")
        self._parts = [part for module in self._modules for name in held if (part := getattr(module, name))]
        self._hooks = [getattr(module, name) for module in self._modules for name in _HOOKS]
        # Of a whole model the methods that embed: its `forward` is not used.
        kinds = {kind: [name for name in _EMBEDDERS if hasattr(kind, name)] for kind in map(type, self._modules)}
        self._named = [
            (kind, name) for kind, names in kinds.items() for name in names or _METHODS if hasattr(kind, name)
        ]
        settings = [(own, [name for name in own if name not in _IGNORED]) for own in self._dicts]
        self._settings = [(itemgetter(*names), own) for own, names in settings if names]
        self._tensors = [x for module in self._modules for x in module._buffers.values() if x is not None]
        self._tensors += [x for own, names in settings for name in names if isinstance(x := own[name], Tensor)]
        self._seen = [dict(part) for part in self._parts]
        self._seen_hooks = [dict(hooks) for hooks in self._hooks] if any(self._hooks) else None
        self._counts, self._methods = self._count(), list(starmap(getattr, self._named))
        # PEFT changes its dictionaries of scales in place.
        self._counts[_SETTINGS] = [_copied(values) for values in self._counts[_SETTINGS]]

    def _count(self) -> list[Any]:
        return [
            list(map(type, self._modules)),
            list(map(len, self._dicts)),  # an instance method or a new attribute makes it longer
            [get(own) for get, own in self._settings],
            list(map(_VERSION, self._tensors)),
            list(map(Tensor.data_ptr, self._tensors)),
        ]

    def replaced_method(self) -> bool:
        """True if a class of the modules has another `forward` than at the snapshot, or another of these methods."""
        return list(starmap(getattr, self._named)) != self._methods

    def is_unchanged(self) -> bool:
        """True if nothing differs from the snapshot. Numbers written past autograd (`.data`) are not seen."""
        try:
            hooked = any(self._hooks) if self._seen_hooks is None else self._hooks != self._seen_hooks
            same = not hooked and self._parts == self._seen and self._count() == self._counts
            return same and not self.replaced_method()
        except (RuntimeError, TypeError, KeyError):  # two tensors were compared by value, or an attribute is gone
            return False


_VERSION = attrgetter("_version")
_SETTINGS = 2  # their place in `Structure._count`


def _copied(values: Any) -> Any:
    """Values as itemgetter gives them, one or a tuple, with dictionaries, lists and sets copied."""
    if isinstance(values, tuple):
        return tuple(map(_copied, values))
    return copy.copy(values) if isinstance(values, (dict, list, set)) else values


def containers(model: nn.Module, towers: Sequence[Tower]) -> list[nn.Module]:
    """The model and the modules around its blocks, embeddings and heads, which SkipCLIP does not call."""
    parts = [part for tower in towers for part in (*tower.embedding, *tower.head, *tower.blocks)]
    modules = {id(x) for part in parts if isinstance(part, nn.Module) for x in part.modules()}
    parameters = {id(part) for part in parts if isinstance(part, nn.Parameter)}

    def holds_a_part(module: nn.Module) -> bool:
        inside = any(id(child) in modules for child in module.modules())
        return inside or any(id(parameter) in parameters for parameter in module.parameters(recurse=False))

    return [x for x in model.modules() if id(x) not in modules and (x is model or holds_a_part(x))]


def fused_modules(tower: Tower, blocks: Iterable[int]) -> list[nn.Module]:
    """Every module of those blocks that are fused."""
    return [module for index in blocks if tower.is_fused(index) for module in tower.blocks[index].modules()]


def called_modules(tower: Tower, *, lower: bool = False) -> list[nn.Module]:
    """Every module of a tower that is called, or below the cut: the embedding, blocks that are not fused, the head."""
    count = tower.skip if lower else len(tower.blocks)
    blocks = [tower.blocks[index] for index in range(count) if not tower.is_fused(index)]
    parts = (*tower.embedding, *blocks, *(() if lower else tower.head))
    return [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]


def refuse_overrides(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Refuse hooks and instance methods on containers, which are not called.

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


class WeightsSeen:
    """Parameters and buffers as they were: changes are seen by identity and version, and by content where those differ.

    Args:
        parts: Modules, and single parameters.
    """

    def __init__(self, parts: Iterable[nn.Module | nn.Parameter | None]):
        parts = list(parts)
        modules = dict.fromkeys(m for part in parts if isinstance(part, nn.Module) for m in part.modules())
        self._held: list[dict[str, Any]] = [x for m in modules for x in (m._parameters, m._buffers) if x]
        self._held.append({str(i): p for i, p in enumerate(parts) if isinstance(p, nn.Parameter)})
        self._differs = False
        self._digests = self._look()

    def _look(self) -> list[int]:
        """Take identities and versions as seen; return the digest of each tensor."""
        self._seen = [dict(tensors) for tensors in self._held]
        self._tensors = [x for tensors in self._held for x in tensors.values() if x is not None]
        self._versions = list(map(_VERSION, self._tensors))
        return digests(x.detach() for x in self._tensors)

    def trains(self) -> bool:
        """True if a parameter is set to train."""
        return any(x.requires_grad for x in self._tensors)

    def changed(self) -> bool:
        """True if the numbers are others than at construction; a change past the version counter is not seen."""
        try:
            if not self._differs and self._held == self._seen and list(map(_VERSION, self._tensors)) == self._versions:
                return False
        except RuntimeError:  # two tensors were compared by value
            pass
        return self.look()

    def look(self) -> bool:
        """The same by content, whatever identities and versions say."""
        self._differs = self._look() != self._digests
        return self._differs
