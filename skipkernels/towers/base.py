"""What SkipCLIP needs of a tower: embed, a list of blocks, a last block that may be pooled, a head.

A family of models says how it embeds, what its blocks are and how it ends; how blocks run is the same for all of them.
Where a block is the pre-norm transformer block of `block.py` it is one autograd node, above the cut and below it; any
other block is called as the module that it is.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..memory import free_bytes
from ..store import digest_tensors
from . import attention
from .eligibility import lacks
from .fused_block import KEPT, Parts, Spec, flattened, run_block
from .modes import counts, evaluating
from .prompts import SharedPrefix
from .reductions import Reduction

Memory = Literal["auto", "fast", "min"]
Part = nn.Module | nn.Parameter | None


class UnsupportedModel(ValueError):
    """A model that no adapter handles exactly; the message says which part and why."""


class Tower(ABC):
    """A stack of blocks between an embedding and a head, cut below block `skip`.

    A tower holds no parameters of its own: it calls the caller's modules. Hidden states are [n, tokens, W], or what
    else the blocks of a family pass on, [n, …].

    Attributes:
        model: The caller's.
        blocks: The caller's blocks, in order; a sequence of modules.
        embedding: What is in front of the first block: modules and single parameters.
        head: What is behind the last block.
        fixed: Parameters that the model never trains.
        skip: Blocks below the cut. Set by SkipCLIP.
        memory: What an upper block keeps for backward. Set by SkipCLIP.
        attention: Who computes attention in blocks that run as nodes. Set by SkipCLIP.
        reductions: Name → `Reduction`.
    """

    model: Any
    blocks: Any
    embedding: Sequence[Part]
    head: Sequence[Part]
    fixed: Sequence[nn.Parameter] = ()
    skip: int = 0
    memory: Memory = "fast"
    attention: attention.Backend = attention.SDPA
    reductions: dict[str, Reduction]
    _read: Sequence[Parts | str] = ()  # of each block, or the reason why it is not fused; empty: no block is

    @abstractmethod
    def own(self, inputs: Tensor) -> Tensor:
        """The embeddings [n, D] that the caller's model gives itself, normalised or not."""

    @abstractmethod
    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs to the hidden states in front of the first block."""

    @abstractmethod
    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """One block over every token, by the caller's module."""

    @staticmethod
    def parts(block: Any) -> Parts:
        """What a block is made of; asked only where `fused_block` is enabled."""
        raise NotImplementedError

    @staticmethod
    def obstacle(block: Any) -> str | None:
        """Why a block cannot be run as one node, which sees its weights alone, or None."""
        return "a block runs as your module"

    def read(self, block: Any) -> Parts | str:
        """What a block is made of, or why it cannot be run as one node."""
        reason = self.obstacle(block)
        if reason is not None:
            return reason
        parts = self.parts(block)
        return lacks(parts.weights) or parts

    def read_blocks(self) -> tuple[str | None, str | None]:
        """Read every block; return why not all are fused, and why the last one is not, or None."""
        self._read = [self.read(block) for block in self.blocks]
        reasons = [read for read in self._read if isinstance(read, str)]
        if not reasons:
            return None, None
        some = "" if len(reasons) == len(self._read) else f"{len(reasons)} of {len(self._read)} blocks: "
        return some + reasons[0], self._read[-1] if isinstance(self._read[-1], str) else None

    @property
    def can_fuse(self) -> bool:
        """True if blocks of this family are fused, unless a block was altered."""
        return len(self._read) > 0

    def is_fused(self, index: int) -> bool:
        """True if block `index` runs as one autograd node."""
        return index < len(self._read) and not isinstance(self._read[index], str)

    def parts_of(self, index: int) -> Parts:
        """Weights and settings of fused block `index`. A layer scale is multiplied into them at each call."""
        parts = self._read[index]
        assert not isinstance(parts, str)
        return (
            parts
            if all(isinstance(x, nn.Parameter) for x in flattened(parts.weights))
            else self.parts(self.blocks[index])
        )

    def mask(self, inputs: Tensor) -> Tensor | None:
        """What is added to the attention's logits, [1 or n, 1, tokens, tokens], or None."""
        return None

    def lower(self, inputs: Tensor, *, draw: bool = False) -> Tensor:
        """Inputs to the hidden states at the cut.

        Below the cut everything is in evaluation mode: what a cache keeps is no sample of a dropout, and the statistics
        of batch norms stay what they are. With `draw` patches are dropped as in training, if the model does that.
        """
        still = [part for part in self.lower_parts if isinstance(part, nn.Module)]
        with evaluating(still, except_for=self.patch_dropout if draw else None):
            hidden, mask = self.embed(inputs), self.mask(inputs)
            for index in range(self.skip):
                if self.is_fused(index):
                    hidden = self._fused(index, hidden, mask, minimal=False)
                else:
                    hidden = self.call_block(self.blocks[index], hidden, mask)
        return hidden

    @property
    def patch_dropout(self) -> nn.Module | None:
        """The module that drops patches of images in training, if there is one."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs, if they are numbers."""
        return next(parameter for parameter in _parameters(self.embedding) if parameter.ndim > 1).dtype

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids that the embedding has, or None for images."""
        modules = (module for part in self.embedding if isinstance(part, nn.Module) for module in part.modules())
        return next((module.num_embeddings for module in modules if isinstance(module, nn.Embedding)), None)

    @property
    def lower_parts(self) -> Sequence[Part]:
        """What is below the cut; nothing at skip = 0, where the embedding trains too."""
        return (*self.embedding, *self.blocks[: self.skip]) if self.skip > 0 else ()

    def lower_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters below the cut."""
        return _parameters(self.lower_parts)

    def summary(self) -> dict[str, Any]:
        """What is read off the caller's model, by name, in values that two towers of one model can be compared by."""
        known = {id(module) for module in self.model.modules()}

        def own(block: nn.Module) -> list[int]:
            """The caller's modules in a block; a chain of them may be ours."""
            return [id(block)] if id(block) in known else [x for child in block.children() for x in own(child)]

        def read(parts: Parts | str) -> Any:
            if isinstance(parts, str):
                return parts
            weights = [id(x) for x in flattened(parts.weights) if isinstance(x, nn.Parameter)]
            return weights, parts.kind, parts.eps, parts.heads

        return {
            "its type": type(self),
            "its blocks": [own(block) for block in self.blocks],
            "its embedding": list(map(id, self.embedding)),
            "its head": list(map(id, self.head)),
            "the weights or settings of a block": list(map(read, self._read)),
            "its exact reductions": self.reductions,
        }

    def lower_identity(self) -> dict[str, str | int]:
        """What features at the cut depend on, by name: digests of parameters and buffers, and the cut itself."""
        return {
            "tower": type(self).__qualname__,
            "skipped blocks": self.skip,
            "embedding": digest_tensors(_named_tensors(self.embedding)),
            "lower blocks": digest_tensors(_named_tensors(self.blocks[: self.skip])),
        }

    def move_lower(self, device: torch.device) -> None:
        """Move what is below the cut, parameters and buffers, to another device."""
        for part in self.lower_parts:
            if isinstance(part, nn.Parameter):
                part.data = part.data.to(device)
            elif part is not None:
                part.to(device)

    def upper_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters above the cut."""
        upper = (*(() if self.skip > 0 else self.embedding), *self.blocks[self.skip :], *self.head)
        fixed = {id(parameter) for parameter in self.fixed}
        yield from (parameter for parameter in _parameters(upper) if id(parameter) not in fixed)

    def _fused(self, index: int, hidden: Tensor, mask: Tensor | None, *, minimal: bool) -> Tensor:
        """One fused block over sequences [n, tokens, W]."""
        attend = partial(attention.sequences, by=self.attention, n=len(hidden), mask=mask)
        return self._node(index, hidden.flatten(0, 1), attend, minimal=minimal).view_as(hidden)

    def _node(
        self, index: int, rows: Tensor, attention: Callable, *, minimal: bool, wanted: Tensor | None = None
    ) -> Tensor:
        """One fused block over rows [R, W]; `attention` takes the number of heads as `heads`."""
        weights, kind, eps, heads = self.parts_of(index)
        dtype = weights.fc.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        return run_block(Spec(partial(attention, heads=heads), kind, eps, dtype, minimal), rows, weights, wanted)

    def _upper_block(self, index: int, hidden: Tensor, mask: Tensor | None, *, minimal: bool) -> Tensor:
        """One block above the cut, fused or as the caller's module. With `memory="min"` it runs again in backward.

        A module with a batch norm in training mode is not run again: it would update its statistics twice.
        """
        if self.is_fused(index):
            return self._fused(index, hidden, mask, minimal=minimal)
        block = self.blocks[index]
        if self.memory == "min" and torch.is_grad_enabled() and not counts(block):
            return checkpoint(self.call_block, block, hidden, mask, use_reentrant=False)
        return self.call_block(block, hidden, mask)

    @torch.compiler.disable  # it asks the system
    def keeps_little(self, hidden: Tensor) -> bool:
        """Whether the upper blocks keep their input alone.

        With `memory="auto"` they do where all they keep would take more than half of the memory that is free.
        """
        if not any(map(self.is_fused, range(self.skip, len(self.blocks)))):
            return False
        if self.memory != "auto" or not torch.is_grad_enabled():
            return self.memory == "min"
        wanted = hidden.numel() * hidden.element_size() * KEPT * (len(self.blocks) - self.skip)
        return wanted > free_bytes(hidden.device) / 2


class ImageTower(Tower):
    """A tower over images [n, 3, height, width]."""

    image_size: tuple[int, int]

    def encoder(self) -> nn.Module:
        """The caller's image encoder by itself: images to embeddings [n, D], or a tuple that begins with them."""
        return self.model.visual

    def _set_reductions(self, fused_block: str | None, pooled_last_block: str | None) -> None:
        """Take the reason against each reduction, or None."""
        self.reductions = {
            "fused_block": Reduction.unless(fused_block),
            "pooled_last_block": Reduction.unless(pooled_last_block),
        }

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states behind the last block to embeddings [n, D].

        They are those of every token, or of the first alone where `pooled_last_block` is on.
        """

    def upper(self, hidden: Tensor) -> Tensor:
        """Hidden states at the cut to image embeddings [n, D], not normalised."""
        depth, minimal = len(self.blocks), self.keeps_little(hidden)
        pools = self.skip < depth and self.reductions["pooled_last_block"].enabled
        for index in range(self.skip, depth - pools):
            hidden = self._upper_block(index, hidden, None, minimal=minimal)
        if not pools:
            return self.finish(hidden)
        n, tokens, _ = hidden.shape
        first = torch.arange(n, device=hidden.device) * tokens
        attend = partial(attention.pooled, mask=None)
        return self.finish(self._node(depth - 1, hidden.flatten(0, 1), attend, minimal=minimal, wanted=first)[:, None])


class TextTower(Tower):
    """A tower over the prompts of the task's classes, each of which becomes an embedding at one of its tokens.

    Above the cut tokens are rows: the prefix that all prompts share, once, then what follows it in each class.

    Attributes:
        tokens: [C, L] int64, cropped where that is exact.
        pooled: [C] int64, the position in each prompt that becomes the embedding.
        prompts: Where the tokens of the prompts are, if their prefix runs once.
    """

    tokens: Tensor
    pooled: Tensor
    prompts: SharedPrefix | None = None

    def take(
        self,
        tokens: Tensor,
        pooled: Tensor,
        one_node: str | None,
        last_block: str | None = None,
        *,
        causal: str | None = None,
        crop: str | None = None,
        length: int | None = None,
        blind: bool = False,
    ) -> None:
        """Take the prompts, with every reduction that holds.

        Args:
            tokens: [C, L] int64.
            pooled: [C] int64.
            one_node: Why not all blocks are fused, or None.
            last_block: Why the last block is not fused, or None.
            causal: Why the mask is not the causal one.
            crop: Why what comes last may not be left out.
            length: Tokens that are seen by any pooled one; by default as far as the last of those.
            blind: The pooled token sees what is in front of it and not itself.
        """
        self.pooled = pooled
        self.tokens = tokens if crop else tokens[:, : length or int(pooled.max()) + 1].contiguous()
        prompts = SharedPrefix(self.tokens, pooled, blind=blind)
        alone = causal or one_node or (None if prompts.length else "the prompts begin with different tokens")
        self.prompts = prompts if alone is None else None
        reasons = {
            "text_crop": crop,
            "shared_prefix": alone,
            "fused_block": one_node,
            "pooled_last_block": last_block if self._read else one_node,
        }
        self.reductions = {name: Reduction.unless(reason) for name, reason in reasons.items()}

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move what is beside the model's modules."""
        self.tokens, self.pooled = fn(self.tokens), fn(self.pooled)
        if self.prompts is not None:
            self.prompts.apply(fn)

    def summary(self) -> dict[str, Any]:  # noqa: D102
        return super().summary() | {
            "the tokens that are seen": self.tokens.tolist(),
            "the positions that become embeddings": self.pooled.tolist(),
        }

    def mask(self, inputs: Tensor) -> Tensor | None:
        """The causal one, unless a family has another."""
        length = inputs.shape[1]
        return torch.full((1, 1, length, length), -torch.inf, device=inputs.device).triu(1)

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states [K, W] of the pooled tokens behind the last block to embeddings [K, D]."""

    def rows(self, hidden: Tensor, class_ids: Tensor | None = None, *, packed: bool = False) -> Tensor:
        """Hidden states [n, L, W] of the prompts of `class_ids` (None: of all classes) to rows [R, W].

        With `packed` they lie as among those of all classes.
        """
        return hidden.flatten(0, 1) if self.prompts is None else self.prompts.rows(hidden, class_ids, packed=packed)

    @property
    def row_count(self) -> int:
        """R, rows of all classes."""
        return self.tokens.numel() if self.prompts is None else self.prompts.count

    def places(self, class_ids: Tensor) -> Tensor:
        """Which of the rows of all classes are those of `class_ids` alone, int64, as `upper` takes them."""
        if self.prompts is not None:
            return self.prompts.choose(self.row_count, class_ids.device, class_ids, of_all=True).picked
        L = self.tokens.shape[1]
        return (L * class_ids[:, None] + torch.arange(L, device=class_ids.device)).flatten()

    def upper(self, rows: Tensor, class_ids: Tensor | None = None, *, of_all: bool = True) -> Tensor:
        """Rows at the cut to the text embeddings [K, D] of `class_ids` (None: of all classes), not normalised.

        Args:
            rows: [R, W] of all classes, or, unless `of_all`, of `class_ids` alone.
            class_ids: [K] int64.
            of_all: Whose rows they are.
        """
        run = self._run_alone if self.prompts is None else self._run_behind_prefix
        return self.finish(run(rows, class_ids, of_all))

    def prompts_of(self, rows: Tensor, class_ids: Tensor | None, of_all: bool) -> tuple[Tensor, Tensor]:
        """Hidden states [K, L, W] and tokens [K, L] of some classes, where each prompt stands by itself in `rows`."""
        tokens, there = self.tokens, len(self.tokens) if class_ids is None or of_all else len(class_ids)
        hidden = rows.unflatten(0, (there, -1))
        if class_ids is not None:
            hidden, tokens = hidden[class_ids] if of_all else hidden, tokens[class_ids]
        return hidden, tokens.to(rows.device)

    def _run_alone(self, rows: Tensor, class_ids: Tensor | None, of_all: bool) -> Tensor:
        """Hidden states [K, W] of the pooled tokens behind the last block, each prompt by itself."""
        hidden, tokens = self.prompts_of(rows, class_ids, of_all)
        ends, mask = (self.pooled if class_ids is None else self.pooled[class_ids]).to(rows.device), self.mask(tokens)
        n, L, _ = hidden.shape
        at_end, depth = torch.arange(n, device=rows.device) * L + ends, len(self.blocks)
        minimal, pools = self.keeps_little(hidden), self.skip < depth and self.reductions["pooled_last_block"].enabled
        for index in range(self.skip, depth - pools):
            hidden = self._upper_block(index, hidden, mask, minimal=minimal)
        if not pools:
            return hidden.flatten(0, 1)[at_end]
        if mask is not None:
            mask = mask.expand(n, 1, L, L)[torch.arange(n, device=rows.device), 0, ends]
        attend = partial(attention.pooled, mask=mask)
        return self._node(depth - 1, hidden.flatten(0, 1), attend, minimal=minimal, wanted=at_end)

    def _run_behind_prefix(self, rows: Tensor, class_ids: Tensor | None, of_all: bool) -> Tensor:
        """Hidden states [K, W] of the pooled tokens behind the last block, the prefix computed once for all."""
        assert self.prompts is not None
        chosen = self.prompts.choose(len(rows), rows.device, class_ids, of_all)
        rows = rows.index_select(0, chosen.picked)
        depth, minimal = len(self.blocks), self.keeps_little(rows)
        if self.skip == depth:
            return rows[chosen.ends]
        attend = partial(
            attention.suffixes,
            by=self.attention,
            prefix=self.prompts.length,
            offsets=chosen.offsets,
            max_length=self.prompts.longest,
            blind=chosen.ends if self.prompts.blind else None,
        )
        for index in range(self.skip, depth - 1):
            rows = self._node(index, rows, attend, minimal=minimal)
        last = partial(attend, queries=chosen.ends)
        return self._node(depth - 1, rows, last, minimal=minimal, wanted=chosen.ends)


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
