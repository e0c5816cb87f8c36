"""refresh="epoch": a new view for each epoch."""

from __future__ import annotations

import pickle
import random
import threading
from pathlib import Path

import pytest
import torch
from caches import Drawn, build

import skipkernels as sk
from skipkernels.store import StoreError

COUNT, EPOCHS = 8, 4


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Expected features of epochs 0 to 3."""
    cache = build(tmp_path_factory.mktemp("views") / "store", Drawn(COUNT), views=EPOCHS)
    return cache.store.gather(torch.arange(EPOCHS * COUNT)).split(COUNT)


def refreshed(folder: Path, dataset=None, **arguments) -> sk.FeatureCache:
    return build(folder, Drawn(COUNT) if dataset is None else dataset, **{"refresh": "epoch", **arguments})


def epoch(loader: sk.FeatureLoader) -> torch.Tensor:
    return torch.cat([features for features, _ in loader])


def epochs_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("epoch-*"))


class Failing(Drawn):
    """Images, of which number 5 cannot be loaded while a file exists."""

    def __init__(self, file: Path):
        super().__init__(COUNT)
        self._file = file

    def __getitem__(self, item):
        if item == 5 and self._file.exists():
            raise OSError("the disk has gone")
        return super().__getitem__(item)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_each_epoch_has_its_own_view_and_one_is_stored(tmp_path, views, prefetch):
    with refreshed(tmp_path) as cache:
        loader = cache.loader(3, "sequential", prefetch=prefetch)
        for number in range(EPOCHS):
            assert epoch(loader).equal(views[number])
            assert epochs_in(tmp_path) == [f"epoch-{number:05d}"]


def test_epoch_does_not_change_the_generators_of_training(tmp_path):
    with refreshed(tmp_path) as cache:
        loader = cache.loader(3, "sequential")
        epoch(loader)
        before = torch.get_rng_state(), random.getstate()
        epoch(loader)
        assert torch.get_rng_state().equal(before[0]) and random.getstate() == before[1]


def test_failed_epoch_is_retried(tmp_path, views):
    file = tmp_path / "fails"
    with refreshed(tmp_path / "cache", Failing(file), key="failing") as cache:
        loader = cache.loader(3, "sequential")
        assert epoch(loader).equal(views[0])
        file.touch()
        with pytest.raises(StoreError, match=r"item 5 of the dataset cannot be loaded: OSError\('the disk has gone'\)"):
            epoch(loader)
        file.unlink()
        assert epoch(loader).equal(views[1])


def test_second_cache_in_the_folder_is_refused(tmp_path, views):
    with refreshed(tmp_path) as cache:
        for overwrite in (False, True):
            with pytest.raises(StoreError, match="in use by another process, or by a FeatureCache that was not closed"):
                refreshed(tmp_path, overwrite=overwrite)
        loader = cache.loader(3, "sequential")
        assert epoch(loader).equal(views[0]) and epoch(loader).equal(views[1])
    closing = refreshed(tmp_path)  # closed in another thread
    thread = threading.Thread(target=closing.close)
    thread.start()
    thread.join()
    refreshed(tmp_path).close()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["epoch-00000/checkpoint.pt", "thesis.tex", "manifest.json"])
def test_folder_with_other_files_is_refused_and_kept(tmp_path, name, overwrite):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    for refresh in ("epoch", "never"):
        with pytest.raises(StoreError, match=r"run: holds other files \(.+\)\. Choose an empty folder"):
            refreshed(tmp_path / "run", overwrite=overwrite, refresh=refresh)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [file], "no lock is created"


def test_other_files_in_a_completed_epoch_are_kept(tmp_path, views):
    with refreshed(tmp_path) as cache:
        (tmp_path / "epoch-00000" / "notes.txt").write_text("precious")
        loader = cache.loader(3, "sequential")
        assert [epoch(loader).equal(views[number]) for number in range(2)] == [True, True]
    assert [path.name for path in (tmp_path / "epoch-00000").iterdir()] == ["notes.txt"]


def test_stores_of_both_kinds_replace_each_other_with_overwrite(tmp_path, views):
    build(tmp_path, Drawn(COUNT), views=EPOCHS)
    with pytest.raises(StoreError, match="holds a store for all epochs. Choose another .* `overwrite=True`"):
        refreshed(tmp_path)
    sk.FeatureCache.open(tmp_path, verify=True)
    with refreshed(tmp_path, overwrite=True) as cache:
        assert epoch(cache.loader(3, "sequential")).equal(views[0])
        assert not {"manifest.json", "00000.safetensors"} & {path.name for path in tmp_path.iterdir()}
        with pytest.raises(StoreError, match="in use by another process"):
            refreshed(tmp_path, refresh="never", overwrite=True)
    with pytest.raises(StoreError, match="holds the features of epochs.* `overwrite=True`"):
        build(tmp_path, Drawn(COUNT), views=EPOCHS, resume=True)
    cache = build(tmp_path, Drawn(COUNT), views=EPOCHS, overwrite=True)
    assert cache.store.gather(torch.arange(COUNT)).equal(views[0]) and epochs_in(tmp_path) == []


def test_loader_of_a_closed_cache(tmp_path):
    cache = refreshed(tmp_path)
    loader = cache.loader(3, "sequential")
    epoch(loader)
    cache.close()
    before = epochs_in(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{tmp_path}: this FeatureCache was closed. Build it again"):
            epoch(loader)
    assert epochs_in(tmp_path) == before


def test_cache_cannot_be_pickled(tmp_path):
    with (
        refreshed(tmp_path) as cache,
        pytest.raises(TypeError, match='cache with refresh="epoch" cannot be sent to another'),
    ):
        pickle.dumps(cache)


class Relabelled(Drawn):
    """Images with random labels."""

    def __getitem__(self, item):
        return super().__getitem__(item)[0], random.randrange(100)


def test_epoch_with_other_labels_is_refused(tmp_path):
    with refreshed(tmp_path, Relabelled(COUNT)) as cache:
        loader = cache.loader(3, "sequential")
        epoch(loader)
        for _ in range(2):
            with pytest.raises(StoreError, match="epoch 1 has other labels than the first"):
                epoch(loader)


def test_failed_build_releases_the_folder(tmp_path):
    refreshed(tmp_path).close()
    with pytest.raises(StoreError, match="holds a store that differs in seed") as kept:
        refreshed(tmp_path, seed=1)
    with refreshed(tmp_path, seed=1, overwrite=True) as cache:
        assert epochs_in(tmp_path)[0] == "epoch-00000" and len(cache) == COUNT
    assert kept.value.__traceback__ is not None, "an error with its traceback is referenced, and holds no lock"


def test_epoch_of_a_loader_state_is_resumed(tmp_path, views):
    with refreshed(tmp_path / "first") as cache:
        loader = cache.loader(3, "random")
        for _ in range(2):
            epoch(loader)
        for _ in loader:  # one batch of the third epoch
            state = loader.state_dict()
            break
        assert cache._rows.gather(torch.arange(COUNT)).equal(views[2])
    for name in ("first", "second"):  # with and without the folder of the first run
        with refreshed(tmp_path / name) as cache:
            loader = cache.loader(3, "random", generator=torch.Generator().manual_seed(9))
            loader.load_state_dict(state)
            assert loader.epoch == 2
            got = [features for features, _ in loader]
            reference = cache.loader(3, "random")
            reference.load_state_dict(state)
            for features, batch in zip(got, reference.sampler, strict=True):
                assert features.equal(views[2][batch])
            assert len(got) == 2
            assert epochs_in(tmp_path / name) == ["epoch-00002"]
            assert epoch(cache.loader(sampler=[[0]])).equal(views[0][:1]), "an earlier epoch is rebuilt"
            assert epochs_in(tmp_path / name) == ["epoch-00000"]
