"""SkipCLIP inside `DistributedDataParallel` and `torch.compile`; other wrappers are refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import skipkernels as sk
from skipkernels.features import FeatureCache
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.processes import run_in_processes

IMAGES, CLASSES, TOGETHER = 16, 10, 4


def small_clip(**settings) -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(), tiny_tokens(CLASSES), skip_layers=1 / 3, **settings)


# ---- several processes -------------------------------------------------------------------------------------------


def train(clip: sk.SkipCLIP, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Train two epochs of four steps on four images, shared by the processes; return the weights."""
    torch.set_num_threads(1)
    images = FeatureCache.in_memory(list(zip(*tiny_batch(IMAGES, CLASSES), strict=True)))
    loader = images.loader(TOGETHER // world_size, "random", rank=rank, world_size=world_size)
    optimizer = sk.FusedSGD(
        clip.parameter_groups(text_lr=0.02, image_lr=0.01), momentum=0.9, weight_decay=5e-4, in_backward=False
    )
    forward = clip if world_size == 1 else DistributedDataParallel(clip, broadcast_buffers=False)
    for _ in range(2):
        for part, labels in loader:
            assert len(labels) == TOGETHER // world_size
            forward(part, labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return clip.model.state_dict()


def train_together(rank: int, settings: dict) -> dict[str, torch.Tensor]:
    dist.init_process_group("gloo")
    weights = train(small_clip(**settings), rank, 2)
    dist.destroy_process_group()
    return weights


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_ddp_matches_one_process_with_all_classes(tmp_path):
    """With all classes kept, the mean of the processes' gradients is that of the whole batch."""
    first, second = run_in_processes(2, tmp_path, train_together, {"keep_ratio": 1.0})
    alone = train(small_clip(keep_ratio=1.0), 0, 1)
    assert distance(first, second) == 0.0
    assert distance(first, alone) < 1e-12 < 1e-4 < distance(alone, tiny_clip().state_dict())


def test_ddp_selects_classes_per_process(tmp_path):
    """The loss is not that of the whole batch, but the processes have equal weights."""
    first, second = run_in_processes(2, tmp_path, train_together, {"keep_ratio": 0.3})
    assert distance(first, second) == 0.0
    assert distance(first, train(small_clip(keep_ratio=0.3), 0, 1)) > 1e-6


def shard_fully(rank: int, blocks: bool) -> dict[str, torch.Tensor]:
    """Train with FSDP2 around the blocks above the cut, if `blocks`, and the SkipCLIP; return the whole weights."""
    dist.init_process_group("gloo")
    clip = small_clip(keep_ratio=1.0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if blocks:
        for tower in (clip.model.visual.transformer, clip.model.transformer):
            for block in tower.resblocks[1:]:
                fully_shard(block, mesh=mesh)
    fully_shard(clip, mesh=mesh, ignored_params={clip.model.logit_scale})
    assert all(reduction.enabled for reduction in clip.reductions.values())
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1), momentum=0.9)
    images, labels = tiny_batch(TOGETHER, CLASSES)
    half = slice(rank, None, dist.get_world_size())
    for _ in range(3):
        clip(images[half], labels[half]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    clip.eval().train()  # compares the weights below the cut
    clip(images[half], labels[half])
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in clip.model.state_dict().items()}


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "clip"])
def test_fully_shard_matches_one_process(blocks, tmp_path):
    first, second = run_in_processes(2, tmp_path, shard_fully, blocks)
    clip = small_clip(keep_ratio=1.0)
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1), momentum=0.9)
    images, labels = tiny_batch(TOGETHER, CLASSES)
    for _ in range(3):
        clip(images, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance(first, second) == 0.0
    assert distance(first, clip.model.state_dict()) < 1e-9 < 1e-4 < distance(first, tiny_clip().state_dict())


def test_flat_parameters_of_fsdp1_are_refused():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        clip = small_clip()
        frozen = [parameter for parameter in clip.parameters() if not parameter.requires_grad]
        cpu = {"device_id": torch.device("cpu"), "ignored_states": frozen}
        wrapped = FullyShardedDataParallel(clip, use_orig_params=False, **cpu)
        wrapped(*tiny_batch(4, CLASSES))  # FSDP1 marks modules in its first forward
        with pytest.raises(RuntimeError, match="FSDP1 replaced its parameters by flat ones: pass use_orig_params=True"):
            wrapped.eval()
    finally:
        dist.destroy_process_group()


# ---- compiled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["images", "features"])
def test_compile_matches_eager(inputs):
    plain, other = small_clip(), small_clip()
    compiled = torch.compile(other, backend="aot_eager")
    images, labels = tiny_batch(TOGETHER, CLASSES)
    x = images if inputs == "images" else plain.encode_lower(images)
    for _ in range(2):
        expected, got = plain(x, labels), compiled(x, labels)
        assert got.class_ids.equal(expected.class_ids), "equal draws"
        assert got.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)
        expected.loss.backward()
        got.loss.backward()
    for ours, theirs in zip(plain.trainable_parameters(), other.trainable_parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-9, atol=1e-12)
