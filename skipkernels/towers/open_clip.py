"""open_clip's `CLIP` and `CustomTextCLIP` with its own vision transformer and its own text transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import (
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
from torch.nn.utils import parametrize

from .attend import pooled, sequences, suffixes
from .base import ImageTower, TextTower, UnsupportedModel
from .block import KEPT, Attend, Spec, Weights, run_block
from .prompts import SharedPrefix


def _require_clip(model: nn.Module) -> CLIP | CustomTextCLIP:
    if not isinstance(model, (CLIP, CustomTextCLIP)):
        raise UnsupportedModel(
            f"SkipCLIP: model must be an open_clip CLIP or CustomTextCLIP; got {type(model).__module__}."
            f"{type(model).__qualname__}. Other families (CoCa, OpenAI's clip, Hugging Face) are not handled yet."
        )
    return model


def _text_part(model: CLIP | CustomTextCLIP) -> tuple[Any, str, int]:
    """What has the text tower's modules, how it pools, and its end-of-text token."""
    if isinstance(model, CLIP):
        return model, model.text_pool_type, model.text_eos_id
    text = model.text
    if not isinstance(text, TextTransformer):
        raise UnsupportedModel(
            f"SkipCLIP: the text tower must be open_clip's TextTransformer; got {type(text).__qualname__}."
        )
    if text.cls_emb is not None or text.use_pad_mask:
        raise UnsupportedModel("SkipCLIP: a text tower with a class embedding or a padding mask is not handled yet.")
    return text, text.pool_type, text.eos_id


_ACTIVATIONS = {QuickGELU: "quick_gelu", nn.GELU: "gelu"}
_PLAIN = (nn.Linear, nn.Identity, nn.Sequential, LayerScale, *_ACTIVATIONS, NonDynamicallyQuantizableLinear)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _obstacle(block: Any) -> str | None:
    """Why a block cannot be run as one node, which sees its weights alone, or None."""
    if type(block) is not ResidualAttentionBlock:
        return f"a block is a {type(block).__name__}, not open_clip's ResidualAttentionBlock"
    attention, norms = block.attn, (block.ln_1, block.ln_2)
    if type(attention) is not nn.MultiheadAttention or any(
        type(norm) not in (LayerNorm, LayerNormFp32) for norm in norms
    ):
        return "a block has an attention or a norm of its own"
    if attention.in_proj_weight is None or attention.in_proj_bias is None or attention.bias_k is not None:
        return "a block's attention has no joint projection with a bias"
    if attention.dropout > 0 or attention.add_zero_attn:
        return "a block's attention has dropout or a zero key"
    if any(norm.weight is None or norm.bias is None for norm in norms):
        return "a norm has no weight or no bias"
    for module in block.modules():
        if module not in (block, attention, *norms) and type(module) not in _PLAIN:
            return f"a block has a {type(module).__name__}"
        if not {"forward", "attention"}.isdisjoint(vars(module)) or parametrize.is_parametrized(module):
            return f"a {type(module).__name__} of a block was altered"
    if list(block._modules) != ["ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"] or list(block.mlp._modules) != [
        "c_fc",
        "gelu",
        "c_proj",
    ]:
        return "a block has other parts than open_clip's"
    if any(layer.bias is None for layer in (block.mlp.c_fc, block.mlp.c_proj, attention.out_proj)):
        return "a layer of a block has no bias"
    return None if not _has_hooks(block) else "a block has hooks"


def _has_hooks(block: nn.Module) -> bool:
    return any(getattr(module, hooks) for module in block.modules() for hooks in _HOOKS)


def _weights(block: ResidualAttentionBlock) -> Weights:
    attention, mlp = block.attn, block.mlp
    out_proj, out_proj_bias = attention.out_proj.weight, attention.out_proj.bias
    proj, proj_bias = mlp.c_proj.weight, mlp.c_proj.bias
    if isinstance(block.ls_1, LayerScale):
        out_proj, out_proj_bias = block.ls_1.gamma[:, None] * out_proj, block.ls_1.gamma * out_proj_bias
    if isinstance(block.ls_2, LayerScale):
        proj, proj_bias = block.ls_2.gamma[:, None] * proj, block.ls_2.gamma * proj_bias
    return Weights(
        block.ln_1.weight, block.ln_1.bias, attention.in_proj_weight, attention.in_proj_bias, out_proj, out_proj_bias,
        block.ln_2.weight, block.ln_2.bias, mlp.c_fc.weight, mlp.c_fc.bias, proj, proj_bias,
    )  # fmt: skip


