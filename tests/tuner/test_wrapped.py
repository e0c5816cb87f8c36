"""SkipCLIP inside `DistributedDataParallel` and `torch.compile`: the same loss, gradients and weights."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import skipkernels as sk
from skipkernels.features import FeatureCache
from tests.models import tiny_batch, tiny_clip, tiny_tokens

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


def process(rank: int, folder: Path, settings: dict) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(train(small_clip(**settings), rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


def by_two(folder: Path, **settings) -> list[dict[str, torch.Tensor]]:
    """Final weights of each of two processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "open_clip", "skipkernels.features", "skipkernels.clip"])
    both = [context.Process(target=process, args=(rank, folder, settings)) for rank in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(120)
        assert each.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_ddp_matches_one_process_with_all_classes(tmp_path):
    """With all classes kept, the mean of the processes' gradients is that of the whole batch."""
    first, second = by_two(tmp_path, keep_ratio=1.0)
    alone = train(small_clip(keep_ratio=1.0), 0, 1)
    assert distance(first, second) == 0.0
    assert distance(first, alone) < 1e-12 < 1e-4 < distance(alone, tiny_clip().state_dict())


def test_ddp_selects_classes_per_process(tmp_path):
    """The loss is not that of the whole batch, but the processes have equal weights."""
    first, second = by_two(tmp_path, keep_ratio=0.3)
    assert distance(first, second) == 0.0
    assert distance(first, train(small_clip(keep_ratio=0.3), 0, 1)) > 1e-6


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
