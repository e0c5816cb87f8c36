"""Alterations of a block that its fused forward would not follow: hooks, adapters, replaced methods, other children.

Each step asks for each block above the cut, so `why_altered` reads dictionaries in place of attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch
from torch.nn.utils import parametrize

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OBSERVERS = ("torch.", "transformers.utils.output_capturing")
_GLOBAL_HOOKS = [getattr(modules_of_torch, f"_global{name}") for name in HOOKS]

# ---- what a block must have ------------------------------------------------------------------------------------------


class Child(NamedTuple):
    """A submodule that a block must have."""

    parent: str  # path of the module that has it
    name: str
    forwards: Mapping[type, Any]  # allowed types, each with the `forward` of its package


Submodules = Mapping[str, Child]  # by path; parents come first


def submodules(types: Mapping[str, tuple[type, ...]]) -> Submodules:
    """Make a table of submodules from their allowed types by path; a family makes its tables once, at import."""
    found: dict[str, Child] = {}
    for path, allowed in types.items():
        parent, _, name = path.rpartition(".")
        found[path] = Child(parent, name, {kind: original_method(kind, "forward") for kind in allowed})
    return found


def original_method(kind: type, method: str) -> Any:
    """Return a method of a class as its package defines it, or None if another package has replaced it."""
    function, home = getattr(kind, method), _definer(kind, method).__module__
    module = getattr(function, "__globals__", {}).get("__name__", "")  # a wrapper may have any `__module__`
    return function if module.partition(".")[0] == home.partition(".")[0] else None


def _definer(kind: type, method: str) -> type:
    return next(base for base in kind.__mro__ if method in vars(base))


# ---- what was altered ------------------------------------------------------------------------------------------------


def why_altered(block: Any, own: type, methods: Mapping[str, Any], children: Submodules) -> str | None:
    """Return which part of a block of the class `own` was altered, or None."""
    if global_hooks():
        return "global module hooks are registered, so each block runs its own forward"
    if "attention" in vars(block):
        return "attention() of a block was replaced"
    for name, method in methods.items():
        if getattr(own, name) is not method:
            return _why_replaced(own, name)
    modules: dict[str, Any] = {"": block}
    for path, child in children.items():
        module = modules[child.parent]._modules.get(child.name)
        if module is None:
            return f"the submodules of a block differ from those of a {own.__name__}"
        reason = _why_child(module, path, child)
        if reason is not None:
            return reason
        modules[path] = module
    if _has_other_children(modules.values()):
        return f"the submodules of a block differ from those of a {own.__name__}"
    return "the weights of a block have more than one dtype" if _have_dtypes(modules.values()) else None


def changing_hooks(module: Any) -> list[Any]:
    """Hooks of a module that may change values, or expect an ordinary input."""
    return [hook for hooks in map(vars(module).get, HOOKS) if hooks for hook in _changing(hooks)]


def global_hooks() -> list[Any]:
    """Hooks of all modules that may change values."""
    return [hook for hooks in _GLOBAL_HOOKS if hooks for hook in _changing(hooks)]


def _changing(hooks: Mapping[int, Any]) -> list[Any]:
    """Hooks that may change values, or expect an ordinary input.

    Those of FSDP2, of PyTorch's tools such as `FlopCounterMode`, and those that transformers leaves on a model after a
    call with `output_hidden_states`, only observe, and take any structure of tensors.
    """
    return [hook for hook in hooks.values() if not str(getattr(hook, "__module__", "")).startswith(_OBSERVERS)]


def _why_child(module: Any, path: str, child: Child) -> str | None:
    """Return why a submodule is not what the fused block computes, or None."""
    attributes, kind = module.__dict__, type(module)
    if kind not in child.forwards:
        kind = parametrize.type_before_parametrizations(module)
        reason = _why_parametrized(module, kind, path, child)
        if reason is not None:
            return reason
    if kind.forward is not child.forwards[kind]:
        return _why_replaced(kind, "forward")
    if (  # `HOOKS`, written out: this runs for each module of each block in each step
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        return "a module of a block has hooks"
    if "forward" in attributes:
        return f"forward() of a {type(module).__name__} of a block was replaced"
    for name, x in attributes["_parameters"].items():
        if x is None:
            if name == "weight":
                return "a norm of a block has no weight"
        elif type(x) not in (nn.Parameter, Tensor) and not hasattr(x, "placements"):  # FSDP2 shards whole ones
            return f"a weight of a block is a {type(x).__name__}"
    return None


def _why_parametrized(module: nn.Module, kind: type, path: str, child: Child) -> str | None:
    """Return why a module is not one of the allowed types with low-rank updates, or None."""
    if kind not in child.forwards:
        package = type(module).__module__.partition(".")[0]
        return f"a block has a {type(module).__name__} of {package} for its {path}"
    from .low_rank import low_rank_updates  # few models have any

    return None if low_rank_updates(module) else f"a {type(module).__name__} of a block was altered"


def _why_replaced(kind: type, method: str) -> str:
    return f"{method}() of the class {_definer(kind, method).__name__} was replaced"


def _has_other_children(modules: Iterable[Any]) -> bool:
    """Return True if one of these modules has a child that is none of them; low-rank updates are known."""
    known = set(modules)
    return any(
        child not in known and name != "parametrizations" for module in known for name, child in module._modules.items()
    )


def _have_dtypes(modules: Iterable[Any]) -> bool:
    """Return True if the matrices of these modules have more than one dtype."""
    weights = (x for module in modules for name, x in module._parameters.items() if name != "bias" and x is not None)
    return len({x.dtype for x in weights if x.ndim == 2}) > 1
