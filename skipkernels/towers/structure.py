"""Detect changes to a model after SkipCLIP is constructed: to modules that it does not call, and to weights.

A fused block reads the weights and settings of the caller's block and never calls it. The containers around the blocks
(the model, `visual`, a stack of blocks) are not called either. A later change to them (a hook, a replaced layer,
another number of heads) would be ignored, so each step compares them with a snapshot.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import starmap
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

from ..digests import digests
from .base import Tower, UnsupportedModel
from .eligibility import HOOKS, global_hooks

_METHODS = ("forward", "attention")  # blocks of OpenAI and open_clip have the second
_ENCODERS = ("encode_image", "encode_text", "get_image_features", "get_text_features")
# Attributes of every module, and attributes of PyTorch's layers that follow from the weights.
_IGNORED = {*vars(nn.Module()), "in_features", "out_features", "normalized_shape", "elementwise_affine"}


class Structure:
    """A snapshot of modules: types, settings, parameters, submodules, buffers, hooks and instance methods."""

    def __init__(self, modules: Iterable[nn.Module]):
        self._modules = list(dict.fromkeys(modules))
        self._dicts = [vars(module) for module in self._modules]
        held = ("_parameters", "_modules", "_buffers")
        self._members = [members for module in self._modules for name in held if (members := getattr(module, name))]
        self._hooks = [getattr(module, name) for module in self._modules for name in HOOKS]
        # A model is compared by the methods that embed: its `forward` is not used.
        kinds = {kind: [name for name in _ENCODERS if hasattr(kind, name)] for kind in map(type, self._modules)}
        self._named = [
            (kind, name) for kind, names in kinds.items() for name in names or _METHODS if hasattr(kind, name)
        ]
        settings = [(values, [name for name in values if name not in _IGNORED]) for values in self._dicts]
        self._settings = [(itemgetter(*names), values) for values, names in settings if names]
        self._tensors = [x for module in self._modules for x in module._buffers.values() if x is not None]
        self._tensors += [x for values, names in settings for name in names if isinstance(x := values[name], Tensor)]
        self._seen = [dict(members) for members in self._members]
        self._seen_hooks = [dict(hooks) for hooks in self._hooks] if any(self._hooks) else None
        self._seen_state, self._methods = self._state(), list(starmap(getattr, self._named))
        # PEFT changes its dictionaries of scales in place.
        self._seen_state[_SETTINGS] = [_copied(values) for values in self._seen_state[_SETTINGS]]

    def _state(self) -> list[Any]:
        return [
            list(map(type, self._modules)),
            list(map(len, self._dicts)),  # an instance method or a new attribute makes it longer
            [get(values) for get, values in self._settings],
            list(map(_VERSION, self._tensors)),
            list(map(Tensor.data_ptr, self._tensors)),
            global_hooks(),
        ]

    def replaced_method(self) -> bool:
        """Return True if `forward` or another compared method of a class was replaced since the snapshot."""
        return list(starmap(getattr, self._named)) != self._methods

    def is_hooked(self) -> bool:
        """Return True if a module has hooks, of its own or global ones."""
        return any(self._hooks) or bool(global_hooks())

    def is_unchanged(self) -> bool:
        """Return True if nothing differs from the snapshot. Values written through `.data` are not detected."""
        try:
            hooked = any(self._hooks) if self._seen_hooks is None else self._hooks != self._seen_hooks
            same = not hooked and self._members == self._seen and self._state() == self._seen_state
            return same and not self.replaced_method()
        except (RuntimeError, TypeError, KeyError):  # tensors were compared by value, or an attribute was deleted
            return False


_VERSION = attrgetter("_version")
_SETTINGS = 2  # position in `Structure._state`


def _copied(values: Any) -> Any:
    """Copy the dictionaries, lists and sets among the values of an itemgetter, one or a tuple."""
    if isinstance(values, tuple):
        return tuple(map(_copied, values))
    return copy.copy(values) if isinstance(values, (dict, list, set)) else values


def containers(model: nn.Module, towers: Sequence[Tower]) -> list[nn.Module]:
    """Modules that SkipCLIP does not call: the model, and the modules around its blocks, embeddings and heads."""
    parts = [part for tower in towers for part in (*tower.embedding, *tower.head, *tower.blocks)]
    modules = {id(x) for part in parts if isinstance(part, nn.Module) for x in part.modules()}
    parameters = {id(part) for part in parts if isinstance(part, nn.Parameter)}

    def holds_a_part(module: nn.Module) -> bool:
        inside = any(id(child) in modules for child in module.modules())
        return inside or any(id(parameter) in parameters for parameter in module.parameters(recurse=False))

    return [x for x in model.modules() if id(x) not in modules and (x is model or holds_a_part(x))]


def fused_modules(tower: Tower, blocks: Iterable[int]) -> list[nn.Module]:
    """Modules of the fused blocks among these."""
    return [module for index in blocks if tower.is_fused(index) for module in tower.blocks[index].modules()]


def called_modules(tower: Tower, *, lower: bool = False) -> list[nn.Module]:
    """Modules that a tower calls, or only those below the cut: the embedding, blocks that are not fused, the head."""
    count = tower.skip if lower else len(tower.blocks)
    blocks = [tower.blocks[index] for index in range(count) if not tower.is_fused(index)]
    parts = (*tower.embedding, *blocks, *(() if lower else tower.head))
    return [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]


def refuse_overrides(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Refuse hooks and instance methods on containers, which are not called."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in modules:
        attributes, what = vars(module), None
        if module is not model and any(attributes[name] for name in HOOKS):
            what = "hooks"
        methods = _ENCODERS if module is model else ("forward", *_ENCODERS)
        replaced = next((name for name in methods if name in attributes), None)
        if replaced is not None:
            what = f"a replaced {replaced}()"
        if what is not None:
            where = names.get(id(module)) or type(module).__name__
            raise UnsupportedModel(
                f"SkipCLIP: {where} has {what}, and SkipCLIP does not call this module, so it would have no effect. "
                "Remove it, or put it on a block, an embedding or a head, which SkipCLIP calls."
            )


class WeightSnapshot:
    """A snapshot of weights and buffers. Changes are found by identity and version, then confirmed by content."""

    def __init__(self, parts: Iterable[nn.Module | nn.Parameter | None]):
        parts = list(parts)
        modules = dict.fromkeys(m for part in parts if isinstance(part, nn.Module) for m in part.modules())
        self._members: list[dict[str, Any]] = [x for m in modules for x in (m._parameters, m._buffers) if x]
        self._members.append({str(i): p for i, p in enumerate(parts) if isinstance(p, nn.Parameter)})
        self._differs = False
        self._digests = self._record()

    def _record(self) -> list[int]:
        """Record identities and versions; return the digest of each tensor."""
        self._seen = [dict(tensors) for tensors in self._members]
        self._tensors = [x for tensors in self._members for x in tensors.values() if x is not None]
        self._versions = list(map(_VERSION, self._tensors))
        return digests(x.detach() for x in self._tensors)

    def requires_grad(self) -> bool:
        """Return True if a parameter is set to train."""
        return any(x.requires_grad for x in self._tensors)

    def changed(self) -> bool:
        """Return True if the values differ from the snapshot. Values written through `.data` are not detected."""
        try:
            same = self._members == self._seen and list(map(_VERSION, self._tensors)) == self._versions
            if same and not self._differs:
                return False
        except RuntimeError:  # tensors were compared by value
            pass
        return self.content_changed()

    def content_changed(self) -> bool:
        """Return True if the digests of the values differ from the snapshot."""
        self._differs = self._record() != self._digests
        return self._differs
