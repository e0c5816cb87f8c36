"""Towers: an embedding, a list of blocks and a head, cut below block `skip`.

A model family defines the embedding, the blocks and the head; this file runs the blocks. A pre-norm transformer block
(`fused_block.py`) runs as one autograd node; any other block is called as the caller's module.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..digests import digest_tensors
from ..memory import free_bytes
from ..options import Memory
from . import attention
from .eligibility import global_hooks, why_weights_not_fusable
from .fused_block import CAST_BYTES, SAVED_WIDTHS, BlockSettings, FusableBlock, Hidden, fused_block
from .modes import evaluating, updates_statistics
from .reductions import Reduction

Part = nn.Module | nn.Parameter | None


class UnsupportedModel(ValueError):
    """A model that no adapter handles exactly; the message names the part and the reason."""


class Tower(ABC):
    """A stack of blocks between an embedding and a head, cut below block `skip`.

    A tower holds no parameters: it calls the caller's modules. Hidden states are [n, tokens, W], or [n, …] as defined
    by the blocks of a family.
    """

    model: Any
    blocks: Any  # The caller's blocks in order, a sequence of modules
    embedding: Sequence[Part]  # Modules and parameters in front of the first block
    head: Sequence[Part]  # Modules and parameters behind the last block
    constants: Sequence[nn.Parameter] = ()  # Parameters that the model never trains
    skip: int = 0  # Number of blocks below the cut. Set by SkipCLIP.
    memory: Memory = "fast"  # Saved for backward by an upper block. Set by SkipCLIP.
    runs: int = 1  # Number of times that a step runs the blocks: once for each template of the prompts
    attention_backend: attention.AttentionBackend = attention.SDPA  # Attention of fused blocks. Set by SkipCLIP.
    reductions: dict[str, Reduction]  # The exact reductions of this tower by name
    # Paths in a block of the weights of query, key, value, W_o, W_fc and W_p; a packed projection is named three times.
    linear_weights: Sequence[str] = ()
    # Weights and settings of each block, or the reason why it is not fused; empty if the family fuses no blocks.
    # Weights that are computed from parameters are on the meta device: `fused` computes them.
    _fusable: Sequence[FusableBlock | str] = ()
    _block_parameters: Sequence[list[nn.Parameter]] = ()  # for each block in `_fusable`, when it was read

    @abstractmethod
    def reference_forward(self, inputs: Tensor) -> Tensor:
        """Embeddings [n, D] computed by the caller's model, normalised or not."""

    @abstractmethod
    def embed(self, inputs: Tensor) -> Tensor:
        """Map inputs to the hidden states in front of the first block."""

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Call one block as the caller's module."""
        return block(hidden)

    @staticmethod
    def read_block(block: Any) -> FusableBlock:
        """Read the weights and settings of a block that can be fused."""
        raise NotImplementedError

    @staticmethod
    def why_not_fusable(block: Any) -> str | None:
        """Return why a block cannot be fused, apart from its weights, or None if it can."""
        return "a block runs its own forward"

    def _read(self, block: Any) -> FusableBlock | str:
        reason = self.why_not_fusable(block)
        if reason is not None:
            return reason
        with torch.no_grad():
            fusable = self.read_block(block)
        reason = why_weights_not_fusable(fusable.weights)
        if reason is not None:
            return reason
        weights = fusable.weights.map(lambda x: x if isinstance(x, nn.Parameter) else x.to("meta"))
        return fusable._replace(weights=weights)

    def read_blocks(self) -> tuple[str | None, str | None]:
        """Read every block; return why not all are fused and why the last one is not, or None."""
        self._fusable = [self._read(block) for block in self.blocks]
        self._block_parameters = [list(block.parameters()) for block in self.blocks]
        of_reason: dict[str, list[int]] = {}
        for index, fusable in enumerate(self._fusable):
            if isinstance(fusable, str):
                of_reason.setdefault(fusable, []).append(index)
        depth = len(self._fusable)
        reasons = [
            reason
            if len(indices) == depth
            else f"{len(indices)} of {depth} blocks ({', '.join(map(str, indices))}): {reason}"
            for reason, indices in of_reason.items()
        ]
        return "; ".join(reasons) or None, self._fusable[-1] if isinstance(self._fusable[-1], str) else None

    @property
    def can_fuse(self) -> bool:
        """True if this family fuses blocks that are not altered."""
        return len(self._fusable) > 0

    def is_fused(self, index: int) -> bool:
        """Return True if block `index` can run as one autograd node."""
        return index < len(self._fusable) and not isinstance(self._fusable[index], str)

    def runs_fused(self, index: int) -> bool:
        """Return True if block `index` runs as one autograd node now: global hooks expect its own modules to run."""
        return self.is_fused(index) and not global_hooks()

    def current_reductions(self) -> dict[str, Reduction]:
        """Return `reductions`, without those of fused blocks while global module hooks are registered."""
        if not (self.can_fuse and global_hooks()):
            return self.reductions
        hooked = Reduction(False, "global module hooks are registered, so each block runs its own forward")
        of_blocks = ("fused_block", "shared_prefix", "pooled_last_block")
        return self.reductions | {name: hooked for name in of_blocks if name in self.reductions}

    def fused(self, index: int) -> FusableBlock:
        """Weights and settings of fused block `index`. Layer scales and low-rank updates are applied at each call."""
        fusable = self._fusable[index]
        assert not isinstance(fusable, str)
        if all(isinstance(x, nn.Parameter) for x in fusable.weights.tensors()):
            return fusable
        return self.read_block(self.blocks[index])

    def mask(self, inputs: Tensor) -> Tensor | None:
        """Attention mask added to the logits, [1 or n, 1, tokens, tokens], or None."""
        return None

    def lower(self, inputs: Tensor, *, drop_patches: bool = False) -> Tensor:
        """Map inputs to the hidden states at the cut, in evaluation mode: no dropout, constant batch-norm statistics.

        With `drop_patches`, patches are dropped as in training if the model has patch dropout.
        """
        frozen = [part for part in self.lower_parts if isinstance(part, nn.Module)]
        with evaluating(frozen, except_for=self.patch_dropout if drop_patches else None):
            hidden, mask = Hidden(self.embed(inputs)), self.mask(inputs)
            for index in range(self.skip):
                if self.runs_fused(index):
                    hidden = self._run_fused_sequences(index, hidden, mask, save_inputs_only=False)
                else:
                    hidden = Hidden(self.call_block(self.blocks[index], hidden.sum(), mask))
        return hidden.sum()

    @property
    def patch_dropout(self) -> nn.Module | None:
        """Module that drops patches of images in training, or None."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of floating-point inputs."""
        return next(parameter for parameter in _parameters(self.embedding) if parameter.ndim > 1).dtype

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids of the embedding, or None for images."""
        modules = (module for part in self.embedding if isinstance(part, nn.Module) for module in part.modules())
        return next((module.num_embeddings for module in modules if isinstance(module, nn.Embedding)), None)

    @property
    def lower_parts(self) -> Sequence[Part]:
        """Modules and parameters below the cut; none at skip = 0, where the embedding trains too."""
        return (*self.embedding, *self.blocks[: self.skip]) if self.skip > 0 else ()

    def lower_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters below the cut."""
        return _parameters(self.lower_parts)

    def summary(self) -> dict[str, Any]:
        """Properties read from the caller's model, by name; equal for two towers of the same unaltered model."""
        known = {id(module) for module in self.model.modules()}

        def model_modules(block: nn.Module) -> list[int]:
            """Ids of the caller's modules in a block, which may be an `nn.Sequential` built by the tower."""
            if id(block) in known:
                return [id(block)]
            return [x for child in block.children() for x in model_modules(child)]

        def comparable(fusable: FusableBlock | str, parameters: list[nn.Parameter]) -> Any:
            return fusable if isinstance(fusable, str) else (list(map(id, parameters)), *fusable[1:])

        return {
            "its type": type(self),
            "its blocks": [model_modules(block) for block in self.blocks],
            "its embedding": list(map(id, self.embedding)),
            "its head": list(map(id, self.head)),
            "the weights or settings of a block": list(map(comparable, self._fusable, self._block_parameters)),
            "its exact reductions": self.reductions,
        }

    def lower_identity(self) -> dict[str, str | int]:
        """Everything that features at the cut depend on, by name: digests of parameters and buffers, and the cut."""
        return {
            "tower": type(self).__qualname__,
            "skipped blocks": self.skip,
            "embedding": digest_tensors(_named_tensors(self.embedding)),
            "lower blocks": digest_tensors(_named_tensors(self.blocks[: self.skip])),
        }

    def replace_parameters(self, replaced: Mapping[int, nn.Parameter]) -> None:
        """Follow a move that made new parameters, given by the id of the old one: a move to "meta" does."""

        def follow(parts: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(replaced.get(id(part), part) for part in parts)

        self.embedding, self.head, self.constants = map(follow, (self.embedding, self.head, self.constants))
        if self.can_fuse:
            self.read_blocks()

    def move_lower(self, device: torch.device) -> None:
        """Move the parameters and buffers below the cut to another device."""
        for part in self.lower_parts:
            if isinstance(part, nn.Parameter):
                part.data = part.data.to(device)
            elif part is not None:
                part.to(device)

    def upper_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters above the cut."""
        upper = (*(() if self.skip > 0 else self.embedding), *self.blocks[self.skip :], *self.head)
        constants = {id(parameter) for parameter in self.constants}
        yield from (parameter for parameter in _parameters(upper) if id(parameter) not in constants)

    def _run_fused_sequences(
        self, index: int, hidden: Hidden, mask: Tensor | None, *, save_inputs_only: bool
    ) -> Hidden:
        """Run fused block `index` over sequences [n, tokens, W]."""
        n, tokens, _ = hidden.stream.shape
        attention_fn = partial(attention.sequences, backend=self.attention_backend, n=n, mask=mask)
        rows = hidden.map(lambda x: x.flatten(0, 1))
        rows = self._run_fused_block(index, rows, attention_fn, save_inputs_only=save_inputs_only)
        return rows.map(lambda x: x.view(n, tokens, -1))

    def _run_fused_block(
        self,
        index: int,
        rows: Hidden,
        attention_fn: Callable,
        *,
        save_inputs_only: bool,
        query_rows: Tensor | None = None,
        separate_queries: bool = False,
    ) -> Hidden:
        """Run fused block `index` over rows [R, W]; `attention_fn` takes the number of heads as `heads`."""
        weights, activation, eps, heads = self.fused(index)
        dtype, device_type = weights.fc.dtype, rows.stream.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        attention_fn = partial(attention_fn, heads=heads)
        settings = BlockSettings(attention_fn, activation, eps, dtype, save_inputs_only, separate_queries)
        return fused_block(settings, rows, weights, query_rows)

    def _run_upper_block(self, index: int, hidden: Hidden, mask: Tensor | None, *, save_inputs_only: bool) -> Hidden:
        """Run one block above the cut; with `memory="min"`, a block that is not fused is recomputed in backward."""
        if self.runs_fused(index):
            return self._run_fused_sequences(index, hidden, mask, save_inputs_only=save_inputs_only)
        block = self.blocks[index]
        # A batch norm in training mode would update its statistics twice if it were recomputed.
        if self.memory == "min" and torch.is_grad_enabled() and not updates_statistics(block):
            return Hidden(checkpoint(self.call_block, block, hidden.sum(), mask, use_reentrant=False))
        return Hidden(self.call_block(block, hidden.sum(), mask))

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
        if not any(map(self.runs_fused, range(self.skip, len(self.blocks)))):
            return False
        if self.memory != "auto" or not torch.is_grad_enabled():
            return self.memory == "min"
        saved = hidden.numel() * hidden.element_size() * SAVED_WIDTHS
        if torch.is_autocast_enabled(hidden.device.type):
            saved += CAST_BYTES * hidden.shape[-1] ** 2
        saved *= (len(self.blocks) - self.skip) * self.runs
        # Asked once: reading the free memory takes 0.1 ms, and a captured graph must not ask the driver.
        key = saved, hidden.device
        if key not in self._decisions:
            self._decisions[key] = saved > free_bytes(hidden.device) / 2
        return self._decisions[key]


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
