"""A linear probe: logistic regression on frozen image embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Protocol, Task
from ...tuner.methods.base import FrozenModel, Recipe, Tokenizer

_ITERATIONS = 1000
_COARSE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # decimal exponents of the penalties that are tried first
_FINEST = 1 / 8  # of a decade
_WITHOUT_SWEEP = 1 / 0.316  # of the example in CLIP's repository, where no class has an image to hold out
_HELD_OUT = 4  # of so many images one


class LinearProbe(FrozenModel):
    """A linear probe (Radford et al. 2021): multinomial logistic regression on frozen image embeddings.

        min over W, b of  Σ_i −log softmax(W x_i + b)[label_i]  +  l2/2 · |W|²

    by L-BFGS, at most 1000 iterations, begun at zero. x is the image embedding as it is, of any length. l2 is chosen as
    the paper does: 1e-6, 1e-4, …, 1e6 on images held out, then the interval around the best is halved until it is an
    eighth of a decade. A quarter of each class's training images is held out, where it has two or more; among equal
    accuracies the lower loss decides. With l2 chosen, it is fitted to all images. Where no class has two, l2 is 3.16.

    It knows no texts, so it has no logits for classes that it was not trained on. A test whose classes are all among
    those by name, such as another domain, gets the logits of these. What is kept of an image is its embedding. Before
    `fit` all logits are zero.

    The paper takes what is before the projection of a vision transformer; this takes the embedding, as the example in
    CLIP's repository and CoOp's comparison do.

    Args:
        model: An open_clip model, of which nothing changes.
        tokenizer: Its tokenizer.
        task: What it is fitted to.
        generator: Of which images are held out.

    Attributes:
        weight: [C, D].
        bias: [C].
        l2: [], the penalty that was chosen.

    Raises:
        InputError: If it is no model of open_clip.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv
    2103.00020, appendix A.3.

    Example:
        >>> LinearProbe.recipe("ViT-B-16", "few-shot", shots=16).optimizer
        'lbfgs'
    """

    name = "linear-probe"

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        super().__init__(model, tokenizer, task, keep_embeddings=True, generator=generator)
        like, tuned = self._like_an_embedding(), task.tests[0].classes
        self.weight, self.bias = like.new_zeros(len(tuned), len(like)), like.new_zeros(len(tuned))
        self.l2 = like.new_tensor(_WITHOUT_SWEEP)
        rows = {name: row for row, name in enumerate(tuned)}
        self._rows: dict[str, list[int] | None] = {
            test.name: list(range(len(tuned)))
            if test.classes == tuned
            else [rows[name] for name in test.classes]
            if rows.keys() >= set(test.classes)
            else None
            for test in task.tests
        }

    @classmethod
    def _published(cls, protocol: Protocol, shots: int, classes: int) -> Recipe:
        return Recipe(epochs=0, optimizer="lbfgs")

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Choose l2 and fit, in fp64, to embeddings [n, D] of all training images with labels [n]."""
        image, labels = self.frozen_embedding(inputs).double(), labels.to(self.weight.device)
        held_out = self._held_out(labels)
        if held_out.any():
            l2 = self._choose(image[~held_out], labels[~held_out], image[held_out], labels[held_out])
        else:
            l2 = _WITHOUT_SWEEP
            self.notes.append(
                f"{self.name}: no class has two training images, one of which could choose l2; it is {l2:.2f}."
            )
        weight, bias = logistic_regression(image, labels, len(self.bias), l2)
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.l2.fill_(l2)

    def _held_out(self, labels: Tensor) -> Tensor:
        """Which images [n] choose l2."""
        held_out = torch.zeros_like(labels, dtype=torch.bool)
        for label in labels.unique():
            images = (labels == label).nonzero().squeeze(1)
            count = max(1, len(images) // _HELD_OUT) if len(images) > 1 else 0
            order = torch.randperm(len(images), generator=self._generator, device=self._generator.device)
            held_out[images[order[:count].to(images.device)]] = True
        return held_out

    def _choose(self, image: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor) -> float:
        """The penalty whose fit to the one part does best on the other."""
        tried: dict[float, tuple[float, float]] = {}

        def best(exponents: tuple[float, ...]) -> float:
            for exponent in exponents:
                if exponent not in tried and _COARSE[0] <= exponent <= _COARSE[-1]:
                    weight, bias = logistic_regression(image, labels, len(self.bias), 10**exponent)
                    logits = held_out @ weight.T + bias
                    right = (logits.argmax(dim=1) == held_out_labels).double().mean()
                    tried[exponent] = right.item(), -F.cross_entropy(logits, held_out_labels).item()
            return max(tried, key=lambda exponent: tried[exponent])

        around, width = best(_COARSE), _COARSE[1] - _COARSE[0]
        while width > _FINEST:
            width /= 2
            around = best((around - width, around + width))
        return 10**around

    @torch.no_grad()
    def logits(self, test: str, inputs: Tensor) -> Tensor | None:
        """W x + b [B, C] of the classes of a test; None if it was not trained on all of them."""
        self._of(test)
        rows = self._rows[test]
        if rows is None:
            return None
        image = self.frozen_embedding(inputs)
        with torch.autocast(image.device.type, enabled=False):
            return (image.to(self.weight.dtype) @ self.weight.T + self.bias)[:, rows]

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """None: it is fitted."""
        return []

    def _tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias, "l2": self.l2}


def logistic_regression(image: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] that minimise Σ cross-entropy + l2/2 · |weight|²; the bias is free.

    The same problem as that of scikit-learn's LogisticRegression with C = 1/l2.

    Args:
        image: [n, D], fp64 to find the minimum beyond 1e-4; autocast leaves that as it is.
        labels: int64 [n].
        classes: C.
        l2: Above 0.

    Example:
        >>> image = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        >>> weight, bias = logistic_regression(image, torch.tensor([0, 1]), classes=2, l2=1.0)
        >>> [round(w, 4) for w in weight.flatten().tolist()]
        [0.5213, -0.5213]
    """
    weight, bias = image.new_zeros(classes, image.shape[1]), image.new_zeros(classes)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    # Divided by n, so that the tolerances mean the same for any number of images. scipy's L-BFGS keeps ten steps too.
    solver = torch.optim.LBFGS(
        parameters,
        max_iter=_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(image @ weight.T + bias, labels) + l2 / (2 * len(image)) * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return weight.detach(), bias.detach()
