"""Registry of methods, and the packaged model. They are imported at first use."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import Method

_METHODS: dict[str, tuple[str, str, str]] = {  # class, name in reports, and words for --help
    "skip": ("skip:Skip", "Skip Tuning", "Skip Tuning"),
    "zero-shot": ("zero_shot:ZeroShot", "zero-shot", "no training"),
    "full": ("full:Full", "full fine-tuning", "full fine-tuning"),
    "linear-probe": ("linear_probe:LinearProbe", "linear probe", "a linear classifier of embeddings"),
    "coop": ("coop:CoOp", "CoOp", "learned prompts"),
    "clip-adapter": ("clip_adapter:CLIPAdapter", "CLIP-Adapter", "a small network on embeddings"),
    "lora": ("lora:LoRA", "LoRA", "low-rank updates of attention"),
}
AUTO = "auto"
"""Name of the choice between candidates, which is no method: see `train.candidates`."""
METHOD_NAMES = {name: in_reports for name, (_, in_reports, _) in _METHODS.items()} | {AUTO: "a choice of candidates"}
"""Names of methods in reports."""
METHOD_HELP = ", ".join(f"{name} ({words})" for name, (*_, words) in _METHODS.items())


class _Methods(Mapping[str, "type[Method]"]):
    """Classes of methods by name; the module of a method is imported when its class is read."""

    def __getitem__(self, name: str) -> type[Method]:
        module, _, attribute = _METHODS[name][0].partition(":")
        return getattr(importlib.import_module(f"skipkernels.app.methods.{module}"), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(_METHODS)

    def __len__(self) -> int:
        return len(_METHODS)


METHODS = _Methods()
PACKAGED = "pictogram-tiny"
"""Name of the model that is packaged with its weights."""


def packaged() -> Any:
    """Import the module of the packaged model, which registers its image tower in timm."""
    return importlib.import_module("skipkernels.app.demo.pictogram_tiny")
