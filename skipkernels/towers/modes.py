"""Training and evaluation mode of modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# Attributes in which modules of PyTorch, timm, open_clip and transformers hold their dropout rate. A rate under another
# name makes SkipCLIP's comparison with the model fail: the module then drops other values in each of the two passes.
_DROPOUT_RATES = ("p", "prob", "drop_prob", "dropout", "attention_dropout", "activation_dropout", "layerdrop")


@contextlib.contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set evaluation mode for modules and their submodules."""
    with _in_mode([module for part in modules for module in part.modules()], False):
        yield


@contextlib.contextmanager
def deterministic_training(model: nn.Module) -> Iterator[None]:
    """Set training mode, except for batch norms and modules that drop values at random."""
    modules = list(model.modules())
    dropping = set(filter(_drops, modules))
    frozen = [m for m in modules if m in dropping or isinstance(m, _NormBase) or not dropping.isdisjoint(m.children())]
    others = set(modules) - set(frozen)
    with _in_mode(frozen, False), _in_mode(others, True):
        yield


def updates_statistics(module: nn.Module) -> bool:
    """Return True if the module contains a batch norm in training mode."""
    return any(isinstance(part, _NormBase) and part.training for part in module.modules())


def _drops(module: nn.Module) -> bool:
    rates = (getattr(module, name, None) for name in _DROPOUT_RATES)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@contextlib.contextmanager
def _in_mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    changed = [module for module in modules if module.training != training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training
