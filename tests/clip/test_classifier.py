"""The plain module from images to logits: its mode, and its export."""

from __future__ import annotations

import pytest
import torch

from skipkernels.app import heads
from tests.clip.clips import IMAGES, make_clip


@pytest.mark.parametrize("has_head", [False, True])
def test_classifier_exports(has_head):
    clip, images = make_clip(torch.float32), IMAGES[:3].float()
    image = clip.encode_image(images).detach()
    head = heads.gaussian_head(image, torch.tensor([0, 2, 2]), classes=3) if has_head else None
    classifier, expected = clip.classifier(head), head.logits(image) if has_head else clip.predict(images)
    torch.testing.assert_close(classifier(images).detach(), expected)
    exported = torch.export.export(classifier, (images,)).module()
    torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-4)


def test_classifier_has_its_own_mode():
    clip = make_clip()
    classifier = clip.classifier()
    assert all(module.training for module in clip.modules())
    clip.train()
    assert not any(module.training for module in classifier.modules())
    assert classifier.encoder.conv1.weight is clip.model.visual.conv1.weight
