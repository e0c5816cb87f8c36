"""CLIP-Adapter: a small network on the embeddings of the frozen image tower."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dtypes import wide_dtype
from ..data import Task
from ..heads import AffineHead, Head
from .base import StepOutput, Tokenizer
from .coop import CoOp
from .frozen import FrozenModel
from .recipe import Recipe, TrainingData

_REDUCTION, _RATIO = 4, 0.2


def adapted(image: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Adapted embeddings x' [B, D] of image embeddings x [B, D]; see `CLIPAdapter`."""
    return _RATIO * F.relu(F.linear(F.relu(F.linear(image, down)), up)) + (1 - _RATIO) * image


class AdapterHead(AffineHead):
    """`AffineHead` on adapted embeddings."""

    def __init__(self, head: Head, down: Tensor, up: Tensor):
        super().__init__(head)
        self.register_buffer("down", down.detach().float())
        self.register_buffer("up", up.detach().float())

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits and the adapted embeddings."""
        return super().forward(adapted(image, self.down, self.up))  # type: ignore[arg-type]


class CLIPAdapter(FrozenModel):
    """CLIP-Adapter (Gao et al. 2021) with its image adapter.

        a(x) = relu(W_up · relu(W_down · x));   x' = 0.2 · a(x) + 0.8 · x
        z_bc = exp(logit_scale) · ⟨x'_b/|x'_b|, t̂_c⟩

    x is the image embedding before normalisation. Only W_down [D/4, D] and W_up [D, D/4] train; the
    class embeddings t̂ are frozen and computed once. W_up is random before training, so the logits are then not those
    of zero-shot. It trains like 16-shot CoOp for any number of shots: 200 epochs, SGD at 0.002, batches of 32.

    Source: Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters", 2021, arXiv 2110.04544.
    """

    name = "clip-adapter"
    takes_head = False  # the exports of heads classify the embeddings of the model, without the adapter

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        super().__init__(model, tokenizer, task, generator=generator)
        with torch.no_grad():
            first = self.model.encode_text(self._tokens[self._train_test][0][:1], normalize=False)
        embedding = first[0].to(wide_dtype(first.dtype))
        width = len(embedding)
        self.down = self._initial(embedding, width // _REDUCTION, width)
        self.up = self._initial(embedding, width, width // _REDUCTION)

    @cached_property
    def _text(self) -> Tensor:
        """Unit-norm class embeddings [C, D] of the training classes."""
        return self._embedded(self._tokens[self._train_test][0])

    def _initial(self, embedding: Tensor, width_out: int, width_in: int) -> nn.Parameter:
        """Return a weight [width_out, width_in], initialised like that of `nn.Linear`."""
        bound = width_in**-0.5
        weight = torch.empty(width_out, width_in, device=self._generator.device)
        return nn.Parameter(weight.uniform_(-bound, bound, generator=self._generator).to(embedding))

    @classmethod
    def _published(cls, data: TrainingData) -> Recipe:
        return replace(CoOp._published(TrainingData()), text_lr=None, image_lr=2e-3)

    def embed(self, inputs: Tensor) -> Tensor:
        """Adapted embeddings x' [B, D] of images or embeddings."""
        return adapted(self.encode_frozen(inputs).to(self.down.dtype), self.down, self.up)

    def step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """Compute the loss of a batch over all classes."""
        return self._cross_entropy_step(self.embed(inputs), self._text, labels)

    def head(self) -> nn.Module:  # noqa: D102
        return AdapterHead(self._trained_head(), self.down, self.up)

    @property
    def head_code(self) -> str:  # noqa: D102
        return f"""hidden = F.relu(image @ head["down"].T)
image = {_RATIO} * F.relu(hidden @ head["up"].T) + {1 - _RATIO} * image
{self._trained_head().code}"""

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return the adapter, with `image_lr`."""
        return [{"name": "image", "params": [self.down, self.up], "lr": image_lr}]

    def _tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}
