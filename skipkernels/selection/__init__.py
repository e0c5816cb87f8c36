"""CSkip: the classes of a step, by rank of their scores and a sample of the tail."""

from .probabilities import base_keep, bounded, inclusion_probabilities, systematic_sample, tail_probabilities
from .sampler import ClassSelection, RankSampler

__all__ = [
    "ClassSelection",
    "RankSampler",
    "base_keep",
    "bounded",
    "inclusion_probabilities",
    "systematic_sample",
    "tail_probabilities",
]
