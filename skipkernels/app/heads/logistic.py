"""Multinomial logistic regression with weights that are drawn to given ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ITERATIONS = 1000
"""Largest number of iterations, in each of the two phases."""
_CHECKED = 10  # iterations between two comparisons of the gradient with the tolerance
_LOGITS = 2**24  # logits in memory at a time
# Gradient norm for each image below which steps have no line search: it compares values, and these are equal in fp64
# while the gradient is still about 1e-8.
_SEARCHED = 1e-6
# torch.optim.LBFGS ignores pairs with a curvature below 1e-10, an absolute bound, and stops improving there.
_SCALE = 1e6


class Fit(NamedTuple):
    """Weight [C, D], bias [C], and the norm of the gradient of the objective there."""

    weight: Tensor
    bias: Tensor
    gradient: float


@torch.no_grad()
def logistic_regression(
    image: Tensor,
    labels: Tensor,
    anchor: Tensor,
    l2: float,
    *,
    tolerance: float,
    bias: bool = False,
    start: Tensor | None = None,
) -> Fit:
    """Minimise over W and b, by L-BFGS,

        Σ_i −log softmax(W x_i + b)[label_i]  +  l2/2 · |W − anchor|²

    Classes without images are part of the softmax and keep their anchor, with b = 0.

    Args:
        image: x, [n, D]; its dtype is that of the computation.
        labels: [n].
        anchor: [C, D]; zero for the usual regression.
        l2: Penalty. The bias has none.
        tolerance: Norm of the gradient at which to stop.
        bias: Fit b, else it is zero.
        start: Weight to start from. Default: the anchor.
    """
    classes, targets = labels.unique(return_inverse=True)
    others = torch.ones(len(anchor), dtype=torch.bool, device=anchor.device)
    others[classes] = False
    rows = max(1, _LOGITS // len(anchor))
    rest = torch.cat([(part @ anchor[others].T).logsumexp(dim=1) for part in image.split(rows)])  # −inf without others
    batches = list(zip(image.split(rows), targets.split(rows), rest.split(rows), strict=True))
    change = torch.zeros_like(anchor[classes]) if start is None else (start - anchor)[classes]
    shift = anchor.new_zeros(len(classes))
    parameters = [change, shift] if bias else [change]

    def objective() -> Tensor:
        """Set the gradients of `_SCALE` times the objective, and return its value."""
        loss, d_change, d_shift = l2 / 2 * change.square().sum(), l2 * change, torch.zeros_like(shift)
        weight = anchor[classes] + change
        for x, target, of_others in batches:
            logits = x @ weight.T + shift  # [rows, classes with images]
            lse = torch.logaddexp(logits.logsumexp(dim=1), of_others)
            loss = loss + (lse - logits.gather(1, target[:, None]).squeeze(1)).sum()
            residual = (logits - lse[:, None]).exp_()
            residual[torch.arange(len(x), device=x.device), target] -= 1
            d_change += residual.T @ x
            d_shift += residual.sum(dim=0)
        change.grad, shift.grad = _SCALE * d_change, _SCALE * d_shift
        return _SCALE * loss

    gradient = _minimise(objective, parameters, tolerance, searched=_SEARCHED * len(image))
    weight, offset = anchor.clone(), anchor.new_zeros(len(anchor))
    weight[classes] += change
    offset[classes] = shift
    return Fit(weight, offset, gradient)


def _minimise(objective: Callable[[], Tensor], parameters: list[Tensor], tolerance: float, searched: float) -> float:
    """Run L-BFGS with a line search down to the gradient norm `searched`, then without; return the norm at the end."""
    for line_search, goal in (("strong_wolfe", max(tolerance, searched)), (None, tolerance)):
        solver = torch.optim.LBFGS(
            parameters,
            max_iter=_CHECKED,
            tolerance_grad=0,
            tolerance_change=0,
            history_size=10,
            line_search_fn=line_search,
        )
        for _ in range(ITERATIONS // _CHECKED):
            objective()
            norms = [p.grad.norm() for p in parameters if p.grad is not None]
            gradient = torch.stack(norms).norm().item() / _SCALE
            if gradient <= goal:
                break
            solver.step(objective)
    return gradient
