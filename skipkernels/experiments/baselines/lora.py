"""CLIP-LoRA: low-rank changes of the attention of both towers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from ...data import InputError, Protocol, Task
from ...tuner.methods.base import Method, Recipe, StepOutput, Tokenizer, compare, text_transformer, unit_norm, wide

_STEPS_A_SHOT = 500
_BATCH = 32


class LoRA(Method):
    """CLIP-LoRA (Zanella & Ben Ayed 2024): q, k and v of every attention of both towers get a part of low rank.

        q = x W_qᵀ + b_q + alpha/√rank · dropout(x) A_qᵀ B_qᵀ,   and k and v likewise
        loss = mean over b of −log softmax_c(exp(logit_scale) · ⟨x̂_b, t̂_c⟩)[label_b],   c over all classes

    Only A [rank, W] and B [W, rank] train. B begins at zero, so before training the logits are those of zero-shot; A
    is uniform in ±1/√W. The scale is that of the published code. Dropout takes PyTorch's own random numbers.

    Trains with AdamW at 2e-4 for 500 steps a shot, batches of 32; as epochs, rounded up.

    Args:
        model: An open_clip `CLIP`, or a `CustomTextCLIP` with open_clip's own text transformer, with open_clip's own
            vision transformer. Its weights stop training, and the modules of its attention are replaced by ones that
            share their weights: the keys of its `state_dict` stay, and those of A and B come to them.
        tokenizer: Its tokenizer.
        task: What it is tuned to.
        rank: Of the change.
        alpha: Numerator of its scale.
        dropout: Of its input, in training.
        generator: Of the first A.

    Raises:
        InputError: If the model has another attention, or a number is out of its range.

    Source: Zanella & Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models", CVPR workshops 2024, arXiv
    2405.18541.

    Example:
        >>> LoRA.recipe("ViT-B-16", "few-shot", shots=16, classes=100).epochs  # 8000 steps of 50 an epoch
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
        blocks = {side: self._blocks(side, tower) for side, tower in towers.items()}
        super().__init__(model, tokenizer, task, generator=generator)
        model.requires_grad_(False)
        self._groups: dict[str, list[nn.Parameter]] = {}
        for side, of_tower in blocks.items():
            for block in of_tower:
                block.attn = LowRankAttention(block.attn, rank, alpha / math.sqrt(rank), dropout, self._generator)
            self._groups[side] = [p for block in of_tower for p in (block.attn.down, block.attn.up)]

    def _blocks(self, side: str, tower: Any) -> list[Any]:
        """The blocks of a tower, all of a kind that is known here."""
        own = side == "text" or isinstance(tower, VisionTransformer)
        blocks = list(tower.transformer.resblocks) if own else []
        other = [block for block in blocks if not _is_plain(block)]
        if blocks and not other:
            return blocks
        found = (other[0], getattr(other[0], "attn", None)) if other else (tower,)
        got = " with ".join(type(part).__name__ for part in found)
        raise InputError(
            f"{self.name}: the {side} tower of model must be open_clip's own transformer, with nn.MultiheadAttention "
            f"in each block that is adapted once; got {got}. Make the model anew, or use another."
        )

    @classmethod
    def _published(cls, protocol: Protocol, shots: int, classes: int) -> Recipe:
        return Recipe(
            epochs=math.ceil(_STEPS_A_SHOT * shots / math.ceil(shots * classes / _BATCH)),
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
        """The loss of images [B, 3, H, W] over all classes."""
        text = self.encode_texts(self._of(self._tuned)[0])
        return compare(self.embed(inputs), unit_norm(text), labels, self.model.logit_scale)

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """A and B of each tower, at its own learning rate."""
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
    """Self-attention with a part of low rank in its q, k and v, in the place of an `nn.MultiheadAttention`.

    That packs W_q, W_k and W_v into one `in_proj_weight` and never calls a module for them, so nothing can be put
    before or behind a projection; and a weight W + B A, computed anew in each call, would leave no place for the
    dropout of what A alone sees. So this computes the projections itself and leaves the rest to PyTorch's attention.

    Args:
        attention: Whose weights it shares, under the same names.
        rank: Of the change.
        scale: Of the change.
        dropout: Of its input, drawn for q, k and v apart, as in the published code.
        generator: Of the first `down`.

    Attributes:
        down: [3, rank, W], A of q, k and v.
        up: [3, W, rank], B.
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
        self.down = nn.Parameter(first.to(weight.device, wide(weight.dtype)))
        self.up = nn.Parameter(self.down.new_zeros(3, width, rank))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """As open_clip's block calls it, [B, N, W] → ([B, N, W], None); key and value are the query.

        Args:
            query: [B, N, W].
            key: The same tensor.
            value: The same tensor.
            need_weights: Not heeded: the second result is None.
            attn_mask: Added to the scores: [N, N], or [B · heads, N, N].
        """
        B, N, W = query.shape
        dropped = self.dropout(query.expand(3, B, N, W)).flatten(1, 2)
        change = dropped @ self.down.mT.to(query.dtype) @ self.up.mT.to(query.dtype)  # [3, B · N, W]
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias).view(B, N, 3, W)
        packed = packed + self.scale * change.view(3, B, N, W).permute(1, 2, 0, 3)
        q, k, v = packed.view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.dtype)
            attn_mask = attn_mask.view(B, self.heads, N, N) if attn_mask.ndim == 3 else attn_mask
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(attended.transpose(1, 2).reshape(B, N, W)), None
