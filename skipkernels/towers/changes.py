"""Changes of a model that SkipCLIP wraps: of the containers that it does not call, and of what kept features depend on.

Blocks, embeddings and heads are called and read in each step, so changes to them need no detection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

from ..digests import digests
from ..reference import widened
from .base import Part, Tower, UnsupportedModel
from .block import HOOKS, FusedBlock, fuse_blocks, global_hooks
from .text import TextTower

_ENCODERS = ("encode_image", "encode_text", "get_image_features", "get_text_features")
_IGNORED = {*vars(nn.Module()), "in_features", "out_features", "normalized_shape", "elementwise_affine"}
_VERSION, _REQUIRES_GRAD = attrgetter("_version"), attrgetter("requires_grad")


class Containers:
    """The model and the modules around its blocks, embeddings and heads, which SkipCLIP does not call."""

    def __init__(self, model: nn.Module, towers: Sequence[Tower]):
        parts = [part for tower in towers for part in (*tower.embedding, *tower.head, *tower.blocks)]
        called = {id(x) for part in parts if isinstance(part, nn.Module) for x in part.modules()}
        parameters = {id(part) for part in parts if isinstance(part, nn.Parameter)}

        def holds_a_part(module: nn.Module) -> bool:
            inside = any(id(child) in called for child in module.modules())
            return inside or any(id(parameter) in parameters for parameter in module.parameters(recurse=False))

        self._model, self._towers = model, towers
        self._around = [x for x in model.modules() if id(x) not in called and (x is model or holds_a_part(x))]
        self._children = [dict(module._modules) for module in self._around]
        self._methods = self._read_methods()
        self._seen_masks = self._masks()
        self._mask_values = [mask.detach().clone() for mask, _ in self._seen_masks]

    def _masks(self) -> list[tuple[Tensor, int]]:
        """Return the masks of the text towers, with their versions."""
        masks = [mask for tower in self._towers if isinstance(tower, TextTower) for mask in tower.masks()]
        return [(mask, mask._version) for mask in masks if mask is not None]

    def _read_methods(self) -> list[tuple[Any, ...]]:
        """Return the class of each container, and its methods that SkipCLIP replaces."""
        return [
            (type(module), *(getattr(type(module), name, None) for name in ("forward", *_ENCODERS)))
            for module in self._around
        ]

    def check(self) -> None:
        """Raise a RuntimeError if the modules were altered in a way that SkipCLIP does not follow.

        Fuses blocks that were put in the place of others.
        """
        what = self._override()
        if self._methods != self._read_methods():
            what = "the class of a container, or a method of it, was replaced"
        if self._children != [module._modules for module in self._around]:
            for tower in self._towers:
                blocks = tower.model_blocks()
                if [x for x in self._model.modules() if x in set(blocks)] != blocks:
                    what = "its blocks changed"
                fuse_blocks(tower.blocks)
            self._children = [dict(module._modules) for module in self._around]
        masks = self._masks()
        if [(id(mask), version) for mask, version in masks] != [(id(mask), x) for mask, x in self._seen_masks]:
            pairs = zip(masks, self._mask_values, strict=False)
            if len(masks) != len(self._mask_values) or not all(_equal_masks(mask, seen) for (mask, _), seen in pairs):
                what = "the attention mask changed (to NaN, if −inf in it was averaged: average with use_buffers=False)"
            self._seen_masks = masks
        if what is not None:
            self._seen_masks = []  # compared again in the next call
            self._children = []
            raise RuntimeError(
                f"SkipCLIP: the model was altered after SkipCLIP was made: {what}. Undo that, or call clip.refresh() "
                "to read the model again, and create the optimizer again if parameters were replaced."
            )

    def refuse_overrides(self) -> None:
        """Raise an UnsupportedModel for hooks and instance methods on containers: they would have no effect."""
        if what := self._override():
            raise UnsupportedModel(f"SkipCLIP: {what}")

    def _override(self) -> str | None:
        """Return the hooks, instance methods or shards of a container, with a remedy, or None."""
        for module in self._around:
            attributes, what = vars(module), None
            if module is not self._model and any(attributes[name] for name in HOOKS):
                what = "hooks"
            methods = _ENCODERS if module is self._model else ("forward", *_ENCODERS)
            what = next((f"a replaced {name}()" for name in methods if name in attributes), what)
            if hasattr(module, "unshard"):  # of FSDP2
                what = "shards (fully_shard; shard the blocks above the cut, and the SkipCLIP)"
            if attributes.get("_fsdp_use_orig_params") is False:
                return "FSDP1 replaced its parameters by flat ones: pass use_orig_params=True, or use fully_shard"
            if what is not None:
                name = next(n for n, x in self._model.named_modules() if x is module) or type(module).__name__
                return (
                    f"{name} has {what}, and SkipCLIP does not call this module, so it would have no effect. Remove "
                    "it, or put it on a block, an embedding or a head, which SkipCLIP calls."
                )
        return None


def _equal_masks(mask: Tensor, seen: Tensor) -> bool:
    return widened(mask.detach().to(seen.device)).equal(widened(seen))


class Settings:
    """Attributes of modules that are no tensors, modules or hooks, such as epsilons."""

    def __init__(self, modules: Iterable[nn.Module]):
        named = [
            (vars(m), [name for name, x in vars(m).items() if name not in _IGNORED and not isinstance(x, Tensor)])
            for m in modules
        ]
        self._getters = [(itemgetter(*names), values) for values, names in named if names]
        # PEFT changes its dictionaries of scales in place.
        self._seen = [_copied(get(values)) for get, values in self._getters]

    def changed(self) -> bool:
        """Return True if a value differs from the one at construction."""
        try:
            return [get(values) for get, values in self._getters] != self._seen
        except (RuntimeError, KeyError):  # a tensor in a dictionary, or an attribute was deleted
            return True


class Frozen:
    """Modules and weights that computed kept features: settings and hooks, identities, versions and digests."""

    def __init__(self, parts: Callable[[], Sequence[Part]], *, with_global_hooks: bool = True):
        self._parts, self._with_global_hooks = parts, with_global_hooks
        self._called = [part for part in parts() if isinstance(part, nn.Module)]
        self._modules = list(dict.fromkeys(module for part in self._called for module in part.modules()))
        self._members: list[dict[str, Any]] = [x for m in self._modules for x in (m._parameters, m._buffers) if x]
        self._members.append({})  # parameters among the parts
        self._hooks = [hooks for m in self._modules for name in HOOKS if (hooks := getattr(m, name)) is not None]
        self._settings = Settings(self._modules)
        self._state = self._read_state()
        self._differs = False
        self._digests = self._record()

    def _read_state(self) -> list[Any]:
        return [
            [(kind, kind.forward) for kind in map(_own_type, self._modules)],
            [dict(module._modules) for module in self._modules if module._modules],
            [dict(hooks) for hooks in self._hooks if hooks],
            ["forward" in vars(module) or "attention" in vars(module) for module in self._modules],
            global_hooks() if self._with_global_hooks else [],
        ]

    def _record(self) -> list[int | None]:
        """Record identities and versions; return the digest of each tensor, or None for those that FSDP2 shards."""
        self._members[-1] = self._own_parameters()
        self._seen = [dict(tensors) for tensors in self._members]
        self._tensors = [x for tensors in self._members for x in tensors.values() if x is not None]
        self._versions = list(map(_VERSION, self._tensors))
        if self.is_sharded():
            return [None] * len(self._tensors)
        return list(digests(x.detach() for x in self._tensors))

    def is_sharded(self) -> bool:
        """Return True if FSDP2 manages a module: it frees the whole weights, so their values are not compared."""
        return any(getattr(module, "_is_fsdp_managed_module", False) for module in self._modules)

    def _own_parameters(self) -> dict[str, Any]:
        return {str(i): part for i, part in enumerate(self._parts()) if isinstance(part, nn.Parameter)}

    def trains(self) -> bool:
        """Return True if a weight requires grad."""
        return any(map(_REQUIRES_GRAD, self._tensors))

    def is_hooked(self) -> bool:
        """Return True if a module has hooks, of its own or global ones: their effect may change between calls."""
        return any(self._hooks) or bool(global_hooks())

    def changed(self) -> bool:
        """Return True if settings or values differ. Values written through `.data` are not detected."""
        try:
            self._members[-1] = self._own_parameters()
            same = self._members == self._seen and list(map(_VERSION, self._tensors)) == self._versions
            if same and not self._differs:
                return self.settings_changed()
        except RuntimeError:  # tensors were compared by value
            pass
        return self.content_changed()

    def content_changed(self) -> bool:
        """Return True if settings, or the digests of the values, differ."""
        now = self._record()
        pairs = zip(now, self._digests, strict=False)
        differs = any(new != old for new, old in pairs if new is not None and old is not None)
        self._differs = differs or len(now) != len(self._digests)
        return self._differs or self.settings_changed()

    def settings_changed(self) -> bool:
        """Return True if types, settings, hooks or submodules differ."""
        replaced = [part for part in self._parts() if isinstance(part, nn.Module)] != self._called
        return replaced or self._settings.changed() or self._read_state() != self._state


def _own_type(module: nn.Module) -> Any:
    return module._own if isinstance(module, FusedBlock) else type(module)


def _copied(values: Any) -> Any:
    """Copy the dictionaries, lists and sets among the values of an itemgetter: PEFT changes its scales in place."""
    if isinstance(values, tuple):
        return tuple(map(_copied, values))
    return copy.copy(values) if isinstance(values, (dict, list, set)) else values
