"""A linear probe: logistic regression on frozen image embeddings."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dtypes import in_accumulation_dtype, wide_dtype
from ..heads import Head
from ..heads.logistic import logistic_regression
from .frozen import FrozenModel

_TOLERANCE = 1e-6  # norm of the gradient for each image
_COARSE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # decimal exponents of the penalties of the first sweep
_FINEST = 1 / 8  # last step of the search, in decades
_WITHOUT_SWEEP = 1 / 0.316  # from the example in CLIP's repository; used if no image can be held out
_HELD_OUT = 4  # one image in four is held out


class LinearProbe(FrozenModel):
    """A linear probe (Radford et al. 2021): multinomial logistic regression on frozen image embeddings.

        min over W, b of  Σ_i −log softmax(W x_i + b)[label_i]  +  l2/2 · |W|²

    by L-BFGS, at most 1000 iterations from zero. x is the image embedding without normalisation. l2 is chosen by the
    accuracy on held-out images, a quarter of each class with two or more, as in the paper: first among 1e-6, 1e-4, …,
    1e6, then in steps around the best that are halved down to an eighth of a decade; of equal accuracies, by the lower
    loss. The final fit uses all images. If no class has two images, l2 is 3.16.

    The probe uses no texts, so it has no logits for classes that it was not trained on. A test with trained class names
    only, such as one of another domain, uses their logits. Before `fit` the texts classify. The paper uses the
    features before the projection; this class uses the embedding, as do the example in CLIP's repository and CoOp's
    comparison.

    Source: Radford et al., CLIP, ICML 2021, arXiv 2103.00020, appendix A.3.
    """

    name = "linear-probe"
    takes_head = False

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Choose l2 and fit, in fp64 if possible, to embeddings [n, D] of all training images with labels [n]."""
        embeddings, classes = self.encode_frozen(inputs), self.task.tests[0].classes
        image, labels = in_accumulation_dtype(embeddings), labels.to(embeddings.device)
        is_held_out = self._held_out(labels)
        if is_held_out.any():
            l2 = _choose(image, labels, is_held_out, len(classes))
        else:
            l2 = _WITHOUT_SWEEP
            self.notes.append(
                f"{self.name}: no class has two training images, so none is held out to choose l2; it is {l2:.2f}."
            )
        weight, bias = (part.to(wide_dtype(embeddings.dtype)) for part in _fit(image, labels, len(classes), l2))
        self.use_head(Head(weight, bias, normalized=False), classes)

    def _held_out(self, labels: Tensor) -> Tensor:
        """Mask [n] of the held-out images."""
        is_held_out = torch.zeros_like(labels, dtype=torch.bool)
        for label in labels.unique():
            images = (labels == label).nonzero().squeeze(1)
            count = max(1, len(images) // _HELD_OUT) if len(images) > 1 else 0
            order = torch.randperm(len(images), generator=self._generator, device=self._generator.device)
            is_held_out[images[order[:count].to(images.device)]] = True
        return is_held_out


def _choose(image: Tensor, labels: Tensor, is_held_out: Tensor, classes: int) -> float:
    """Choose l2 by the accuracy on the held-out images, a mask [n], of fits to the others; see `LinearProbe`."""
    train, train_labels = image[~is_held_out], labels[~is_held_out]
    held_out, held_out_labels = image[is_held_out], labels[is_held_out]

    @functools.cache
    def score(exponent: float) -> tuple[float, float]:
        """Accuracy with l2 = 10^exponent, and minus the loss."""
        weight, bias = _fit(train, train_labels, classes, 10**exponent)
        logits = held_out @ weight.T + bias
        accuracy = in_accumulation_dtype(logits.argmax(dim=1) == held_out_labels).mean()
        return accuracy.item(), -F.cross_entropy(logits, held_out_labels).item()

    best, width = max(_COARSE, key=score), _COARSE[1] - _COARSE[0]
    while width > _FINEST:
        width /= 2
        beside = (exponent for exponent in (best - width, best + width) if _COARSE[0] <= exponent <= _COARSE[-1])
        best = max(best, *beside, key=score)
    return 10**best


def _fit(image: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] of `LinearProbe`; the problem of scikit-learn's LogisticRegression with C = 1/l2."""
    anchor = image.new_zeros(classes, image.shape[1])
    return logistic_regression(image, labels, anchor, l2, bias=True, tolerance=_TOLERANCE * len(image))[:2]
