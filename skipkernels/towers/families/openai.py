"""OpenAI's `clip.model.CLIP`, as returned by `clip.load` (not scripted): vision transformer, causal text transformer.

Its blocks take [tokens, n, W] and hold their attention mask.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..alterations import Submodules, submodules
from ..base import Part
from ..block import BlockInput
from ..image import ImageTower
from ..prompts import Pooling, Prompts
from ..text import TextTower
from .open_clip import BLOCK_TYPES, OpenClipBlock, OpenClipTextTower


class OpenAIBlock(OpenClipBlock):
    """OpenAI's `ResidualAttentionBlock`, on [tokens, n, W]."""

    attn_mask: Tensor | None

    def _parse_input(self, x: Tensor) -> BlockInput | None:  # type: ignore[override]
        if x.ndim != 3:
            return None
        tokens, mask = len(x), self.attn_mask
        mask = None if mask is None else mask[None, None, -tokens:, -tokens:].to(x.device)
        return BlockInput(x.transpose(0, 1), mask)

    def _output(self, hidden: Tensor) -> Tensor:
        return hidden.transpose(0, 1)

    def example_input(self, draw: Callable[..., Tensor], width: int) -> tuple[Any, ...]:
        return (draw(3 if self.attn_mask is None else len(self.attn_mask), 2, width),)

    def _submodules(self) -> Submodules:
        return _submodules_of(sys.modules["clip.model"])  # already imported: it defines the model

    def _why_settings(self) -> str | None:
        learned = self.attn_mask is not None and self.attn_mask.requires_grad
        return "a block's attention mask is learned" if learned else super()._why_settings()


@functools.cache
def _submodules_of(module: Any) -> Submodules:
    types = {name: allowed for name, allowed in BLOCK_TYPES.items() if not name.startswith("ls_")}
    own = {"ln_1": (module.LayerNorm,), "ln_2": (module.LayerNorm,), "mlp.gelu": (module.QuickGELU,)}
    return submodules(types | own)


class OpenAIImageTower(ImageTower):
    """Image tower with a vision transformer as `visual`."""

    def __init__(self, model: Any):
        visual = model.visual
        self.model, self.visual, self.blocks = model, visual, visual.transformer.resblocks
        self.image_size = (visual.input_resolution, visual.input_resolution)

    @property
    def embedding(self) -> tuple[Part, ...]:
        visual = self.visual
        return visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre

    @property
    def head(self) -> tuple[Part, ...]:
        return self.visual.ln_post, self.visual.proj

    def embed(self, images: Tensor) -> Tensor:
        visual = self.visual
        patches = visual.conv1(images.to(self.dtype)).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return visual.ln_pre(torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches.dtype))

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return block(hidden.transpose(0, 1)).transpose(0, 1)

    def finish(self, hidden: Tensor) -> Tensor:
        return self.visual.ln_post(hidden[:, 0]) @ self.visual.proj


class OpenAITextTower(OpenClipTextTower):
    """Text tower of a `clip.model.CLIP`, which has its modules under the names of open_clip's `CLIP`."""

    def __init__(self, model: Any):
        self.model = self.text = model
        self.blocks = model.transformer.resblocks
        length = len(model.positional_embedding)
        triangle = torch.full((length, length), -torch.inf, device="cpu").triu(1)
        causal = all(x is not None and x[:length, :length].float().cpu().equal(triangle) for x in self.masks())
        self._why_not_causal = None if causal else "a block's mask is not the causal one"

    def masks(self) -> list[Tensor | None]:
        return [getattr(block, "attn_mask", None) for block in self.blocks]

    def pooling(self, tokens: Tensor) -> Pooling:
        return Pooling(tokens.argmax(dim=-1), why_not_shared=self._why_not_causal, why_not_cropped=self._why_not_causal)

    def why_never_rows(self) -> str | None:
        return self._why_not_causal

    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        positions = self.model.positional_embedding[: tokens.shape[1]]
        return self.model.token_embedding(tokens).to(self.model.dtype) + positions.to(self.model.dtype)

    def mask(self, tokens: Tensor, prompts: Prompts) -> Tensor | None:
        return TextTower.mask(self, tokens, prompts)

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Call a block on prompts of the context length, for which it has a mask."""
        length, context = hidden.shape[1], len(self.model.positional_embedding)
        whole = nn.functional.pad(hidden, (0, 0, 0, context - length))  # no token sees those behind it
        return block(whole.transpose(0, 1)).transpose(0, 1)[:, :length]
