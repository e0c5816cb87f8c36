"""refresh="epoch": a new view for each epoch, in place of that of the epoch before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import skipkernels as sk
from skipkernels.features import CacheError
from skipkernels.features.image_batches import load_batches, split_batches
from tests.features.caches import Drawn, build, skip_clip

COUNT, EPOCHS = 8, 4


@pytest.fixture(scope="module")
def views():
    """Expected features of epochs 0 to 3."""
    clip, found = skip_clip(), []
    for number in range(EPOCHS):
        batches = load_batches(Drawn(COUNT), split_batches(COUNT, 4), epoch=number)
        found.append(torch.cat([clip.encode_lower(batch.images) for batch in batches]))
    return found


def refreshed(folder: Path, dataset=None, **arguments) -> sk.FeatureCache:
    return build(folder, Drawn(COUNT) if dataset is None else dataset, **{"refresh": "epoch", **arguments})


def epoch(loader: sk.FeatureLoader) -> torch.Tensor:
    return torch.cat([features for features, _ in loader])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_each_epoch_has_its_own_view_and_one_is_stored(tmp_path, views, prefetch):
    loader = refreshed(tmp_path).loader(3, "sequential", prefetch=prefetch)
    before = torch.get_rng_state(), random.getstate()
    for number in range(EPOCHS):
        assert epoch(loader).equal(views[number])
        assert len(list(tmp_path.glob("*.npy"))) == 3
        sk.FeatureCache.open(tmp_path, verify=True)
    assert torch.get_rng_state().equal(before[0]) and random.getstate() == before[1], "those of training"


@pytest.mark.parametrize("workers", [0, 2])
def test_in_memory(views, workers):
    """The same images as on the disk, in any process, also if epochs are skipped; kept batches do not change."""
    encode = skip_clip().encode_lower
    cache = sk.FeatureCache.in_memory(Drawn(COUNT), encode, batch_size=4, workers=workers, refresh="epoch")
    loader = cache.loader(3, "sequential")
    kept = [features for features, _ in loader]
    loader.load_state_dict(loader.state_dict() | {"epoch": 2})
    torch.testing.assert_close(epoch(loader), views[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(kept), views[0], atol=1e-5, rtol=1e-5)


class Failing(Drawn):
    """Images, of which number 5 cannot be loaded while a file exists."""

    def __init__(self, file: Path):
        super().__init__(COUNT)
        self._file = file

    def __getitem__(self, item):
        if item == 5 and self._file.exists():
            raise OSError("the disk has gone")
        return super().__getitem__(item)


def test_failed_epoch_is_retried_and_resumed(tmp_path, views):
    file = tmp_path / "fails"
    loader = refreshed(tmp_path / "cache", Failing(file), identity="failing").loader(3, "sequential")
    assert epoch(loader).equal(views[0])
    file.touch()
    with pytest.raises(CacheError, match=r"item 5 of the dataset cannot be loaded: OSError\('the disk has gone'\)"):
        epoch(loader)
    file.unlink()
    done = []
    resumed = refreshed(tmp_path / "cache", Failing(file), identity="failing", progress=done.append)
    assert done == [4, 4], "the first four images of epoch 1 existed"
    assert resumed.load_epoch(1).rows(torch.arange(COUNT)).equal(views[1])
    assert epoch(loader).equal(views[1])


def test_store_of_another_kind_is_refused_and_replaced_with_overwrite(tmp_path, views):
    build(tmp_path, Drawn(COUNT))
    with pytest.raises(CacheError, match=r"differs in refresh \(never there, epoch here\)"):
        refreshed(tmp_path)
    assert epoch(refreshed(tmp_path, overwrite=True).loader(3, "sequential")).equal(views[0])
    with pytest.raises(CacheError, match="differs in seed"):
        refreshed(tmp_path, seed=1)
    with pytest.raises(CacheError, match=r"differs in refresh \(epoch there, never here\)"):
        build(tmp_path, Drawn(COUNT), resume=True)


class Relabelled(Drawn):
    """Images with random labels."""

    def __getitem__(self, item):
        return super().__getitem__(item)[0], random.randrange(100)


def test_epoch_with_other_labels_is_refused(tmp_path):
    loader = refreshed(tmp_path, Relabelled(COUNT)).loader(3, "sequential")
    epoch(loader)
    for _ in range(2):
        with pytest.raises(CacheError, match="epoch 1 has other labels than the first"):
            epoch(loader)


def test_epoch_of_a_loader_state_is_resumed(tmp_path, views):
    loader = refreshed(tmp_path / "first").loader(3, "random")
    for _ in range(2):
        epoch(loader)
    for _ in loader:  # one batch of the third epoch
        state = loader.state_dict()
        break
    for name in ("first", "second"):  # with and without the folder of the first run
        cache = refreshed(tmp_path / name)
        loader = cache.loader(3, "random", generator=torch.Generator().manual_seed(9))
        loader.load_state_dict(state)
        assert loader.epoch == 2
        got = [features for features, _ in loader]
        reference = cache.loader(3, "random")
        reference.load_state_dict(state)
        for features, batch in zip(got, reference.sampler, strict=True):
            assert features.equal(views[2][batch])
        assert len(got) == 2
        assert epoch(cache.loader(sampler=[[0]])).equal(views[0][:1]), "an earlier epoch is computed again"
