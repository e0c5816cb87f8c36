"""Features of images at the LSkip cut: computed once, cached on the disk or in memory, and read in batches."""

from .feature_cache import FeatureCache, Progress
from .loader import FeatureLoader
from .samplers import BatchSampler, SharedBatchSampler

__all__ = ["BatchSampler", "FeatureCache", "FeatureLoader", "Progress", "SharedBatchSampler"]
