"""An affine classifier of embeddings, as a value and as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_shape
from ...dtypes import without_autocast
from .checks import check_labels


@dataclass(frozen=True)
class Head:
    """Affine classifier of embeddings.

        z_bc = ⟨weight_c, x_b/|x_b|⟩ + bias_c,   or ⟨weight_c, x_b⟩ + bias_c if not `normalized`

    Attributes:
        weight: [C, D].
        bias: [C]; −inf for a class that is never predicted.
        scale: [], the factor of text embeddings that become rows of `weight`. None: the head uses no texts, so that it
            has no logits for classes without images.
        normalized: It was fitted to embeddings of unit norm.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    normalized: bool = True

    @classmethod
    def of_text(cls, text: Tensor, scale: float | Tensor) -> Head:
        """Return the zero-shot head of unit-norm class embeddings [C, D]: weight = scale · text, without bias."""
        return cls(scale * text, text.new_zeros(len(text)), text.new_tensor(float(scale)))

    def logits(self, image: Tensor) -> Tensor:
        """Logits [B, C] of embeddings [B, D] of any norm."""
        with without_autocast(image.device):  # bf16 logits at a scale of 100 are half a unit apart
            image = image.to(self.weight.dtype)
            return (F.normalize(image, dim=-1) if self.normalized else image) @ self.weight.T + self.bias

    @property
    def code(self) -> str:
        """Code that computes `logits` with the tensors `head` of the head, for a model card."""
        image = "F.normalize(image, dim=-1)" if self.normalized else "image"
        return f'logits = {image} @ head["weight"].T + head["bias"]'

    def with_new_classes(self, text: Tensor) -> Head:
        """Append classes with the unit-norm text embeddings [C', D]: their logits are the zero-shot ones."""
        if self.scale is None:
            raise ValueError("Head.with_new_classes: this head uses no texts. Use an anchored probe, or `with_text`.")
        check_shape("Head.with_new_classes", "text", text, ("weight", self.weight), C=None, D=self.weight.shape[1])
        new = Head.of_text(text.to(self.weight), self.scale)
        return replace(self, weight=torch.cat([self.weight, new.weight]), bias=torch.cat([self.bias, new.bias]))

    def of_classes(self, names: Sequence[str], known: Sequence[str], text: Callable[[], Tensor]) -> Head | None:
        """Return the head for classes by their names, of which some may be `known`, those of this head.

        The others get the zero-shot logits of `text`, the embeddings [C, D] of all; None if this head uses no texts.
        Names may repeat if both lists are equal.

        >>> head = Head(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 4.0]))
        >>> head.of_classes(["fox", "cat"], ["cat", "fox"], lambda: torch.ones(2, 1)).bias.tolist()
        [4.0, 3.0]
        >>> head.of_classes(["fox", "owl"], ["cat", "fox"], lambda: torch.ones(2, 1)) is None
        True
        """
        if list(names) == list(known):
            return self
        places, whole = {name: place for place, name in enumerate(known)}, self
        if not set(names) <= places.keys():
            if self.scale is None:
                return None
            whole = self.with_new_classes(text())
        rows = [places.get(name, len(known) + place) for place, name in enumerate(names)]
        return replace(whole, weight=whole.weight[rows], bias=whole.bias[rows])

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, as for safetensors."""
        tensors = {"weight": self.weight, "bias": self.bias, "scale": self.scale}
        tensors |= {} if self.normalized else {"normalized": torch.tensor(False)}
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Head:
        """Make a head of what `tensors` returned."""
        normalized = bool(tensors.get("normalized", True))
        return cls(tensors["weight"], tensors["bias"], tensors.get("scale"), normalized)


def cosine_logits(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Logits [B, C] of images over classes, computed as in `SkipCLIP.predict`.

        z_bc = exp(logit_scale) · ⟨x_b/|x_b|, t_c⟩

    `image` x [B, D] may have any norm; `text` t [C, D] has unit norm; `logit_scale`, [] or [1], gets no gradient.
    """
    with without_autocast(image.device):  # bf16 logits at a scale of 100 are half a unit apart
        return logit_scale.detach().exp().to(text.dtype) * F.normalize(image.to(text.dtype), dim=-1) @ text.T


class AffineHead(nn.Module):
    """A head as a module of an export: embeddings x [B, D] of any norm → logits [B, C] of `Head`, and x/|x|, [B, D]."""

    def __init__(self, head: Head):
        super().__init__()
        self.normalized = head.normalized
        self.register_buffer("weight", head.weight.float())
        self.register_buffer("bias", head.bias.float())

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits and the embeddings."""
        embedding = F.normalize(image, dim=-1)
        logits = F.linear(embedding if self.normalized else image, self.weight, self.bias)  # type: ignore[arg-type]
        return logits, embedding


def balanced(head: Head, labels: Tensor) -> Head:
    """Subtract from each bias the logarithm of the number n_c of training images, for classes with equal priors.

        bias_c ← bias_c − log n_c + mean log n

    over the classes with images; others keep their bias. With equal counts nothing changes. A Gaussian head is balanced
    before `with_text`, which rescales its logits.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314, equation 9, τ = 1.
    """
    check_labels("balanced", labels, len(head.bias))
    counts = torch.bincount(labels, minlength=len(head.bias)).to(head.bias)
    known, bias = counts > 0, head.bias.clone()
    log_counts = counts[known].log()
    bias[known] -= log_counts - log_counts.mean()
    return replace(head, bias=bias)
