"""Batches of features: rows in the order of the sampler, read ahead."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader

import skipkernels as sk
from skipkernels.features import BatchSampler, CacheError
from skipkernels.features.table import MemoryTable
from tests.features.caches import CLASSES, build, read_epoch
from tests.processes import forkserver

COUNT = 23


@pytest.fixture
def cache(folder):
    return sk.FeatureCache.open(folder)


@pytest.fixture
def rows(cache):
    return cache.table.rows(torch.arange(COUNT))


def in_memory(rows: torch.Tensor) -> sk.FeatureCache:
    return sk.FeatureCache(MemoryTable(rows), torch.arange(len(rows)) % CLASSES)


@pytest.fixture(params=["disk", "memory"])
def each_cache(request, cache, rows):
    return cache if request.param == "disk" else in_memory(rows)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("skipkernels features")]


# ---- contents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("kind", ["class_pure", "sequential"])
def test_rows_follow_the_sampler(each_cache, rows, kind, prefetch):
    loader = each_cache.loader(5, kind, generator=torch.Generator().manual_seed(3), prefetch=prefetch)
    order = BatchSampler(each_cache.labels, 5, kind, torch.Generator().manual_seed(3))
    assert len(loader) == len(order) == 5
    epochs = [list(loader), list(loader)]  # kept batches do not change
    for epoch in epochs:
        for (features, labels), batch in zip(epoch, order, strict=True):
            assert features.equal(rows[batch]) and labels.equal(each_cache.labels[batch])
            assert labels.dtype == torch.int64


def test_processes_divide_batches(cache):
    ranks = (cache.loader(3, "random", rank=rank, world_size=2) for rank in range(2))
    together = [features for parts in zip(*ranks, strict=True) for features, _ in parts]
    assert torch.cat(together).equal(read_epoch(cache.loader(6, "random")))


def test_lists_of_numbers_as_sampler(cache, rows):
    batches = [[3, 1], [], [22, 0, 3]]
    loader = cache.loader(sampler=batches)
    assert len(loader) == 3
    assert all(features.equal(rows[batch]) for (features, _), batch in zip(loader, batches, strict=True))
    assert len(list(loader)) == 3 and loader.epoch == 2


@pytest.mark.parametrize("wrong", [COUNT, -1])
def test_image_number_out_of_range(each_cache, wrong):
    with pytest.raises(IndexError, match=rf"^FeatureLoader: images are numbered from 0 to 22; got \[3, {wrong}, 2\]"):
        list(each_cache.loader(sampler=[[0], [3, wrong, 2]]))
    assert not threads()


def test_cache_in_a_torch_dataloader(cache, rows):
    """In this process, and then pickled for another."""
    for options in ({}, {"num_workers": 1, "multiprocessing_context": forkserver()}):
        got = list(DataLoader(cache, batch_size=5, **options))
        assert torch.cat([features for features, _ in got]).equal(rows)
        assert torch.cat([labels for _, labels in got]).equal(cache.labels)


# ---- reading thread -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1, 3])
def test_break_ends_the_thread_and_a_new_loop_is_complete(cache, rows, prefetch):
    loader = cache.loader(2, "sequential", prefetch=prefetch)
    for step, _ in enumerate(loader):
        assert threads()
        if step == 2:
            break
    assert not threads()
    assert read_epoch(loader).equal(rows)
    assert not threads()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_read_error_is_raised_in_the_loop(tmp_path, rows, prefetch):
    cache = build(tmp_path / "store")
    data = bytearray((tmp_path / "store" / "features.npy").read_bytes())
    data[128 + 17 * (len(data) - 128) // COUNT] ^= 1
    (tmp_path / "store" / "features.npy").write_bytes(data)
    seen = 0
    with pytest.raises(CacheError, match=r"row 17 damaged: .* Build it again"):
        for features, _ in cache.loader(4, "sequential", prefetch=prefetch):
            assert features.equal(rows[seen : seen + 4])
            seen += 4
    assert seen == 16 or (seen == 12 and prefetch), "with prefetch, the batch before the error may be lost"
    assert not threads()


# ---- states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 5, 12])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_state_counts_yielded_batches(cache, tmp_path, prefetch, steps):
    """A state saved in the body of the loop, here in the second epoch, while a thread has read ahead."""
    whole = cache.loader(2, "random", prefetch=0)
    epochs = [read_epoch(whole) for _ in range(3)]
    loader = cache.loader(2, "random", prefetch=prefetch)
    read_epoch(loader)
    batches = iter(loader)
    for _ in range(steps):
        next(batches)
    time.sleep(0.02)  # lets the thread read ahead
    torch.save(loader.state_dict(), tmp_path / "state")
    resumed = cache.loader(2, "random", generator=torch.Generator().manual_seed(9), prefetch=prefetch)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert loader.epoch == resumed.epoch == 1
    rest = [epochs[1][: 2 * steps], *(features for features, _ in resumed)]
    assert torch.cat(rest).equal(epochs[1]) and resumed.epoch == 2
    assert read_epoch(resumed).equal(epochs[2])


# ---- GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("where", ["disk", "memory", "memory of the GPU"])
def test_batches_on_a_gpu(cache, rows, where, prefetch):
    if where != "disk":
        cache = in_memory(rows.cuda() if where == "memory of the GPU" else rows)
    loader = cache.loader(5, "random", device="cuda", prefetch=prefetch)
    order = BatchSampler(cache.labels, 5, "random")
    for _ in range(3):
        kept = list(loader)
        for _ in loader:  # may use memory that is free
            pass
        for (features, labels), batch in zip(kept, order, strict=True):
            assert features.is_cuda and labels.is_cuda
            assert features.cpu().equal(rows[batch]) and labels.cpu().equal(cache.labels[batch])
        list(order)
