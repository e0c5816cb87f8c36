"""Sampler and texts with which a graph captures `clip.step`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..clip import SkipCLIP
from ..clip.texts import ClassTexts
from ..ops.classes_at_ranks import classes_at_ranks
from ..ops.launching import pinned
from ..selection import ClassSelection


class ReservedRanks:
    """A `Sampler` of `clip.step` that takes the ranks drawn before the step, at an address that a graph reads.

    Attributes:
        ranks: int64 [K], of the last draw. The address changes with K alone.
    """

    def __init__(self, clip: SkipCLIP):
        self._clip = clip
        self.ranks: Tensor | None = None

    def draw(self, batch_size: int) -> Tensor:
        """Draw the ranks of the next step, and return them; K is the same in every step."""
        device = self._clip.prototypes.device
        drawn = self._clip.sampler.draw(self._clip.num_classes, batch_size, one_size=True)
        if self.ranks is None or self.ranks.shape != drawn.shape or self.ranks.device != device:
            self.ranks = torch.empty_like(drawn, device=device)
        self.ranks.copy_(pinned(drawn, device), non_blocking=True)
        return self.ranks

    def select(self, scores: Tensor, labels: Tensor) -> ClassSelection:
        """Select the classes [K] at these ranks, see `RankSampler.select`."""
        return ClassSelection(*classes_at_ranks(scores, self.ranks, labels))


class TextsOnStream:
    """`Texts` of `clip.step` that are encoded on a stream of their own, so that their backward runs on it.

    Autograd runs each node of backward on the stream of its forward: that of the texts runs beside that of the images,
    and streams wait for each other's gradients alone. Forward gains nothing: its results are awaited at once.
    """

    def __init__(self, texts: ClassTexts, stream: Any):
        self._texts, self._stream = texts, stream

    def scores(self, image: Tensor, labels: Tensor) -> Tensor:
        """Highest cosine [C] of each class with image embeddings [B, D], +∞ for labels [B]."""
        return self._texts.scores(image, labels)

    def encode(self, class_ids: Tensor) -> Tensor:
        """Class ids [K] to text embeddings [K, D]."""
        current = torch.cuda.current_stream(class_ids.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            text = self._texts.encode(class_ids)
        current.wait_stream(self._stream)
        return text
