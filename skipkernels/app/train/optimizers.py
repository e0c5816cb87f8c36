"""Optimizers by name: `FusedSGD`, or a class of `torch.optim`."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch.optim import Optimizer

from ...formatting import first_line
from ...optimizer import FusedSGD
from .errors import argument_error

FUSED = "sgd"
_TORCH_SGD = "torch-sgd"
_UNSUPPORTED = {"LBFGS": "evaluates the loss several times per step", "SparseAdam": "needs sparse gradients"}


def find(name: str) -> type[Optimizer]:
    """Return an optimizer class: "sgd" is `FusedSGD`, "torch-sgd" is `torch.optim.SGD`, else a class of `torch.optim`.

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
    key = "sgd" if name == _TORCH_SGD else name.lower()
    if key not in classes:
        spelled = {known: value.__name__ for known, value in classes.items()} | {FUSED: FUSED, _TORCH_SGD: _TORCH_SGD}
        close = [spelled[known] for known in difflib.get_close_matches(key, spelled, 3)]
        hint = f"did you mean {' or '.join(close)}?" if close else "choose sgd, torch-sgd, or a class of torch.optim."
        raise argument_error("optimizer", f"no optimizer {name!r}; {hint}")
    found = classes[key]
    if found.__name__ in _UNSUPPORTED:
        reason = f"{found.__name__} {_UNSUPPORTED[found.__name__]}, which is not supported; use sgd."
        raise argument_error("optimizer", reason)
    return found


def build(name: str, groups: list[dict[str, Any]], *, in_backward: bool = False, **options: Any) -> Optimizer:
    """Construct an optimizer by its name; options that its class does not have are left out."""
    found = find(name)
    known = inspect.signature(found).parameters
    options |= {"in_backward": in_backward}
    try:
        return found(groups, **{option: value for option, value in options.items() if option in known})
    except (TypeError, ValueError) as error:
        raise argument_error("optimizer", f"{found.__name__} can't be used here: {first_line(error)}") from error
