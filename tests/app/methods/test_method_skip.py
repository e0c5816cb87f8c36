"""Skip against SkipCLIP, and methods on models of other families."""

from __future__ import annotations

import open_clip
import pytest
import torch

import skipkernels as sk
from skipkernels.app.data import InputError
from skipkernels.app.methods import METHODS
from tests.app.methods.method_tasks import (
    BASE,
    CONTEXT,
    made,
    stacked,
    tiny_model,
    tiny_task,
    tokenizer,
    trained,
    zero_shot,
)
from tests.models import openai_models


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


def test_skip_supports_openai_model_and_full_does_not():
    model = openai_models().CLIP(12, 16, 2, 128, 8, CONTEXT, 60, 16, 2, 2)
    task = tiny_task(1)
    method = METHODS["skip"](model, tokenizer, task)
    images = stacked(task.tests[0].images)[0].float()
    with torch.no_grad():
        expected = model(images, tokenizer(task.tests[0].prompts[0]))[0]
    torch.testing.assert_close(method.logits("base", images), expected)
    with pytest.raises(InputError, match="full: model must be an open_clip CLIP, CustomTextCLIP or CoCa; got CLIP"):
        METHODS["full"](model, tokenizer, task)


@pytest.fixture
def coca() -> open_clip.CoCa:
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8, "attentional_pool": True}
    vision |= {"attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True}
    text = {"context_length": CONTEXT, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2}
    text |= {"embed_cls": True, "output_tokens": True}
    return open_clip.CoCa(12, {**text, "mlp_ratio": 2}, text, vision).double().eval()


@pytest.mark.parametrize("name", ["zero-shot", "full", "skip", "lora"])
def test_methods_on_coca_classify_as_zero_shot(coca, name):
    task = tiny_task(1)
    images = stacked(task.tests[1].images)[0]
    expected = zero_shot(coca, images, task.tests[1].prompts)
    method = METHODS[name](coca, tokenizer, task)
    torch.testing.assert_close(method.logits("new", method.encode_frozen(images)), expected)


@pytest.mark.parametrize("name", ["full", "skip", "clip-adapter", "lora"])
def test_methods_train_on_coca(coca, name):
    first, _, last = trained(METHODS[name](coca, tokenizer, tiny_task(1)), rate=1e-3)
    assert last < first


def test_coop_refuses_coca(coca):
    with pytest.raises(InputError, match="coop: model must be .*; got CoCa"):
        made("coop", coca)
