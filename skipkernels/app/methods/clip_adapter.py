"""CLIP-Adapter: a small network on the embeddings of the frozen image tower."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...options import Protocol
from ..data import InputError, Task
from ..heads import AffineHead, Head
from .base import Recipe, StepOutput, Tokenizer
from .coop import CoOp
from .frozen import FrozenModel


def adapted(image: Tensor, down: Tensor, up: Tensor, ratio: Tensor | float) -> Tensor:
    """Adapted embeddings x' [B, D] of image embeddings x [B, D]; see `CLIPAdapter`."""
    return ratio * F.relu(F.linear(F.relu(F.linear(image, down)), up)) + (1 - ratio) * image


class AdapterHead(AffineHead):
    """`AffineHead` on adapted embeddings."""

    def __init__(self, head: Head, down: Tensor, up: Tensor, ratio: float):
        super().__init__(head)
        for name, tensor in {"down": down.detach(), "up": up.detach(), "ratio": torch.tensor(ratio)}.items():
            self.register_buffer(name, tensor)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits and the adapted embeddings."""
        return super().forward(adapted(image, self.down, self.up, self.ratio))  # type: ignore[arg-type]


class CLIPAdapter(FrozenModel):
    """CLIP-Adapter (Gao et al. 2021) with its image adapter.

        a(x) = relu(W_up · relu(W_down · x));   x' = ratio · a(x) + (1 − ratio) · x
        z_bc = exp(logit_scale) · ⟨x'_b/|x'_b|, t̂_c⟩

    x is the image embedding before normalisation. Only W_down [D/reduction, D] and W_up [D, D/reduction] train; the
    class embeddings t̂ are frozen and computed once. W_up is random before training, so the logits are then not those
    of zero-shot. It trains like 16-shot CoOp for any number of shots: 200 epochs, SGD at 0.002, batches of 32.

    Source: Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters", 2021, arXiv 2110.04544.
    """

    name = "clip-adapter"
    takes_head = False  # the exports of heads classify the embeddings of the model, without the adapter
    head_code = f"""hidden = F.relu(image @ head["down"].T)
image = head["ratio"] * F.relu(hidden @ head["up"].T) + (1 - head["ratio"]) * image
{AffineHead.CODE}"""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        task: Task,
        *,
        reduction: int = 4,
        ratio: float = 0.2,
        generator: torch.Generator | None = None,
    ):
        super().__init__(model, tokenizer, task, generator=generator)
        embedding = self._empty_embedding()
        width = len(embedding)
        if not 1 <= reduction <= width:
            raise InputError(
                f"{self.name}: reduction must be from 1 to the embedding's width {width}; got {reduction}."
            )
        if not 0 <= ratio <= 1:
            raise InputError(f"{self.name}: ratio must be from 0 to 1; got {ratio}.")
        self.ratio = ratio
        self.down = self._initial(embedding, width // reduction, width)
        self.up = self._initial(embedding, width, width // reduction)

    @cached_property
    def _text(self) -> Tensor:
        """Unit-norm class embeddings [C, D] of the training classes."""
        return self._embedded(self._test_tokens(self._train_test)[0])

    def _initial(self, embedding: Tensor, width_out: int, width_in: int) -> nn.Parameter:
        """Return a weight [width_out, width_in], initialised like that of `nn.Linear`."""
        bound = width_in**-0.5
        weight = torch.empty(width_out, width_in, device=self._generator.device)
        return nn.Parameter(weight.uniform_(-bound, bound, generator=self._generator).to(embedding))

    @classmethod
    def _published(cls, protocol: Protocol, shots: int) -> Recipe:
        return replace(CoOp._published("few-shot", 16), text_lr=None, image_lr=2e-3)

    def embed(self, inputs: Tensor) -> Tensor:
        """Adapted embeddings x' [B, D] of images or embeddings."""
        return adapted(self.encode_frozen(inputs).to(self.down.dtype), self.down, self.up, self.ratio)

    def step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """Compute the loss of a batch over all classes."""
        return self._cross_entropy_step(self.embed(inputs), self._text, labels)

    def head(self) -> nn.Module:  # noqa: D102
        text, scale = self.class_embeddings(self._train_test).float(), self.model.logit_scale.detach().float().exp()
        return AdapterHead(Head.of_text(text, scale), self.down.float(), self.up.float(), self.ratio)

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return the adapter, with `image_lr`."""
        return [{"name": "image", "params": [self.down, self.up], "lr": image_lr}]

    def _tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}
