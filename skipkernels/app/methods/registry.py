"""Registry of methods, and the packaged model. They are imported at first use."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from . import Method


class _Entry(NamedTuple):
    path: str  # module and class
    in_reports: str  # name there
    help: str  # words for --help


_METHODS = {
    "skip": _Entry("skip:Skip", "Skip Tuning", "Skip Tuning"),
    "zero-shot": _Entry("zero_shot:ZeroShot", "zero-shot", "no training"),
    "full": _Entry("full:Full", "full fine-tuning", "full fine-tuning"),
    "linear-probe": _Entry("linear_probe:LinearProbe", "linear probe", "a linear classifier of embeddings"),
    "coop": _Entry("coop:CoOp", "CoOp", "learned prompts"),
    "clip-adapter": _Entry("clip_adapter:CLIPAdapter", "CLIP-Adapter", "a small network on embeddings"),
    "lora": _Entry("lora:LoRA", "LoRA", "low-rank updates of attention"),
}
AUTO = "auto"
"""Name of the choice between candidates, which is no method: see `train.candidates`."""
METHOD_NAMES = {name: entry.in_reports for name, entry in _METHODS.items()} | {AUTO: "a choice of candidates"}
"""Names of methods in reports."""
METHOD_HELP = ", ".join(f"{name} ({entry.help})" for name, entry in _METHODS.items())


class _Methods(Mapping[str, "type[Method]"]):
    """Classes of methods by name; the module of a method is imported when its class is read."""

    def __getitem__(self, name: str) -> type[Method]:
        module, attribute = _METHODS[name].path.split(":")
        return getattr(importlib.import_module(f".{module}", __package__), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(_METHODS)

    def __len__(self) -> int:
        return len(_METHODS)


METHODS = _Methods()
PACKAGED = "pictogram-tiny"
"""Name of the model that is packaged with its weights."""


def packaged() -> Any:
    """Import the module of the packaged model, which registers its image tower in timm."""
    return importlib.import_module("..demo.pictogram_tiny", __package__)
