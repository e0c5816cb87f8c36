"""skipkernels: Skip Tuning for CLIP, with fused kernels for CPUs and GPUs.

Importing this package imports no other package: each public name is loaded at its first use. `import skipkernels.ops`
registers the operators with PyTorch as `torch.ops.skipkernels.…`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._lazy import lazy_names

if TYPE_CHECKING:
    from skipkernels import functional, ops, pairs, parallel, reference, retrieval
    from skipkernels.app.config import TuneConfig
    from skipkernels.app.serve import Classifier, blend, export
    from skipkernels.app.train import tune
    from skipkernels.boundary import run_frozen
    from skipkernels.clip import SkipCLIP, SkipOutput
    from skipkernels.features import CacheError, FeatureCache
    from skipkernels.graphs import GraphedStep, graphed
    from skipkernels.lora import add_lora, merge_lora, save_lora
    from skipkernels.ops import backends
    from skipkernels.optimizer import FusedSGD
    from skipkernels.selection import ClassSelection, RankSampler
    from skipkernels.towers.base import UnsupportedModel
    from skipkernels.towers.fuse import fuse, unfuse

__version__ = "0.2.0"

__all__ = [
    "CacheError",
    "ClassSelection",
    "Classifier",
    "FeatureCache",
    "FusedSGD",
    "GraphedStep",
    "RankSampler",
    "SkipCLIP",
    "SkipOutput",
    "TuneConfig",
    "UnsupportedModel",
    "__version__",
    "add_lora",
    "backends",
    "blend",
    "export",
    "functional",
    "fuse",
    "graphed",
    "merge_lora",
    "ops",
    "pairs",
    "parallel",
    "reference",
    "retrieval",
    "run_frozen",
    "save_lora",
    "tune",
    "unfuse",
]

_CLI_PACKAGES = ("pydantic", "rich", "tyro", "yaml", "jinja2")  # the extra `cli` in pyproject.toml
_SUBMODULES = ("functional", "ops", "pairs", "parallel", "reference", "retrieval")
_find = lazy_names(
    __name__,
    {
        "boundary": ("run_frozen",),
        "clip": ("SkipCLIP", "SkipOutput"),
        "features": ("CacheError", "FeatureCache"),
        "graphs": ("GraphedStep", "graphed"),
        "lora": ("add_lora", "merge_lora", "save_lora"),
        "ops": ("backends",),
        "optimizer": ("FusedSGD",),
        "selection": ("ClassSelection", "RankSampler"),
        "app.serve": ("Classifier", "blend", "export"),
        "towers.base": ("UnsupportedModel",),
        "towers.fuse": ("fuse", "unfuse"),
        "app.config": ("TuneConfig",),
        "app.train": ("tune",),
    },
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"skipkernels.{name}")
    try:
        value = globals()[name] = _find(name)
    except ModuleNotFoundError as error:
        if error.name in _CLI_PACKAGES:
            error.msg = f"skipkernels.{name} needs {error.name}: pip install 'skipkernels[cli]'"
        raise
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
