"""OpenAI's `clip.model.CLIP`, as `clip.load` gives it (not scripted): vision transformer, causal text transformer.

Its blocks take [tokens, n, W] and bring their own mask, of the first tokens or of no tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..base import ImageTower, TextTower
from ..eligibility import unlike
from ..fused_block import Parts, Weights


def _obstacle(block: Any) -> str | None:
    """Why a block cannot be run as one node, which sees its weights alone, or None."""
    module: Any = sys.modules["clip.model"]  # which made the model, and so is imported
    expected: dict[str, tuple[type, ...]] = {
        "attn": (nn.MultiheadAttention,),
        "attn.out_proj": (NonDynamicallyQuantizableLinear,),
        "ln_1": (module.LayerNorm,),
        "mlp": (nn.Sequential,),
        "mlp.c_fc": (nn.Linear,),
        "mlp.gelu": (module.QuickGELU,),
        "mlp.c_proj": (nn.Linear,),
        "ln_2": (module.LayerNorm,),
    }
    return unlike(block, module.ResidualAttentionBlock, expected)


def _parts(block: Any) -> Parts:
    attention, mlp = block.attn, block.mlp
    weights = Weights(
        block.ln_1.weight, block.ln_1.bias, attention.in_proj_weight, attention.in_proj_bias,
        attention.out_proj.weight, attention.out_proj.bias, block.ln_2.weight, block.ln_2.bias,
        mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias,
    )  # fmt: skip
    return Parts(weights, "quick_gelu", (block.ln_1.eps, block.ln_2.eps), attention.num_heads)


def _call(block: nn.Module, hidden: Tensor) -> Tensor:
    return block(hidden.transpose(0, 1)).transpose(0, 1)


class OpenAIImageTower(ImageTower):
    """`model.visual` of such a model, where it is a vision transformer."""

    parts, obstacle = staticmethod(_parts), staticmethod(_obstacle)

    def __init__(self, model: Any):
        visual = model.visual
        self.model, self.visual, self.blocks = model, visual, visual.transformer.resblocks
        self.image_size = (visual.input_resolution, visual.input_resolution)
        self.embedding = (visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre)
        self.head = (visual.ln_post, visual.proj)
        one_node, last_block = self.read_blocks()
        self._set_reductions(one_node, last_block)

    def own(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.model.encode_image(inputs)

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
    """The text half of such a model, over the tokens of the task's classes."""

    parts, obstacle = staticmethod(_parts), staticmethod(_obstacle)

    def __init__(self, model: Any, tokens: Tensor):
        self.model, self.blocks = model, model.transformer.resblocks
        self.embedding = (model.token_embedding, model.positional_embedding)
        self.head = (model.ln_final, model.text_projection)
        one_node, last_block = self.read_blocks()
        length = tokens.shape[1]
        triangle = torch.full((length, length), -torch.inf).triu(1)
        masks = [getattr(block, "attn_mask", None) for block in self.blocks]
        causal = all(mask is not None and mask[:length, :length].float().cpu().equal(triangle) for mask in masks)
        reason = None if causal else "a block's mask is not the causal one"
        one_node, last_block = one_node or reason, last_block or reason
        if reason is not None:
            self._read = [reason] * len(self.blocks)
        crop = None if one_node is None else "a block runs as your module, on the whole context"
        self.take(tokens, tokens.argmax(dim=-1), one_node, last_block, causal=reason, crop=crop)

    def own(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.model.encode_text(inputs)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        positions = self.model.positional_embedding[: inputs.shape[1]]
        return self.model.token_embedding(inputs).to(self.model.dtype) + positions.to(self.model.dtype)

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        return _call(block, hidden)

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.model.ln_final(hidden) @ self.model.text_projection
