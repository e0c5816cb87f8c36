"""Adapters of PEFT and hooks in some blocks: which reductions are turned off, and the step equals the model's own."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from tests.hugging_face_models import hugging_face_clip
from tests.models import tiny_clip
from tests.towers.families import FAMILIES, OPEN_CLIP


def with_lora(blocks: list[int]) -> nn.Module:
    """Hugging Face CLIP with PEFT's LoRA in some blocks of both towers."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=blocks)
    base = hugging_face_clip(end=59)  # the last token of `tiny_tokens`
    model = peft.inject_adapter_in_model(config, base.requires_grad_(False)).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("memory", ["fast", "min"])
@pytest.mark.parametrize("blocks", [[1], [2], [1, 2]], ids=str)
def test_peft_blocks_run_beside_fused_ones(blocks, memory):
    model, family = with_lora(blocks), FAMILIES["hf_eos"]
    clip = family.cut(1, model, trainable="as_is", memory=memory)
    named = (
        f"{len(blocks)} of 3 blocks ({', '.join(map(str, blocks))}): a block has a Linear of peft for its self_attn."
    )
    for tower in ("image", "text"):
        assert clip.reductions[f"{tower}.fused_block"].reason.startswith(named)
        assert not clip.reductions[f"{tower}.pooled_last_block"].enabled
    assert clip.reductions["text.shared_prefix"].reason == "a block has a Linear of peft for its self_attn.q_proj"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 8 * len(blocks) and all("lora_" in name for name in trained)
    family.check_step(clip)


def test_backward_hook_sees_the_gradients_of_each_prompt():
    """tanh is not linear: of gradients that were summed over the prompts it would be another."""
    model = tiny_clip()
    model.transformer.resblocks[1].register_full_backward_hook(lambda module, d_in, d_out: (d_in[0].tanh(),))
    OPEN_CLIP.check_step(OPEN_CLIP.cut(0, model))
