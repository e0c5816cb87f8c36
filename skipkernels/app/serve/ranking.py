"""Order in which images are worth a look: unlabelled ones to label next, and training images with a doubtful label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...retrieval import top_k_logits

_SHARPNESS = 10.0  # of a vote: an image with a cosine of 1 has e¹⁰ times the vote of one with a cosine of 0
_ROWS = 1024  # images in a block of cosines


def margin_scores(best: Tensor) -> Tensor:
    """Return 1 − (p₁ − p₂) [n] for the two largest probabilities [n, 2]: 1 if two classes are equally probable.

    Source: margin sampling, Scheffer et al. 2001; Settles, "Active Learning Literature Survey", 2009, section 3.1.

    >>> margin_scores(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([1., 0.])
    """
    return 1 - (best[:, 0] - best[:, 1:].sum(dim=1))


def farthest_first(embeddings: Tensor, known: Tensor | None, count: int) -> tuple[list[int], list[float]]:
    """Choose images one by one, each the farthest from all that are known or chosen before.

    Args:
        embeddings: Unit-norm embeddings [n, D] of the images.
        known: Unit-norm embeddings [m, D] of images that are known, such as the training images. Without any, the first
            image is the one nearest to the mean of all.
        count: Number of images to choose.

    Returns:
        Positions of the images, and the distance 1 − cosine of each to the nearest that is known or chosen before, NaN
        for the first without known ones.

    Source: Gonzalez 1985; k-center greedy of Sener & Savarese, "Active Learning for Convolutional Neural Networks: A
    Core-Set Approach", ICLR 2018, arXiv 1708.00489.

    >>> e = torch.eye(3)
    >>> farthest_first(e[[0, 1, 0]], e[:1], 2)
    ([1, 0], [1.0, 0.0])
    """
    if known is None:
        nearest = torch.full((len(embeddings),), torch.nan)
        index = int((embeddings @ embeddings.mean(dim=0)).argmax())
    else:
        nearest = top_k_logits(embeddings, known, 1)[0][:, 0]
        index = int(nearest.argmin())
    chosen, distances = [], []
    for _ in range(min(count, len(embeddings))):
        chosen.append(index)
        distances.append(1 - nearest[index].clamp(max=1).item())  # a cosine is rounded to a little more than 1
        nearest = torch.fmax(nearest, embeddings @ embeddings[index])  # fmax ignores NaN
        nearest[chosen] = torch.inf
        index = int(nearest.argmin())
    return chosen, distances


def leave_one_out(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return probabilities [n, C] of the classes of labelled images, each from the labels of all others.

        p_ic ∝ mean over j ≠ i of class c of exp(10 · cos(x_i − x̄, x_j − x̄))

    An image that is the only one of its class has NaN, as nothing is known about it.

    Args:
        embeddings: Embeddings [n, D]; their mean x̄ is subtracted, as those of a CLIP are in a narrow cone.
        labels: Classes int64 [n].
        classes: Number of classes C.

    >>> e = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    >>> leave_one_out(e, torch.tensor([0, 0, 1, 1]), 2).argmax(dim=1)
    tensor([0, 0, 1, 1])
    """
    centred = F.normalize(embeddings - embeddings.mean(dim=0), dim=1)
    members = F.one_hot(labels, classes).float()  # [n, C]
    found = []
    for rows in torch.arange(len(labels)).split(_ROWS):
        votes = (_SHARPNESS * (centred[rows] @ centred.T - 1)).exp()  # [rows, n]
        votes[torch.arange(len(rows)), rows] = 0
        counts = members.sum(dim=0) - members[rows]  # [rows, C], without the image
        of_class = votes @ members / counts.clamp(min=1)
        of_class[counts.gather(1, labels[rows, None])[:, 0] == 0] = torch.nan
        found.append(of_class / of_class.sum(dim=1, keepdim=True))
    return torch.cat(found)
