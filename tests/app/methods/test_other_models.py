"""Methods on models other than open_clip's CLIP and CustomTextCLIP: OpenAI's, and CoCa."""

from __future__ import annotations

import open_clip
import pytest
import torch

from skipkernels.app.data import InputError
from tests.app.methods.method_tasks import CONTEXT, made, stacked, tiny_task, tokenizer, trained, zero_shot
from tests.models import openai_models


@pytest.fixture
def openai_model() -> torch.nn.Module:
    return openai_models().CLIP(12, 16, 2, 128, 8, CONTEXT, 60, 16, 2, 2)


def test_skip_on_an_openai_model_classifies_as_zero_shot(openai_model):
    task = tiny_task(1)
    images = stacked(task.tests[0].images)[0].float()
    with torch.no_grad():
        expected = openai_model(images, tokenizer(task.tests[0].prompts[0]))[0]
    torch.testing.assert_close(made("skip", openai_model, task).logits("base", images), expected)


def test_full_refuses_an_openai_model(openai_model):
    with pytest.raises(InputError, match="full: model must be an open_clip CLIP, CustomTextCLIP or CoCa; got CLIP"):
        made("full", openai_model)


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
    method = made(name, coca, task)
    torch.testing.assert_close(method.logits("new", method.encode_frozen(images)), expected)


@pytest.mark.parametrize("name", ["full", "skip", "clip-adapter", "lora"])
def test_methods_train_on_coca(coca, name):
    first, _, last = trained(made(name, coca, tiny_task(1)), rate=1e-3)
    assert last < first


def test_coop_refuses_coca(coca):
    with pytest.raises(InputError, match="coop: model must be .*; got CoCa"):
        made("coop", coca)
