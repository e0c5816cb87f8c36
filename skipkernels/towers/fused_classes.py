"""Classes of fused blocks: `block.__class__` becomes a subclass of its own class with another `forward`.

A wrapper would change the names in `state_dict` and fail `isinstance`, and a `forward` set on the block would be copied
and pickled with it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..options import FusedMemory
from .alterations import original_method
from .block import FusedBlock
from .families import BLOCKS, type_name


def fuse_blocks(modules: Iterable[nn.Module], memory: FusedMemory = "fast") -> list[Any]:
    """Make every known block among these modules a fused block, in place, and return the fused blocks.

    Those that are fused already stay as they are.
    """
    blocks: list[Any] = []
    for module in modules:
        kind: Any = type(module)
        if not isinstance(module, FusedBlock) and type_name(kind) in BLOCKS:
            module.__class__ = _fused_class(kind, memory)
        if isinstance(module, FusedBlock):
            blocks.append(module)
    return blocks


@functools.cache
def _fused_class(own: Any, memory: FusedMemory) -> type:
    """Make the class of fused blocks in front of the caller's class `own`, with the same name.

    For the block of open_clip it is what this would define:

        class ResidualAttentionBlock(OpenClipBlock, open_clip.transformer.ResidualAttentionBlock):
            caller_class, _memory = open_clip.transformer.ResidualAttentionBlock, "fast"
    """
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    methods = {name: original_method(own, name) for name in ("forward", "attention") if hasattr(own, name)}
    bases = BLOCKS[type_name(own)].load(), own
    return type(own.__name__, bases, {**names, "caller_class": own, "_memory": memory, "_methods": methods})


@functools.cache
def unfused_class(kind: Any) -> Any:
    """The caller's class of a fused block, with what was made on top of the fused class, such as FSDP2's."""
    if not issubclass(kind, FusedBlock):
        return kind
    if "caller_class" in vars(kind):
        return kind.caller_class
    attributes = {name: x for name, x in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(map(unfused_class, kind.__bases__)), attributes)


@contextmanager
def unfused(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give fused blocks among these modules the caller's class."""
    before: list[tuple[Any, Any]] = [(x, type(x)) for x in modules if isinstance(x, FusedBlock)]
    try:
        for module, kind in before:
            module.__class__ = unfused_class(kind)
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind
