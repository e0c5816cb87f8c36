"""Skip against SkipCLIP."""

from __future__ import annotations

import torch

import skipkernels as sk
from tests.app.methods.method_tasks import BASE, made, stacked, tiny_model, tiny_task, tokenizer


def test_skip_step_uses_first_template():
    settings = {"keep_ratio": 0.2, "max_keep": 3, "decay": 5.0, "max_tail": 2}
    method = made("skip", **settings, generator=torch.Generator().manual_seed(4))
    tokens, generator = tokenizer(tiny_task().tests[0].prompts[0]), torch.Generator().manual_seed(4)
    clip = sk.SkipCLIP(tiny_model(), tokens, skip_layers=0.5, generator=generator, **settings)
    images, labels = stacked(method.task.train)
    for image, label in zip(images[:6, None], labels[:6, None], strict=True):
        loss, classes = method.step(method.encode_frozen(image), label)
        out = clip(image, label)
        assert loss.equal(out.loss) and classes == len(out.class_ids) < len(BASE)


def test_encode_frozen_of_skip():
    method, images = made("skip"), stacked(tiny_task().train)[0]
    features = method.encode_frozen(images)
    assert features.equal(method.caches.encode_lower(images)) and features.shape == (20, 5, 24)
    assert method.caches is method.clip and method.caches.skip_layers == (2, 2)
    torch.testing.assert_close(method.logits("base", features), method.logits("base", images))
    for whole in (made("skip", skip_layers=0), made("full")):
        assert whole.caches is None and whole.encode_frozen(images) is images


def test_skip_text_cache_has_folder_per_test(tmp_path):
    def logits(**settings) -> torch.Tensor:
        method = made("skip", tiny_model(dtype=torch.float32), **settings)
        return torch.cat([method.logits(test, images) for test in ("base", "new")], dim=1)

    images = stacked(tiny_task().train)[0].float()
    first = logits(cache=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"texts-base", "texts-base+templates", "texts-new+templates"}
    assert first.equal(logits(cache=tmp_path))
    torch.testing.assert_close(first, logits())
