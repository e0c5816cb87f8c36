"""A store that several processes build: the bits of one process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import skipkernels as sk
from skipkernels.features import FeatureCache
from skipkernels.store import StoreError
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.processes import run_in_processes
from tests.stores import contents, listed_shards

IMAGES, SIZE, SHARDS = 42, 3, 11  # shards of two batches, the last of one: views of 42 images in batches of 4
SHARD_BYTES = 8 * 150  # of eight rows
BAD = 40  # in the sixth shard, which process 2 encodes, and not sampled


class Images(torch.utils.data.Dataset):
    """Images, of which one may end the process."""

    def __init__(self, kill: bool = False):
        self.kill, self.images = kill, tiny_batch(IMAGES, 5, torch.float32)[0]

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        if item == BAD and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[item], item


def build(folder: Path, dataset: Any = None, **options: Any) -> FeatureCache:
    torch.set_num_threads(1)
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(5), skip_layers=1 / 3)
    own = Images() if dataset is None else dataset
    options = {"dtype": "int8", "batch_size": 4, "views": 2, "progress": False, "shard_bytes": SHARD_BYTES} | options
    return FeatureCache.build(folder, clip, own, key="images", **options)


def in_process(rank: int, folder: Path) -> int:
    dist.init_process_group("gloo")
    group, images = dist.group.WORLD, []
    build(folder / "whole", process_group=group, progress=images.append)
    if rank == 1:
        build(folder / "alone")  # without a group the others need not call it
    with pytest.raises(ValueError, match='process_group None with refresh="epoch"'):
        build(folder / "epochs", views=1, refresh="epoch", process_group=group)
    with pytest.raises(StoreError, match="must be equal on all processes of process_group; got different ones"):
        build(folder / "other", seed=rank, process_group=group)
    with pytest.raises(RuntimeError):  # of gloo, as in any step after a process was killed
        build(folder / "killed", Images(kill=True), process_group=group)
    return sum(images)


def test_builds_of_several_processes(tmp_path):
    """One test, so that the processes start once."""
    build(tmp_path / "one")
    one = contents(tmp_path / "one")
    assert len(json.loads(one["manifest.json"])["shards"]) == SHARDS
    assert run_in_processes(SIZE, tmp_path, in_process, tmp_path, killed=[2]) == [2 * IMAGES, 0, None], (
        "the first shows all"
    )
    assert contents(tmp_path / "whole") == contents(tmp_path / "alone") == one
    assert listed_shards(tmp_path / "killed") == 3, "each process loses the shard that it was encoding"
    build(tmp_path / "killed", resume=True)
    assert contents(tmp_path / "killed") == one
