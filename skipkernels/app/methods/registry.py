"""Registry of methods, and the packaged model. They are imported at first use."""

from __future__ import annotations

import importlib
from collections import UserDict
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from . import Method

Entry = TypeVar("Entry")


class Registry(UserDict[str, Entry]):
    """Entries by name; one that is given as text, "module:attribute", is imported when it is read.

    >>> Registry({"square root": "math:sqrt"})["square root"](4.0)
    2.0
    """

    def __getitem__(self, name: str) -> Entry:
        entry: Any = super().__getitem__(name)
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self[name] = getattr(importlib.import_module(module), attribute)
        return entry


_METHODS: dict[str, tuple[str, str]] = {  # class, and words for --help
    "skip": ("skip:Skip", "Skip Tuning"),
    "zero-shot": ("zero_shot:ZeroShot", "no training"),
    "full": ("full:Full", "full fine-tuning"),
    "linear-probe": ("linear_probe:LinearProbe", "a linear classifier of embeddings"),
    "coop": ("coop:CoOp", "learned prompts"),
    "clip-adapter": ("clip_adapter:CLIPAdapter", "a small network on embeddings"),
    "lora": ("lora:LoRA", "low-rank updates of attention"),
}
AUTO = "auto"
"""Name of the choice between candidates, which is no method: see `train.candidates`."""
METHOD_HELP = ", ".join(f"{name} ({words})" for name, (_, words) in _METHODS.items())
METHODS: Registry[type[Method]] = Registry(
    {name: f"skipkernels.app.methods.{place}" for name, (place, _) in _METHODS.items()}  # type: ignore[misc]
)
PACKAGED = "pictogram-tiny"
"""Name of the model that is packaged with its weights."""


def packaged() -> Any:
    """Import the module of the packaged model, which registers its image tower in timm."""
    return importlib.import_module("skipkernels.app.demo.pictogram_tiny")
