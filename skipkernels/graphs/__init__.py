"""Whole training steps as CUDA graphs."""

from .graphed_step import GraphedStep, graphed

__all__ = ["GraphedStep", "graphed"]
