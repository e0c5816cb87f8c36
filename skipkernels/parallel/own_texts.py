"""Texts of a step of several processes: scores of all classes, and embeddings of the classes of this process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..clip.texts import ClassTexts
from .class_parallel import ClassParallel
from .gathers import filled


class OwnTexts:
    """`Texts` of `clip.step` for one step of several processes.

    Attributes:
        positions: [K_r] int64, of the classes of this process among the selected ones [K]; set by `encode`.
    """

    positions: Tensor

    def __init__(self, texts: ClassTexts, shards: ClassParallel):
        self._texts, self._shards = texts, shards

    @torch.no_grad()
    def scores(self, image: Tensor, labels: Tensor) -> Tensor:
        """Scores [C] for images [B, D] of all processes, +∞ for their labels [B], or [b, C] of each; collective."""
        scores = self._shards.gather_classes(self._texts.scores(image, None))
        if labels.ndim == 1:
            return scores.index_fill(0, labels, torch.inf)
        is_label = labels.any(dim=0).byte()  # [C]
        dist.all_reduce(is_label, dist.ReduceOp.MAX, group=self._shards.group)
        return scores.masked_fill(is_label.bool(), torch.inf)

    def encode(self, class_ids: Tensor) -> Tensor:
        """Selected classes [K] to embeddings [K_r, D] of those of this process; on a GPU with a host sync.

        Without any, that of a class that is not used, so that gradients are zero, not None.
        """
        self.positions, own_ids = self._shards.own_of(class_ids)
        return self._texts.encode(*filled(own_ids))
