"""Vision transformer and text transformer of open_clip, as in its `CLIP`, `CustomTextCLIP` and `CoCa`.

Images: patches, class token, positions, norm; pre-norm blocks; norm and pooling (class token, mean, or an attentional
pooler); projection. Texts: tokens and positions; pre-norm blocks, causal or without a mask; norm, pooling at one token,
projection. CoCa adds a class token behind the padding, and masks the padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.pos_embed import get_2d_sincos_pos_embed
from open_clip.transformer import (
    Attention,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    QuickGELU,
    TextTransformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..alterations import Submodules, submodules
from ..base import Part, UnsupportedModel
from ..block import BlockInput, FusedBlock
from ..fused.weights import BlockSettings, GivenWeights
from ..image import ImageTower
from ..prompts import Pooling, Prompts
from ..text import TextTower
from .reading import activation, layer_scale, weights_of

_ACTIVATIONS = {QuickGELU: "quick_gelu", nn.GELU: "gelu"}


class OpenClipBlock(FusedBlock):
    """open_clip's `ResidualAttentionBlock`."""

    linear_weights = ("attn.in_proj_weight",) * 3 + ("attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    def read_weights(self) -> tuple[GivenWeights, BlockSettings]:
        parts = self._modules
        norm_1, norm_2, attention, mlp = parts["ln_1"], parts["ln_2"], parts["attn"], parts["mlp"]._modules
        weights = {
            **weights_of("norm_1", norm_1),
            "in_proj": attention.in_proj_weight,
            **({} if attention.in_proj_bias is None else {"in_proj_bias": attention.in_proj_bias}),
            **weights_of("out_proj", attention._modules["out_proj"], layer_scale(parts.get("ls_1"))),
            **weights_of("norm_2", norm_2),
            **weights_of("mlp_in", mlp["c_fc"]),
            **weights_of("mlp_out", mlp["c_proj"], layer_scale(parts.get("ls_2"))),
        }
        kind, eps = activation(mlp["gelu"], _ACTIVATIONS), {"norm_1": norm_1.eps, "norm_2": norm_2.eps}
        return weights, BlockSettings(kind, eps, attention.num_heads)

    def _parse_input(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> BlockInput | None:
        if (
            k_x is not None
            or v_x is not None
            or q_x.ndim != 3
            or not getattr(self._modules["attn"], "batch_first", True)
        ):
            return None
        if attn_mask is not None and attn_mask.ndim == 3:  # [n · H, tokens, tokens]
            return BlockInput(q_x, attn_mask.unflatten(0, (len(q_x), -1)))
        return BlockInput(q_x, None if attn_mask is None else attn_mask[None, None])

    def _submodules(self) -> Submodules:
        return _BLOCK_OF_OPEN_CLIP_4 if isinstance(self._modules["attn"], Attention) else _BLOCK

    def _why_settings(self) -> str | None:
        attention = self._modules["attn"]
        if tuple(self._modules["mlp"]._modules) != ("c_fc", "gelu", "c_proj"):
            return "the layers of a block's MLP are in another order"
        if not getattr(attention, "_qkv_same_embed_dim", True):
            return "a block's attention has separate projections"
        if isinstance(attention, Attention):
            if attention.logit_scale is not None or attention.head_scale is not None:
                return "a block's attention has an extra scale"
            if attention.attn_drop.p > 0 or attention.out_drop.p > 0:
                return "a block's attention has dropout"
            width = attention._modules["out_proj"].in_features  # in_proj_weight may be a low-rank update
            if attention.scale != (width // attention.num_heads) ** -0.5:
                return "a block's attention is scaled"
            return None
        if attention.dropout > 0 or attention.add_zero_attn or attention.bias_k is not None:
            return "a block's attention has dropout or an extra key"
        return None


_NORM, _SCALE = (LayerNorm, LayerNormFp32), (nn.Identity, LayerScale)
BLOCK_TYPES: dict[str, tuple[type, ...]] = {
    "ln_1": _NORM,
    "attn": (nn.MultiheadAttention, Attention),
    "attn.out_proj": (NonDynamicallyQuantizableLinear, nn.Linear),
    "ls_1": _SCALE,
    "ln_2": _NORM,
    "mlp": (nn.Sequential,),
    "mlp.c_fc": (nn.Linear,),
    "mlp.gelu": tuple(_ACTIVATIONS),
    "mlp.c_proj": (nn.Linear,),
    "ls_2": _SCALE,
}
# Further submodules if `attn` is the `Attention` of open_clip 4.
_ATTENTION: dict[str, tuple[type, ...]] = {f"attn.ln_{name}": (nn.Identity,) for name in ("q", "k", "inner")}
_ATTENTION |= {f"attn.{name}_drop": (nn.Dropout,) for name in ("attn", "out")}
_BLOCK, _BLOCK_OF_OPEN_CLIP_4 = submodules(BLOCK_TYPES), submodules(BLOCK_TYPES | _ATTENTION)


def _is_sin_cos_table(positions: Tensor, grid: tuple[int, int]) -> bool:
    """Return True for open_clip's fixed table, which it never trains; SkipCLIP changes `requires_grad`."""
    if grid[0] != grid[1] or positions.shape[1] % 4:
        return False
    table = torch.from_numpy(get_2d_sincos_pos_embed(positions.shape[1], grid[0], cls_token=True).astype("float32"))
    return positions.detach().cpu().equal(table.to(positions.dtype))


class OpenClipImageTower(ImageTower):
    """Image tower with a `VisionTransformer` as `visual`."""

    def __init__(self, model: Any):
        self.model, self.visual = model, model.visual
        visual: VisionTransformer = model.visual
        if getattr(visual, "attn_pool_contrastive", None) is not None:
            raise UnsupportedModel(
                f"SkipCLIP: open_clip's {visual.attn_pool_type} attentional pooler leaves an axis of one token in its "
                "embeddings, [n, 1, D]; create the model with attentional_pool=True."
            )
        self.blocks = visual.transformer.resblocks
        self.image_size = tuple(visual.image_size)
        if _is_sin_cos_table(visual.positional_embedding, visual.grid_size):
            self.constants = (visual.positional_embedding,)

    @property
    def embedding(self) -> tuple[Part, ...]:
        visual = self.visual
        return visual.conv1, visual.class_embedding, visual.positional_embedding, visual.patch_dropout, visual.ln_pre

    @property
    def head(self) -> tuple[Part, ...]:
        return self.visual.attn_pool, self.visual.ln_post, self.visual.proj

    def why_not_pooled(self) -> str | None:
        one_token = self.visual.attn_pool is None and self.visual.pool_type == "tok"
        return None if one_token else "the tower pools over all tokens"

    def embed(self, images: Tensor) -> Tensor:
        return self.visual._embeds(images)

    def finish(self, hidden: Tensor) -> Tensor:
        pooled, _ = self.visual._pool(hidden)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


class OpenClipTextTower(TextTower):
    """Text tower of a `CLIP`, `CustomTextCLIP` or `CoCa`; `text`, which may be the model itself, holds its modules."""

    def __init__(self, model: Any):
        self.model = model
        self.text: Any = model if isinstance(model, CLIP) else model.text
        self.blocks = self.text.transformer.resblocks

    @property
    def embedding(self) -> tuple[Part, ...]:
        return self.text.token_embedding, self.text.positional_embedding

    @property
    def head(self) -> tuple[Part, ...]:
        return self.text.ln_final, self.text.text_projection

    def read_prompts(self, tokens: Tensor) -> Prompts:
        context = len(self.text.positional_embedding) - (getattr(self.text, "cls_emb", None) is not None)
        if tokens.shape[1] > context or (self.text is self.model and tokens.shape[1] != context):
            raise ValueError(
                f"SkipCLIP: tokens must be [C, L={context}], as long as the model's context; got {list(tokens.shape)}. "
                "Use the model's tokenizer: open_clip.get_tokenizer(NAME)."
            )
        return super().read_prompts(tokens)

    def masks(self) -> list[Tensor | None]:
        return [self.text.attn_mask]

    def pooling(self, tokens: Tensor) -> Pooling:
        pooled = self._pooled_positions(tokens)
        mask, length = self.text.attn_mask, int(pooled.max()) + 1
        if getattr(self.text, "use_pad_mask", False):
            visible = int((tokens != self.text.pad_id).long().cumsum(dim=1).argmax(dim=1).max()) + 1
            return Pooling(
                pooled,
                why_not_shared="the mask hides only padding, so a token sees later ones",
                why_not_cropped=None if length <= visible else "a pooled token is padding",
                visible_length=visible,
            )
        if mask is not None and mask.equal(torch.full_like(mask, -math.inf).triu(1)):
            return Pooling(pooled)
        sees_later = mask is None or (mask[:length, length:] != -math.inf).any()
        return Pooling(
            pooled,
            why_not_shared="the attention mask is not the causal one",
            why_not_cropped="the attention mask lets a token see later ones" if sees_later else None,
        )

    def _pooled_positions(self, tokens: Tensor) -> Tensor:
        """Positions [C] that `text_global_pool` of open_clip selects."""
        in_model = self.text is self.model
        pool_type = self.text.text_pool_type if in_model else self.text.pool_type
        if pool_type == "argmax":
            return tokens.argmax(dim=-1)
        if pool_type == "eos":
            return (tokens == (self.text.text_eos_id if in_model else self.text.eos_id)).int().argmax(dim=-1)
        if pool_type in ("first", "last"):
            return tokens.new_full((len(tokens),), 0 if pool_type == "first" else tokens.shape[1] - 1)
        raise UnsupportedModel(f"SkipCLIP: text pooling {pool_type!r} is not handled; expected one token per prompt.")

    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        dtype = self.text.transformer.get_cast_dtype()
        positions = self.text.positional_embedding[: tokens.shape[1]]
        return self.text.token_embedding(tokens).to(dtype) + positions.to(dtype)

    def mask(self, tokens: Tensor, prompts: Prompts) -> Tensor | None:
        if getattr(self.text, "use_pad_mask", False):
            return padding_mask(self.text, tokens)
        length, mask = tokens.shape[1], self.text.attn_mask
        return None if mask is None else mask[None, None, :length, :length].to(tokens.device)

    def call_block(self, block: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return block(hidden)
        mask = mask.to(hidden)
        per_head = mask[0, 0] if len(mask) == 1 else mask.expand(-1, block.attn.num_heads, -1, -1).flatten(0, 1)
        return block(hidden, attn_mask=per_head)

    def finish(self, hidden: Tensor) -> Tensor:
        hidden, projection = self.text.ln_final(hidden), self.text.text_projection
        if projection is None:
            return hidden
        return projection(hidden) if isinstance(projection, nn.Module) else hidden @ projection


def padding_mask(text: TextTransformer, tokens: Tensor) -> Tensor:
    """Mask [n, 1, T, T] that hides padding from every token, added to the causal mask if the text tower has one."""
    length = tokens.shape[1] + (text.cls_emb is not None)
    mask = text._build_additive_mask(tokens, length, torch.float32)[:: text.heads, None]
    return mask if text.attn_mask is None else mask + text.attn_mask[:length, :length].to(mask)
