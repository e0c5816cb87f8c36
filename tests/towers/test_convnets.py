"""Towers in stages: the ResNet of OpenAI, statistics of batch norms, and features that are maps."""

from __future__ import annotations

import pytest
import torch

from tests.timm_models import batch_norms, resnet, swin
from tests.towers.families import FAMILIES, LABELS

RESNET = FAMILIES["resnet"]


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
