"""Registries of methods, and of models that are packaged with weights. Entries are imported at first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from . import Method

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by name, in the order of registration.

    >>> registry = Registry()
    >>> registry.register("square root", "math:sqrt")
    >>> list(registry), registry["square root"](4.0)
    (['square root'], 2.0)
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry | str] = {}

    def register(self, name: str, entry: Entry | str) -> None:
        """Add an entry, or "module:attribute", which is imported on first use; replace the one of that name."""
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class PackagedModel:
    """A model of open_clip that is packaged with weights."""

    config: Path  # JSON file of the open_clip model config, with the name of the model
    state_dict: Callable[[], dict[str, Tensor]]  # Function that reads the weights
    # Function of a method name and a dataset name of `TuneConfig` that returns the fields of the method's `Recipe` that
    # differ for this model
    recipe: Callable[[str, str], Mapping[str, Any]]


METHODS: Registry[type[Method]] = Registry()
MODELS: Registry[PackagedModel] = Registry()

for _name, _class in {
    "skip": "skip:Skip",
    "zero-shot": "zero_shot:ZeroShot",
    "full": "full:Full",
    "linear-probe": "linear_probe:LinearProbe",
    "coop": "coop:CoOp",
    "clip-adapter": "clip_adapter:CLIPAdapter",
    "lora": "lora:LoRA",
}.items():
    METHODS.register(_name, f"skipkernels.app.methods.{_class}")
MODELS.register("glyph-tiny", "skipkernels.app.demo.glyph_tiny:PACKAGED")
