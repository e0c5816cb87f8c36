"""CoOp: a learned context in front of each class name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from ...dtypes import wide_dtype
from ..data import InputError, Task
from .base import Tokenizer
from .frozen import FrozenModel
from .recipe import Recipe, TrainingData


class CoOp(FrozenModel):
    """Context Optimization (Zhou et al. 2022), with the unified context and the class token at the end.

        prompt of c = [start, v_1, …, v_M, name of c, ".", end];   t_c = text tower(prompt of c)
        loss = mean over b of −log softmax_c(exp(logit_scale) · ⟨x̂_b, t̂_c⟩)[label_b],   c over all classes

    Only the context vectors v [M, W] train, in place of the embeddings of M placeholder tokens after start-of-text;
    both towers are frozen. All tests use the same context. Templates are not used. v is initialised from N(0, 0.02²),
    so the logits before training are not those of zero-shot.

    M is `vectors`, 16 as published. If the longest prompt of any test would exceed the context length L of the model, M
    is the largest number that fits, L − 2 − (number of tokens of the longest name and its full stop), with a note in
    `notes`.

    Trains with SGD at 0.002. Few-shot takes 200 epochs for 8 or more shots, 100 for 2 to 7, and 50 for one; the other
    protocols take 50, as on ImageNet and in later base-to-new comparisons.

    The other arguments are those of `Method` and `FrozenModel`; the text tower must be open_clip's text transformer.

    Source: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134.
    """

    name = "coop"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        task: Task,
        *,
        vectors: int = 16,
        generator: torch.Generator | None = None,
    ):
        self._text = _text_tower(model)
        super().__init__(model, tokenizer, task, generator=generator)
        names = [name for test in task.tests for name in test.classes]
        tokens = tokenizer([f"{name}." for name in names])  # [n, L]
        count = self._count_that_fits(vectors, names, tokens)
        device = next(model.parameters()).device
        prompts = _with_placeholders(tokens, count).to(device).split([len(test.classes) for test in task.tests])
        self._tokens = {test.name: [part] for test, part in zip(task.tests, prompts, strict=True)}  # not of templates
        embedding = self._text.token_embedding.weight
        initial = torch.empty(count, embedding.shape[1], device=self._generator.device)
        nn.init.normal_(initial, std=0.02, generator=self._generator)
        self.context = nn.Parameter(initial.to(device, wide_dtype(embedding.dtype)))  # v, [M, W]
        model.requires_grad_(False)

    def _count_that_fits(self, vectors: int, names: list[str], tokens: Tensor) -> int:
        """Return the number of context vectors, at most `vectors`, that fit in front of each name."""
        ends = self._ends(tokens)
        last_end, length = int(ends.max()), tokens.shape[1]
        count = min(vectors, length - 1 - last_end)
        longest_name = names[int(ends.argmax())]
        if count < 1:
            raise InputError(
                f"{self.name}: no context fits beside the class name {longest_name!r}, which takes all {length} tokens "
                "that the model has. Use shorter names, or another method."
            )
        if count < vectors:
            self.notes.append(
                f"{self.name}: {count} context vectors in place of {vectors}: with {longest_name!r} the prompt would "
                f"have {last_end + 1 + vectors} tokens, and the model takes {length}."
            )
        return count

    def _ends(self, tokens: Tensor) -> Tensor:
        """Position of the end-of-text token, which the model pools, in each prompt, [n]."""
        if self._text.pool == "argmax":
            return tokens.argmax(dim=1)
        if self._text.pool == "eos":
            return (tokens == self._text.eos_id).int().argmax(dim=1)
        raise InputError(
            f"{self.name}: the text tower of model must pool the end-of-text token; that of this "
            f"{type(self.model).__name__} pools {self._text.pool!r}. Use another model, or another method."
        )

    @classmethod
    def _published(cls, data: TrainingData) -> Recipe:
        few_shot = 200 if data.shots >= 8 else 100 if data.shots >= 2 else 50
        return Recipe(
            epochs=few_shot if data.protocol == "few-shot" else 50,
            batch_size=32,
            optimizer="sgd",
            text_lr=2e-3,
            momentum=0.9,
            weight_decay=5e-4,
            warmup_epochs=1,
            warmup_lr=1e-5,
            sampler="random",
        )

    @property
    def head_code(self) -> str:  # noqa: D102
        return self._trained_head().code

    def train(self, training: bool) -> None:
        """Forget the embeddings of classes, which depend on the context."""
        self._embeddings.clear()

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Text embeddings [n, D] of any norm, of prompts with the context.

        A hook on the token embedding inserts the context, so that pooling, mask and dtypes are those of the model.
        """
        handle = self._text.token_embedding.register_forward_hook(self._insert_context)
        try:
            return super().encode_texts(tokens)
        finally:
            handle.remove()

    def _insert_context(self, module: nn.Module, args: tuple[Tensor], embedded: Tensor) -> Tensor:
        """Embeddings [n, L, W] with the context after the start-of-text token."""
        context = self.context.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat([embedded[:, :1], context, embedded[:, 1 + len(self.context) :]], dim=1)

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return the context, with `text_lr`."""
        return [{"name": "text", "params": [self.context], "lr": text_lr}]

    def _tensors(self) -> dict[str, Tensor]:
        return {"context": self.context}


def _with_placeholders(tokens: Tensor, count: int) -> Tensor:
    """Insert placeholders after the start-of-text token of prompts [n, L], which stay as long.

    They have any id but padding and end-of-text, which set the mask and the pooled position: that of the next token.
    """
    return torch.cat([tokens[:, :1], tokens[:, 1:2].expand(-1, count), tokens[:, 1 : tokens.shape[1] - count]], dim=1)


class _TextTower(NamedTuple):
    """Parts of the text tower of an open_clip model."""

    token_embedding: nn.Embedding
    pool: str  # position of the token that is pooled
    eos_id: Any  # id of the end-of-text token, for the position "eos"


def _text_tower(model: Any) -> _TextTower:
    """Return the text tower of a model, or raise an InputError."""
    if isinstance(model, CLIP):
        return _TextTower(model.token_embedding, model.text_pool_type, getattr(model, "text_eos_id", None))
    text = getattr(model, "text", None)
    if isinstance(model, CustomTextCLIP) and isinstance(text, TextTransformer):
        pool = text.pool_type if text.cls_emb is None else "cls_emb"
        return _TextTower(text.token_embedding, pool, getattr(text, "eos_id", None))
    got = type(model).__name__ if text is None else f"{type(model).__name__} with a {type(text).__name__}"
    raise InputError(
        f"coop: model must be an open_clip CLIP, or a CustomTextCLIP with a TextTransformer; got {got}. Use another "
        "model, or another method."
    )
