"""A fused block: the caller's block, with the class of `fused_classes.py`, which has another `forward`.

The caller's model calls it with its ordinary input, a tower with rows: `block(hidden, options)`. It reads weights and
settings from the block's children at each call. If a child is not what the fused path knows (an adapter, a quantised
layer, a hook, a method that was replaced on its class), the block runs the forward of its own class.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checks import warn_caller
from ..options import FusedMemory
from .alterations import Submodules, changing_hooks, why_altered
from .rows import Hidden, Rotary, RowsOptions, Sequences

if TYPE_CHECKING:
    from .fused.weights import BlockSettings, GivenWeights


class BlockInput(NamedTuple):
    """Ordinary input of a block: sequences of equal length."""

    hidden: Tensor  # [n, tokens, W]
    mask: Tensor | None = None  # added to the logits, [1 or n, 1 or H, tokens, tokens]
    causal: bool = False
    rotary: Rotary | None = None


class FusedBlock:
    """Base of the classes of fused blocks. A subclass knows one family of blocks, by its methods up to `_why_settings`.

    A fused class comes before the caller's class in the order of bases: its names must differ from those of the
    caller's attributes and methods.
    """

    linear_weights: Sequence[str]  # paths of query, key, value, W_o, W_fc and W_p; packed ones three times
    _modules: dict[str, Any]  # of nn.Module
    # Set by `fused_classes.py`:
    caller_class: ClassVar[type]
    _methods: ClassVar[Mapping[str, Any]]  # its methods that this class replaces, as its package defines them
    _memory: ClassVar[FusedMemory]  # saved for backward of a call with its ordinary input

    def read_weights(self) -> tuple[GivenWeights, BlockSettings]:
        """Read weights and settings from the children."""
        raise NotImplementedError

    def _parse_input(self, *args: Any, **kwargs: Any) -> BlockInput | None:
        """Name the arguments of the block's own forward, or return None if only that forward takes them."""
        raise NotImplementedError

    def _output(self, hidden: Tensor) -> Tensor:
        """Return hidden states [n, tokens, W] as the block's own forward does."""
        return hidden

    def example_input(self, draw: Callable[..., Tensor], width: int) -> tuple[Any, ...] | None:
        """Return arguments of a small call, of tensors `draw(*shape)`; None if its own forward takes no fp32."""
        return (draw(2, 3, width),)

    def _submodules(self) -> Submodules:
        """Return the submodules that this block must have."""
        raise NotImplementedError

    def _why_settings(self) -> str | None:
        """Return why the settings of this block can't be fused, or None."""
        return None

    # ---- running -----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # reads Python objects that a compiler would guard on, and holds an autograd graph
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on its ordinary input, or `block(hidden, options)` on rows.

        Both are calls of the module: hooks on it run, such as those by which FSDP2 gathers its weights.
        """
        if args and isinstance(args[0], Hidden):  # the tower has asked `why_takes_no_rows`
            return self._run_fused(*args)
        given = self._fusable_input(*args, **kwargs)
        if given is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden, mask, causal, rotary = given
        options = RowsOptions(Sequences(len(hidden), mask, causal), self._memory, rotary)
        out = self._run_fused(Hidden(hidden.flatten(0, 1)), options)
        # The sum of views is no view: FSDP2 warns of a block that returns one.
        return Hidden(*(self._output(x.view(hidden.shape)) for x in out if x is not None)).sum()

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
        if given is None or not given.hidden.numel():
            return None
        if given.mask is not None and given.mask.requires_grad:
            return None  # a fused block gives a mask no gradient
        return given

    def _run_fused(self, hidden: Hidden, options: RowsOptions) -> Hidden:
        """Run the block on rows [R, W]."""
        from .fused.node import fused_block  # not at the head: an import of skipkernels.clip loads few modules

        return fused_block(*self.read_weights(), hidden, options)

    def why_not_fused(self) -> str | None:
        """Return why this block runs its own forward now, or None."""
        return why_altered(self, self.caller_class, self._methods, self._submodules()) or self._why_settings()

    # ---- copies ------------------------------------------------------------------------------------------------------

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "torch.jit.script: a fused block cannot be scripted. Call skipkernels.unfuse(model) first, or script a "
            "copy: copy.deepcopy(model) has the model's own classes."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the caller's class: a fused class is made at run time, and cannot be imported."""
        rebuild = copyreg._reconstructor  # type: ignore[attr-defined]
        return rebuild, (self.caller_class, object, None), *super().__reduce_ex__(2)[2:]


def why_takes_no_rows(block: Any) -> str | None:
    """Return why a block has to be called with its ordinary input, or None if it takes rows, `block(hidden, options)`.

    A block that takes rows is fused. One with hooks of its own is fused without rows: they expect ordinary input.
    """
    if not isinstance(block, FusedBlock):
        return f"a block is a {type(block).__name__}, which runs its own forward"
    if "forward" in vars(block):
        return "forward() of a block was replaced"
    if changing_hooks(block):
        return "a block has hooks"
    if getattr(block, "gradient_checkpointing", False):
        return "a block has gradient checkpointing of transformers"
    return block.why_not_fused()


def _is_transformed() -> bool:
    """Return True while the call is exported, traced, or transformed by `torch.func`."""
    in_functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or in_functorch
