"""SkipCLIP, and a model with fused blocks, inside DistributedDataParallel, FSDP2 and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import skipkernels as sk
from skipkernels.features import FeatureCache
from skipkernels.testing import gradients
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.processes import run_in_processes
from tests.timm_models import vit

IMAGES, CLASSES, TOGETHER = 16, 10, 4
FUSED = partial(sk.FusedSGD, in_backward=False)


def make_clip(**settings) -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(), tiny_tokens(CLASSES), skip_layers=1 / 3, **settings)


# ---- several processes -------------------------------------------------------------------------------------------


class ImageModel(torch.nn.Module):
    """SkipCLIP as docs/more-trainers.md shows it to trainers that call `loss_fn(model(x), y)`."""

    def __init__(self, clip: sk.SkipCLIP):
        super().__init__()
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        return self.clip.encode_image(x) if self.training else self.clip.predict(x)


def train(
    clip: sk.SkipCLIP, loss: Callable[[Tensor, Tensor], Tensor], optimizer: Callable[..., Any] = FUSED
) -> dict[str, Tensor]:
    """Train two epochs of four steps on four images, shared by the processes; return the whole weights."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    update = optimizer(clip.parameter_groups(text_lr=0.02, image_lr=0.01), momentum=0.9, weight_decay=5e-4)
    images = FeatureCache.in_memory(list(zip(*tiny_batch(IMAGES, CLASSES), strict=True)))
    loader = images.loader(TOGETHER // processes, "random", rank=rank, world_size=processes)
    for _ in range(2):
        for part, labels in loader:
            loss(part, labels).backward()
            update.step()
            update.zero_grad()
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in clip.model.state_dict().items()}


def train_plain(**settings) -> dict[str, Tensor]:
    clip = make_clip(**settings)
    return train(clip, lambda x, labels: clip(x, labels).loss)


def train_ddp(**settings) -> dict[str, Tensor]:
    clip = make_clip(**settings)
    model = DistributedDataParallel(clip, broadcast_buffers=False)
    return train(clip, lambda x, labels: model(x, labels).loss)


def train_split_ddp() -> dict[str, Tensor]:
    clip = make_clip(keep_ratio=1.0)
    model = DistributedDataParallel(ImageModel(clip), broadcast_buffers=False)
    return train(clip, lambda x, labels: clip.loss(model(x), labels))


def train_fsdp2(blocks: bool) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """Train with SkipCLIP sharded, before it also each upper block if `blocks`; return the enabled reductions too."""
    clip, mesh = make_clip(keep_ratio=1.0), init_device_mesh("cpu", (dist.get_world_size(),))
    for tower in (clip.model.visual.transformer, clip.model.transformer) if blocks else ():
        for block in tower.resblocks[1:]:
            fully_shard(block, mesh=mesh)
    fully_shard(clip, mesh=mesh, ignored_params={clip.model.logit_scale})
    enabled = {name: reduction.enabled for name, reduction in clip.reductions.items()}
    weights = train(clip, lambda x, labels: clip(x, labels).loss, torch.optim.SGD)
    clip.eval().train()  # the next step then compares the weights below the cut
    clip(*tiny_batch(TOGETHER, CLASSES))
    return weights, enabled


def fused_gradients(fully_sharded: bool) -> dict[str, Tensor]:
    """Gradients of an image model with fused blocks, for two accumulated halves of the images of a process."""
    model, mesh = sk.fuse(vit().visual.trunk), init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.blocks, model) if fully_sharded else ():
        fully_shard(module, mesh=mesh)
    wrapped = model if fully_sharded else DistributedDataParallel(model)
    for half in tiny_batch(8, CLASSES)[0][dist.get_rank() :: 2].chunk(2):
        wrapped(half).square().sum().backward()
    return {name: p.grad.full_tensor() if fully_sharded else p.grad for name, p in model.named_parameters()}


KINDS = ("ddp", "split", "blocks", "clip")


def in_process(rank: int) -> dict[str, dict[str, Any]]:
    dist.init_process_group("gloo")
    found: dict[str, dict[str, Any]] = {"ddp": train_ddp(keep_ratio=1.0), "split": train_split_ddp()}
    found["some classes"] = train_ddp(keep_ratio=0.3)
    for kind in ("blocks", "clip"):
        found[kind], found[f"reductions, {kind}"] = train_fsdp2(kind == "blocks")
    found |= {"fused, ddp": fused_gradients(False), "fused, fsdp2": fused_gradients(True)}
    # The models are freed by now: a Reducer freed after the group may wait for a thread that waits for the GIL.
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, dict[str, Any]]]:
    return run_in_processes(2, tmp_path_factory.mktemp("processes"), in_process)


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return train_plain(keep_ratio=1.0)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_match_one(results, alone, kind):
    """With all classes kept, the mean of the processes' gradients is that of the whole batch."""
    first, second = (found[kind] for found in results)
    assert distance(first, second) == 0.0
    assert distance(first, alone) < 1e-9 < 1e-4 < distance(alone, tiny_clip().state_dict())


@pytest.mark.parametrize("kind", ["blocks", "clip"])
def test_fsdp2_keeps_every_reduction(results, kind):
    assert all(all(found[f"reductions, {kind}"].values()) for found in results)


def test_ddp_selects_classes_per_process(results):
    """The loss is not that of the whole batch, but the processes have equal weights."""
    first, second = (found["some classes"] for found in results)
    assert distance(first, second) == 0.0
    assert distance(first, train_plain(keep_ratio=0.3)) > 1e-6


@pytest.mark.parametrize("kind", ["fused, ddp", "fused, fsdp2"])
def test_fused_blocks_in_two_processes_match_one(results, kind):
    model = vit().visual.trunk
    expected = gradients(model, model(tiny_batch(8, CLASSES)[0]).square().sum() / 2)
    for found in results:
        assert distance(found[kind], expected) <= 1e-12 * max(x.abs().max() for x in expected.values())


def test_flat_parameters_of_fsdp1_are_refused():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        clip = make_clip()
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
    plain, other = make_clip(), make_clip()
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
