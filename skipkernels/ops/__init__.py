"""The operators, one file each, and who serves them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _extension

__all__ = ["OPERATORS", "Backend", "backends"]

OPERATORS = (
    "class_sampled_ce",
    "class_sampled_logits",
    "class_scores",
    "add_layer_norm",
    "mlp_activation",
    "suffix_attention",
    "pooled_attention",
    "gather_rows",
    "sgd_momentum_",
)
_CPP = ("class_sampled_ce", "class_scores")


class Backend(NamedTuple):
    """Who serves an operator on a device, and why nobody faster does."""

    kernel: str
    reason: str = ""


def backends() -> dict[str, dict[str, Backend]]:
    """Which kernel serves each operator on each kind of device, and why not a faster one.

    Loads the C++ kernels, and builds them if that was never done.

    Returns:
        For each operator, for "cpu" and "cuda": the kernel ("C++" or "reference", which is plain PyTorch) and the
        reason why it is not a faster one; empty where it is the fastest there is.

    Example:
        >>> sorted(backends()["class_scores"])
        ['cpu', 'cuda']
        >>> backends()["class_scores"]["cuda"].kernel
        'reference'
    """
    extension = _extension.load()
    loaded = extension.path is not None
    no_gpu = "" if torch.cuda.is_available() else "; there is no CUDA device here"
    return {
        name: {
            "cpu": Backend("C++")
            if loaded and name in _CPP
            else Backend("reference", "no C++ kernel yet" if name not in _CPP else extension.reason),
            "cuda": Backend("reference", f"no Triton kernel yet{no_gpu}"),
        }
        for name in OPERATORS
    }
