"""refresh="epoch": a new view for each epoch, computed in the background of the epoch before."""

from __future__ import annotations

import errno
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import Drawn, build, images, skip_clip

import skipkernels as sk
from skipkernels.features import builder
from skipkernels.features.image_batches import load_batches
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


def extractions() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "skipkernels extraction"]


def epochs_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("epoch-*"))


def wait(what) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.005)


class Slow(Drawn):
    """Images that load slowly in worker processes, which background extraction uses."""

    def __init__(self, seconds: float):
        super().__init__(COUNT)
        self._home, self._seconds = os.getpid(), seconds

    def __getitem__(self, item):
        if os.getpid() != self._home:
            time.sleep(self._seconds)
        return super().__getitem__(item)


class Failing(Drawn):
    """Images of which one cannot be loaded while a file exists."""

    def __init__(self, file: Path):
        super().__init__(COUNT)
        self._file = file

    def __getitem__(self, item):
        if item == 5 and self._file.exists():
            raise OSError("the disk has gone")
        return super().__getitem__(item)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_epoch_is_the_view_of_its_number_and_two_are_kept(tmp_path, views, prefetch):
    with refreshed(tmp_path) as cache:
        loader = cache.loader(3, "sequential", prefetch=prefetch)
        for number in range(EPOCHS):
            assert epoch(loader).equal(views[number])
            assert f"epoch-{number:05d}" in epochs_in(tmp_path)
            assert set(epochs_in(tmp_path)) <= {f"epoch-{number:05d}", f"epoch-{number + 1:05d}"}
    assert not extractions()


def test_next_epoch_is_built_in_the_background(tmp_path):
    with refreshed(tmp_path) as cache:
        loader = cache.loader(3, "sequential")
        for step, _ in enumerate(loader):
            if step == 0:
                wait(lambda: not extractions())
                sk.FeatureCache.open(tmp_path / "epoch-00001", verify=True)


def test_workers_start_before_training_continues(tmp_path, monkeypatch):
    """A process forked while the training thread holds a lock of PyTorch would wait forever."""
    begun = []

    def slowly(*args, **kwargs):
        time.sleep(0.3)
        loading = load_batches(*args, **kwargs)
        begun.append(threading.current_thread().name)
        return loading

    monkeypatch.setattr(builder, "load_batches", slowly)
    with refreshed(tmp_path):
        assert begun[-1] == "skipkernels extraction"


def test_extraction_does_not_draw_from_the_generators_of_training(tmp_path, views):
    """Numbers drawn by a loop, and images drawn in the background, do not depend on each other."""

    def draws(while_: threading.Event | None) -> list:
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        found = []
        while len(found) < 200 or (while_ is not None and not while_.is_set()):
            found.append((torch.rand(1).item(), np.random.rand(), random.random()))
            time.sleep(0.0005)
        return found

    alone = draws(None)
    done = threading.Event()
    with refreshed(tmp_path, Slow(0.02)) as cache:

        def watch():
            wait(lambda: not extractions())
            done.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        both = draws(done)
        watcher.join()
        assert both[:200] == alone
        loader = cache.loader(3, "sequential")
        assert epoch(loader).equal(views[0]) and epoch(loader).equal(views[1])


def test_background_error_is_raised_in_the_loop_and_can_be_repaired(tmp_path, views):
    file = tmp_path / "fails"
    with refreshed(tmp_path / "cache", Failing(file), key="failing", workers=0) as cache:
        loader = cache.loader(3, "sequential")
        wait(lambda: not extractions())
        assert epoch(loader).equal(views[0])
        file.touch()
        assert epoch(loader).equal(views[1]), "built before"
        with pytest.raises(StoreError, match=r"item 5 of the dataset cannot be loaded: OSError\('the disk has gone'\)"):
            epoch(loader)
        file.unlink()
        assert epoch(loader).equal(views[2])


