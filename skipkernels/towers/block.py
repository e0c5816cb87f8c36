"""The caller's block as a fused block: `block.__class__` becomes a subclass of its own class with another `forward`.

Parameters, their names, `state_dict`, `isinstance` and hooks stay. `forward` reads weights and settings from the
block's children at each call. If a child is not what the fused path knows (an adapter, a quantised layer, a hook, a
method that was replaced on its class), the block runs the forward of its own class.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch
from torch.nn.utils import parametrize

from ..checks import warn_caller
from ..options import FusedMemory
from .attention import Sequences
from .families import BLOCKS, type_name
from .fused.records import BlockSettings, BlockWeights, Hidden, Rotary, RowsOptions

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(modules_of_torch, f"_global{name}") for name in HOOKS]


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


class BlockInput(NamedTuple):
    """Ordinary input of a block: sequences of equal length."""

    hidden: Tensor  # [n, tokens, W]
    mask: Tensor | None = None  # added to the logits, [1 or n, 1 or H, tokens, tokens]
    causal: bool = False
    rotary: Rotary | None = None


class FusedBlock:
    """Base of the classes of fused blocks. A subclass knows one family of blocks, by its methods `_submodules` to
    `_output`.

    A fused class comes before the caller's class in the order of bases: underscores keep its names apart from those of
    the caller's attributes and methods, and other files of the package read them.
    """

    linear_weights: Sequence[str]  # paths of query, key, value, W_o, W_fc and W_p; packed ones three times
    _modules: dict[str, Any]  # of nn.Module
    # Set by `_fused_class`:
    _own: ClassVar[type]  # the caller's class
    _methods: ClassVar[Mapping[str, Any]]  # its methods that this class replaces, as its package defines them
    _memory: ClassVar[FusedMemory]  # saved for backward of a call with its ordinary input

    def _submodules(self) -> Submodules:
        """Return the submodules that this block must have."""
        raise NotImplementedError

    def _why_settings(self) -> str | None:
        """Return why the settings of this block can't be fused, or None."""
        return None

    def _read(self) -> tuple[BlockWeights, BlockSettings]:
        """Read weights and settings from the children."""
        raise NotImplementedError

    def _parse_input(self, *args: Any, **kwargs: Any) -> BlockInput | None:
        """Name the arguments of the block's own forward, or return None if only that forward takes them."""
        raise NotImplementedError

    def _example(self, draw: Callable[..., Tensor], width: int) -> tuple[Any, ...] | None:
        """Return arguments of a small call, of tensors `draw(*shape)`; None if its own forward takes no fp32."""
        return (draw(2, 3, width),)

    def _output(self, hidden: Tensor) -> Tensor:
        """Return hidden states [n, tokens, W] as the block's own forward does."""
        return hidden

    # ---- running -----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # reads Python objects that a compiler would guard on, and holds an autograd graph
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on its ordinary input, or `block(hidden, options)` on rows.

        Both are calls of the module: hooks on it run, such as those by which FSDP2 gathers its weights.
        """
        if args and isinstance(args[0], Hidden):
            return self._run_fused(*args)
        given = self._fusable_input(*args, **kwargs)
        if given is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden, mask, causal, rotary = given
        options = RowsOptions(Sequences(len(hidden), mask, causal), self._memory, rotary)
        out = self._run_fused(Hidden(hidden.flatten(0, 1)), options)
        return self._output(out.sum().view(hidden.shape))

    def _fusable_input(self, *args: Any, **kwargs: Any) -> BlockInput | None:
        """Name the arguments of a call, or return None if the block runs its own forward."""
        if _is_transformed():
            return None
        reason = self.why_not_fused()
        if reason is not None:
            warn_caller(
                f"skipkernels: a block is not fused ({reason}). It runs its own forward: the result is the same, "
                "but takes more time and memory."
            )
            return None
        given = self._parse_input(*args, **kwargs)
        if (
            given is not None and given.mask is not None and given.mask.requires_grad
        ):  # a mask gets no gradient if fused
            return None
        return given

    def _run_fused(self, hidden: Hidden, options: RowsOptions) -> Hidden:
        """Run the block on rows [R, W]."""
        from .fused.node import fused_block  # not at the head: an import of skipkernels.clip loads few modules

        return fused_block(*self._read(), hidden, options)

    # ---- checks, in each call ----------------------------------------------------------------------------------------

    def why_not_fused(self) -> str | None:
        """Return why this block runs its own forward now, or None."""
        if global_hooks():
            return "global module hooks are registered, so each block runs its own forward"
        block: Any = self
        if "attention" in vars(block):
            return "attention() of a block was replaced"
        for name, method in self._methods.items():
            if getattr(self._own, name) is not method:
                return _why_replaced(self._own, name)
        modules: dict[str, Any] = {"": block}
        for path, child in self._submodules().items():
            module = modules[child.parent]._modules.get(child.name)
            if module is None:
                return f"the submodules of a block differ from those of a {self._own.__name__}"
            reason = _why_child(module, path, child)
            if reason is not None:
                return reason
            modules[path] = module
        if _has_other_children(modules.values()):
            return f"the submodules of a block differ from those of a {self._own.__name__}"
        matrices = (
            x for m in modules.values() for name, x in m._parameters.items() if name != "bias" and x is not None
        )
        if len({x.dtype for x in matrices if x.ndim == 2}) > 1:
            return "the weights of a block have more than one dtype"
        return self._why_settings()

    def why_no_rows(self) -> str | None:
        """Return why this block has to be called with its ordinary input, or None if it takes rows.

        A block that takes rows is fused. One with hooks of its own is fused without rows: they expect ordinary input.
        """
        block: Any = self
        if "forward" in vars(block):
            return "forward() of a block was replaced"
        if any(hooks and _changing(hooks) for hooks in map(vars(block).get, HOOKS)):
            return "a block has hooks"
        if getattr(block, "gradient_checkpointing", False):
            return "a block has gradient checkpointing of transformers"
        return self.why_not_fused()

    # ---- copies ------------------------------------------------------------------------------------------------------

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "torch.jit.script: a fused block cannot be scripted. Call skipkernels.unfuse(model) first, or script a "
            "copy: copy.deepcopy(model) has the model's own classes."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the caller's class: a fused class is made at run time, and cannot be imported."""
        rebuild = copyreg._reconstructor  # type: ignore[attr-defined]
        return rebuild, (self._own, object, None), *super().__reduce_ex__(2)[2:]


