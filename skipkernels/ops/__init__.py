"""The operators, one file each, and who serves them. Importing this package registers all of them."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch

from .. import _extension
from . import launching, registration

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


class Backend(NamedTuple):
    """Who serves an operator on a device, why nobody faster does, and what is left to plain PyTorch all the same."""

    kernel: str
    reason: str = ""
    leaves: str = ""


def backends() -> dict[str, dict[str, Backend]]:
    """Which kernel serves each operator on each kind of device, and why not a faster one.

    Loads the C++ kernels, and builds them if that was never done.

    Returns:
        For each operator, for "cpu" and "cuda" (ROCm devices too): the kernel ("C++", "Triton", or "reference", which
        is plain PyTorch), the reason why it is not a faster one (empty where it is the fastest there is), and the calls
        that it leaves to plain PyTorch.

    Example:
        >>> sorted(backends()["class_scores"])
        ['cpu', 'cuda']
    """
    extension = _extension.load()
    return {name: {"cpu": _on_cpu(name, extension), "cuda": _on_cuda(name)} for name in OPERATORS}


def _on_cpu(name: str, extension: _extension.Extension) -> Backend:
    if registration.has_cpp(name):
        return Backend("C++")
    return Backend("reference", extension.reason or f"{extension.path} is older than this operator; install again")


def _on_cuda(name: str) -> Backend:
    if not launching.installed:
        return Backend("reference", "Triton is not installed")
    reason = "" if torch.cuda.is_available() else "there is no CUDA or ROCm device here"
    return Backend("Triton", reason, leaves=registration.definitions[name].leaves)


for _name in OPERATORS:
    importlib.import_module(f"{__name__}.{_name.rstrip('_')}")