def test_close_stops_an_extraction_and_a_later_build_resumes_it(tmp_path, views):
    cache = refreshed(tmp_path, Slow(0.3), key="slow", batch_size=1)
    wait(lambda: (tmp_path / "epoch-00001" / "00000.safetensors").exists())
    before = time.monotonic()
    cache.close()
    assert time.monotonic() - before < 1.2, "eight images take twice as long"
    assert not extractions() and not (tmp_path / "epoch-00001" / "00007.safetensors").exists()
    cache.close()
    kept = (tmp_path / "epoch-00001" / "00000.safetensors").stat().st_mtime_ns
    with refreshed(tmp_path, key="slow", batch_size=1) as cache:
        wait(lambda: not extractions())
        assert (tmp_path / "epoch-00001" / "00000.safetensors").stat().st_mtime_ns == kept
        loader = cache.loader(3, "sequential")
        for number in range(2):  # batches of another size may round differently
            torch.testing.assert_close(epoch(loader), views[number], rtol=1e-5, atol=1e-5)


def test_second_cache_in_the_folder_is_refused(tmp_path, views):
    with refreshed(tmp_path) as cache:
        for overwrite in (False, True):
            with pytest.raises(StoreError, match="in use by another process, or by a FeatureCache that was not"):
                refreshed(tmp_path, overwrite=overwrite)
        loader = cache.loader(3, "sequential")
        assert epoch(loader).equal(views[0]) and epoch(loader).equal(views[1])
    refreshed(tmp_path).close()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["epoch-00000/checkpoint.pt", "epoch-00007/checkpoint.pt"],
            r"epoch-00000: holds other files \(checkpoint.pt\)",
        ),
        (["epoch-best/checkpoint.pt"], r"run: holds other files \(epoch-best\)"),
        (["epoch-1/manifest.json"], r"run: holds other files \(epoch-1\)"),
        (["epoch-00003/manifest.json"], r"epoch-00003: holds other files \(manifest.json\)"),
        (["epoch-00003/00000.safetensors"], r"epoch-00003: holds other files \(00000.safetensors\)"),
        (["epoch-00003"], r"run: holds other files \(epoch-00003\)"),
        (["thesis.tex"], r"run: holds other files \(thesis.tex\)"),
        (["manifest.json"], r"run: holds other files \(manifest.json\)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_foreign_files_are_refused_and_kept(tmp_path, files, message, overwrite):
    for name in files:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("precious")
    for refresh in ("epoch", "never"):
        if refresh == "never" and files == ["manifest.json"]:
            continue  # a store with a damaged manifest
        with pytest.raises(StoreError, match=message):
            refreshed(tmp_path / "run", overwrite=overwrite, refresh=refresh)
    assert [path for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()] == [
        tmp_path / "run" / name for name in files
    ], "no lock is created"


def test_overwrite_deletes_nothing_if_refused(tmp_path):
    refreshed(tmp_path).close()
    (tmp_path / "epoch-00001" / "notes.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for refresh in ("epoch", "never"):
        with pytest.raises(StoreError, match=r"epoch-00001: holds other files \(notes.txt\)"):
            refreshed(tmp_path, overwrite=True, refresh=refresh)
    assert sorted(tmp_path.rglob("*")) == before


def test_foreign_files_in_a_completed_epoch_are_kept(tmp_path, views):
    with refreshed(tmp_path) as cache:
        (tmp_path / "epoch-00000" / "notes.txt").write_text("precious")
        loader = cache.loader(3, "sequential")
        assert [epoch(loader).equal(views[number]) for number in range(2)] == [True, True]
    assert [path.name for path in (tmp_path / "epoch-00000").iterdir()] == ["notes.txt"]


def test_leftovers_of_a_killed_build_are_not_foreign(tmp_path, views):
    (tmp_path / "epoch-00004").mkdir()
    (tmp_path / "epoch-00004" / ".lock").touch()
    (tmp_path / "epoch-00009").mkdir()
    (tmp_path / "epoch-00009" / "..owner.json.7.partial").touch()  # of an older version
    (tmp_path / "epoch-00009" / "..owner.json.0123456789abcdef.skipkernels-partial").touch()
    with refreshed(tmp_path) as cache:
        loader = cache.loader(3, "sequential")
        assert epoch(loader).equal(views[0])
        assert set(epochs_in(tmp_path)) <= {"epoch-00000", "epoch-00001"}


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
    for resume in (False, True):
        with pytest.raises(StoreError, match=r"holds the features of epochs \(epoch-00000\).* `overwrite=True`"):
            build(tmp_path, Drawn(COUNT), views=EPOCHS, resume=resume)
    cache = build(tmp_path, Drawn(COUNT), views=EPOCHS, overwrite=True)
    assert cache.store.gather(torch.arange(COUNT)).equal(views[0]) and epochs_in(tmp_path) == []


def test_unusable_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file: is a file. Choose a folder"):
        refreshed(tmp_path / "file")
    with pytest.raises(StoreError, match=r"below: cannot be read or written \(Not a directory\)\. "):
        refreshed(tmp_path / "file" / "below")

    def read_only(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(StoreError, match=r"new: cannot be read or written \(Read-only file system\)\. "):
        refreshed(tmp_path / "new")


def test_loader_of_a_closed_cache(tmp_path):
    cache = refreshed(tmp_path)
    loader = cache.loader(3, "sequential")
    epoch(loader)
    cache.close()
    before = epochs_in(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{tmp_path}: this FeatureCache was closed. Build it again"):
            epoch(loader)
    assert epochs_in(tmp_path) == before and not extractions()


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
    assert kept.value.__traceback__ is not None, "the kept error does not hold the lock"


def test_epoch_of_a_loader_state_is_resumed(tmp_path, views):
    with refreshed(tmp_path / "first") as cache:
        loader = cache.loader(3, "random")
        for _ in range(2):
            epoch(loader)
        for step, _ in enumerate(loader):  # one batch of the third epoch
            if step == 0:
                state = loader.state_dict()
                break
        expected = [cache._rows.gather(torch.arange(COUNT))]
        assert expected[0].equal(views[2])
    for name in ("first", "second"):  # with and without the stores of the first run
        with refreshed(tmp_path / name) as cache:
            loader = cache.loader(3, "random", generator=torch.Generator().manual_seed(9))
            loader.load_state_dict(state)
            assert loader.epoch == 2
            got, order = [], []
            for features, labels in loader:
                got.append(features)
                order.append(labels)
            reference = cache.loader(3, "random")
            reference.load_state_dict(state)
            for features, batch in zip(got, reference.sampler, strict=True):
                assert features.equal(views[2][batch])
            assert len(got) == 2
            assert set(epochs_in(tmp_path / name)) <= {"epoch-00002", "epoch-00003"}
            assert epoch(cache.loader(sampler=[[0]])).equal(views[0][:1]), "an earlier epoch is rebuilt"
            assert set(epochs_in(tmp_path / name)) <= {"epoch-00000", "epoch-00001"}


def test_other_epoch_than_the_next_does_not_wait_for_it(tmp_path, views):
    with refreshed(tmp_path, Slow(0.4), batch_size=1) as cache:
        loader = cache.loader(3, "sequential")
        loader.load_state_dict(loader.state_dict() | {"epoch": 3})
        before = time.monotonic()
        torch.testing.assert_close(epoch(loader), views[3], rtol=1e-5, atol=1e-5)  # batches of another size
        assert time.monotonic() - before < 2, "eight images take 3.2 s; those in progress 0.8 s"
        assert "epoch-00003" in epochs_in(tmp_path) and "epoch-00001" not in epochs_in(tmp_path)


def test_images_without_random_transform_stay_the_same(tmp_path):
    with refreshed(tmp_path, images(COUNT)) as cache:
        loader = cache.loader(3, "sequential")
        assert epoch(loader).equal(epoch(loader))


def test_extraction_does_not_change_the_mode_of_the_model(tmp_path, views):
    """The mode must not change even for a moment, because training may change it at the same time."""
    clip, touched = skip_clip(), set()
    conv1 = clip.model.visual.conv1

    class Watched(type(conv1)):
        def __setattr__(self, name, value):
            if name == "training" and self is conv1:
                touched.add(threading.current_thread().name)
            super().__setattr__(name, value)

    conv1.__class__ = Watched
    clip.model.train()
    assert touched == {threading.current_thread().name}
    with refreshed(tmp_path, clip=clip) as cache:
        loader = cache.loader(3, "sequential")
        assert epoch(loader).equal(views[0]) and epoch(loader).equal(views[1])
    assert touched == {threading.current_thread().name}


def test_program_may_end_without_closing(tmp_path):
    here = [str(path) for path in (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2])]
    code = f"""
import pathlib, test_refresh as t
cache = t.refreshed(pathlib.Path({str(tmp_path)!r}), t.Slow(0.2), key="slow", batch_size=1)
batches = iter(cache.loader(1, "sequential"))
next(batches)
assert t.extractions()
print("done")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(here)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    refreshed(tmp_path, key="slow", batch_size=1).close()
