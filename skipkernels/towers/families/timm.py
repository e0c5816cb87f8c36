"""Transformers of timm as the image tower of an open_clip model: `trunk` and `head` of a `TimmModel`.

Patches, by a projection or convolutions; class token and registers; positions in front of the blocks or inside them
(rotary, relative); blocks; norm, pooling (class token, mean, attention), projection. Trunks with blocks in stages are
in `convnets.py`, fused blocks in `timm_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import HybridEmbed
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vitamin import MbConvStages
from torch import Tensor, nn

from ..base import Part, UnsupportedModel
from ..image import ImageTower
from ..rows import Rotary
from .convnets import NOT_FUSED, chain_stages, convnext_tower, fastvit_tower, swin_tower
from .timm_blocks import rotary_of_tokens


def timm_tower(model: Any) -> ImageTower:
    """Build the image tower with a `TimmModel` as `visual`."""
    trunk: Any = model.visual.trunk
    known: dict[type, Callable[[Any], ImageTower]] = {
        VisionTransformer: ViTaminTower if _is_vitamin(trunk) else TransformerTower,
        VisionTransformerRelPos: RelPosTower,
        Eva: EvaTower,
        NaFlexVit: NaFlexTower,
        ConvNeXt: convnext_tower,
        FastVit: fastvit_tower,
        SwinTransformer: swin_tower,
    }
    if type(trunk) not in known:
        raise UnsupportedModel(
            f"SkipCLIP: the trunk of the image tower must be one of {', '.join(kind.__name__ for kind in known)}; got "
            f"timm's {type(trunk).__qualname__}."
        )
    return known[type(trunk)](model)


def _is_vitamin(trunk: Any) -> bool:
    """Return True if the patch embedding is that of a ViTamin: convolutional stages and a projection."""
    embed: Any = getattr(trunk, "patch_embed", None)
    plain = type(embed) is HybridEmbed and embed.flatten and not embed.dynamic_img_pad
    return plain and type(embed.backbone) is MbConvStages


class TransformerTower(ImageTower):
    """Image tower with a `VisionTransformer` as its trunk."""

    def __init__(self, model: Any):
        self.model, self.visual = model, model.visual
        self.trunk = trunk = model.visual.trunk
        self.blocks = trunk.blocks
        self.image_size = tuple(trunk.patch_embed.img_size)  # `visual.image_size` may differ (ViTamin-XL-384)

    @property
    def embedding(self) -> tuple[Part | None, ...]:
        names = ("patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "rope", "norm_pre")
        return tuple(getattr(self.trunk, name, None) for name in names)

    @property
    def head(self) -> tuple[Part | None, ...]:
        names = ("norm", "attn_pool", "fc_norm", "head_drop", "head")
        return (*(getattr(self.trunk, name, None) for name in names), self.visual.head)

    def why_not_pooled(self) -> str | None:
        one_token = getattr(self.trunk, "attn_pool", None) is None and self.trunk.global_pool == "token"
        return None if one_token else "the tower pools over all tokens"

    def embed(self, inputs: Tensor) -> Tensor:
        hidden = self.trunk._pos_embed(self.trunk.patch_embed(inputs))
        return self.trunk.norm_pre(self.trunk.patch_drop(hidden))

    def finish(self, hidden: Tensor) -> Tensor:
        return self.visual.head(self.trunk.forward_head(self.trunk.norm(hidden)))


class NaFlexTower(TransformerTower):
    """Image tower with a `NaFlexVit` as its trunk, on images of one size: an ordinary vision transformer.

    Positions are interpolated to the size of the images; there is no padding, and so no mask.
    """

    def __init__(self, model: Any):
        self.model, self.visual = model, model.visual
        self.trunk = trunk = model.visual.trunk
        if trunk.rope is not None:
            raise UnsupportedModel(
                "SkipCLIP: the NaFlexVit of the image tower has rotary positions; learned positions are handled."
            )
        self.blocks = trunk.blocks
        self.image_size = tuple(model.visual.image_size)

    @property
    def embedding(self) -> tuple[Part | None, ...]:
        return self.trunk.embeds, self.trunk.patch_drop, self.trunk.norm_pre

    def embed(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.trunk.embeds(inputs)
        if self.trunk.patch_drop is not None:
            hidden, _ = self.trunk.patch_drop(hidden)
        return self.trunk.norm_pre(hidden)


class ViTaminTower(TransformerTower):
    """Image tower with a ViTamin as its trunk: blocks of convolutional stages, then transformer blocks."""

    def __init__(self, model: Any):
        super().__init__(model)
        backbone = self.trunk.patch_embed.backbone
        stages = [((), stage) for stage in backbone.stages]
        self.blocks = chain_stages([*stages, ([_Tokens(self.trunk)], self.trunk.blocks)])

    @property
    def embedding(self) -> tuple[Part | None, ...]:
        return (self.trunk.patch_embed.backbone.stem,)

    def why_never_rows(self) -> str | None:
        return NOT_FUSED

    def embed(self, inputs: Tensor) -> Tensor:
        return self.trunk.patch_embed.backbone.stem(inputs)


class _Tokens(nn.Module):
    """Layers between the convolutions and the transformer: maps to tokens, positions, norm."""

    def __init__(self, trunk: Any):
        super().__init__()
        self.project = nn.Sequential(trunk.patch_embed.backbone.pool, trunk.patch_embed.proj)
        self.cls_token, self.reg_token, self.pos_embed = trunk.cls_token, trunk.reg_token, trunk.pos_embed
        self.pos_drop, self.patch_drop, self.norm_pre = trunk.pos_drop, trunk.patch_drop, trunk.norm_pre
        self._add_positions = trunk._pos_embed  # adds the parameters above

    def forward(self, maps: Tensor) -> Tensor:
        patches = self.project(maps).flatten(2).transpose(1, 2)
        return self.norm_pre(self.patch_drop(self._add_positions(patches)))


class RelPosTower(TransformerTower):
    """Image tower with a `VisionTransformerRelPos` as its trunk, with relative positions in each block."""

    def __init__(self, model: Any):
        if model.visual.trunk.shared_rel_pos is not None:
            raise UnsupportedModel(
                "SkipCLIP: the blocks of the image tower share one relative position bias (shared_rel_pos), which "
                "would be on both sides of the cut. A tower with one bias per block is handled."
            )
        super().__init__(model)

    def embed(self, inputs: Tensor) -> Tensor:
        patches, token = self.trunk.patch_embed(inputs), self.trunk.cls_token
        return patches if token is None else torch.cat([token.expand(len(patches), -1, -1), patches], dim=1)


class EvaTower(TransformerTower):
    """Image tower with an `Eva` as its trunk: EVA, EVA-02, Perception Encoder.

    Rotary positions belong to the embedding, although every block uses them: learned ones ("mixed") train at
    skip_layers=0 and are constant otherwise.
    """

    def __init__(self, model: Any):
        if model.visual.trunk.rope is not None:
            _refuse_varying_positions(model.visual.trunk)
        super().__init__(model)
        self._depth = {block: i for i, block in enumerate(self.blocks)}

    def embed(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.trunk._pos_embed(self.trunk.patch_embed(inputs))
        return self.trunk.norm_pre(hidden)

    def why_never_rows(self) -> str | None:
        return "each block has rotary positions of its own" if self._is_mixed else None

    @property
    def _is_mixed(self) -> bool:
        return self.trunk.rope is not None and self.trunk.rope_mixed

    def _positions(self, device: torch.device) -> Tensor:
        """Rotary positions of the patches, [patches, 2E], or those of each block."""
        rope = self.trunk.rope
        grid = {} if hasattr(rope, "feat_shape") else {"shape": self.trunk.patch_embed.grid_size}
        return rope.get_embed(**grid).to(device)

    def rotary(self, device: torch.device) -> Rotary | None:
        if self.trunk.rope is None or self._is_mixed:
            return None
        return rotary_of_tokens(self._positions(device), self.blocks[0].attn)

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if self.trunk.rope is None:
            return block(hidden)
        positions = self._positions(hidden.device)
        return block(hidden, rope=positions[self._depth[block]] if self._is_mixed else positions)


def _refuse_varying_positions(trunk: Any) -> None:
    """Refuse rotary positions that depend on the images: features at the cut do not contain them."""
    reasons = {
        "depend on the patches that patch dropout keeps in training (patch_drop_rate)": trunk.patch_drop is not None,
        "depend on the size of the image (dynamic_img_size)": trunk.dynamic_img_size,
        "are random in training (rope_shift_coords and others)": getattr(trunk.rope, "aug_active", False),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModel(
                f"SkipCLIP: the rotary positions of the image tower {reason}; features at the cut do not contain them."
            )
