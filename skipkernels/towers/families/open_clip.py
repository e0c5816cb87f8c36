"""open_clip's own vision transformer and text transformer, as in its `CLIP`, `CustomTextCLIP` and `CoCa`.

Images: patches, class token, positions, norm; pre-norm blocks; norm and pooling (class token, mean, or an attentional
pooler); projection. Texts: tokens and positions; causal pre-norm blocks, or without a mask; norm, pooling at one token,
projection. CoCa puts a class token behind the padding, and its mask hides the padding from it.
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

from ..base import ImageTower, TextTower, UnsupportedModel
from ..eligibility import scaled, unlike
from ..fused_block import Parts, Weights

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
# Attention of open_clip 4, in place of PyTorch's.
_ATTENTION: dict[str, tuple[type, ...]] = {f"attn.ln_{name}": (nn.Identity,) for name in ("q", "k", "inner")}
_ATTENTION |= {f"attn.{name}_drop": (nn.Dropout,) for name in ("attn", "out")}


def _obstacle(block: Any) -> str | None:
    """Why a block cannot be run as one node, which sees its weights alone, or None."""
    own = isinstance(getattr(block, "attn", None), Attention)
    reason = unlike(block, ResidualAttentionBlock, _BLOCK | _ATTENTION if own else _BLOCK)
    if reason is not None:
        return reason
    attention = block.attn
    if own:
        plain = attention.logit_scale is None and attention.head_scale is None and attention.in_proj_weight is not None
        if not plain or attention.attn_drop.p > 0 or attention.out_drop.p > 0:
            return "a block's attention has dropout, a scale of its own, or projections apart"
        width = attention.in_proj_weight.shape[1]
        return None if attention.scale == (width // attention.num_heads) ** -0.5 else "a block's attention is scaled"
    if attention.dropout > 0 or attention.add_zero_attn or attention.bias_k is not None:
        return "a block's attention has dropout or a key of its own"
    return None


def parts(block: Any) -> Parts:
    """An open_clip block as `block.py` runs it."""
    attention, mlp = block.attn, block.mlp
    weights = Weights(
        block.ln_1.weight, block.ln_1.bias, attention.in_proj_weight, attention.in_proj_bias,
        *scaled(attention.out_proj, block.ls_1), block.ln_2.weight, block.ln_2.bias,
        mlp.c_fc.weight, mlp.c_fc.bias, *scaled(mlp.c_proj, block.ls_2),
    )  # fmt: skip
    tanh = getattr(mlp.gelu, "approximate", "none") == "tanh"
    kind = "gelu_tanh" if tanh else _ACTIVATIONS[type(mlp.gelu)]
    return Parts(weights, kind, (block.ln_1.eps, block.ln_2.eps), attention.num_heads)


def _are_sines_and_cosines(positions: Tensor, grid: tuple[int, int]) -> bool:
    """Whether they are those that open_clip never trains; `requires_grad` does not tell, which SkipCLIP sets."""
    if grid[0] != grid[1] or positions.shape[1] % 4:
        return False
    table = torch.from_numpy(get_2d_sincos_pos_embed(positions.shape[1], grid[0], cls_token=True)).float()
    return positions.detach().cpu().equal(table.to(positions.dtype))


class OpenClipImageTower(ImageTower):
    """`model.visual` of such a model, where it is a `VisionTransformer`."""

    parts, obstacle = staticmethod(parts), staticmethod(_obstacle)

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
        if _are_sines_and_cosines(visual.positional_embedding, visual.grid_size):
            self.fixed = (visual.positional_embedding,)
        self.head = (visual.attn_pool, visual.ln_post, visual.proj)
        one_node, pooled = self.read_blocks()
        if visual.attn_pool is not None or visual.pool_type != "tok":
            pooled = pooled or "the tower pools over all tokens"
        self._set_reductions(one_node, pooled)

    def own(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.model.encode_image(inputs)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.visual._embeds(inputs)

    @property
    def patch_dropout(self) -> nn.Module | None:  # noqa: D102
        return self.visual.patch_dropout if isinstance(self.visual.patch_dropout, PatchDropout) else None

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        return block(hidden)

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        pooled, _ = self.visual._pool(hidden)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


class OpenClipTextTower(TextTower):
    """The text half of such a model, over the tokens of the task's classes.

    `text` has its modules: the model itself or, in `CustomTextCLIP` and `CoCa`, a `TextTransformer`.
    """

    parts, obstacle = staticmethod(parts), staticmethod(_obstacle)

    def __init__(self, model: Any, tokens: Tensor):
        self.model = model
        self.text: Any = model if isinstance(model, CLIP) else model.text
        self.blocks = self.text.transformer.resblocks
        context = len(self.text.positional_embedding) - (getattr(self.text, "cls_emb", None) is not None)
        if tokens.shape[1] > context or (self.text is model and tokens.shape[1] != context):
            raise ValueError(
                f"SkipCLIP: tokens must be [C, L={context}], as long as the model's context; got {list(tokens.shape)}. "
                "Use the model's own tokenizer: open_clip.get_tokenizer(its name)."
            )
        self.embedding = (self.text.token_embedding, self.text.positional_embedding)
        self.head = (self.text.ln_final, self.text.text_projection)
        one_node, last_block = self.read_blocks()
        self.take(tokens, one_node=one_node, last_block=last_block, **self._seen(tokens))

    def _seen(self, tokens: Tensor) -> dict[str, Any]:
        """Which tokens become embeddings and which are seen at all, as `take` wants it."""
        pooled = self._pooled_positions(tokens)
        mask, length = self.text.attn_mask, int(pooled.max()) + 1
        if getattr(self.text, "use_pad_mask", False):
            causal = "the mask hides padding alone, so a token sees later ones"
            last = int((tokens != self.text.pad_id).long().cumsum(dim=1).argmax(dim=1).max()) + 1
            crop = None if length <= last else "a pooled token is padding"
            return {"pooled": pooled, "causal": causal, "crop": crop, "length": last}
        not_causal = "the attention mask is not the causal one"
        if mask is None or (mask[:length, length:] != -math.inf).any():
            return {
                "pooled": pooled,
                "causal": not_causal,
                "crop": "the attention mask lets a token see later ones",
            }
        triangle = torch.full_like(mask, -math.inf).triu(1)
        return {"pooled": pooled, "causal": None if mask.equal(triangle) else not_causal}

    def _pooled_positions(self, tokens: Tensor) -> Tensor:
        """Position [C] that open_clip's `text_global_pool` takes for each prompt."""
        in_one = self.text is self.model
        pool_type = self.text.text_pool_type if in_one else self.text.pool_type
        if pool_type == "argmax":
            return tokens.argmax(dim=-1)
        if pool_type == "eos":
            return (tokens == (self.text.text_eos_id if in_one else self.text.eos_id)).int().argmax(dim=-1)
        if pool_type in ("first", "last"):
            return tokens.new_full((len(tokens),), 0 if pool_type == "first" else tokens.shape[1] - 1)
        raise UnsupportedModel(f"SkipCLIP: text pooling {pool_type!r} is not handled; expected one token per prompt.")

    def own(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.model.encode_text(inputs)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        dtype = self.text.transformer.get_cast_dtype()
        positions = self.text.positional_embedding[: inputs.shape[1]]
        return self.text.token_embedding(inputs).to(dtype) + positions.to(dtype)

    def mask(self, inputs: Tensor) -> Tensor | None:  # noqa: D102
        if getattr(self.text, "use_pad_mask", False):
            return hidden_padding(self.text, inputs)
        length, mask = inputs.shape[1], self.text.attn_mask
        return None if mask is None else mask[None, None, :length, :length].to(inputs.device)

    def call_block(self, block: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        if mask is None:
            return block(hidden)
        mask = mask.to(hidden)
        each_head = mask[0, 0] if len(mask) == 1 else mask.expand(-1, block.attn.num_heads, -1, -1).flatten(0, 1)
        return block(hidden, attn_mask=each_head)

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        hidden, projection = self.text.ln_final(hidden), self.text.text_projection
        if projection is None:
            return hidden
        return projection(hidden) if isinstance(projection, nn.Module) else hidden @ projection


def hidden_padding(text: TextTransformer, tokens: Tensor) -> Tensor:
    """The mask [n, 1, T, T] by which a text transformer keeps every token from seeing padding, causal or not."""
    length = tokens.shape[1] + (text.cls_emb is not None)
    mask = text._build_additive_mask(tokens, length, torch.float32)[:: text.heads, None]
    return mask if text.attn_mask is None else mask + text.attn_mask[:length, :length].to(mask)