# ---- reading of weights and settings, for families ------------------------------------------------------------------


def weights_of(name: str, layer: Any, scale: Tensor | None = None) -> dict[str, Any]:
    """Weight and bias of a layer, as the fields `name` and `name_bias` of `BlockWeights`.

    They are multiplied by the layer scale [W] that follows the layer, if there is one. They are attributes, as the
    layer reads them: a bias may be a parameter, a buffer, or a view of a flat parameter.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)  # RMSNorm has none
    if scale is not None:
        weight, bias = scale[:, None] * weight, None if bias is None else scale * bias
    return {name: weight, f"{name}_bias": bias}


def joint_weights_of(name: str, *layers: Any) -> dict[str, Any]:
    """Weights and biases of layers side by side, as these fields; zeros for a bias that one of them lacks."""
    weights, biases = tuple(layer.weight for layer in layers), [getattr(layer, "bias", None) for layer in layers]
    if all(bias is None for bias in biases):
        return {name: weights, f"{name}_bias": None}
    filled = (w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True))
    return {name: weights, f"{name}_bias": tuple(filled)}


def layer_scale(module: Any) -> Tensor | None:
    """Factors [W] of a module that scales a branch; None for an identity."""
    return None if module is None or isinstance(module, nn.Identity) else module.gamma


def activation(module: nn.Module, names: Mapping[type, str]) -> str:
    """Name of an activation in `functional.mlp_activation`; `names` by type, if its options do not change it."""
    if getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    kind = type(module)
    if kind not in names and kind.__name__ == "QuickGELU":  # each package has one of its own
        return "quick_gelu"
    if kind not in names:
        known = ", ".join(sorted(set(names.values())))
        raise TypeError(f"fused block: the activation must be one of {known}; got a {kind.__name__}.")
    return names[kind]


# ---- reasons why a block is not fused --------------------------------------------------------------------------------


def global_hooks() -> list[Any]:
    """Hooks of all modules that may change values."""
    return [hook for hooks in _GLOBAL_HOOKS if hooks for hook in _changing(hooks)]


def _changing(hooks: Mapping[int, Any]) -> list[Any]:
    """Hooks that may change values, or expect an ordinary input.

    Those of FSDP2 and of PyTorch's tools such as `FlopCounterMode` only observe, and take any structure of tensors.
    """
    return [hook for hook in hooks.values() if not str(getattr(hook, "__module__", "")).startswith("torch.")]


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


def _is_transformed() -> bool:
    """Return True while the call is exported, traced, or transformed by `torch.func`."""
    in_functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or in_functorch


# ---- classes ---------------------------------------------------------------------------------------------------------


@functools.cache
def _fused_class(own: Any, memory: FusedMemory) -> type:
    """Make the class of fused blocks in front of the caller's class `own`, with the same name.

    For the block of open_clip it is what this would define:

        class ResidualAttentionBlock(OpenClipBlock, open_clip.transformer.ResidualAttentionBlock):
            _own, _memory = open_clip.transformer.ResidualAttentionBlock, "fast"
    """
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    methods = {name: original_method(own, name) for name in ("forward", "attention") if hasattr(own, name)}
    bases = BLOCKS[type_name(own)].load(), own
    return type(own.__name__, bases, {**names, "_own": own, "_memory": memory, "_methods": methods})


@functools.cache
def own_class(kind: Any) -> Any:
    """The caller's class of a fused block, with what was made on top of the fused class, such as FSDP2's."""
    if not issubclass(kind, FusedBlock):
        return kind
    if "_own" in vars(kind):
        return kind._own
    attributes = {name: x for name, x in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(map(own_class, kind.__bases__)), attributes)


def fuse_blocks(modules: Iterable[nn.Module], memory: FusedMemory = "fast") -> list[Any]:
    """Make every known block among these modules a fused block, in place, and return the fused blocks.

    Those that are fused already stay as they are.
    """
    blocks: list[Any] = []
    for module in modules:
        kind: Any = type(module)
        if not isinstance(module, FusedBlock) and type_name(kind) in BLOCKS:
            module.__class__ = _fused_class(kind, memory)
        if isinstance(module, FusedBlock):
            blocks.append(module)
    return blocks


@contextmanager
def unfused(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give fused blocks among these modules the caller's class."""
    before: list[tuple[Any, Any]] = [(x, type(x)) for x in modules if isinstance(x, FusedBlock)]
    try:
        for module, kind in before:
            module.__class__ = own_class(kind)
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind
