"""Towers: an embedding, a list of blocks and a head, cut below block `skip`.

A model family defines the embedding, the blocks and the head; this file runs the blocks below and above the cut. They
are called with rows [R, W], packed tokens of any number of sequences, or as the model calls them, with sequences
[n, tokens, W]. Three functions return why a call is not with rows, or None:

    Tower.why_no_rows          for some blocks: the first reason of the other two
    Tower.why_never_rows       for all blocks of a family
    block.why_takes_no_rows    for one block: it is not fused, or has hooks

    below the cut   _run_lower            the embedding and the blocks, in chunks, without gradient
    above the cut   _run_upper_rows       blocks that take rows
                    _call_upper_blocks    other blocks
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..boundary import DEFAULT_CHUNK, run_frozen
from ..digests import digest_tensors
from ..options import FusedMemory, Memory
from .block import why_takes_no_rows
from .fused_classes import fuse_blocks
from .modes import evaluating, updates_statistics
from .rows import SDPA, AttentionBackend, BlockAttention, Hidden, Rotary, RowsOptions, Sequences

if TYPE_CHECKING:
    from ..memory import FreeMemory

Part = nn.Module | nn.Parameter


class UnsupportedModel(ValueError):
    """A model that no adapter handles exactly; the message names the part and the reason."""


@dataclass(frozen=True)
class Cut:
    """Position of the cut of a tower, and how its blocks run. SkipCLIP sets it."""

    skip: int = 0  # Number of blocks below the cut
    memory: Memory = "fast"  # Saved for backward by blocks above the cut
    backend: AttentionBackend = SDPA  # Attention of fused blocks
    chunk: int = DEFAULT_CHUNK  # Images or prompts that run below the cut at a time
    runs: int = 1  # Runs of the blocks above the cut before a backward pass: one for each template
    lower_device: torch.device | None = None  # Device of the modules below the cut, if it differs from that above


class Tower(ABC):
    """A stack of blocks between an embedding and a head, cut below block `skip`.

    A tower holds no parameters: it calls the caller's modules. Hidden states are [n, tokens, W], or [n, …] as defined
    by the blocks of a family.
    """

    cut: Cut = Cut()
    model: Any
    blocks: Any  # The caller's blocks in order, a sequence of modules
    # Modules and parameters in front of the first block, and behind the last one; None where a model lacks one. Those
    # with parameters are properties: `load_state_dict(assign=True)`, FSDP2 and moves to "meta" replace parameters.
    embedding: Any
    head: Any
    constants: Sequence[nn.Parameter] = ()  # Parameters that the model never trains

    @property
    def skip(self) -> int:
        """Number of blocks below the cut."""
        return self.cut.skip

    @property
    def lower_blocks(self) -> list[Any]:
        """The blocks below the cut."""
        return list(self.blocks)[: self.skip]

    @property
    def upper_blocks(self) -> list[Any]:
        """The blocks above the cut."""
        return list(self.blocks)[self.skip :]

    @abstractmethod
    def reference_forward(self, inputs: Tensor) -> Tensor:
        """Embeddings [n, D] computed by the caller's model, normalised or not."""

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Call one block as the caller's module."""
        return block(hidden)

    def rotary(self, device: torch.device) -> Rotary | None:
        """Rotary position embeddings of fused blocks, or None."""
        return None

    # ---- running -----------------------------------------------------------------------------------------------------

    @property
    def takes_rows_above(self) -> bool:
        """True if the blocks above the cut, at least one, are called with rows."""
        return len(self.upper_blocks) > 0 and self.why_no_rows(self.upper_blocks) is None

    def _run_lower(self, embed: Callable[[Tensor], tuple[Tensor, Tensor | None]], inputs: Tensor) -> Tensor:
        """Run the embedding and the blocks below the cut over images or tokens, see `run_frozen`.

        Evaluation mode: no dropout, frozen batch norms. With skip = 0 the embedding trains, and runs as any other part.

        Args:
            embed: Maps a chunk of the inputs to hidden states in front of the first block, and their mask.
            inputs: Images [n, 3, height, width], or tokens [n, L].
        """

        def run(chunk: Tensor) -> Tensor:
            return self._run_lower_blocks(*embed(chunk))

        if self.skip == 0:
            return run(inputs)
        device = inputs.device
        if self.cut.lower_device is not None:  # not yet the device of these parts while SkipCLIP is constructed
            inputs = inputs.to(next(self.lower_parameters()).device)
        with evaluating([part for part in self.lower_parts() if isinstance(part, nn.Module)]):
            return run_frozen(run, inputs, self.cut.chunk).to(device)

    def _run_lower_blocks(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Run the blocks below the cut over sequences [n, tokens, W]. They save nothing for backward."""
        blocks = self.lower_blocks
        if self.why_no_rows(blocks) is None:
            options = RowsOptions(self._sequences(hidden, mask), rotary=self.rotary(hidden.device))
            return _run_rows(blocks, Hidden(hidden.flatten(0, 1)), options).sum().view(hidden.shape)
        for block in blocks:
            hidden = self.call_block(block, hidden, mask)
        return hidden

    def _call_upper_blocks(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Call the blocks above the cut as the model does; with only their inputs saved, backward calls them again."""
        recomputes = torch.is_grad_enabled() and self.block_memory(hidden, fused=False) == "min"
        for block in self.upper_blocks:
            # A batch norm in training mode would update its statistics twice if it were recomputed.
            if recomputes and not updates_statistics(block):
                hidden = checkpoint(self.call_block, block, hidden, mask, use_reentrant=False)
            else:
                hidden = self.call_block(block, hidden, mask)
        return hidden

    def _run_upper_rows(self, rows: Tensor, attention: BlockAttention, last_attention: BlockAttention | None) -> Tensor:
        """Run the blocks above the cut over rows [R, W]; the last one with an attention of its own, if there is one."""
        options = RowsOptions(attention, self.block_memory(rows, fused=True), self.rotary(rows.device))
        *blocks, last = self.upper_blocks
        hidden = _run_rows(blocks, Hidden(rows), options)
        if last_attention is not None:
            options = options._replace(attention=last_attention)
        return _run_rows([last], hidden, options).sum()

    def _sequences(self, hidden: Tensor, mask: Tensor | None = None) -> Sequences:
        """Attention within sequences [n, tokens, W]."""
        return Sequences(len(hidden), mask, backend=self.cut.backend)

    @torch.compiler.disable  # queries the free memory
    def block_memory(self, hidden: Tensor, *, fused: bool) -> FusedMemory:
        """Return what each block above the cut saves for backward, over hidden states [..., W].

        With `memory="auto"` it is "min" if saving everything would take more than half of the free memory, and did in
        every earlier step of this size.
        """
        if self.cut.memory != "auto":
            return self.cut.memory
        if not torch.is_grad_enabled():
            return "fast"
        from ..memory import most_saved_bytes

        needed = most_saved_bytes(hidden, fused=fused) * len(self.upper_blocks) * self.cut.runs
        return "fast" if self._free_memory.allows(needed, hidden.device) else "min"

    @functools.cached_property  # a family defines its own __init__
    def _free_memory(self) -> FreeMemory:
        from ..memory import FreeMemory

        return FreeMemory()

    def why_never_rows(self) -> str | None:
        """Return why no block of this tower is called with rows, or None; families override it."""
        return None

    def why_no_rows(self, blocks: Iterable[Any]) -> str | None:
        """Return why these blocks run over sequences, or None; one that takes no rows is enough."""
        reasons = (self.why_never_rows() or why_takes_no_rows(block) for block in blocks)
        return next(filter(None, reasons), None)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def lower_parts(self) -> Sequence[Part]:
        """Modules and parameters below the cut; none at skip = 0, where the embedding trains too."""
        return present([*self.embedding, *self.lower_blocks]) if self.skip > 0 else ()

    def upper_parts(self) -> Sequence[Part]:
        """Modules and parameters above the cut."""
        return present([*(() if self.skip > 0 else self.embedding), *self.upper_blocks, *self.head])

    def lower_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters below the cut."""
        return parameters_of(self.lower_parts())

    def upper_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters above the cut."""
        constants = {id(parameter) for parameter in self.constants}
        yield from (parameter for parameter in parameters_of(self.upper_parts()) if id(parameter) not in constants)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        fuse_blocks(self.blocks)  # copies and pickles of fused blocks have the caller's class

    def lower_identity(self) -> dict[str, str | int]:
        """Everything that features at the cut depend on, by name: digests of parameters and buffers, and the cut."""
        return {
            "tower": type(self).__qualname__,
            "skipped blocks": self.skip,
            "embedding": digest_tensors(_named_tensors(present(self.embedding))),
            "lower blocks": digest_tensors(_named_tensors(self.lower_blocks)),
        }

    def move_lower(self, device: torch.device | None = None) -> None:
        """Move the parameters and buffers below the cut to `lower_device`, if there is one, or from it to `device`."""
        for part in self.lower_parts() if self.cut.lower_device is not None else ():
            if isinstance(part, nn.Parameter):
                part.data = part.data.to(device or self.cut.lower_device)
            else:
                part.to(device or self.cut.lower_device)


def _run_rows(blocks: Iterable[Any], hidden: Hidden, options: RowsOptions) -> Hidden:
    """Run blocks that take rows. Each is a `FusedBlock`, and the call its `forward`."""
    for block in blocks:
        hidden = block(hidden, options)
    return hidden


def present(parts: Iterable[Part | None]) -> tuple[Part, ...]:
    """Return the parts that a model has."""
    return tuple(part for part in parts if part is not None)


def parameters_of(parts: Iterable[Part]) -> Iterator[nn.Parameter]:
    """Yield the parameters of modules, and those among the parts themselves."""
    for part in parts:
        if isinstance(part, nn.Parameter):
            yield part
        else:
            yield from part.parameters()


def _named_tensors(parts: Iterable[Part]) -> Iterator[tuple[str, Tensor]]:
    for number, part in enumerate(parts):
        if isinstance(part, nn.Parameter):
            yield f"{number}", part
        else:
            for name, tensor in itertools.chain(part.named_parameters(), part.named_buffers()):
                yield f"{number}.{name}", tensor
