"""Changes of the modules around the blocks of a model, which SkipCLIP does not call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..reference import widened
from ..towers.alterations import HOOKS
from ..towers.base import Tower, UnsupportedModel
from ..towers.text import TextTower

_ENCODERS = ("encode_image", "encode_text", "get_image_features", "get_text_features")


class Containers:
    """The model and its modules that contain a block, an embedding or a head, which SkipCLIP does not call.

    Hooks or methods on them would have no effect: they are refused, but for hooks of the model itself, and so are
    changes of the order of the blocks.
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
        self._depths = [len(_blocks_of_model(tower)) for tower in (image, text)]
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
            blocks = _blocks_of_model(tower)
            known = set(blocks)
            order = [x for x in self._model.modules() if x in known]
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


def _blocks_of_model(tower: Tower) -> list[nn.Module]:
    """The caller's modules that are blocks: a block may be an `nn.Sequential` that the tower made of several."""
    known = set(tower.model.modules())

    def of_model(block: nn.Module) -> list[nn.Module]:
        return [block] if block in known else [x for child in block.children() for x in of_model(child)]

    return [module for block in tower.blocks for module in of_model(block)]


def _equal_masks(mask: Tensor | None, seen: Tensor | None) -> bool:
    if mask is None or seen is None:
        return mask is seen
    return widened(mask.detach().to(seen.device)).equal(widened(seen))
