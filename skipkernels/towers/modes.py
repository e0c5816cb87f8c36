"""Evaluation and training mode for a while, and every module's own mode back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# Where modules of PyTorch, timm, open_clip and transformers keep how often they drop something in training.
_CHANCES = ("p", "prob", "drop_prob", "dropout", "attention_dropout", "activation_dropout", "layerdrop")


@contextlib.contextmanager
def evaluating(modules: Iterable[nn.Module], *, except_for: nn.Module | None = None) -> Iterator[None]:
    """Evaluation mode for modules and all in them, but for one."""
    with _in_mode([module for part in modules for module in part.modules() if module is not except_for], False):
        yield


@contextlib.contextmanager
def training_without_chance(model: nn.Module) -> Iterator[None]:
    """Training mode, but for what then draws at random and for batch norms, which would count what they see."""
    changes = [m for m in model.modules() if _drops(m) or any(map(_drops, m.children())) or isinstance(m, _NormBase)]
    still = set(changes)
    with _in_mode(changes, False), _in_mode([m for m in model.modules() if m not in still], True):
        yield


def counts(module: nn.Module) -> bool:
    """Whether a batch norm in it, in training mode, keeps statistics of what it sees."""
    return any(isinstance(part, _NormBase) and part.training for part in module.modules())


def _drops(module: nn.Module) -> bool:
    chances = (getattr(module, name, None) for name in _CHANCES)
    return any(isinstance(chance, float) and chance > 0 for chance in chances)


@contextlib.contextmanager
def _in_mode(modules: list[nn.Module], training: bool) -> Iterator[None]:
    others = [module for module in modules if module.training != training]
    for module in others:
        module.training = training
    try:
        yield
    finally:
        for module in others:
            module.training = not training
