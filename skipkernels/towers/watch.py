"""Changes of modules and tensors that computed something that is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..digests import digests
from .alterations import changing_hooks, global_hooks
from .base import Part
from .block import FusedBlock

_NOT_SETTINGS = {
    *vars(nn.Module()),  # parameters, buffers, hooks and children, which are compared apart, and the training mode
    *("in_features", "out_features", "normalized_shape", "elementwise_affine"),  # follow from the shapes of parameters
}


class Watch:
    """Detects changes of modules and tensors that computed something that is kept.

        method     looks at                                                   called
        compare    contents of tensors, and settings of modules               at switches of the mode
        is_stale   identities, versions, dtypes; compares if these changed    in each step

    Values that change back are valid again. Before the start nothing is kept, and nothing is stale.

    Args:
        parts: Returns the modules and parameters, as they are now.
    """

    def __init__(self, parts: Callable[[], Sequence[Part]]):
        self._parts = parts
        self.started = False
        self._stale = False  # the result of the last comparison
        # Contents and settings at the start
        self._digests: list[int | None] = []
        self._settings: list[Any] = []

    def start(self) -> None:
        """Begin, with the modules and tensors of now; also anew."""
        self.started, self._stale = True, False
        self._record()
        self._digests, self._settings = self._digest(), self._read_settings()

    def stop(self) -> None:
        """Nothing is kept any more."""
        self.started = False

    def _record(self) -> None:
        """Record identities of modules, and identities and versions of tensors."""
        self._recorded = parts = list(self._parts())
        self._modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
        # The dictionaries in which modules hold their children, each with what it held
        self._children = [(m._modules, list(m._modules.values())) for m in self._modules if m._modules]
        # Those in which they hold tensors; and all tensors in this order, with their versions and dtypes
        self._held = [tensors for m in self._modules for tensors in (m._parameters, m._buffers) if tensors]
        self._tensors = [(x, x._version, x.dtype) for x in self._current()]

    def _current(self) -> Iterator[Tensor]:
        """Yield the tensors of now."""
        for tensors in self._held:
            yield from (x for x in tensors.values() if x is not None)
        yield from (part for part in self._recorded if isinstance(part, nn.Parameter))

    def _touched(self) -> bool:
        """Return True if a module or tensor was replaced, or a tensor written, since the last comparison."""
        parts = self._parts()
        if len(parts) != len(self._recorded) or any(x is not y for x, y in zip(parts, self._recorded, strict=True)):
            return True
        if any(list(children.values()) != recorded for children, recorded in self._children):
            return True
        now = list(self._current())
        return len(now) != len(self._tensors) or any(
            x is not seen or x._version != version or x.dtype != dtype
            for x, (seen, version, dtype) in zip(now, self._tensors, strict=True)
        )

    def is_stale(self) -> bool:
        """Return True if the kept values were computed with other tensors, as far as versions show."""
        if not self.started:
            return False
        return self.compare() if self._touched() else self._stale

    def compare(self) -> bool:
        """Return True if contents or settings differ from those at the start, and remember it for `is_stale`."""
        if not self.started:
            return False
        self._record()
        digests_now = self._digest()
        values_differ = len(digests_now) != len(self._digests) or any(
            now != then for now, then in zip(digests_now, self._digests, strict=True) if None not in (now, then)
        )
        try:
            settings_differ = self._read_settings() != self._settings
        except (RuntimeError, ValueError):  # arrays or tensors within an attribute have no truth value
            settings_differ = True
        self._stale = values_differ or settings_differ
        return self._stale

    def is_comparable(self) -> bool:
        """Return False if contents and settings do not determine the result: with hooks, or shards of FSDP2."""
        hooked = any(map(changing_hooks, self._modules))
        return not (hooked or global_hooks() or self._is_sharded())

    def _is_sharded(self) -> bool:
        return any(getattr(module, "_is_fsdp_managed_module", False) for module in self._modules)

    def _digest(self) -> list[int | None]:
        """Digest of each tensor; None of those that FSDP2 manages, which frees the whole weights."""
        if self._is_sharded():
            return [None] * len(self._tensors)
        return list(digests(x.detach() for x, *_ in self._tensors))

    def _read_settings(self) -> list[Any]:
        """Types, children, hooks, replaced methods and other attributes of the modules."""
        return [global_hooks(), *map(_settings_of, self._modules)]


def _settings_of(module: nn.Module) -> list[Any]:
    attributes = vars(module)
    # Of a fused block also if FSDP2 has put its class in front
    kind: Any = module.caller_class if isinstance(module, FusedBlock) else type(module)
    replaced = [name for name in ("forward", "attention") if name in attributes]
    # Copied: PEFT changes its dictionaries of scales in place.
    others = {
        name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for name, value in attributes.items()
        if name not in _NOT_SETTINGS and not isinstance(value, Tensor)
    }
    return [kind, kind.forward, dict(module._modules), changing_hooks(module), replaced, others]
