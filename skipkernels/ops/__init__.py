"""The operators, one file each. Importing this package registers all of them."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import reference
from . import launching, registration

if TYPE_CHECKING:
    from .. import _build

__all__ = ["OPERATORS", "Backend", "backends"]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

OPERATORS = tuple(name for name in reference.__all__ if name in registration.definitions)
"""The public operators, which have a reference. The others are parts of a step."""


class Backend(NamedTuple):
    """Implementation of an operator on a device, why it is not the fastest, and the calls that use the reference."""

    kernel: str
    reason: str = ""
    fallback_cases: str = ""


def backends() -> dict[str, dict[str, Backend]]:
    """Return the implementation of each operator on each kind of device. Loads the C++ kernels.

    Returns:
        For each operator, for "cpu" and "cuda" (also ROCm): "C++", "Triton", or "reference", which is plain PyTorch;
        why it is not a faster one, empty if there is no reason; and the calls that use the reference all the same.

    Example:
        >>> sorted(backends()["class_scores"])
        ['cpu', 'cuda']
    """
    from .. import _build

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
    return Backend("Triton", reason, registration.definitions[name].fallback_note)
