"""refresh="epoch" in memory: a new view for each epoch, with the memory of one."""

from __future__ import annotations

import random
import weakref

import numpy as np
import pytest
import torch

import skipkernels as sk
from skipkernels.features import CacheError
from skipkernels.features.extraction import Images
from tests.features.caches import Drawn, read_epoch, skip_clip

COUNT, EPOCHS = 8, 4
ALL = torch.arange(COUNT)


@pytest.fixture(scope="module")
def views():
    """Expected features of epochs 0 to 3."""
    clip, images = skip_clip(), Images("test", Drawn(COUNT), batch_size=4, workers=0, seed=0)
    return [images.compute(clip.encode_lower, epoch)[0].features for epoch in range(EPOCHS)]


def refreshed(dataset=None, encode=None, **options) -> sk.FeatureCache:
    dataset, encode = dataset or Drawn(COUNT), encode or skip_clip().encode_lower
    return sk.FeatureCache.in_memory(dataset, encode, **{"batch_size": 4, "refresh": "epoch", **options})


def generators() -> tuple:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_has_its_own_view(views, workers, prefetch):
    """In any process; batches and subsets of an earlier epoch do not change."""
    assert not views[0].equal(views[1])
    before = generators()
    cache = refreshed(workers=workers)
    subset, loader = cache.subset(ALL.flip(0)), cache.loader(3, "sequential", prefetch=prefetch)
    kept = [features for features, _ in loader]
    for number in range(1, EPOCHS):
        torch.testing.assert_close(read_epoch(loader), views[number], atol=1e-5, rtol=1e-5)  # threads round differently
    torch.testing.assert_close(torch.cat(kept), views[0], atol=1e-5, rtol=1e-5)
    assert read_epoch(subset.loader(3, "sequential")).flip(0).equal(torch.cat(kept))
    assert generators() == before, "those of training"


def test_two_iterations_keep_their_epochs(views):
    cache = refreshed()
    first = cache.loader(3, "sequential")
    kept = iter(first)
    started = [next(kept)[0]]
    assert cache.load_epoch(1).rows(ALL).equal(views[1])
    assert torch.cat([*started, *(features for features, _ in kept)]).equal(views[0])


def test_epoch_before_is_released_first(views):
    """So that memory does not double; a subset keeps its own."""
    held: list[weakref.ref] = []
    lower = skip_clip().encode_lower

    def encode(images: torch.Tensor) -> torch.Tensor:
        alive.append(bool(held) and held[-1]() is not None)
        return lower(images)

    alive: list[bool] = []
    cache = refreshed(encode=encode)
    loader = cache.loader(3, "sequential", prefetch=2)
    for _ in range(2):
        read_epoch(loader)
        held.append(weakref.ref(cache.table.features))
    cache.load_epoch(2)
    assert not any(alive)
    subset = cache.subset(ALL)
    held.append(weakref.ref(cache.table.features))
    cache.load_epoch(3)
    assert alive[-1] and read_epoch(subset.loader(3, "sequential")).equal(views[2])


class Failing(Drawn):
    """Images, of which number 5 can be loaded a number of times."""

    loads = 1

    def __getitem__(self, item):
        if item == 5:
            self.loads -= 1
            if self.loads < 0:
                raise OSError("the disk has gone")
        return super().__getitem__(item)


def test_failed_epoch_is_computed_again_from_its_beginning(views):
    """No rows of two epochs are ever in one table."""
    dataset = Failing(COUNT)
    cache = refreshed(dataset)
    loader = cache.loader(3, "sequential")
    assert read_epoch(loader).equal(views[0])
    for read in (lambda: read_epoch(loader), lambda: cache[0], lambda: cache.table):
        with pytest.raises(CacheError, match=r"item 5 of the dataset cannot be loaded: OSError\('the disk has gone'\)"):
            read()
    dataset.loads = 9
    assert cache[0][0].equal(views[1][0]) and read_epoch(loader).equal(views[1])


class Relabelled(Drawn):
    """Images with random labels."""

    def __getitem__(self, item):
        return super().__getitem__(item)[0], random.randrange(100)


def test_epoch_with_other_labels_is_refused():
    loader = refreshed(Relabelled(COUNT)).loader(3, "sequential")
    read_epoch(loader)
    for _ in range(2):
        with pytest.raises(CacheError, match="epoch 1 has other labels than the first"):
            read_epoch(loader)


def test_epoch_of_a_loader_state_is_resumed(views):
    loader = refreshed().loader(3, "random")
    for _ in range(2):
        read_epoch(loader)
    third = iter(loader)
    next(third)
    state, rest = loader.state_dict(), torch.cat([features for features, _ in third])
    cache = refreshed()
    resumed = cache.loader(3, "random", generator=torch.Generator().manual_seed(9))
    resumed.load_state_dict(state)
    assert resumed.epoch == 2 and read_epoch(resumed).equal(rest) and resumed.epoch == 3
    assert read_epoch(cache.loader(sampler=[[0]])).equal(views[0][:1]), "an earlier epoch is computed again"
