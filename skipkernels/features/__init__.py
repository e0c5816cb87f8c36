"""Image features at the LSkip cut (see `boundary`): computed once, kept on disk or in memory, read in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .cache import FeatureCache, Progress
    from .folder_table import CacheError
    from .loader import FeatureLoader
    from .samplers import BatchSampler
    from .table import FeatureTable

__all__ = [
    "BatchSampler",
    "CacheError",
    "FeatureCache",
    "FeatureLoader",
    "FeatureTable",
    "Progress",
]

__getattr__ = lazy_names(
    __name__,
    {
        "cache": ("FeatureCache", "Progress"),
        "folder_table": ("CacheError",),
        "loader": ("FeatureLoader",),
        "samplers": ("BatchSampler",),
        "table": ("FeatureTable",),
    },
)
