"""Image features at the LSkip cut (see `boundary`): computed once, cached on disk or in memory, read in batches."""

from .feature_cache import FeatureCache, Progress
from .loader import FeatureLoader
from .samplers import BatchSampler, SharedBatchSampler

__all__ = ["BatchSampler", "FeatureCache", "FeatureLoader", "Progress", "SharedBatchSampler"]
