"""Towers in stages: the ResNet of OpenAI, statistics of batch norms, and features that are maps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from skipkernels.towers.base import Cut
from skipkernels.towers.families.convnets import ResNetTower
from tests.models import openai_models
from tests.timm_models import batch_norms, randomise, resnet, swin
from tests.towers.families import FAMILIES, LABELS

RESNET = FAMILIES["resnet"]


@pytest.mark.parametrize("skip", [0, 2, 5], ids=lambda skip: f"skip{skip}")
def test_openai_resnet(skip):
    visual = randomise(openai_models().ModifiedResNet((1, 2, 1, 1), 12, 8, 32, 8)).double().eval()
    tower = ResNetTower(SimpleNamespace(visual=visual, encode_image=visual))
    tower.cut = Cut(skip)
    for parameter in tower.lower_parameters():
        parameter.requires_grad_(False)
    assert len(tower.blocks) == 5 and tower.image_size == (32, 32)
    images = RESNET.images().float()  # the tower casts them, as the forward of the model does
    features = tower.lower(images)
    kept, trained = features.detach().clone(), list(tower.upper_parameters())
    got, expected = (
        torch.autograd.grad(embeddings.square().sum(), trained)
        for embeddings in (tower.upper(features), visual(images))
    )
    assert features.equal(kept)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_memory_min_updates_batch_norm_once():
    counted = []
    for memory in ("fast", "min"):
        model = resnet().train()
        clip = RESNET.cut((1, 1), model, memory=memory)
        clip(RESNET.images(), LABELS).loss.backward()
        counted.append([norm.num_batches_tracked.item() for norm in batch_norms(model)])
    assert counted[0] == counted[1] and set(counted[0]) == {0, 1}


@pytest.mark.gpu
def test_lower_device_holds_batch_norm_statistics():
    model = resnet().cuda()
    clip = RESNET.cut((2, 1), model)
    images, labels = RESNET.images().cuda(), LABELS.cuda()
    expected = clip(images, labels).loss
    clip = RESNET.cut((2, 1), model, lower_device="cpu")
    visual = model.visual
    assert not any(tensor.is_cuda for part in (visual.bn1, visual.layer1) for tensor in part.state_dict().values())
    assert all(tensor.is_cuda for tensor in visual.layer3.state_dict().values())
    torch.testing.assert_close(clip(images, labels).loss, expected, rtol=1e-6, atol=0)


def test_features_with_three_rows_are_not_images():
    clip = RESNET.cut((1, 1), swin(img_size=(12, 16), patch_size=4, window_size=2, depths=(1, 1)))
    images = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    features = clip.encode_lower(images)
    assert features.shape[1:] == (3, 4, 8)  # maps in front of the second block
    assert clip(features, LABELS[:2]).loss.equal(clip(images, LABELS[:2]).loss)


def test_lower_batch_norm_update_makes_features_stale():
    """A call of the model in training mode updates the batch norms below the cut."""
    model = resnet()
    clip, images = RESNET.cut((3, 1), model), RESNET.images()
    maps = clip.encode_lower(images)
    model.train().encode_image(images)
    with pytest.raises(RuntimeError, match="weights below the cut have changed"):
        clip(maps, LABELS)
    clip.refresh()
    clip(clip.encode_lower(images), LABELS)
