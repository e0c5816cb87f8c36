"""The ranks that a graph reads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from skipkernels.graphs.parts import ReservedRanks
from skipkernels.selection import RankSampler


@pytest.mark.parametrize("tail", ["fixed", "resample"])
def test_reserved_ranks_are_draws_of_one_size_at_one_address(tail):
    """Also after other batches and classes, with which the address may change."""
    ours, theirs = (RankSampler(tail=tail) for _ in range(2))
    clip = SimpleNamespace(sampler=ours, prototypes=torch.zeros(1))
    reserved = ReservedRanks(clip)
    for classes, batch in ((300, 4), (310, 60), (300, 2), (90, 4), (2, 1)):
        addresses, clip.num_classes = set(), classes
        for _ in range(4):
            assert reserved.draw(batch).equal(theirs.draw(classes, batch, one_size=True))
            addresses.add(reserved.ranks.data_ptr())
        assert len(addresses) == 1
