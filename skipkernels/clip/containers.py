"""The modules around the blocks of a model, which SkipCLIP does not call: what is altered on them would have no effect.

Hooks and methods of instances are refused, but for hooks of the model itself. So are, after construction, changes of
their classes, of the order of the blocks and of attention masks.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..towers.alterations import HOOKS
from ..towers.base import Tower, UnsupportedModel
from ..towers.text import TextTower

_ENCODERS = ("encode_image", "encode_text", "get_image_features", "get_text_features")


class Containers:
    """The model and its modules that contain a block, an embedding or a head.

    Raises:
        UnsupportedModel: If one has hooks or methods of its own.
    """

    def __init__(self, model: nn.Module, image: Tower, text: TextTower):
        self._model, self._image, self._text = model, image, text
        self._around = _modules_around(model, [x for t in (image, text) for x in (*t.embedding, *t.head, *t.blocks)])
        if override := self._override():
            raise UnsupportedModel(f"SkipCLIP: {override}")
        self._known = self._read()

    def check_unchanged(self) -> None:
        """Raise a RuntimeError if the model was altered in a way that SkipCLIP does not follow."""
        changes = [change for (change, known), (_, now) in zip(self._known, self._read(), strict=True) if now != known]
        if change := changes[0] if changes else self._override():
            raise RuntimeError(
                f"SkipCLIP: the model was altered after SkipCLIP was made: {change.rstrip('.')}. Undo that, or call "
                "clip.refresh() to read the model again, and create the optimizer again if parameters were replaced."
            )

    def _read(self) -> list[tuple[str, Any]]:
        """Return what must stay as it is: the message of a change, and the value of now."""
        masks = [None if mask is None else mask.tolist() for mask in self._text.masks()]
        methods = [[getattr(type(x), name, None) for name in ("forward", *_ENCODERS)] for x in self._around]
        return [
            ("the attention mask changed (to NaN, if −inf in it was averaged: average with use_buffers=False)", masks),
            ("its blocks changed", [_order_of_blocks(tower) for tower in (self._image, self._text)]),
            ("the class of a container, or a method of it, was replaced", [list(map(type, self._around)), methods]),
        ]

    def _override(self) -> str | None:
        """Return what a container has that would have no effect, with a remedy, or None."""
        for module in self._around:
            if vars(module).get("_fsdp_use_orig_params") is False:
                return "FSDP1 replaced its parameters by flat ones: pass use_orig_params=True, or use fully_shard"
            if (what := _override_of(module, is_model=module is self._model)) is not None:
                name = next(n for n, x in self._model.named_modules() if x is module) or type(module).__name__
                return (
                    f"{name} has {what}, and SkipCLIP does not call this module, so it would have no effect. Remove "
                    "it, or put it on a block, an embedding or a head, which SkipCLIP calls."
                )
        return None


def _modules_around(model: nn.Module, parts: list[Any]) -> list[nn.Module]:
    """Return the model, and its modules around these parts, which are modules and parameters."""
    called = {x for part in parts if isinstance(part, nn.Module) for x in part.modules()}
    parameters = {id(part) for part in parts if isinstance(part, nn.Parameter)}

    def holds_a_part(module: nn.Module) -> bool:
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        return not (called.isdisjoint(module.modules()) and parameters.isdisjoint(own))

    return [x for x in model.modules() if x not in called and (x is model or holds_a_part(x))]


def _override_of(module: nn.Module, *, is_model: bool) -> str | None:
    """Return the shards, instance method or hooks of a container, or None."""
    if hasattr(module, "unshard"):  # of FSDP2
        return "shards (fully_shard; shard the blocks above the cut, and the SkipCLIP)"
    for name in _ENCODERS if is_model else ("forward", *_ENCODERS):
        if name in vars(module):
            return f"a replaced {name}()"
    if not is_model and any(vars(module)[name] for name in HOOKS):
        return "hooks"
    return None


def _order_of_blocks(tower: Tower) -> tuple[int, bool]:
    """Number of the caller's modules that are blocks of a tower, and True if the model has them in this order.

    A block may be an `nn.Sequential` that the tower made of several.
    """
    modules = list(tower.model.modules())
    known = set(modules)

    def of_model(block: nn.Module) -> list[nn.Module]:
        return [block] if block in known else [x for child in block.children() for x in of_model(child)]

    blocks = [module for block in tower.blocks for module in of_model(block)]
    own = set(blocks)
    return len(blocks), blocks == [module for module in modules if module in own]
