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
    PatchDropout,
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..base import UnsupportedModel
from ..eligibility import why_not_fusable, with_layer_scale
from ..fused_block import BlockWeights, FusableBlock
from ..image import ImageTower
from ..text import TextTower

_ACTIVATIONS = {QuickGELU: "quick_gelu", nn.GELU: "gelu"}
_NORM, _SCALE = (LayerNorm, LayerNormFp32), (nn.Identity, LayerScale)
_BLOCK: dict[str, tuple[type, ...]] = {
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

_LINEAR_WEIGHTS = ("attn.in_proj_weight",) * 3 + ("attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _why_not_fusable(block: Any) -> str | None:
    of_open_clip = isinstance(getattr(block, "attn", None), Attention)
    reason = why_not_fusable(block, ResidualAttentionBlock, _BLOCK | _ATTENTION if of_open_clip else _BLOCK)
    if reason is not None:
        return reason
    attention = block.attn
    if of_open_clip:
        plain = attention.logit_scale is None and attention.head_scale is None and attention.in_proj_weight is not None
        if not plain or attention.attn_drop.p > 0 or attention.out_drop.p > 0:
            return "a block's attention has dropout, an extra scale, or separate projections"
        width = attention.in_proj_weight.shape[1]
        return None if attention.scale == (width // attention.num_heads) ** -0.5 else "a block's attention is scaled"
    if attention.dropout > 0 or attention.add_zero_attn or attention.bias_k is not None:
        return "a block's attention has dropout or an extra key"
    return None


def _read_block(block: Any) -> FusableBlock:
    attention, mlp = block.attn, block.mlp
    weights = BlockWeights(
        block.ln_1.weight, block.ln_1.bias, attention.in_proj_weight, attention.in_proj_bias,
        *with_layer_scale(attention.out_proj, block.ls_1), block.ln_2.weight, block.ln_2.bias,
        mlp.c_fc.weight, mlp.c_fc.bias, *with_layer_scale(mlp.c_proj, block.ls_2),
    )  # fmt: skip
    tanh = getattr(mlp.gelu, "approximate", "none") == "tanh"
    kind = "gelu_tanh" if tanh else _ACTIVATIONS[type(mlp.gelu)]
    return FusableBlock(weights, kind, (block.ln_1.eps, block.ln_2.eps), attention.num_heads)


def _is_sin_cos_table(positions: Tensor, grid: tuple[int, int]) -> bool:
    """Return True for open_clip's fixed table, which it never trains; SkipCLIP changes `requires_grad`."""
    if grid[0] != grid[1] or positions.shape[1] % 4:
        return False
    table = torch.from_numpy(get_2d_sincos_pos_embed(positions.shape[1], grid[0], cls_token=True)).float()
    return positions.detach().cpu().equal(table.to(positions.dtype))


class OpenClipImageTower(ImageTower):
    """Image tower with a `VisionTransformer` as `visual`."""

    read_block, why_not_fusable = staticmethod(_read_block), staticmethod(_why_not_fusable)
    linear_weights = _LINEAR_WEIGHTS

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
        self.embedding = (
            visual.conv1, visual.class_embedding, visual.positional_embedding, visual.patch_dropout, visual.ln_pre
        )  # fmt: skip
        if _is_sin_cos_table(visual.positional_embedding, visual.grid_size):
            self.constants = (visual.positional_embedding,)
        self.head = (visual.attn_pool, visual.ln_post, visual.proj)
        not_fused, not_pooled = self.read_blocks()
        if visual.attn_pool is not None or visual.pool_type != "tok":
            not_pooled = not_pooled or "the tower pools over all tokens"
        self._set_reductions(not_fused, not_pooled)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.visual._embeds(inputs)

    @property
    def patch_dropout(self) -> nn.Module | None:  # noqa: D102
        return self.visual.patch_dropout if isinstance(self.visual.patch_dropout, PatchDropout) else None

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        pooled, _ = self.visual._pool(hidden)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


class OpenClipTextTower(TextTower):
    """Text tower of a `CLIP`, `CustomTextCLIP` or `CoCa`; `text`, which may be the model itself, holds its modules."""

    read_block, why_not_fusable = staticmethod(_read_block), staticmethod(_why_not_fusable)
    linear_weights = _LINEAR_WEIGHTS

    def __init__(self, model: Any, tokens: Tensor):
        self.model = model
        self.text: Any = model if isinstance(model, CLIP) else model.text
        self.blocks = self.text.transformer.resblocks
        self.embedding = (self.text.token_embedding, self.text.positional_embedding)
        self.head = (self.text.ln_final, self.text.text_projection)
        self._not_fused = self.read_blocks()
        self.read_prompts(tokens)

    def read_prompts(self, tokens: Tensor) -> None:  # noqa: D102
        context = len(self.text.positional_embedding) - (getattr(self.text, "cls_emb", None) is not None)
        if tokens.shape[1] > context or (self.text is self.model and tokens.shape[1] != context):
            raise ValueError(
                f"SkipCLIP: tokens must be [C, L={context}], as long as the model's context; got {list(tokens.shape)}. "
                "Use the model's tokenizer: open_clip.get_tokenizer(NAME)."
            )
        not_fused, last_not_fused = self._not_fused
        layout = self._prompt_layout(tokens)
        self._set_prompts(tokens, not_fused=not_fused, last_not_fused=last_not_fused, **layout)

    def _prompt_layout(self, tokens: Tensor) -> dict[str, Any]:
        """Arguments of `_set_prompts`: the pooled tokens, and the tokens that they can see."""
        pooled = self._pooled_positions(tokens)
        mask, length = self.text.attn_mask, int(pooled.max()) + 1
        if getattr(self.text, "use_pad_mask", False):
            visible = int((tokens != self.text.pad_id).long().cumsum(dim=1).argmax(dim=1).max()) + 1
            return {
                "pooled": pooled,
                "not_causal": "the mask hides only padding, so a token sees later ones",
                "not_cropped": None if length <= visible else "a pooled token is padding",
                "visible_length": visible,
            }
        not_causal = "the attention mask is not the causal one"
        if mask is None or (mask[:length, length:] != -math.inf).any():
            return {
                "pooled": pooled,
                "not_causal": not_causal,
                "not_cropped": "the attention mask lets a token see later ones",
            }
        triangle = torch.full_like(mask, -math.inf).triu(1)
        return {"pooled": pooled, "not_causal": None if mask.equal(triangle) else not_causal}

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

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        dtype = self.text.transformer.get_cast_dtype()
        positions = self.text.positional_embedding[: inputs.shape[1]]
        return self.text.token_embedding(inputs).to(dtype) + positions.to(dtype)

    def mask(self, inputs: Tensor) -> Tensor | None:  # noqa: D102
        if getattr(self.text, "use_pad_mask", False):
            return padding_mask(self.text, inputs)
        length, mask = inputs.shape[1], self.text.attn_mask
        return None if mask is None else mask[None, None, :length, :length].to(inputs.device)

    def call_block(self, block: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        if mask is None:
            return block(hidden)
        mask = mask.to(hidden)
        per_head = mask[0, 0] if len(mask) == 1 else mask.expand(-1, block.attn.num_heads, -1, -1).flatten(0, 1)
        return block(hidden, attn_mask=per_head)

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        hidden, projection = self.text.ln_final(hidden), self.text.text_projection
        if projection is None:
            return hidden
        return projection(hidden) if isinstance(projection, nn.Module) else hidden @ projection


def padding_mask(text: TextTransformer, tokens: Tensor) -> Tensor:
    """Mask [n, 1, T, T] that hides padding from every token, added to the causal mask if the text tower has one."""
    length = tokens.shape[1] + (text.cls_emb is not None)
    mask = text._build_additive_mask(tokens, length, torch.float32)[:: text.heads, None]
    return mask if text.attn_mask is None else mask + text.attn_mask[:length, :length].to(mask)
