"""The caller's block as a fused block: `block.__class__` becomes a subclass of its own class with another `forward`.

Parameters, their names, `state_dict`, `isinstance` and hooks stay. `forward` reads weights and settings from the
block's children at each call. If a child is not what the fused path knows (an adapter, a quantised layer, a hook, a
method that was replaced on its class), the block runs its family's own forward.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch
from torch.nn.utils import parametrize

from ..checks import warn_caller
from ..options import FusedMemory
from . import attention
from .fused import BlockSettings, FusableBlock, Hidden, Rotary

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(modules_of_torch, f"_global{name}") for name in HOOKS]

# Type of a block → file in families/, and the class in it. A file is imported on demand.
FAMILIES = {
    "open_clip.transformer.ResidualAttentionBlock": "open_clip:OpenClipBlock",
    "clip.model.ResidualAttentionBlock": "openai:OpenAIBlock",
    "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2EncoderLayer": "hugging_face:HuggingFaceBlock",
    "transformers.models.siglip2.modeling_siglip2.Siglip2EncoderLayer": "hugging_face:HuggingFaceBlock",
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer": "hugging_face:HuggingFaceBlock",
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": "hugging_face:HuggingFaceBlock",
    "timm.models.vision_transformer.Block": "timm_blocks:TimmBlock",
    "timm.models.eva.EvaBlock": "timm_blocks:TimmEvaBlock",
}

Submodules = Mapping[str, tuple[str, str, Mapping[type, Any]]]
"""Path of the parent, name, and allowed types with their `forward`, of each submodule of a block, by path; parents come
first."""


def submodules(types: Mapping[str, tuple[type, ...]]) -> Submodules:
    """Make a table of submodules from their allowed types by path; a family makes its tables once, at import."""
    return {
        path: (path.rpartition(".")[0], path.rpartition(".")[2], {kind: shipped(kind, "forward") for kind in allowed})
        for path, allowed in types.items()
    }


def shipped(kind: type, method: str) -> Any:
    """Return a method of a class, or None if it is not by the package that defines the class: it was replaced."""
    function, home = getattr(kind, method), _definer(kind, method).__module__
    module = getattr(function, "__globals__", {}).get("__name__", "")  # a wrapper may have any `__module__`
    return function if module.partition(".")[0] == home.partition(".")[0] else None


def _definer(kind: type, method: str) -> type:
    return next(base for base in kind.__mro__ if method in vars(base))


class Sequences(NamedTuple):
    """Ordinary input of a block: sequences of equal length."""

    hidden: Tensor  # [n, tokens, W]
    mask: Tensor | None = None  # added to the logits, [1 or n, 1 or H, tokens, tokens]
    causal: bool = False
    rotary: Rotary | None = None


class RowsCall(NamedTuple):
    """Second argument of a fused block that is called with rows, `block(hidden, call)`; the first is a `Hidden`."""

    attention: Callable[..., Tensor]  # as in `BlockSettings`; it takes the number of heads as `heads`
    save_inputs_only: bool = False
    query_rows: Tensor | slice | None = None  # int64 [Q] or a slice, rows to return; default: all
    separate_queries: bool = False
    recompute_mlp: bool = False
    rotary: Rotary | None = None  # of sequences of equal length, the query rows being the first of each


class FusedBlock:
    """Base of the classes of fused blocks, in front of the block's own class. A subclass knows one family of blocks."""

    linear_weights: Sequence[str]  # paths of query, key, value, W_o, W_fc and W_p; packed ones three times
    _own: ClassVar[type]  # the caller's class
    _methods: ClassVar[Mapping[str, Any]]  # its methods that this class replaces, as its package defines them
    _memory: ClassVar[FusedMemory]  # saved for backward of a call with sequences
    _modules: dict[str, Any]  # of nn.Module

    def _submodules(self) -> Submodules:
        """Return the submodules that this block must have."""
        raise NotImplementedError

    def _why_settings(self) -> str | None:
        """Return why the settings of this block can't be fused, or None."""
        return None

    def _read(self) -> FusableBlock:
        """Read weights and settings from the children."""
        raise NotImplementedError

    def _sequences(self, *args: Any, **kwargs: Any) -> Sequences | None:
        """Return the arguments of the block's own forward as sequences, or None if only that forward takes them."""
        raise NotImplementedError

    def _example(self, draw: Callable[..., Tensor], width: int) -> tuple[Any, ...] | None:
        """Return arguments of a small call, of tensors `draw(*shape)`; None if its own forward takes no fp32."""
        return (draw(2, 3, width),)

    def _output(self, hidden: Tensor) -> Tensor:
        """Return hidden states [n, tokens, W] as the block's own forward does."""
        return hidden

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
        count, dtypes = len(block._modules), set()
        for path, (parent, name, types) in self._submodules().items():
            module = modules[path] = modules[parent]._modules.get(name)
            if module is None:
                return f"the submodules of a block differ from those of a {block._own.__name__}"
            attributes, kind = module.__dict__, type(module)
            if kind not in types:
                kind = parametrize.type_before_parametrizations(module)
                reason = _why_parametrized(module, path, types)
                if reason is not None:
                    return reason
                count -= 1  # of `parametrizations`
            if kind.forward is not types[kind]:
                return _why_replaced(kind, "forward")
            if (
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
                elif name != "bias" and x.ndim == 2:
                    dtypes.add(x.dtype)
            count += len(attributes["_modules"])
        if count != len(modules) - 1:
            return f"the submodules of a block differ from those of a {block._own.__name__}"
        if len(dtypes) > 1:
            return "the weights of a block have more than one dtype"
        return self._why_settings()

    def why_no_rows(self) -> str | None:
        """Return why this block has to be called with its ordinary input, or None if it takes rows."""
        block: Any = self
        if "forward" in vars(block):
            return "forward() of a block was replaced"
        if any(hooks and _changing(hooks) for hooks in map(vars(block).get, HOOKS)):
            return "a block has hooks"
        if getattr(block, "gradient_checkpointing", False):
            return "a block has gradient checkpointing of transformers"
        return self.why_not_fused()

    @torch.compiler.disable  # reads Python objects that a compiler would guard on, and holds an autograd graph
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on its ordinary input, or `block(hidden, call)` on rows."""
        if args and isinstance(args[0], Hidden):
            return self._run(*args)
        if not _is_transformed():
            reason = self.why_not_fused()
            given = self._sequences(*args, **kwargs) if reason is None else None
            if given is not None and not (given.mask is not None and given.mask.requires_grad):  # a learned mask
                return self._run_sequences(given)
            if reason is not None:
                warn_caller(
                    f"skipkernels: a block is not fused ({reason}). It runs its own forward: the result is the same, "
                    "but takes more time and memory."
                )
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _run(self, hidden: Hidden, call: RowsCall) -> Hidden:
        """Run the block on rows [R, W]."""
        from .fused.node import fused_block  # importing the towers does not need it

        read = self._read()
        dtype, device_type = read.weights.proj.dtype, hidden.stream.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        settings = BlockSettings(
            attention=partial(call.attention, heads=read.heads),
            activation=read.activation,
            eps=read.eps,
            dtype=dtype,
            save_inputs_only=call.save_inputs_only,
            separate_queries=call.separate_queries,
            recompute_mlp=call.recompute_mlp,
            heads=read.heads,
            rotary=call.rotary,
            rms=read.rms,
        )
        return fused_block(settings, hidden, read.weights, call.query_rows)

    def _run_sequences(self, given: Sequences) -> Tensor:
        hidden, mask, causal, rotary = given
        attention_fn = partial(attention.sequences, backend=attention.SDPA, n=len(hidden), mask=mask, causal=causal)
        call = RowsCall(attention_fn, self._memory == "min", recompute_mlp=self._memory == "balanced", rotary=rotary)
        rows = self._run(Hidden(hidden.flatten(0, 1)), call)
        return self._output(rows.map(lambda x: x.view(hidden.shape)).sum())

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "torch.jit.script: a fused block cannot be scripted. Call skipkernels.unfuse(model) first, or script a "
            "copy: copy.deepcopy(model) has the model's own classes."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles have the caller's class."""
        rebuild = copyreg._reconstructor  # type: ignore[attr-defined]
        return rebuild, (self._own, object, None), *super().__reduce_ex__(2)[2:]


def _changing(hooks: Mapping[int, Any]) -> list[Any]:
    """Hooks that may change values, or expect an ordinary input.

    Those of FSDP2 and of PyTorch's tools such as `FlopCounterMode` only observe, and take any structure of tensors.
    """
    return [hook for hook in hooks.values() if not str(getattr(hook, "__module__", "")).startswith("torch.")]


def global_hooks() -> list[Any]:
    """Hooks of all modules that may change values."""
    return [hook for hooks in _GLOBAL_HOOKS if hooks for hook in _changing(hooks)]


def _why_replaced(kind: type, method: str) -> str:
    return f"{method}() of the class {_definer(kind, method).__name__} was replaced"


def _why_parametrized(module: nn.Module, path: str, types: Mapping[type, Any]) -> str | None:
    """Return why a module is not one of these types with low-rank updates, or None."""
    if parametrize.type_before_parametrizations(module) not in types:
        package = type(module).__module__.partition(".")[0]
        return f"a block has a {type(module).__name__} of {package} for its {path}"
    from .low_rank import low_rank_updates  # few models have any

    return None if low_rank_updates(module) else f"a {type(module).__name__} of a block was altered"


def weight_and_bias(layer: Any, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, multiplied by the layer scale [W] that follows it, if there is one.

    They are attributes, as the layer reads them: a bias may be a parameter, a buffer, or a view of a flat parameter.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)  # RMSNorm has none
    if scale is None:
        return weight, bias
    return scale[:, None] * weight, None if bias is None else scale * bias


def joint_weight_and_bias(*layers: Any) -> tuple[Any, Any]:
    """Weights and biases of layers side by side; zeros for a bias that one of them lacks."""
    weights, biases = zip(*map(weight_and_bias, layers), strict=True)
    if all(bias is None for bias in biases):
        return weights, None
    return weights, tuple(
        w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)
    )


