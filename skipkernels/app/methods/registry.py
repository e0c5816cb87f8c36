"""Registries of methods, and of models that are packaged with weights. Entries are imported at first use."""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass(frozen=True)
class PackagedModel:
    """A model of open_clip that is packaged with weights."""

    config: Path  # JSON file of the open_clip model config, with the name of the model
    state_dict: Callable[[], dict[str, Tensor]]  # Function that reads the weights
    recipes: Mapping[str, Mapping[str, Any]]  # By name of a method, the fields of its `Recipe` that differ


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
_MODELS: dict[str, Any] = {
    "pictogram-tiny": "skipkernels.app.demo.pictogram_tiny:PACKAGED",
}
METHODS: Registry[type[Method]] = Registry(
    {name: f"skipkernels.app.methods.{place}" for name, (place, _) in _METHODS.items()}  # type: ignore[misc]
)
MODELS: Registry[PackagedModel] = Registry(_MODELS)


def register_tower() -> None:
    """Register the image tower of pictogram-tiny in timm, for folders that have such a model."""
    importlib.import_module("skipkernels.app.demo.vit_pictogram")
