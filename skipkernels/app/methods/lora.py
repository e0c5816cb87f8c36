"""CLIP-LoRA: low-rank updates of the attention weights of both towers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from ...options import Protocol
from ..data import InputError, Task
from .base import Method, Recipe, StepOutput, Tokenizer, at_least_fp32, text_transformer

_STEPS_PER_SHOT = 500
_BATCH = 32


class LoRA(Method):
    """CLIP-LoRA (Zanella & Ben Ayed 2024): low-rank updates of q, k and v in all attention layers of both towers.

        q = x W_qᵀ + b_q + alpha/√rank · dropout(x) A_qᵀ B_qᵀ,   and k and v likewise
        loss = mean over b of −log softmax_c(exp(logit_scale) · ⟨x̂_b, t̂_c⟩)[label_b],   c over all classes

    Only A [rank, W] and B [W, rank] train. B is initialised to zero, so before training the logits are those of
    zero-shot; A is uniform in ±1/√W. The scale is that of the published code. Dropout uses PyTorch's global generator.
    Trains with AdamW at 2e-4 in batches of 32, for 500 steps per shot, rounded up to whole epochs.

    Both towers must be open_clip's transformers. Attention modules are replaced by modules that share their weights:
    the `state_dict` of the model keeps its keys, and gains those of A and B.

    Source: Zanella & Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models", CVPR workshops 2024, arXiv
    2405.18541.

    Example:
        >>> LoRA.recipe("ViT-B-16", "few-shot", shots=16, classes=100).epochs  # 8000 steps, 50 per epoch
        160
    """

    name = "lora"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        task: Task,
        *,
        rank: int = 2,
        alpha: float = 1.0,
        dropout: float = 0.25,
        generator: torch.Generator | None = None,
    ):
        if rank < 1:
            raise InputError(f"{self.name}: rank must be at least 1; got {rank}.")
        if not 0 <= dropout < 1:
            raise InputError(f"{self.name}: dropout must be from 0 to below 1; got {dropout}.")
        towers = {"text": text_transformer(self.name, model), "image": model.visual}
        blocks_of = {side: self._blocks(side, tower) for side, tower in towers.items()}
        super().__init__(model, tokenizer, task, generator=generator)
        model.requires_grad_(False)
        self._groups: dict[str, list[nn.Parameter]] = {}
        for side, blocks in blocks_of.items():
            for block in blocks:
                block.attn = LowRankAttention(block.attn, rank, alpha / math.sqrt(rank), dropout, self._generator)
            self._groups[side] = [p for block in blocks for p in (block.attn.down, block.attn.up)]

    def _blocks(self, side: str, tower: Any) -> list[Any]:
        """Return the blocks of a tower, or raise an InputError if they are not supported."""
        supported = side == "text" or isinstance(tower, VisionTransformer)
        blocks = list(tower.transformer.resblocks) if supported else []
        others = [block for block in blocks if not _is_plain(block)]
        if blocks and not others:
            return blocks
        found = (others[0], getattr(others[0], "attn", None)) if others else (tower,)
        got = " with ".join(type(part).__name__ for part in found)
        raise InputError(
            f"{self.name}: the {side} tower of model must be open_clip's transformer, with a plain "
            f"nn.MultiheadAttention in each block; got {got}. Create the model again, or use another."
        )

    @classmethod
    def _published(cls, protocol: Protocol, shots: int, classes: int) -> Recipe:
        return Recipe(
            epochs=math.ceil(_STEPS_PER_SHOT * shots / math.ceil(shots * classes / _BATCH)),
            batch_size=_BATCH,
            optimizer="adamw",
            text_lr=2e-4,
            image_lr=2e-4,
            weight_decay=1e-2,
            warmup_epochs=0,
            warmup_lr=0.0,
            sampler="random",
        )

    def step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """Compute the loss of images [B, 3, H, W] over all classes."""
        return self._cross_entropy_step(self.embed(inputs), self._encoded_texts(), labels)

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return A and B of each tower, with its learning rate."""
        rates = {"text": text_lr, "image": image_lr}
        return [{"name": side, "params": params, "lr": rates[side]} for side, params in self._groups.items()]

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{part}": getattr(module, part)
            for name, module in self.model.named_modules()
            if isinstance(module, LowRankAttention)
            for part in ("down", "up")
        }


def _is_plain(block: Any) -> bool:
    attention = getattr(block, "attn", None)
    return (
        type(attention) is nn.MultiheadAttention
        and attention.batch_first
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and attention.dropout == 0
    )


class LowRankAttention(nn.Module):
    """Self-attention with a low-rank update of q, k and v, in place of an `nn.MultiheadAttention`, with its weights.

    `nn.MultiheadAttention` packs W_q, W_k and W_v into one `in_proj_weight` and calls no module for them, so nothing
    can be inserted around a projection; a weight W + B A would not allow dropout on the input of A alone. Dropout is
    drawn separately for q, k and v, as in the published code.
    """

    def __init__(
        self,
        attention: nn.MultiheadAttention,
        rank: int,
        scale: float,
        dropout: float,
        generator: torch.Generator,
    ):
        super().__init__()
        weight, width = attention.in_proj_weight, attention.embed_dim
        self.in_proj_weight, self.in_proj_bias = weight, attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.heads, self.scale = attention.num_heads, scale
        first = torch.empty(3, rank, width, device=generator.device)
        bound = width**-0.5
        nn.init.uniform_(first, -bound, bound, generator=generator)
        self.down = nn.Parameter(first.to(weight.device, at_least_fp32(weight.dtype)))  # A of q, k and v, [3, rank, W]
        self.up = nn.Parameter(self.down.new_zeros(3, width, rank))  # B of q, k and v, [3, W, rank]
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Compute attention of `query`, [B, N, W] → ([B, N, W], None), with the signature that open_clip calls."""
        B, N, W = query.shape
        dropped = self.dropout(query.expand(3, B, N, W)).flatten(1, 2)
        update = dropped @ self.down.mT.to(query.dtype) @ self.up.mT.to(query.dtype)  # [3, B · N, W]
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias).view(B, N, 3, W)
        packed = packed + self.scale * update.view(3, B, N, W).permute(1, 2, 0, 3)
        q, k, v = packed.view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.dtype)
            attn_mask = attn_mask.view(B, self.heads, N, N) if attn_mask.ndim == 3 else attn_mask
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(attended.transpose(1, 2).reshape(B, N, W)), None