def _run(
    block: ResidualAttentionBlock, hidden: Tensor, attend: Attend, *, minimal: bool, rows: Tensor | None = None
) -> Tensor:
    """An open_clip block over tokens in rows, [R, W] → [R, W], or [Q, W] of those that `rows` names."""
    if _has_hooks(block):
        raise RuntimeError(
            "SkipCLIP: a block got a hook after SkipCLIP was made, which runs it as one node and would not call it. "
            "Register hooks first; SkipCLIP then runs the modules themselves."
        )
    device, activation = hidden.device.type, block.mlp.gelu
    tanh = getattr(activation, "approximate", "none") == "tanh"
    spec = Spec(
        attend,
        "gelu_tanh" if tanh else _ACTIVATIONS[type(activation)],
        (block.ln_1.eps, block.ln_2.eps),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else block.mlp.c_fc.weight.dtype,
        minimal,
    )
    return run_block(spec, hidden, _weights(block), rows)


class OpenClipImageTower(ImageTower):
    """`model.visual` of such a model."""

    blocks: Any

    def __init__(self, model: nn.Module):
        visual = _require_clip(model).visual
        if not isinstance(visual, VisionTransformer):
            raise UnsupportedModel(
                f"SkipCLIP: the image tower must be open_clip's VisionTransformer; got {type(visual).__qualname__}."
            )
        if isinstance(visual.patch_dropout, PatchDropout):
            raise UnsupportedModel(
                "SkipCLIP: the image tower has patch dropout, which would leave cached features with random patches "
                "missing; create the model with force_patch_dropout=0."
            )
        self.visual = visual
        self.blocks = visual.transformer.resblocks
        self.image_size = tuple(visual.image_size)
        one_node = pooled = next(filter(None, map(_obstacle, self.blocks)), None)
        if visual.attn_pool is not None or visual.pool_type != "tok":
            pooled = pooled or "the tower pools over all tokens"
        self.reductions = {"one_node_a_block": one_node, "pooled_last_block": pooled}

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.visual._embeds(inputs)

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:  # noqa: D102
        return block(hidden)

    def embedding_parameters(self) -> Iterator[nn.Parameter]:  # noqa: D102
        yield from (self.visual.class_embedding, self.visual.positional_embedding)
        yield from self.visual.conv1.parameters()
        yield from self.visual.ln_pre.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:  # noqa: D102
        if self.visual.attn_pool is not None:
            yield from self.visual.attn_pool.parameters()
            if self.visual.attn_pool_contrastive is not None:
                yield from self.visual.attn_pool_contrastive.parameters()
        yield from self.visual.ln_post.parameters()
        if self.visual.proj is not None:
            yield self.visual.proj

    def upper(self, hidden: Tensor) -> Tensor:  # noqa: D102
        pooled, _ = self.visual._pool(self._run_upper(hidden))
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def _run_upper(self, hidden: Tensor) -> Tensor:
        """Hidden states behind the last block: [n, tokens, W], or [n, 1, W] of the class token alone."""
        blocks = self.upper_blocks
        if self.reductions["one_node_a_block"] is not None:
            for block in blocks:
                hidden = self.run_block(block, hidden)
            return hidden
        n, tokens, _ = hidden.shape
        rows, minimal = hidden.flatten(0, 1), self.keeps_little(hidden, KEPT)
        attend = partial(sequences, n=n, heads=self.blocks[0].attn.num_heads, mask=None)
        if not blocks or self.reductions["pooled_last_block"] is not None:
            for block in blocks:
                rows = _run(block, rows, attend, minimal=minimal)
            return rows.view_as(hidden)
        for block in blocks[:-1]:
            rows = _run(block, rows, attend, minimal=minimal)
        class_tokens = torch.arange(n, device=rows.device) * tokens
        attend = partial(pooled, heads=blocks[-1].attn.num_heads, mask=None)
        return _run(blocks[-1], rows, attend, minimal=minimal, rows=class_tokens)[:, None]


