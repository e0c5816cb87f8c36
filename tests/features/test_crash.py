"""Builds that are killed, in processes of their own: what is there is sound, and a second run ends with the same bits.

`tests/store/test_faults.py` has the faults of a disk.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import skipkernels as sk
from skipkernels.features import FeatureCache
from skipkernels.store import Manifest, Store, StoreError
from skipkernels.store.lock import OWNER
from skipkernels.store.shards import find_damage
from tests.kills import run_for, server
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.store.stores import contents

IMAGES, SHARDS, KILLS, SEED = 160, 40, 20, 0


def small_images() -> list[tuple[torch.Tensor, int]]:
    return list(zip(tiny_batch(IMAGES, 5, torch.float32)[0], range(IMAGES), strict=True))


def small_model() -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(5), skip_layers=1 / 3)


def build(folder: Path, clip: sk.SkipCLIP | None = None, dataset=None, **options) -> FeatureCache:
    """Forty shards of a batch each, with one thread: sums in another order have other bits."""
    torch.set_num_threads(1)
    options = {"dtype": "int8", "batch_size": 4, "shard_bytes": 1, "progress": False, **options}
    return FeatureCache.build(folder, clip or small_model(), dataset or small_images(), **options)


def listed(folder: Path) -> int:
    """Shards that the manifest says are there, all of which are sound."""
    try:
        manifest = Manifest.read(folder)
    except StoreError as error:
        assert "no manifest.json" in str(error)
        return 0
    assert find_damage(folder, manifest) == []
    return sum(shard is not None for shard in manifest.shards)


@pytest.fixture(scope="module")
def processes():
    """From a server that has imported everything, so that a process begins at once."""
    return server("open_clip", "skipkernels.features")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """What a build leaves that nobody kills."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    build(folder)
    assert listed(folder) == SHARDS
    return contents(folder)


# ---- kills -------------------------------------------------------------------------------------------------------


def builder(folder: Path, pipe) -> None:
    """Builds, and says when it begins and when it has ended."""
    clip, images = small_model(), small_images()
    pipe.send("begins")
    build(folder, clip, images)
    pipe.send("has ended")
    pipe.recv()


def run(processes, folder: Path, seconds: float) -> float:
    return run_for(processes, builder, (folder,), seconds)


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_little_and_breaks_nothing(processes, whole, tmp_path):
    _, duration, _ = sorted(run(processes, tmp_path / f"whole-{n}", seconds=60) for n in range(3))
    assert contents(tmp_path / "whole-0") == whole, "another process makes the same bits"
    moments, middle = random.Random(SEED), 0
    for kill in range(KILLS):
        folder = tmp_path / f"{kill}"
        seconds = (kill + moments.random()) / KILLS * duration
        run(processes, folder, seconds)
        there = listed(folder)
        print(f"killed {seconds:.3f} s into {duration:.3f} s: {there} shards")  # noqa: T201
        middle += 0 < there < SHARDS
        if there < SHARDS:
            with pytest.raises(StoreError, match=f"no manifest.json|incomplete: {there} of {SHARDS} shards exist"):
                FeatureCache.open(folder)
        else:
            assert Store(folder).verify() == []
        made = []
        build(folder, resume=True, progress=made.append)
        assert sum(made[there > 0 :]) == IMAGES - 4 * there, "only what was missing is computed"
        assert contents(folder) == whole
    assert middle, "of the kills one at least came between the first shard and the last"


# ---- two at once -------------------------------------------------------------------------------------------------


class Waiting(torch.utils.data.Dataset):
    """Images, of which the one in the middle says that it was asked for, and waits."""

    def __init__(self, asked, go_on):
        self.asked, self.go_on, self.images = asked, go_on, small_images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        if item == IMAGES // 2:
            self.asked.set()
            assert self.go_on.wait(60)
        return self.images[item]


def waiting_builder(folder: Path, asked, go_on) -> None:
    build(folder, dataset=Waiting(asked, go_on), identity="images")


@pytest.fixture
def at_work(processes, tmp_path):
    """A process that has made half of a store, and goes on when it may."""
    asked, go_on = processes.Event(), processes.Event()
    process = processes.Process(target=waiting_builder, args=(tmp_path / "store", asked, go_on))
    process.start()
    assert asked.wait(60)
    deadline = time.monotonic() + 60
    while listed(tmp_path / "store") < SHARDS // 2:  # the last is on its way to the disk
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process, go_on
    process.kill()
    process.join()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=["new", "resume", "overwrite"])
