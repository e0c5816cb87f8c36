"""The optimizer of a run: ours, or any of torch.optim that a loop can step."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch.optim import Optimizer

from ..data import InputError
from ..optimizer import FusedSGD

FUSED = "sgd"
_TORCH_SGD = "torch-sgd"
_CANNOT = {"LBFGS": "evaluates the loss several times a step", "SparseAdam": "is for sparse gradients"}


def find(name: str) -> type[Optimizer]:
    """The class of an optimizer: "sgd" is `FusedSGD`, "torch-sgd" torch.optim's, else a class of torch.optim.

    Raises:
        InputError: If there is none, or it can't be used here.

    Example:
        >>> find("adamw")
        <class 'torch.optim.adamw.AdamW'>
    """
    if name == FUSED:
        return FusedSGD
    classes = {
        known.lower(): value
        for known, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    wanted = "sgd" if name == _TORCH_SGD else name.lower()
    if wanted not in classes:
        spelt = {known: value.__name__ for known, value in classes.items()} | {FUSED: FUSED, _TORCH_SGD: _TORCH_SGD}
        close = [spelt[known] for known in difflib.get_close_matches(wanted, spelt, 3)]
        hint = f"did you mean {' or '.join(close)}?" if close else "choose sgd, torch-sgd, or a class of torch.optim."
        raise InputError(f"--optimizer: no optimizer {name!r}; {hint}")
    found = classes[wanted]
    if found.__name__ in _CANNOT:
        raise InputError(f"--optimizer: {found.__name__} {_CANNOT[found.__name__]}, which this loop has not; use sgd.")
    return found


def make(name: str, groups: list[dict[str, Any]], *, in_backward: bool = False, **options: Any) -> Optimizer:
    """An optimizer of some parameter groups.

    Args:
        name: As for `find`.
        groups: With a learning rate each.
        in_backward: Update each weight inside backward; `FusedSGD` does that.
        options: momentum, weight_decay and the like; those that it does not have are left out.

    Raises:
        InputError: If it does not take these weights or options.
    """
    found = find(name)
    known = inspect.signature(found).parameters
    options |= {"in_backward": in_backward}
    try:
        return found(groups, **{option: value for option, value in options.items() if option in known})
    except (TypeError, ValueError) as error:
        raise InputError(f"--optimizer: {found.__name__} can't be used here: {str(error).splitlines()[0]}") from error
