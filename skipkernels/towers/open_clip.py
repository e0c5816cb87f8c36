"""open_clip's own `CLIP`: a vision transformer with a class token, a causal text transformer pooled at end-of-text."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from open_clip.model import CLIP
from open_clip.transformer import PatchDropout, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from .base import ImageTower, TextTower, UnsupportedModel


def _require_clip(model: nn.Module) -> CLIP:
    if not isinstance(model, CLIP):
        raise UnsupportedModel(
            f"SkipCLIP: model must be an open_clip CLIP; got {type(model).__module__}.{type(model).__qualname__}. "
            "Other families (CustomTextCLIP, CoCa, OpenAI's clip, Hugging Face) are not handled yet."
        )
    return model


def _pooled_last_block_obstacle(blocks: nn.ModuleList) -> str | None:
    """Why the last block cannot be run for the pooled token alone, or None."""
    block = blocks[-1]
    if type(block) is not ResidualAttentionBlock or type(block.attn) is not nn.MultiheadAttention:
        return f"the last block is a {type(block).__name__}, not open_clip's ResidualAttentionBlock"
    if block.attn.dropout > 0:
        return "the last block has attention dropout"
    if block._forward_hooks or block._forward_pre_hooks or block.attn._forward_hooks or block.attn._forward_pre_hooks:
        return "the last block has forward hooks, which expect every token"
    return None


class OpenClipImageTower(ImageTower):
    """`model.visual` of an open_clip CLIP."""

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
        obstacle = _pooled_last_block_obstacle(self.blocks)
        if visual.attn_pool is not None or visual.pool_type != "tok":
            obstacle = "the tower pools over all tokens"
        self.reductions = {"pooled_last_block": obstacle}

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
        blocks = list(self.blocks[self.skip :])
        pool_last = blocks and self.reductions["pooled_last_block"] is None
        for block in blocks[:-1] if pool_last else blocks:
            hidden = self.run_block(block, hidden)
        if pool_last:
            class_token = hidden.new_zeros(len(hidden), dtype=torch.int64)
            hidden = _pooled_block(blocks[-1], hidden, class_token, mask=None)[:, None]
        pooled, _ = self.visual._pool(hidden)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


class OpenClipTextTower(TextTower):
    """The text half of an open_clip CLIP, over the tokens of the task's classes."""

    def __init__(self, model: nn.Module, tokens: Tensor):
        self.model = _require_clip(model)
        self.blocks = self.model.transformer.resblocks
        self.tokens, self.pooled = tokens, self._pooled_positions(tokens)
        length, crop_obstacle = int(self.pooled.max()) + 1, None
        mask = self.model.attn_mask
        if mask is None or (mask[:length, length:] != -math.inf).any():
            length, crop_obstacle = tokens.shape[1], "the attention mask lets a token see later ones"
        self.tokens = tokens[:, :length].contiguous()
        self.reductions = {
            "text_crop": crop_obstacle,
            "pooled_last_block": _pooled_last_block_obstacle(self.blocks),
        }

    def _pooled_positions(self, tokens: Tensor) -> Tensor:
        """Position [C] that open_clip's `text_global_pool` takes for each prompt."""
        pool_type = self.model.text_pool_type
        if pool_type == "argmax":
            return tokens.argmax(dim=-1)
        if pool_type == "eos":
            return (tokens == self.model.text_eos_id).int().argmax(dim=-1)
        if pool_type in ("first", "last"):
            return tokens.new_full((len(tokens),), 0 if pool_type == "first" else tokens.shape[1] - 1)
        raise UnsupportedModel(f"SkipCLIP: text pooling {pool_type!r} is not handled; expected one token per prompt.")

    def _mask(self, hidden: Tensor) -> Tensor | None:
        length, mask = hidden.shape[1], self.model.attn_mask
        return None if mask is None else mask[:length, :length].to(hidden)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        dtype = self.model.transformer.get_cast_dtype()
        positions = self.model.positional_embedding[: inputs.shape[1]]
        return self.model.token_embedding(inputs).to(dtype) + positions.to(dtype)

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:  # noqa: D102
        return block(hidden, attn_mask=self._mask(hidden))

    def embedding_parameters(self) -> Iterator[nn.Parameter]:  # noqa: D102
        yield from self.model.token_embedding.parameters()
        yield self.model.positional_embedding

    def head_parameters(self) -> Iterator[nn.Parameter]:  # noqa: D102
        yield from self.model.ln_final.parameters()
        if isinstance(self.model.text_projection, nn.Module):
            yield from self.model.text_projection.parameters()
        elif self.model.text_projection is not None:
            yield self.model.text_projection

    def upper(self, hidden: Tensor, class_ids: Tensor | None = None) -> Tensor:  # noqa: D102
        pooled = self.pooled.to(hidden.device)
        pooled = pooled if class_ids is None else pooled[class_ids]
        blocks = list(self.blocks[self.skip :])
        pool_last = blocks and self.reductions["pooled_last_block"] is None
        for block in blocks[:-1] if pool_last else blocks:
            hidden = self.run_block(block, hidden)
        if pool_last:
            mask = self._mask(hidden)
            hidden = _pooled_block(blocks[-1], hidden, pooled, None if mask is None else mask[pooled])
        else:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), pooled]
        hidden = self.model.ln_final(hidden)
        projection = self.model.text_projection
        if projection is None:
            return hidden
        return projection(hidden) if isinstance(projection, nn.Module) else hidden @ projection


def _pooled_block(block: ResidualAttentionBlock, hidden: Tensor, pooled: Tensor, mask: Tensor | None) -> Tensor:
    """A pre-norm residual attention block for one token of each sequence alone.

    Every token gives a key and a value; only the pooled one has a query, an output projection and an MLP, since
    nothing else of the last block reaches the output.

    Args:
        block: An open_clip `ResidualAttentionBlock`.
        hidden: [n, tokens, W].
        pooled: [n] int64, the position that is pooled.
        mask: [n, tokens], added to the attention logits: 0 where a key is seen, −inf where not. None: all are.

    Returns:
        [n, W]: the block's output at that position.
    """
    attention = block.attn
    n, tokens, width = hidden.shape
    heads = attention.num_heads
    rows = torch.arange(n, device=hidden.device)
    normed = block.ln_1(hidden)
    query_weight, key_value_weight = attention.in_proj_weight.split([width, 2 * width])
    query_bias, key_value_bias = attention.in_proj_bias.split([width, 2 * width])
    query = nn.functional.linear(normed[rows, pooled], query_weight, query_bias).view(n, heads, 1, -1)
    key_value = nn.functional.linear(normed, key_value_weight, key_value_bias).view(n, tokens, 2, heads, -1)
    key, value = key_value.permute(2, 0, 3, 1, 4)
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=None if mask is None else mask[:, None, None]
    )
    output = hidden[rows, pooled] + block.ls_1(attention.out_proj(mixed.reshape(n, width)))
    return output + block.ls_2(block.mlp(block.ln_2(output)))
