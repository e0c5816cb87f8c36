"""Small open_clip models with an image tower of timm or a ResNet, and properties that hold at every cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from models import tiny_clip, tiny_tokens, uncompared
from open_clip.timm_model import TimmModel
from reference_step import assert_matches_reference_step
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import skipkernels as sk

TOKENS = tiny_tokens(7)
LABELS = torch.tensor([1, 5, 2])


class Family(NamedTuple):
    """Factory of a model, side of its images, and number of blocks of its image tower."""

    make: Callable[[], nn.Module]
    size: int
    depth: int

    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(3, 3, self.size, self.size, generator=generator, dtype=torch.float64)


def each_cut(families: Mapping[str, Family], lowest: int = 0, variants: Collection[str] = ()) -> Any:
    """Parametrise over every family and every cut, from `lowest` blocks skipped to all of them.

    `variants` of other families have the same blocks, with another head or other weights: one cut is enough.
    """
    cases = [
        pytest.param(family, skip, id=f"{name}-skip{skip}")
        for name, family in families.items()
        for skip in ([2] if name in variants else range(lowest, family.depth + 1))
    ]
    return pytest.mark.parametrize(("family", "skip"), cases)


def timm_clip(trunk: nn.Module, size: int = 16, head: nn.Module | None = None) -> nn.Module:
    """Open_clip model in fp64 around a trunk with 12 outputs, or with any outputs that `head` maps to 12."""
    visual = TimmModel.__new__(TimmModel)  # its constructor takes a name, not sizes
    nn.Module.__init__(visual)
    visual.trunk, visual.head, visual.image_size = trunk, head or nn.Sequential(), (size, size)
    model = tiny_clip(family=open_clip.CustomTextCLIP)
    model.visual = randomise(visual)
    return model.double().eval()


def randomise(module: nn.Module) -> nn.Module:
    """Perturb every parameter, so that none is zero or one and no batch norm the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for norm in batch_norms(module):
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    return module


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def lower_modules(clip: sk.SkipCLIP) -> Iterator[nn.Module]:
    """Modules below the cut of the image tower."""
    tower = clip.images.tower
    if tower.skip:
        yield from (part for part in (*tower.embedding, *tower.blocks[: tower.skip]) if isinstance(part, nn.Module))


def cut(model: nn.Module, skip: int, **arguments: Any) -> sk.SkipCLIP:
    return sk.SkipCLIP(model, TOKENS, skip_layers=(skip, 1), keep_ratio=1.0, **arguments)


def assert_matches_reference(family: Family, skip: int) -> sk.SkipCLIP:
    clip = cut(family.make(), skip)
    assert len(clip.images.tower.blocks) == family.depth
    assert_matches_reference_step(clip, family.images(), TOKENS, LABELS)
    return clip


@uncompared()
def assert_features_are_constant(family: Family, skip: int) -> None:
    """Features at the cut give the same step as images, twice, and neither is written to."""
    images = family.images()
    clip = cut(family.make(), skip, chunk=2)
    expected = clip(images, LABELS).loss
    assert images.equal(family.images())
    features = clip.encode_lower(images)
    kept = features.clone()
    for _ in range(2):
        loss = clip(features, LABELS).loss
        loss.backward()
        assert loss.equal(expected) and features.equal(kept)


def assert_model_is_unchanged(family: Family, skip: int) -> None:
    """The modules, modes and state dict of the caller's model are unchanged."""
    model = family.make()
    model.visual.train()
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    clip = cut(model, skip)
    if skip:  # otherwise the embedding trains and updates its statistics
        clip.encode_lower(family.images())
    assert {name: module.training for name, module in model.named_modules()} == modes
    after = model.state_dict()
    assert list(after) == list(before) and all(after[name].equal(value) for name, value in before.items())


@uncompared()
def assert_batch_norms_update_above_cut_only(family: Family, skip: int) -> None:
    """In training mode batch norms above the cut use and count the batch, those below do neither."""
    model = family.make().train()
    clip, images = cut(model, skip), family.images()
    frozen = {norm for part in lower_modules(clip) for norm in batch_norms(part)}
    before = {norm: (norm.running_mean.clone(), norm.num_batches_tracked.clone()) for norm in batch_norms(model)}
    loss = clip(images, LABELS).loss
    for norm, (mean, batches) in before.items():
        same = norm.running_mean.equal(mean) and norm.num_batches_tracked.equal(batches)
        assert same == (norm in frozen)
    for part in lower_modules(clip):
        part.eval()
    assert_matches_reference_step(clip, images, TOKENS, LABELS)
    torch.testing.assert_close(clip(images, LABELS).loss, loss, rtol=1e-11, atol=0)


def assert_draws_as_the_model(family: Family, skip: int) -> None:
    """In training mode dropout above the cut draws as in the caller's model."""
    model = family.make().train()
    clip, images = cut(model, skip), family.images()
    for part in lower_modules(clip):
        part.eval()
    embeddings = []
    for encode in (model.encode_image, clip.encode_image):
        torch.manual_seed(3)
        embeddings.append(encode(images))
    torch.testing.assert_close(*embeddings, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(clip.encode_image(images), embeddings[1]), "no dropout was applied"
