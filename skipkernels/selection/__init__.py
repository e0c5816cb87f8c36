"""CSkip: the classes of a step, by rank of their scores and a sample of the tail."""

from .probabilities import base_keep, bounded, inclusion_probabilities, systematic_sample, tail_probabilities
from .sampler import ClassSelection, RankSampler, classes_at_ranks, ranked_selection, select_classes, select_ranks

__all__ = [
    "ClassSelection",
    "RankSampler",
    "base_keep",
    "bounded",
    "classes_at_ranks",
    "inclusion_probabilities",
    "ranked_selection",
    "select_classes",
    "select_ranks",
    "systematic_sample",
    "tail_probabilities",
]
