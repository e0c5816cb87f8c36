"""A store that several processes build: the bits of one process, and errors of one that end all."""

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
from skipkernels.store import writer as store_writer
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.processes import together
from tests.store.stores import contents, listed_shards

IMAGES, SIZE, SHARDS = 42, 3, 11  # shards of two batches, the last of one: views of 42 images in batches of 4
SHARD_BYTES = 8 * 150  # of eight rows
BAD = 40  # in the sixth shard, which process 2 encodes, and not sampled


def clip() -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(5), skip_layers=1 / 3)


def build(folder: Path, dataset: Any = None, **options: Any) -> FeatureCache:
    torch.set_num_threads(1)
    own = Images() if dataset is None else dataset
    options = {"dtype": "int8", "batch_size": 4, "views": 2, "progress": False, "shard_bytes": SHARD_BYTES} | options
    return FeatureCache.build(folder, clip(), own, key="images", **options)


class Images(torch.utils.data.Dataset):
    """Images, of which one may raise an error or end the process in its first view."""

    def __init__(self, bad: BaseException | int | None = None):
        self.bad, self.images = bad, tiny_batch(IMAGES, 5, torch.float32)[0]

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        if item == BAD and isinstance(self.bad, int):
            os.kill(os.getpid(), self.bad)
        if item == BAD and self.bad is not None:
            raise self.bad
        return self.images[item], item


def error_of(folder: Path, dataset: Any = None, **options: Any) -> str:
    try:
        build(folder, dataset, process_group=dist.group.WORLD, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def in_process(rank: int, folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    images: list[int] = []
    build(folder / "whole", process_group=dist.group.WORLD, progress=images.append)
    found: dict[str, Any] = {"images": sum(images)}
    if rank == 1:
        build(folder / "alone")  # without a group the others need not call it
    with pytest.raises(ValueError, match='process_group must be None with refresh="epoch"'):
        build(folder / "epochs", views=1, refresh="epoch", process_group=dist.group.WORLD)
    found["other"] = error_of(folder / "other", seed=rank)
    found["exists"] = error_of(folder / "whole")
    found["image"] = error_of(folder / "image", Images(OSError("a bad sector")))
    found["image, shards"] = listed_shards(folder / "image")
    dist.barrier()
    build(folder / "image", process_group=dist.group.WORLD, resume=True)
    for full in (0, 1):
        dist.barrier()
        found[f"disk {full}"] = full_disk(folder / f"disk {full}", rank == full)
    dist.barrier()
    found["killed"] = error_of(folder / "killed", Images(signal.SIGKILL))
    return found


def full_disk(folder: Path, own: bool) -> str:
    """Build with a disk that is full for one process, at its third shard."""
    written, whole = [], store_writer.write_shard

    def write(*arguments: Any) -> Any:
        written.append(arguments)
        if own and len(written) == 3:
            raise OSError(28, "No space left on device")
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "write_shard", write)
        return error_of(folder)


def test_builds_of_several_processes(tmp_path):
    """One test, so that the processes start once."""
    build(tmp_path / "one")
    one = contents(tmp_path / "one")
    assert len(json.loads(one["manifest.json"])["shards"]) == SHARDS
    first, second, killed = together(SIZE, tmp_path, in_process, tmp_path, killed=[2])
    assert [first["images"], second["images"]] == [2 * IMAGES, 0], "the first shows the images of all"
    for name in ("whole", "alone", "image"):
        assert contents(tmp_path / name) == one
    for case, owner, message in [
        ("exists", 0, "StoreError: .*holds a store. Open it"),
        ("image", 2, "StoreError: FeatureCache: item 40 of the dataset cannot be loaded: .*bad sector"),
        ("disk 0", 0, r"StoreError: .*the disk is full. \d of 11 shards exist and stay"),
        ("disk 1", 1, r"StoreError: .*the disk is full. \d of 11 shards exist and stay"),
    ]:
        for rank, found in enumerate((first, second)):
            expected = message if rank == owner else f"PeerError: .*process {owner} of process_group raised an error"
            with pytest.raises(AssertionError, match=expected):
                raise AssertionError(found[case])
    assert "must be equal on all processes of process_group; got different ones on processes 0 and 1" in first["other"]
    assert "PeerError: FeatureCache.build: another process of process_group was killed" in first["killed"]
    # Each process loses the shard that it encodes; of the killed one also the shard that it writes.
    assert first["image, shards"] == 3
    for name, shards in [("disk 0", (6, 9)), ("disk 1", (6, 9)), ("killed", (1, 3))]:
        assert shards[0] <= listed_shards(tmp_path / name) <= shards[1]
        build(tmp_path / name, resume=True)
        assert contents(tmp_path / name) == one
