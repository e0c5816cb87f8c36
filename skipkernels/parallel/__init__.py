"""Several processes: images shared out by batch, classes by c ≡ r (mod W), on `torch.distributed`."""

from .gathers import gather_rows
from .gradients import all_reduce_gradients
from .loss import (
    sharded_binary_cross_entropy,
    sharded_contrastive_loss,
    sharded_cross_entropy,
    sharded_pairwise_sigmoid_loss,
)
from .pairs import pair_loss, sigmoid_loss
from .sharded_clip import ShardedSkipCLIP

__all__ = [
    "ShardedSkipCLIP",
    "all_reduce_gradients",
    "gather_rows",
    "pair_loss",
    "sharded_binary_cross_entropy",
    "sharded_contrastive_loss",
    "sharded_cross_entropy",
    "sharded_pairwise_sigmoid_loss",
    "sigmoid_loss",
]
