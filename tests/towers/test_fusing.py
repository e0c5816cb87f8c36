"""Fused blocks in the caller's model: same outputs, gradients, names and copies as with its own blocks."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import statistics

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

import skipkernels as sk
from skipkernels import reference, testing
from skipkernels.testing import SLACK, relative_error
from skipkernels.towers.base import UnsupportedModel
from skipkernels.towers.block import FusedBlock
from skipkernels.towers.registry import build_towers
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.reference_step import assert_close_by_name
from tests.timm_models import vit
from tests.towers.families import FAMILIES


def timm_vit() -> nn.Module:
    return vit().visual.trunk


def loss_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Contrastive loss of images and prompts by the model's own encoders; for an image model, the sum of squares."""
    if isinstance(model, timm.models.VisionTransformer):
        return model(images).square().sum()
    towers, inputs = build_towers(model), (images, tiny_tokens(len(images)))
    image, text = (tower.reference_forward(x) for tower, x in zip(towers, inputs, strict=True))
    return reference.contrastive_loss(image, text, 5.0)


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = loss_of(model, images)
    return testing.gradients(model, loss) | {"loss": loss.detach()}


assert_equal = functools.partial(assert_close_by_name, tolerance=1e-9)


@pytest.mark.parametrize(
    "name", ["openai", "hf", "hf_eager", "siglip", "siglip_2", "metaclip_2", "layer_scale", "clip", "eva02"]
)
def test_fuse_same_gradients(name):
    family = FAMILIES[name]
    model = family.make()
    images = family.images(dtype := next(model.parameters()).dtype)
    expected, kinds = gradients(model, images), [type(module) for module in model.modules()]
    assert sk.fuse(model) is model and sum(isinstance(module, FusedBlock) for module in model.modules()) == 6
    assert [getattr(type(module), "caller_class", type(module)) for module in model.modules()] == kinds
    assert_equal(gradients(model, images), expected, tolerance=1e-9 if dtype == torch.float64 else 1e-4)
    sk.unfuse(model)
    assert [type(module) for module in model.modules()] == kinds
    assert_equal(gradients(model, images), expected, tolerance=1e-15)


@pytest.mark.parametrize(("autocast", "models"), [(False, 4), (True, 32)], ids=["fp32", "autocast"])
def test_fuse_no_worse_than_eager(autocast, models):
    """The mean error of all gradients over models: that of one in bf16 depends on which values round up.

    In bf16 the difference of the errors of a model has a standard deviation of 0.01, and that of the means 0.0017.
    """
    errors: dict[str, list[float]] = {"eager": [], "fused": []}
    for seed in range(models):
        model, (images, _) = tiny_clip(torch.float32, seed=seed), tiny_batch(5, 3, torch.float32, seed=seed)
        truth = gradients(copy.deepcopy(model).double(), images.double())
        for name in errors:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = gradients(sk.fuse(model) if name == "fused" else model, images)
            flat = (torch.cat([each[x].double().flatten() for x in truth]) for each in (found, truth))
            errors[name].append(relative_error(*flat))
    slack = SLACK[torch.bfloat16 if autocast else torch.float32]
    assert statistics.fmean(errors["fused"]) <= statistics.fmean(errors["eager"]) + slack


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("wrap", [sk.fuse, lambda m: sk.SkipCLIP(m, tiny_tokens(3), skip_layers=0).model])
def test_copies_have_the_own_classes(copied, wrap):
    model, (images, _) = tiny_clip(), tiny_batch(3, 3)
    twin = copied(wrap(model))
    assert [type(x) for x in twin.modules()] == [type(x) for x in tiny_clip().modules()]
    assert twin.state_dict().keys() == model.state_dict().keys() == tiny_clip().state_dict().keys()
    assert_equal(gradients(twin, images), gradients(model, images))


def test_compiled_model_with_fused_blocks():
    model, (images, _) = timm_vit(), tiny_batch(3, 3)
    expected = gradients(model, images)
    compiled = torch.compile(sk.fuse(model), backend="aot_eager")
    found = testing.gradients(model, compiled(images).square().sum())
    assert_equal(found | {"loss": expected["loss"]}, expected)


def test_checkpointed_blocks():
    """Gradient checkpointing of the model around fused blocks."""
    model, (images, _) = tiny_clip(), tiny_batch(3, 3)
    expected = gradients(model, images)
    sk.fuse(model).set_grad_checkpointing(True)
    assert_equal(gradients(model, images), expected)


def test_exported_model_with_fused_blocks():
    model, images = timm_vit().float().eval(), torch.randn(2, 3, 16, 16)
    expected = model(images)
    exported = torch.export.export(sk.fuse(model), (images,)).module()
    torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def process_group():
    """A group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_unfuse_keeps_shards(process_group):
    model, (images, _) = sk.fuse(timm_vit()), tiny_batch(3, 3)
    expected = gradients(timm_vit(), images)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=process_group)
    with pytest.raises(UnsupportedModel, match="fuse: the model is sharded. Call fuse first, then fully_shard"):
        sk.fuse(model)
    sk.unfuse(model)
    assert not any(isinstance(module, FusedBlock) for module in model.modules())
    for block in model.blocks:
        assert isinstance(block, FSDPModule) and isinstance(block, timm.models.vision_transformer.Block)
        block.unshard()
    assert_equal(
        {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in gradients(model, images).items()}, expected
    )


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("original", [True, False])
def test_flat_parameters_of_fsdp1(original, process_group, recwarn):
    """In the forward pass weights and biases are views of a flat parameter, and no parameters."""
    found, (images, _) = [], tiny_batch(3, 3)
    for prepare in (lambda model: model, sk.fuse):
        model, cpu = prepare(timm_vit()), torch.device("cpu")
        wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=cpu)
        loss = wrapped(images).square().sum()
        found.append({"loss": loss.detach()} | testing.gradients(wrapped, loss))
    assert_equal(found[1], found[0])
    assert not [warning for warning in recwarn if "not fused" in str(warning.message)]


def test_batched_gradients():
    model, (images, _) = sk.fuse(timm_vit()), tiny_batch(2, 3)
    out, inputs = model(images), list(model.parameters())
    upstream = torch.randn(4, *out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, inputs, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, inputs, row, retain_graph=True) for row in upstream]
    for x, rows in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(rows), rtol=1e-10, atol=1e-12)


def test_fuse_warns_of_blocks_that_are_not_fused():
    model = tiny_clip()
    model.transformer.resblocks[1].mlp.gelu = nn.SiLU()
    with pytest.warns(UserWarning, match="fuse: 1 of 6 blocks are not fused: a block has a SiLU of torch"):
        sk.fuse(model)
    assert type(model.transformer.resblocks[1]) is type(tiny_clip().transformer.resblocks[1])
