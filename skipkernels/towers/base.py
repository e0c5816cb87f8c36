"""Towers: an embedding, a list of blocks and a head, cut below block `skip`.

A model family defines the embedding, the blocks and the head; this file runs the blocks. All are called as modules: a
fused block (`block.py`) with rows, any other as the model calls it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from ..digests import digest_tensors
from ..options import Memory
from . import attention
from .block import FusedBlock, RowsCall, fuse_blocks
from .fused import Hidden, Rotary

Part = nn.Module | nn.Parameter | None
# Attributes in which modules of PyTorch, timm, open_clip and transformers hold their dropout rate.
_DROPOUT_RATES = ("p", "prob", "drop_prob", "dropout", "attention_dropout", "activation_dropout", "layerdrop")


class Reduction(NamedTuple):
    """State of one exact reduction."""

    enabled: bool
    reason: str  # Reason why it is not applied; "" if it is

    @classmethod
    def unless(cls, reason: str | None) -> Reduction:
        """Return an enabled reduction, or one disabled for `reason`."""
        return cls(not reason, reason or "")


class UnsupportedModel(ValueError):
    """A model that no adapter handles exactly; the message names the part and the reason."""


class Tower(ABC):
    """A stack of blocks between an embedding and a head, cut below block `skip`.

    A tower holds no parameters: it calls the caller's modules. Hidden states are [n, tokens, W], or [n, …] as defined
    by the blocks of a family.
    """

    model: Any
    blocks: Any  # The caller's blocks in order, a sequence of modules
    # Modules and parameters in front of the first block, and behind the last one. Where they have parameters they are
    # properties: `load_state_dict(assign=True)`, FSDP2 and moves to "meta" replace parameters.
    embedding: Any
    head: Any
    constants: Sequence[nn.Parameter] = ()  # Parameters that the model never trains
    skip: int = 0  # Number of blocks below the cut. Set by SkipCLIP.
    # Device of the modules below the cut, if it differs from the device above the cut. Set by SkipCLIP.
    lower_device: torch.device | None = None
    memory: Memory = "fast"  # Saved for backward by an upper block. Set by SkipCLIP.
    runs: int = 1  # Number of times that a step runs the blocks: once for each template of the prompts
    attention_backend: attention.AttentionBackend = attention.SDPA  # Attention of fused blocks. Set by SkipCLIP.

    @abstractmethod
    def reference_forward(self, inputs: Tensor) -> Tensor:
        """Embeddings [n, D] computed by the caller's model, normalised or not."""

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Call one block as the caller's module."""
        return block(hidden)

    def why_no_rows(self, index: int) -> str | None:
        """Return why block `index` is called as the model calls it, or None if it takes rows."""
        block = self.blocks[index]
        if isinstance(block, FusedBlock):
            return block.why_no_rows()
        return f"a block is a {type(block).__name__}, which runs its own forward"

    def why_not_fused(self) -> str | None:
        """Return why not all blocks take rows, with the indices of those that don't, or None."""
        of_reason: dict[str, list[int]] = {}
        depth = len(self.blocks)
        for index in range(depth):
            reason = self.why_no_rows(index)
            if reason is not None:
                of_reason.setdefault(reason, []).append(index)
        reasons = [
            reason
            if len(indices) == depth
            else f"{len(indices)} of {depth} blocks ({', '.join(map(str, indices))}): {reason}"
            for reason, indices in of_reason.items()
        ]
        return "; ".join(reasons) or None

    def rotary(self, device: torch.device) -> Rotary | None:
        """Rotary position embeddings of fused blocks, or None."""
        return None

    def _evaluating_lower(self) -> contextlib.AbstractContextManager[None]:
        """Set evaluation mode below the cut: no dropout, frozen batch norms."""
        return evaluating([part for part in self.lower_parts() if isinstance(part, nn.Module)])

    def _run_lower(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """Run the blocks below the cut over sequences."""
        hidden, rotary = Hidden(embedded), self.rotary(embedded.device)
        for index in range(self.skip):
            hidden = self._run_block(index, hidden, mask, rotary=rotary)
        return hidden.sum()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of floating-point inputs."""
        return next(parameter for parameter in _parameters(self.embedding) if parameter.ndim > 1).dtype

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids of the embedding, or None for images."""
        modules = (module for part in self.embedding if isinstance(part, nn.Module) for module in part.modules())
        return next((module.num_embeddings for module in modules if isinstance(module, nn.Embedding)), None)

    def lower_parts(self) -> Sequence[Part]:
        """Modules and parameters below the cut; none at skip = 0, where the embedding trains too."""
        return (*self.embedding, *self.blocks[: self.skip]) if self.skip > 0 else ()

    def upper_parts(self) -> Sequence[Part]:
        """Modules and parameters above the cut."""
        return (*(() if self.skip > 0 else self.embedding), *self.blocks[self.skip :], *self.head)

    def lower_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters below the cut."""
        return _parameters(self.lower_parts())

    def model_blocks(self) -> list[nn.Module]:
        """The caller's modules that are blocks: a block may be an `nn.Sequential` that the tower made of several."""
        known = set(self.model.modules())

        def of_model(block: nn.Module) -> list[nn.Module]:
            return [block] if block in known else [x for child in block.children() for x in of_model(child)]

        return [module for block in self.blocks for module in of_model(block)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        fuse_blocks(self.blocks)  # copies and pickles of fused blocks have the caller's class

    def lower_identity(self) -> dict[str, str | int]:
        """Everything that features at the cut depend on, by name: digests of parameters and buffers, and the cut."""
        return {
            "tower": type(self).__qualname__,
            "skipped blocks": self.skip,
            "embedding": digest_tensors(_named_tensors(self.embedding)),
            "lower blocks": digest_tensors(_named_tensors(self.blocks[: self.skip])),
        }

    def move_lower(self) -> None:
        """Move the parameters and buffers below the cut to `lower_device`, if there is one."""
        for part in self.lower_parts() if self.lower_device is not None else ():
            if isinstance(part, nn.Parameter):
                part.data = part.data.to(self.lower_device)
            elif part is not None:
                part.to(self.lower_device)

    def upper_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters above the cut."""
        constants = {id(parameter) for parameter in self.constants}
        yield from (parameter for parameter in _parameters(self.upper_parts()) if id(parameter) not in constants)

    def _run_block(
        self,
        index: int,
        hidden: Hidden,
        mask: Tensor | None,
        *,
        save_inputs_only: bool = False,
        rotary: Rotary | None = None,
    ) -> Hidden:
        """Run one block over sequences [n, tokens, W].

        Above the cut, with `memory="min"`, a block that takes no rows is recomputed in backward.
        """
        block = self.blocks[index]
        if self.why_no_rows(index) is None:
            n, tokens, _ = hidden.stream.shape
            attention_fn = partial(attention.sequences, backend=self.attention_backend, n=n, mask=mask)
            call = RowsCall(attention_fn, save_inputs_only, rotary=rotary)
            rows = block(hidden.map(lambda x: x.flatten(0, 1)), call)
            return rows.map(lambda x: x.view(n, tokens, -1))
        # A batch norm in training mode would update its statistics twice if it were recomputed.
        recomputes = index >= self.skip and self.memory == "min" and torch.is_grad_enabled()
        if recomputes and not updates_statistics(block):
            return Hidden(checkpoint(self.call_block, block, hidden.sum(), mask, use_reentrant=False))
        return Hidden(self.call_block(block, hidden.sum(), mask))

    def _run_last_block(
        self,
        hidden: Hidden,
        attention_fn: Callable[..., Tensor],
        query_rows: Tensor | slice,
        *,
        save_inputs_only: bool,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Run the last block over sequences, for the rows of the pooled tokens only, with separate queries."""
        call = RowsCall(attention_fn, save_inputs_only, query_rows, separate_queries=True, rotary=rotary)
        return self.blocks[-1](hidden.map(lambda x: x.flatten(0, 1)), call).sum()

    @functools.cached_property
    def _decisions(self) -> dict[tuple[int, torch.device], bool]:
        """Answers of `saves_inputs_only` by bytes and device."""
        return {}

    @torch.compiler.disable  # queries the free memory
    def saves_inputs_only(self, hidden: Tensor) -> bool:
        """Return True if the fused blocks above the cut save only their inputs for backward.

        With `memory="auto"`, they do if saving everything would take more than half of the memory that is free in the
        first step with as many rows.
        """
        if not any(isinstance(block, FusedBlock) for block in self.blocks):
            return False
        if self.memory != "auto" or not torch.is_grad_enabled():
            return self.memory == "min"
        from .fused.forward import CAST_BYTES, SAVED_WIDTHS

        saved = hidden.numel() * hidden.element_size() * SAVED_WIDTHS
        if torch.is_autocast_enabled(hidden.device.type):
            saved += CAST_BYTES * hidden.shape[-1] ** 2
        saved *= (len(self.blocks) - self.skip) * self.runs
        # Asked once: reading the free memory takes 0.1 ms, and a captured graph must not ask the driver.
        key = saved, hidden.device
        if key not in self._decisions:
            from ..memory import free_bytes

            self._decisions[key] = saved > free_bytes(hidden.device) / 2
        return self._decisions[key]


class ImageTower(Tower):
    """A tower over images [n, 3, height, width]."""

    image_size: tuple[int, int]  # Height and width

    def encoder(self) -> nn.Module:
        """The caller's image encoder, which returns embeddings [n, D] or a tuple that begins with them."""
        return self.model.visual

    @property
    def why_not_pooled(self) -> str | None:
        """Return why the last block is needed for every token, or None if the head pools the first one."""
        return None

    @property
    def reductions(self) -> dict[str, Reduction]:
        """The exact reductions of this tower by name, as they are now."""
        not_pooled = self.why_not_pooled or self.why_no_rows(len(self.blocks) - 1)
        return {
            "fused_block": Reduction.unless(self.why_not_fused()),
            "pooled_last_block": Reduction.unless(not_pooled),
        }

    def reference_forward(self, inputs: Tensor) -> Tensor:
        return self.model.encode_image(inputs)

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Map images [n, 3, height, width] to the hidden states in front of the first block."""

    def lower(self, images: Tensor) -> Tensor:
        """Map images [n, 3, height, width] to hidden states at the cut, in evaluation mode."""
        with self._evaluating_lower():
            return self._run_lower(self.embed(images), None)

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """Map hidden states behind the last block, of all tokens or only the pooled one, to embeddings [n, D]."""

    def upper(self, features: Tensor) -> Tensor:
        """Map hidden states at the cut to image embeddings [n, D], not normalised."""
        depth, save_inputs_only = len(self.blocks), self.saves_inputs_only(features)
        hidden, rotary = Hidden(features), self.rotary(features.device)
        pools = self.skip < depth and self.why_not_pooled is None and self.why_no_rows(depth - 1) is None
        for index in range(self.skip, depth - pools):
            hidden = self._run_block(index, hidden, None, save_inputs_only=save_inputs_only, rotary=rotary)
        if not pools:
            return self.finish(hidden.sum())
        n, tokens, _ = features.shape
        first = slice(None, None, tokens)
        last = partial(attention.pooled, mask=None)
        pooled = self._run_last_block(hidden, last, first, save_inputs_only=save_inputs_only, rotary=rotary)
        return self.finish(pooled[:, None])


def _parameters(parts: Iterable[Part]) -> Iterator[nn.Parameter]:
    for part in parts:
        if isinstance(part, nn.Parameter):
            yield part
        elif part is not None:
            yield from part.parameters()


def _named_tensors(parts: Iterable[Part]) -> Iterator[tuple[str, Tensor]]:
    for number, part in enumerate(parts):
        if isinstance(part, nn.Parameter):
            yield f"{number}", part
        elif part is not None:
            for name, tensor in itertools.chain(part.named_parameters(), part.named_buffers()):
                yield f"{number}.{name}", tensor


# ---- training and evaluation mode


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


def is_deterministic(module: nn.Module) -> bool:
    """Return True for a module without dropout and batch norms, which computes each sample alone."""
    return not any(_drops(part) or isinstance(part, _NormBase) for part in module.modules())


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
