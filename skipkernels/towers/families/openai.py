"""OpenAI's `clip.model.CLIP`, as returned by `clip.load` (not scripted): vision transformer, causal text transformer.

Its blocks take [tokens, n, W] and hold their attention mask.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..eligibility import why_not_fusable
from ..fused_block import BlockWeights, FusableBlock
from ..image import ImageTower
from ..text import TextTower

_LINEAR_WEIGHTS = ("attn.in_proj_weight",) * 3 + ("attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _why_not_fusable(block: Any) -> str | None:
    module: Any = sys.modules["clip.model"]  # already imported: it defines the model
    submodule_types: dict[str, tuple[type, ...]] = {
        "attn": (nn.MultiheadAttention,),
        "attn.out_proj": (NonDynamicallyQuantizableLinear,),
        "ln_1": (module.LayerNorm,),
        "mlp": (nn.Sequential,),
        "mlp.c_fc": (nn.Linear,),
        "mlp.gelu": (module.QuickGELU,),
        "mlp.c_proj": (nn.Linear,),
        "ln_2": (module.LayerNorm,),
    }
    return why_not_fusable(block, module.ResidualAttentionBlock, submodule_types)


def _read_block(block: Any) -> FusableBlock:
    attention, mlp = block.attn, block.mlp
    weights = BlockWeights(
        block.ln_1.weight, block.ln_1.bias, attention.in_proj_weight, attention.in_proj_bias,
        attention.out_proj.weight, attention.out_proj.bias, block.ln_2.weight, block.ln_2.bias,
        mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias,
    )  # fmt: skip
    return FusableBlock(weights, "quick_gelu", (block.ln_1.eps, block.ln_2.eps), attention.num_heads)


def _call(block: nn.Module, hidden: Tensor) -> Tensor:
    return block(hidden.transpose(0, 1)).transpose(0, 1)


class OpenAIImageTower(ImageTower):
    """Image tower with a vision transformer as `visual`."""

    read_block, why_not_fusable = staticmethod(_read_block), staticmethod(_why_not_fusable)
    linear_weights = _LINEAR_WEIGHTS

    def __init__(self, model: Any):
        visual = model.visual
        self.model, self.visual, self.blocks = model, visual, visual.transformer.resblocks
        self.image_size = (visual.input_resolution, visual.input_resolution)
        self.embedding = (visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre)
        self.head = (visual.ln_post, visual.proj)
        self._set_reductions(*self.read_blocks())

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        visual = self.visual
        patches = visual.conv1(inputs.to(self.dtype)).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return visual.ln_pre(torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches.dtype))

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        return _call(block, hidden)

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.visual.ln_post(hidden[:, 0]) @ self.visual.proj


class OpenAITextTower(TextTower):
    """Text tower of a `clip.model.CLIP`."""

    read_block, why_not_fusable = staticmethod(_read_block), staticmethod(_why_not_fusable)
    linear_weights = _LINEAR_WEIGHTS

    def __init__(self, model: Any, tokens: Tensor):
        self.model, self.blocks = model, model.transformer.resblocks
        self.embedding = (model.token_embedding, model.positional_embedding)
        self.head = (model.ln_final, model.text_projection)
        self.read_prompts(tokens)

    def read_prompts(self, tokens: Tensor) -> None:  # noqa: D102
        not_fused, last_not_fused = self.read_blocks()
        length = tokens.shape[1]
        triangle = torch.full((length, length), -torch.inf).triu(1)
        masks = [getattr(block, "attn_mask", None) for block in self.blocks]
        causal = all(mask is not None and mask[:length, :length].float().cpu().equal(triangle) for mask in masks)
        not_causal = None if causal else "a block's mask is not the causal one"
        if not_causal is not None:
            self._fusable = [not_causal] * len(self.blocks)
            not_fused, last_not_fused = not_fused or not_causal, last_not_fused or not_causal
        self._set_prompts(
            tokens,
            tokens.argmax(dim=-1),
            not_fused,
            last_not_fused,
            not_causal=not_causal,
            not_cropped=not_fused and "a block runs its own forward, on the whole context",
        )

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        positions = self.model.positional_embedding[: inputs.shape[1]]
        return self.model.token_embedding(inputs).to(self.model.dtype) + positions.to(self.model.dtype)

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        return _call(block, hidden)

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.model.ln_final(hidden) @ self.model.text_projection
