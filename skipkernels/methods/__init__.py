"""Ways to adapt a CLIP, one a file, behind one interface: Skip Tuning and what it is compared with."""

from .base import Method, Recipe, StepOutput
from .clip_adapter import CLIPAdapter
from .coop import CoOp
from .full import Full
from .linear_probe import LinearProbe
from .lora import LoRA
from .skip import Skip
from .zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Skip, Full, ZeroShot, LinearProbe, CoOp, CLIPAdapter, LoRA)
}

__all__ = [
    "METHODS",
    "CLIPAdapter",
    "CoOp",
    "Full",
    "LinearProbe",
    "LoRA",
    "Method",
    "Recipe",
    "Skip",
    "StepOutput",
    "ZeroShot",
]
