"""Builds that are killed, in their own processes: no shard is damaged, and resume gives the same bits.

A run of more kills: `python -c "from tests.features.test_crash import main; main(100)"`.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import skipkernels as sk
from skipkernels.features import FeatureCache
from skipkernels.store import Store, StoreError
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.processes import forkserver
from tests.stores import contents, listed_shards

IMAGES, SHARDS, KILLS, SEED = 40, 10, 4, 0
BAD = IMAGES // 2 + 1  # in the shard in the middle, and not sampled


def small_images() -> list[tuple[torch.Tensor, int]]:
    return list(zip(tiny_batch(IMAGES, 5, torch.float32)[0], range(IMAGES), strict=True))


def small_model() -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(5), skip_layers=1 / 3)


def build(folder: Path, clip: sk.SkipCLIP | None = None, dataset=None, **options) -> FeatureCache:
    """Build shards of a batch each, with one thread: another order of sums gives other bits."""
    torch.set_num_threads(1)
    options = {"dtype": "int8", "batch_size": 4, "shard_bytes": 1, "progress": False, **options}
    return FeatureCache.build(folder, clip or small_model(), dataset or small_images(), **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Files of an uninterrupted build."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    build(folder)
    assert listed_shards(folder) == SHARDS
    return contents(folder)


# ---- kills -------------------------------------------------------------------------------------------------------


def builder(folder: Path, call: tuple[str, int, bool] | None, pipe) -> None:
    """Build, and send a message at the start and at the end; kill this process at a call of a function of `os`."""
    clip, images = small_model(), small_images()
    if call is not None:
        name, number, after = call
        function, calls = getattr(os, name), itertools.count(1)

        def killing(*arguments):
            last = next(calls) == number
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            function(*arguments)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, killing)
    pipe.send("begins")
    build(folder, clip, images)
    pipe.send("has ended")
    pipe.recv()


def run_for(work: Callable[..., None], arguments: tuple, seconds: float) -> float:
    """Run a function in another process, and kill it after some seconds or at its end; returns the seconds it ran.

    Args:
        work: Function of the arguments and a pipe; it sends "begins", then a message at its end, and waits.
        arguments: Arguments of `work`.
        seconds: Time of the kill after "begins".
    """
    context = forkserver()
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(*arguments, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "begins"
    began = time.perf_counter()
    ours.poll(seconds)
    took = time.perf_counter() - began
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return took


def kill_and_resume(folder: Path, whole: dict[str, bytes], clip: sk.SkipCLIP, seconds: float, call=None) -> int:
    """Kill a build after some seconds or at a call, and resume it; returns the number of shards that it had listed."""
    run_for(builder, (folder, call), seconds)
    done = listed_shards(folder)
    if done < SHARDS:
        with pytest.raises(StoreError, match=f"no manifest.json|incomplete: {done} of {SHARDS} shards exist"):
            FeatureCache.open(folder)
        assert len(list(folder.glob("[0-9]*.safetensors"))) <= done + 1, "at most one shard is lost"
    else:
        assert Store(folder).verify() == []
    computed = []
    build(folder, clip, resume=True, progress=computed.append)
    assert sum(computed[done > 0 :]) == IMAGES - 4 * done, "only missing shards are computed"
    assert contents(folder) == whole
    return done


def main(kills: int) -> None:
    """Kill many builds, half of them at random times and half around a rename or a flush; print what they had."""
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary, "whole"))
        whole, draw, clip = contents(Path(temporary, "whole")), random.Random(SEED), small_model()
        duration = run_for(builder, (Path(temporary, "timed"), None), 60)
        found = Counter()
        for kill in range(kills):
            call = (draw.choice(["replace", "fsync"]), draw.randint(1, 2 * SHARDS), draw.random() < 0.5)
            moment = (60, call) if kill % 2 else (draw.random() * duration, None)
            done = kill_and_resume(Path(temporary, f"{kill}"), whole, clip, *moment)
            found[f"{'at a call' if kill % 2 else 'at a time'}, {min(done, 1) + (done == SHARDS)}"] += 1
    message = f"{kills} kills in builds of {duration:.2f} s and {SHARDS} shards; each resumed to the same bits\n"
    sys.stdout.write(f"{message}none (0), some (1) or all (2) shards were listed: {dict(sorted(found.items()))}\n")


@pytest.mark.slow
def test_kill_at_any_moment_loses_at_most_one_shard(whole, tmp_path):
    duration = run_for(builder, (tmp_path / "whole", None), 60)
    assert contents(tmp_path / "whole") == whole, "another process builds the same bits"
    clip, draw = small_model(), random.Random(SEED)
    for kill in range(KILLS):
        kill_and_resume(tmp_path / f"{kill}", whole, clip, (kill + draw.random()) / KILLS * duration)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "number", "done"),
    [("replace", 4, 1), ("replace", 5, 1), ("fsync", 7, 1)],
    ids=["shard", "manifest", "flush"],
)
def test_kill_around_a_rename_loses_at_most_one_shard(whole, tmp_path, name, number, done, after):
    """The first renames are of the manifest, shard 0, the manifest, shard 1; two flushes belong to each."""
    found = kill_and_resume(tmp_path / "store", whole, small_model(), 60, (name, number, after))
    assert found == done + (after and (name, number) == ("replace", 5))


class Images(torch.utils.data.Dataset):
    """The small images, with a call before each is loaded."""

    def __init__(self):
        self.images = small_images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        self.before(item)
        return self.images[item]


# ---- resuming ----------------------------------------------------------------------------------------------------


class Failing(Images):
    """One image cannot be loaded the `at`-th time, counted by a file over all processes."""

    def __init__(self, asked: Path, at: int):
        super().__init__()
        self._asked, self._at = asked, at

    def before(self, item: int) -> None:
        if item == BAD:
            with self._asked.open("a") as file:
                file.write(".")
            if self._asked.stat().st_size == self._at:
                raise OSError("a bad sector")


@pytest.mark.parametrize("shard_bytes", [1, 1 << 20], ids=["same-shards", "larger-shards"])
def test_build_resumes_after_a_bad_image_with_the_same_shard_rows(tmp_path, shard_bytes):
    dataset = Failing(tmp_path / "asked", at=1)
    with pytest.raises(StoreError, match=f"item {BAD} of the dataset cannot be loaded: .*a bad sector"):
        build(tmp_path / "store", dataset=dataset)
    assert listed_shards(tmp_path / "store") == SHARDS // 2
    build(tmp_path / "store", dataset=dataset, resume=True, shard_bytes=shard_bytes)
    build(tmp_path / "whole", dataset=dataset)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_repair_warning_points_at_the_call_of_build(tmp_path):
    clip, images = small_model(), small_images()[:8]
    options = {"batch_size": 4, "shard_bytes": 1, "progress": False}
    FeatureCache.build(tmp_path, clip, images, **options)
    (tmp_path / "00001.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"00001.safetensors: damaged: 4 bytes .* It is rebuilt\.") as caught:
        FeatureCache.build(tmp_path, clip, images, resume=True, **options)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