def test_a_second_builder_is_told_who_the_first_is(at_work, tmp_path, options):
    process, go_on = at_work
    before = contents(tmp_path / "store")
    told = rf"store: in use by process {process.pid} on \S+, for \d+ seconds"
    with pytest.raises(StoreError, match=told):
        build(tmp_path / "store", identity="images", **options)
    assert contents(tmp_path / "store") == before
    go_on.set()
    process.join()
    assert process.exitcode == 0 and not (tmp_path / "store" / OWNER).exists()
    build(tmp_path / "alone", identity="images")
    assert contents(tmp_path / "store") == contents(tmp_path / "alone")


def test_a_builder_that_was_killed_blocks_nobody(at_work, tmp_path):
    process, _ = at_work
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "store" / OWNER).exists()
    build(tmp_path / "store", identity="images", resume=True)
    assert listed(tmp_path / "store") == SHARDS and not (tmp_path / "store" / OWNER).exists()


# ---- going on ----------------------------------------------------------------------------------------------------


BAD = IMAGES // 2 + 1  # of the shard in the middle, and not of the images that are looked at first


class Failing(torch.utils.data.Dataset):
    """Images, of which one can't be loaded the `at`-th time; a file counts, in whatever process."""

    def __init__(self, asked: Path, at: int):
        self.images, self._asked, self._at = small_images(), asked, at

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        if item == BAD:
            with self._asked.open("a") as file:
                file.write(".")
            if self._asked.stat().st_size == self._at:
                raise OSError("a bad sector")
        return self.images[item]


@pytest.mark.parametrize("shard_bytes", [1, 1 << 20], ids=["same-shards", "larger-shards"])
def test_what_a_bad_image_stopped_goes_on_with_shards_as_large_as_those_that_are_there(tmp_path, shard_bytes):
    dataset = Failing(tmp_path / "asked", at=1)
    with pytest.raises(StoreError, match=f"item {BAD} of the dataset can't be loaded: .*a bad sector"):
        build(tmp_path / "store", dataset=dataset)
    assert listed(tmp_path / "store") == SHARDS // 2
    build(tmp_path / "store", dataset=dataset, resume=True, shard_bytes=shard_bytes)
    build(tmp_path / "whole", dataset=dataset)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


class Dying(torch.utils.data.Dataset):
    """Images, of which one ends the process that loads it, as a system does that is short of memory."""

    def __init__(self):
        self.images = small_images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        if item == BAD and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[item]


def test_a_build_goes_on_after_a_process_that_loads_images_has_died(whole, tmp_path):
    with pytest.raises(StoreError, match=r"FeatureCache: a process that loads images has died \(.+\)\. .* resume=True"):
        build(tmp_path / "store", dataset=Dying(), identity="images", workers=1)
    build(tmp_path / "store", dataset=Dying(), identity="images", resume=True)
    assert contents(tmp_path / "store").keys() == whole.keys()


def test_what_is_mended_is_told_where_build_was_called(tmp_path):
    clip, images = small_model(), small_images()[:8]
    options = {"batch_size": 4, "shard_bytes": 1, "progress": False}
    FeatureCache.build(tmp_path, clip, images, **options)
    (tmp_path / "00001.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"00001.safetensors: damaged: 4 bytes .* It is rebuilt\.") as told:
        FeatureCache.build(tmp_path, clip, images, resume=True, **options)
    assert [Path(warning.filename) for warning in told] == [Path(__file__)]


def test_an_epoch_that_failed_is_tried_again(tmp_path):
    dataset = Failing(tmp_path / "asked", at=2)  # in the background
    with build(tmp_path / "store", dataset=dataset, refresh="epoch") as cache:
        with pytest.raises(StoreError, match="a bad sector"):
            cache.rows_of_epoch(1)
        rows, _ = cache.rows_of_epoch(1)
        assert rows.labels().equal(torch.arange(IMAGES))


def test_a_cache_that_another_thread_closes_lets_go_of_its_folder(tmp_path):
    cache = build(tmp_path, refresh="epoch")
    closing = threading.Thread(target=cache.close)
    closing.start()
    closing.join()
    build(tmp_path, refresh="epoch").close()
