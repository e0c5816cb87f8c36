"""Classifiers on embeddings of images: closed form or convex, fitted without a training step.

Each is a `Head`, logits = weight · x/|x| + bias. They know nothing of models and files:

    >>> import torch
    >>> from skipkernels.app import heads
    >>> image, labels, text = torch.eye(4)[[0, 0, 1, 1]] + 0.1, torch.tensor([0, 0, 1, 1]), torch.eye(4)[1:]
    >>> head = heads.anchored_probe(image, labels, text, scale=10.0, l2=0.1)
    >>> head.logits(image).argmax(dim=1).tolist()  # the third class has no image, and keeps its text
    [0, 0, 1, 1]
"""

from .anchored import CANDIDATES, anchored_l2, anchored_probe, halves, linear_probe, probe_l2, ranks
from .fitting import Examples, choose_l2, fit_head
from .gaussian import gaussian_head, with_text
from .head import AffineHead, Head, balanced, cosine_logits

__all__ = [
    "CANDIDATES",
    "AffineHead",
    "Examples",
    "Head",
    "anchored_l2",
    "anchored_probe",
    "balanced",
    "choose_l2",
    "cosine_logits",
    "fit_head",
    "gaussian_head",
    "halves",
    "linear_probe",
    "probe_l2",
    "ranks",
    "with_text",
]
