"""Top-k classes of images, over chunks of classes: no [B, C] logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

_LOGITS = 1 << 22  # elements of a chunk of logits: 16 MiB in fp32, with 64 images of 65,536 classes


def top_k_logits(image: Tensor, text: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits x_b · t_c, descending, and their classes; of equal ones, the lower class first.

    Args:
        image: Scaled image embeddings [B, D].
        text: Class embeddings [C, D] of the same dtype.
        k: From 1 to C.

    Returns:
        Logits [B, k], and class ids int64 [B, k].

    >>> image, text = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    >>> top_k_logits(image, text, 2)
    (tensor([[2., 2.]]), tensor([[1, 2]]))
    """
    return _top_k(image, text, k)[:2]


def check_k(k: int, classes: int) -> None:
    """Raise a ValueError unless k is in [1, C]."""
    if not 1 <= k <= classes:
        raise ValueError(f"top_k: k must be in [1, C={classes}]; got {k}.")


def top_k_probabilities(image: Tensor, text: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest softmax_c(x_b · t_c), as `top_k_logits` does; NaN for an image with a NaN or +inf logit.

    >>> image, text = torch.tensor([[1.0]]), torch.tensor([[0.0], [torch.tensor(3.0).log()]])
    >>> top_k_probabilities(image, text, 1)
    (tensor([[0.7500]]), tensor([[1]]))
    """
    logits, class_ids, total = _top_k(image, text, k, normalized=True)
    return (logits - total[:, None]).exp(), class_ids


def _top_k(image: Tensor, text: Tensor, k: int, *, normalized: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return `top_k_logits`, and with `normalized` the log-sum-exp [B] of all logits; each logit is computed once."""
    check_k(k, len(text))
    chunk = max(_LOGITS // max(len(image), 1), k)
    logits, class_ids = image.new_empty(len(image), 0), torch.empty(len(image), 0, dtype=torch.int64)
    class_ids, totals = class_ids.to(image.device), [image.new_full((len(image),), -torch.inf)]
    for start in range(0, len(text), chunk):
        part = image @ text[start : start + chunk].T
        if normalized:
            totals.append(part.logsumexp(dim=1))
        found, positions = largest(part, k)
        del part  # before the next chunk is computed
        # The classes found so far are in front, so that a lower position is a lower class among equal logits.
        logits, class_ids = torch.cat([logits, found], dim=1), torch.cat([class_ids, start + positions], dim=1)
        logits, positions = largest(logits, k)
        class_ids = class_ids.gather(1, positions)
    return logits, class_ids, torch.stack(totals).logsumexp(dim=0)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row [B, n] (all if n < k), and their positions; among equals the lower is first."""
    n = logits.shape[1]
    if k == 1:
        return logits.max(dim=1, keepdim=True)
    values, positions = logits.topk(min(k + 1, n), dim=1)
    if k < n and bool((values[:, k - 1] == values[:, k]).any()):  # topk returns any of the equal logits
        values, positions = logits.sort(dim=1, descending=True, stable=True)
        return values[:, :k], positions[:, :k]
    positions, order = positions.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :k], positions.gather(1, order)[:, :k]
