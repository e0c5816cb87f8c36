"""CLIP-Adapter against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from method_tasks import BASE, made, stacked, tokenizer, trained

from skipkernels.app.data import InputError


def formula(method, images, prompts, ratio: float):
    model, state = method.model, method.state_dict()
    with torch.no_grad():
        image = model.encode_image(images)
        bottleneck = (image @ state["down"].T).clamp_min(0)
        image = ratio * (bottleneck @ state["up"].T).clamp_min(0) + (1 - ratio) * image
        mean = sum(model.encode_text(tokenizer(texts), normalize=True) for texts in prompts)
        return model.logit_scale.exp() * F.normalize(image, dim=1) @ F.normalize(mean, dim=1).T


@pytest.mark.parametrize("settings", [{}, {"reduction": 3, "ratio": 0.6}], ids=["published", "others"])
def test_adapter_logits_and_step_match_formula(settings):
    method, ratio = made("clip-adapter", **settings), settings.get("ratio", 0.2)
    trained(method, rate=0.5)
    assert method.state_dict()["down"].shape == (12 // settings.get("reduction", 4), 12)
    for test in method.task.tests:
        images = stacked(test.images)[0]
        expected = formula(method, images, test.prompts, ratio)
        torch.testing.assert_close(method.logits(test.name, images), expected, rtol=0, atol=1e-11)
    images, labels = stacked(method.task.train)
    loss, classes = method.step(images, labels)
    logits = formula(method, images, method.task.tests[0].prompts[:1], ratio)
    assert classes == len(BASE) and loss.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-12)


def test_adapter_encodes_texts_once():
    method = made("clip-adapter")
    images, labels = stacked(method.task.train)
    runs = []
    method.model.token_embedding.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        method.step(images, labels)
    assert len(runs) == 1


def test_adapter_initial_weights():
    state = made("clip-adapter").state_dict()
    for weight, width in ((state["down"], 12), (state["up"], 3)):
        bound = width**-0.5
        assert 0.7 * bound < weight.abs().max() <= bound and weight.min() < 0 < weight.max()


def test_adapter_refuses_arguments():
    with pytest.raises(InputError, match="clip-adapter: reduction must be from 1 to the embedding's width 12; got 13"):
        made("clip-adapter", reduction=13)
    with pytest.raises(InputError, match="clip-adapter: ratio must be from 0 to 1; got 1.5"):
        made("clip-adapter", ratio=1.5)
