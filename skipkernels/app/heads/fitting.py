"""Choice of the penalty and fit of a head by its name, as a run has it."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from torch import Tensor

from ...options import HeadChoice
from .anchored import anchored_l2, anchored_probe, linear_probe, probe_l2
from .gaussian import gaussian_head, with_text
from .head import Head, balanced


class Examples(NamedTuple):
    """Training images and their classes, as a model embeds them."""

    image: Tensor  # [n, D], of any norm
    labels: Tensor  # [n]
    text: Tensor  # [C, D], unit norm
    scale: float  # exponential of `logit_scale`


def choose_l2(name: HeadChoice | None, frozen: Examples) -> float:
    """Choose the penalty of a head, on embeddings of the model before tuning; 0 for a head without one."""
    image, labels, text, scale = frozen
    if name == "anchored":
        return anchored_l2(image, labels, text, scale)
    return probe_l2(image, labels, len(text), scale) if name == "probe" else 0.0


def fit_head(name: HeadChoice | None, examples: Examples, l2: float, *, equal_priors: bool = False) -> Head | None:
    """Fit a head by its name; None for "none". `equal_priors`: as `balanced`."""
    image, labels, text, scale = examples
    if name == "none":
        return None
    with warnings.catch_warnings():
        # A probe warns that its gradient is above the tolerance, of which the remedy is a larger penalty: it is chosen.
        warnings.filterwarnings("ignore", "(anchored|linear)_probe: ", UserWarning)
        if name == "anchored":
            head = anchored_probe(image, labels, text, scale, l2)
        elif name == "probe":
            head = linear_probe(image, labels, len(text), scale, l2)
        elif name == "gaussian":
            head = gaussian_head(image, labels, len(text))
        else:
            raise ValueError(f"fit_head: name must be none, anchored, gaussian or probe; got {name!r}.")
    head = balanced(head, labels) if equal_priors else head
    return with_text(head, image, labels, text, scale) if name == "gaussian" else head