class OpenClipTextTower(TextTower):
    """The text half of such a model, over the tokens of the task's classes."""

    blocks: Any

    def __init__(self, model: nn.Module, tokens: Tensor):
        self.text, self._pool_type, self._eos_id = _text_part(_require_clip(model))
        self.blocks = self.text.transformer.resblocks
        self.tokens, self.pooled = tokens, self._pooled_positions(tokens)
        length, mask = int(self.pooled.max()) + 1, self.text.attn_mask
        crop = causal = None
        if mask is None or (mask[:length, length:] != -math.inf).any():
            length, crop = tokens.shape[1], "the attention mask lets a token see later ones"
        if mask is None or not mask.equal(torch.full_like(mask, -math.inf).triu(1)):
            causal = "the attention mask is not the causal one"
        self.tokens = tokens[:, :length].contiguous()
        one_node = next(filter(None, map(_obstacle, self.blocks)), None)
        prompts = SharedPrefix(self.tokens, self.pooled)
        alone = causal or one_node or (None if prompts.length else "the prompts begin with different tokens")
        self.prompts = prompts if alone is None else None
        self.reductions = {
            "text_crop": crop,
            "shared_prefix": alone,
            "one_node_a_block": one_node,
            "pooled_last_block": one_node,
        }

    def _pooled_positions(self, tokens: Tensor) -> Tensor:
        """Position [C] that open_clip's `text_global_pool` takes for each prompt."""
        pool_type = self._pool_type
        if pool_type == "argmax":
            return tokens.argmax(dim=-1)
        if pool_type == "eos":
            return (tokens == self._eos_id).int().argmax(dim=-1)
        if pool_type in ("first", "last"):
            return tokens.new_full((len(tokens),), 0 if pool_type == "first" else tokens.shape[1] - 1)
        raise UnsupportedModel(f"SkipCLIP: text pooling {pool_type!r} is not handled; expected one token per prompt.")

    def _mask(self, hidden: Tensor) -> Tensor | None:
        length, mask = hidden.shape[1], self.text.attn_mask
        return None if mask is None else mask[:length, :length].to(hidden)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        dtype = self.text.transformer.get_cast_dtype()
        positions = self.text.positional_embedding[: inputs.shape[1]]
        return self.text.token_embedding(inputs).to(dtype) + positions.to(dtype)

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:  # noqa: D102
        return block(hidden, attn_mask=self._mask(hidden))

    def embedding_parameters(self) -> Iterator[nn.Parameter]:  # noqa: D102
        yield from self.text.token_embedding.parameters()
        yield self.text.positional_embedding

    def head_parameters(self) -> Iterator[nn.Parameter]:  # noqa: D102
        yield from self.text.ln_final.parameters()
        if isinstance(self.text.text_projection, nn.Module):
            yield from self.text.text_projection.parameters()
        elif self.text.text_projection is not None:
            yield self.text.text_projection

    def rows(self, hidden: Tensor, class_ids: Tensor | None = None) -> Tensor:  # noqa: D102
        return hidden.flatten(0, 1) if self.prompts is None else self.prompts.rows(hidden, class_ids)

    def upper(self, rows: Tensor, class_ids: Tensor | None = None, *, of_all: bool = True) -> Tensor:  # noqa: D102
        if self.prompts is None:
            hidden = self._run_alone(rows, class_ids, of_all)
        else:
            hidden = self._run_behind_prefix(self.prompts, rows, class_ids, of_all)
        hidden = self.text.ln_final(hidden)
        projection = self.text.text_projection
        if projection is None:
            return hidden
        return projection(hidden) if isinstance(projection, nn.Module) else hidden @ projection

    def _run_alone(self, rows: Tensor, class_ids: Tensor | None, of_all: bool) -> Tensor:
        """Hidden states [K, W] of the pooled tokens behind the last block, each prompt by itself."""
        L, ends = self.tokens.shape[1], self.pooled.to(rows.device)
        hidden = rows.unflatten(0, (-1, L))
        if class_ids is not None:
            ends, hidden = ends[class_ids], hidden[class_ids] if of_all else hidden
        n = len(hidden)
        blocks, mask = self.upper_blocks, self._mask(hidden)
        at_end = torch.arange(n, device=rows.device) * L + ends
        if self.reductions["one_node_a_block"] is not None or not blocks:
            for block in blocks:
                hidden = self.run_block(block, hidden)
            return hidden.flatten(0, 1)[at_end]
        rows, minimal, heads = hidden.flatten(0, 1), self.keeps_little(hidden, KEPT), blocks[0].attn.num_heads
        for block in blocks[:-1]:
            rows = _run(block, rows, partial(sequences, n=n, heads=heads, mask=mask), minimal=minimal)
        attend = partial(pooled, heads=heads, mask=None if mask is None else mask[ends])
        return _run(blocks[-1], rows, attend, minimal=minimal, rows=at_end)

    def _run_behind_prefix(self, prompts: SharedPrefix, rows: Tensor, class_ids: Tensor | None, of_all: bool) -> Tensor:
        """Hidden states [K, W] of the pooled tokens behind the last block, the prefix computed once for all."""
        chosen = prompts.choose(rows, class_ids, of_all)
        rows = rows.index_select(0, chosen.picked)
        blocks, minimal = self.upper_blocks, self.keeps_little(rows, KEPT)
        if not blocks:
            return rows[chosen.ends]
        attend = partial(
            suffixes,
            heads=blocks[0].attn.num_heads,
            prefix=prompts.length,
            offsets=chosen.offsets,
            max_length=prompts.longest,
        )
        for block in blocks[:-1]:
            rows = _run(block, rows, attend, minimal=minimal)
        return _run(blocks[-1], rows, partial(attend, queries=chosen.ends), minimal=minimal, rows=chosen.ends)
