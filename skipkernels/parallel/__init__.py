"""Several processes: images shared out by batch, classes by c ≡ r (mod W), on `torch.distributed`."""

from .class_parallel import ClassParallel
from .gathers import gather_rows
from .gradients import all_reduce_gradients
from .loss import (
    sharded_binary_cross_entropy,
    sharded_contrastive_loss,
    sharded_cross_entropy,
    sharded_pairwise_sigmoid_loss,
)

__all__ = [
    "ClassParallel",
    "all_reduce_gradients",
    "gather_rows",
    "sharded_contrastive_loss",
    "sharded_cross_entropy",
    "sharded_binary_cross_entropy",
    "sharded_pairwise_sigmoid_loss",
]
