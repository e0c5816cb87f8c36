"""Changes of a model that SkipCLIP wraps: of what computed kept values, and of the modules around its blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..digests import digests
from ..reference import widened
from .base import Part, Tower, UnsupportedModel
from .block import HOOKS, FusedBlock, global_hooks
from .text import TextTower

_ENCODERS = ("encode_image", "encode_text", "get_image_features", "get_text_features")
_NOT_SETTINGS = {
    *vars(nn.Module()),  # parameters, buffers, hooks and children, which are compared apart, and the training mode
    *("in_features", "out_features", "normalized_shape", "elementwise_affine"),  # follow from the shapes of parameters
}


# ---- what computed kept values ---------------------------------------------------------------------------------------


class Watched:
    """Modules and tensors that computed something that is kept.

    `compare` compares contents and settings with those at construction, and remembers the result. `is_stale`, in each
    step, looks only at identities of modules and tensors and at versions of tensors: if they are those of the last
    comparison its result holds, else it compares again. Values that change back are valid again.

    Args:
        parts: Returns the modules and parameters, as they are now.
    """

    def __init__(self, parts: Callable[[], Sequence[Part]]):
        self._parts = parts
        self._stale = False
        self._record()
        self._digests, self._settings = self._digest(), self._read_settings()

    def _record(self) -> None:
        """Record identities of modules, and identities and versions of tensors."""
        self._recorded = parts = list(self._parts())
        # All modules within the parts; the dictionaries that hold their tensors; their children, each dictionary with
        # what it held; all tensors, in the order of these dictionaries; and the versions of these.
        self._modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
        self._held = [tensors for m in self._modules for tensors in (m._parameters, m._buffers) if tensors]
        self._children = [(m._modules, list(m._modules.values())) for m in self._modules if m._modules]
        self._tensors = list(self._current())
        self._versions = [x._version for x in self._tensors]

    def _current(self) -> Iterator[Tensor]:
        for tensors in self._held:
            yield from (x for x in tensors.values() if x is not None)
        yield from (part for part in self._recorded if isinstance(part, nn.Parameter))

    def _touched(self) -> bool:
        """Return True if a module or tensor was replaced, or a tensor written, since the last comparison."""
        parts = self._parts()
        if len(parts) != len(self._recorded) or any(x is not y for x, y in zip(parts, self._recorded, strict=True)):
            return True
        if any(list(children.values()) != recorded for children, recorded in self._children):
            return True
        now = list(self._current())
        return len(now) != len(self._tensors) or any(
            x is not seen or x._version != version
            for x, seen, version in zip(now, self._tensors, self._versions, strict=True)
        )

    def is_stale(self) -> bool:
        """Return True if the kept values were computed with other tensors, as far as versions show."""
        return self.compare() if self._touched() else self._stale

    def compare(self) -> bool:
        """Return True if contents or settings differ from those at construction, and remember it for `is_stale`."""
        self._record()
        digests_now = self._digest()
        values_differ = len(digests_now) != len(self._digests) or any(
            now != then for now, then in zip(digests_now, self._digests, strict=True) if None not in (now, then)
        )
        try:
            settings_differ = self._read_settings() != self._settings
        except (RuntimeError, ValueError):  # arrays or tensors within an attribute have no truth value
            settings_differ = True
        self._stale = values_differ or settings_differ
        return self._stale

    def is_comparable(self) -> bool:
        """Return False if contents and settings do not determine the result: with hooks, or shards of FSDP2."""
        hooked = any(getattr(module, name) for module in self._modules for name in HOOKS)
        return not (hooked or global_hooks() or self._is_sharded())

    def _is_sharded(self) -> bool:
        return any(getattr(module, "_is_fsdp_managed_module", False) for module in self._modules)

    def _digest(self) -> list[int | None]:
        """Digest of each tensor; None of those that FSDP2 manages, which frees the whole weights."""
        if self._is_sharded():
            return [None] * len(self._tensors)
        return list(digests(x.detach() for x in self._tensors))

    def _read_settings(self) -> list[Any]:
        """Types, children, hooks, replaced methods and other attributes of the modules."""
        return [global_hooks(), *map(_settings_of, self._modules)]


def _settings_of(module: nn.Module) -> list[Any]:
    attributes = vars(module)
    kind: Any = module._own if isinstance(module, FusedBlock) else type(module)  # also of FSDP2's class on top of it
    hooks = [dict(found) for name in HOOKS if (found := attributes[name])]
    replaced = [name for name in ("forward", "attention") if name in attributes]
    # Copied: PEFT changes its dictionaries of scales in place.
    others = {
        name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for name, value in attributes.items()
        if name not in _NOT_SETTINGS and not isinstance(value, Tensor)
    }
    return [kind, kind.forward, dict(module._modules), hooks, replaced, others]


# ---- modules around the blocks ---------------------------------------------------------------------------------------


class Containers:
    """The model and its modules that contain a block, an embedding or a head, which SkipCLIP does not call.

    Hooks or methods on them would have no effect: they are refused, and so are changes of the order of the blocks.
    """

    def __init__(self, model: nn.Module, image: Tower, text: TextTower):
        parts = [part for tower in (image, text) for part in (*tower.embedding, *tower.head, *tower.blocks)]
        called = {x for part in parts if isinstance(part, nn.Module) for x in part.modules()}
        parameters = {id(part) for part in parts if isinstance(part, nn.Parameter)}

        def holds_a_part(module: nn.Module) -> bool:
            inside = not called.isdisjoint(module.modules())
            return inside or any(id(parameter) in parameters for parameter in module.parameters(recurse=False))

        self._model, self._image, self._text = model, image, text
        self._around = [x for x in model.modules() if x not in called and (x is model or holds_a_part(x))]
        self._methods = self._read_methods()
        self._depths = [len(tower.model_blocks()) for tower in (image, text)]
        self._masks = [None if mask is None else mask.detach().clone() for mask in text.masks()]

    def _read_methods(self) -> list[tuple[Any, ...]]:
        """Return the class of each container, and its methods that SkipCLIP replaces."""
        return [
            (type(module), *(getattr(type(module), name, None) for name in ("forward", *_ENCODERS)))
            for module in self._around
        ]

    def refuse_overrides(self) -> None:
        """Raise an UnsupportedModel for hooks and instance methods on containers: they would have no effect."""
        if override := self._override():
            raise UnsupportedModel(f"SkipCLIP: {override}")

    def check_unchanged(self) -> None:
        """Raise a RuntimeError if the modules were altered in a way that SkipCLIP does not follow."""
        if change := self._change():
            raise RuntimeError(
                f"SkipCLIP: the model was altered after SkipCLIP was made: {change.rstrip('.')}. Undo that, or call "
                "clip.refresh() to read the model again, and create the optimizer again if parameters were replaced."
            )

    def _change(self) -> str | None:
        masks = self._text.masks()
        if len(masks) != len(self._masks) or not all(map(_equal_masks, masks, self._masks)):
            return "the attention mask changed (to NaN, if −inf in it was averaged: average with use_buffers=False)"
        for tower, depth in zip((self._image, self._text), self._depths, strict=True):
            blocks = tower.model_blocks()
            order = [x for x in self._model.modules() if x in set(blocks)]
            if order != blocks or len(blocks) != depth:
                return "its blocks changed"
        if self._methods != self._read_methods():
            return "the class of a container, or a method of it, was replaced"
        return self._override()

    def _override(self) -> str | None:
        """Return what a container has that would have no effect, with a remedy, or None."""
        for module in self._around:
            if vars(module).get("_fsdp_use_orig_params") is False:
                return "FSDP1 replaced its parameters by flat ones: pass use_orig_params=True, or use fully_shard"
            if (what := self._override_of(module)) is not None:
                name = next(n for n, x in self._model.named_modules() if x is module) or type(module).__name__
                return (
                    f"{name} has {what}, and SkipCLIP does not call this module, so it would have no effect. Remove "
                    "it, or put it on a block, an embedding or a head, which SkipCLIP calls."
                )
        return None

    def _override_of(self, module: nn.Module) -> str | None:
        """Return the shards, instance method or hooks of a container, or None."""
        attributes, is_model = vars(module), module is self._model
        if hasattr(module, "unshard"):  # of FSDP2
            return "shards (fully_shard; shard the blocks above the cut, and the SkipCLIP)"
        for name in _ENCODERS if is_model else ("forward", *_ENCODERS):
            if name in attributes:
                return f"a replaced {name}()"
        if not is_model and any(attributes[name] for name in HOOKS):
            return "hooks"
        return None


def _equal_masks(mask: Tensor | None, seen: Tensor | None) -> bool:
    if mask is None or seen is None:
        return mask is seen
    return widened(mask.detach().to(seen.device)).equal(widened(seen))
