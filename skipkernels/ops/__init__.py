"""The operators, one file each. Importing this package registers all of them.

`OPERATORS` are the public ones; the files have others that are parts of a step.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch

from .. import _build
from . import launching, registration

__all__ = ["OPERATORS", "Backend", "backends"]

OPERATORS = (
    "class_sampled_ce",
    "class_sampled_logits",
    "class_scores",
    "add_layer_norm",
    "mlp_activation",
    "rotary_embedding",
    "shared_prefix_attention",
    "pooled_attention",
    "sgd_momentum_",
)


class Backend(NamedTuple):
    """Implementation of an operator on a device, why it is not the fastest, and the calls that use the reference."""

    kernel: str
    reason: str = ""
    fallback_cases: str = ""


def backends() -> dict[str, dict[str, Backend]]:
    """Return the implementation of each operator on each kind of device. Loads the C++ kernels, or builds them first.

    Returns:
        For each operator, for "cpu" and "cuda" (also ROCm): "C++", "Triton", or "reference", which is plain PyTorch;
        why it is not a faster one, empty if there is no reason; and the calls that use the reference all the same.

    Example:
        >>> sorted(backends()["class_scores"])
        ['cpu', 'cuda']
    """
    extension = _build.load()
    return {name: {"cpu": _on_cpu(name, extension), "cuda": _on_cuda(name)} for name in OPERATORS}


def _on_cpu(name: str, extension: _build.Extension) -> Backend:
    if registration.has_cpp(name):
        return Backend("C++")
    return Backend("reference", extension.reason or f"{extension.path} is older than this operator; install again")


def _on_cuda(name: str) -> Backend:
    if not launching.installed:
        return Backend("reference", "Triton is not installed")
    reason = "" if torch.cuda.is_available() else "there is no CUDA or ROCm device here"
    return Backend("Triton", reason, registration.definitions[name].fallback_cases)


for _name in (*OPERATORS, "packed_layout"):
    importlib.import_module(f"{__name__}.{_name.rstrip('_')}")
