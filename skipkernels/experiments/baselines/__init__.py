"""Baselines that Skip Tuning is compared with, one per module."""

from .clip_adapter import CLIPAdapter
from .coop import CoOp
from .full import Full
from .linear_probe import LinearProbe
from .lora import LoRA

__all__ = ["CLIPAdapter", "CoOp", "Full", "LinearProbe", "LoRA"]
