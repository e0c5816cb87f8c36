"""Several processes: images shared out by batch, classes by c ≡ r (mod W), on `torch.distributed`."""

from .gradients import all_reduce_gradients
from .pairs import pair_loss, sigmoid_loss
from .sharded_clip import ShardedSkipCLIP

__all__ = ["ShardedSkipCLIP", "all_reduce_gradients", "pair_loss", "sigmoid_loss"]
