"""The comparison with the model at construction."""

from __future__ import annotations

import peft
import pytest
import torch

from skipkernels.towers.families import open_clip as open_clip_towers
from tests.models import tiny_clip
from tests.towers.families import OPEN_CLIP


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_wrong_activation(dtype, tower, monkeypatch):
    """GELU and QuickGELU differ by less than half precision rounds over a few blocks."""
    from open_clip.transformer import QuickGELU

    model = tiny_clip(dtype)
    (model.visual.transformer if tower == "image" else model.transformer).resblocks[2].mlp.gelu = QuickGELU()
    OPEN_CLIP.cut(1, model)
    monkeypatch.setitem(open_clip_towers._ACTIVATIONS, QuickGELU, "gelu")
    with pytest.raises(RuntimeError, match=f"embeddings of {'an image' if tower == 'image' else 'texts'} differ"):
        OPEN_CLIP.cut(1, model)


def test_verify_weights_that_are_too_large():
    model = tiny_clip(torch.float32)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(1e30)
    with pytest.raises(RuntimeError, match="embeddings of texts are not finite. Its weights are damaged, or too large"):
        OPEN_CLIP.cut(1, model)


def test_verify_takes_integer_parameters():
    """Such as of a quantised layer."""
    model = tiny_clip().requires_grad_(False)
    model.visual.ln_post.requires_grad_(True)
    model.ln_final.requires_grad_(True)
    model.transformer.resblocks[2].mlp.packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), False)
    OPEN_CLIP.cut(1, model, trainable="as_is")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_wrong_gradient(dtype, monkeypatch):
    """The embedding is right and the gradient is three times too large."""

    class Tripled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return 3 * upstream

    own = open_clip_towers.OpenClipImageTower.reference_forward
    monkeypatch.setattr(
        open_clip_towers.OpenClipImageTower, "reference_forward", lambda self, x: Tripled.apply(own(self, x))
    )
    with pytest.raises(RuntimeError, match="relative error of the gradient"):
        OPEN_CLIP.cut(1, tiny_clip(dtype))


def test_peft_without_effect_is_an_error():
    """PEFT's wrapper of `out_proj` is not called by `nn.MultiheadAttention`."""
    config = peft.LoraConfig(r=2, target_modules=["out_proj"])
    model = peft.inject_adapter_in_model(config, tiny_clip()).double()
    with pytest.raises(RuntimeError, match="no parameter that trains has an effect on the model's embeddings of texts"):
        OPEN_CLIP.cut(1, model, trainable="as_is")