def layer_scale(module: Any) -> Tensor | None:
    """Factors [W] of a module that scales a branch; None for an identity."""
    return None if module is None or isinstance(module, nn.Identity) else module.gamma


def activation(module: nn.Module, names: Mapping[type, str]) -> str:
    """Name of an activation in `functional.mlp_activation`; each package has a QuickGELU of its own."""
    if getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return names.get(type(module)) or {"QuickGELU": "quick_gelu"}[type(module).__name__]


def _is_transformed() -> bool:
    """Return True while the call is exported, traced, or transformed by `torch.func`."""
    in_functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or in_functorch


@functools.cache
def _fused_class(own: Any, memory: FusedMemory) -> type:
    """Make the class of fused blocks in front of the caller's class `own`, with the same name."""
    file, _, name = FAMILIES[f"{own.__module__}.{own.__qualname__}"].partition(":")
    family = getattr(importlib.import_module(f".families.{file}", __package__), name)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    methods = {name: shipped(own, name) for name in ("forward", "attention") if hasattr(own, name)}
    return type(own.__name__, (family, own), {**names, "_own": own, "_memory": memory, "_methods": methods})


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
        if not isinstance(module, FusedBlock) and f"{kind.__module__}.{kind.__qualname__}" in FAMILIES:
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
