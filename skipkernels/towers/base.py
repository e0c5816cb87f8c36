"""What SkipCLIP needs of a tower: embed, a list of blocks, a last block that may be pooled, a head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Memory = Literal["auto", "fast", "min"]


class UnsupportedModel(ValueError):
    """A model that no adapter handles exactly; the message says which part and why."""


class Tower(ABC):
    """A stack of blocks between an embedding and a head, cut below block `skip`.

    A tower holds no parameters of its own: it calls the caller's modules. Hidden states are [n, tokens, W].

    Attributes:
        blocks: The caller's blocks, in order.
        skip: Blocks below the cut. Set by SkipCLIP.
        memory: What an upper block keeps for backward. Set by SkipCLIP.
        reductions: Name → None where an exact reduction is on, else the reason why it is off.
    """

    blocks: nn.ModuleList
    skip: int = 0
    memory: Memory = "fast"
    reductions: dict[str, str | None]

    @abstractmethod
    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs to the hidden states in front of the first block, [n, tokens, W]."""

    @abstractmethod
    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block over every token, as the caller's module does it."""

    @abstractmethod
    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters in front of the first block."""

    @abstractmethod
    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters behind the last block."""

    def lower(self, inputs: Tensor) -> Tensor:
        """Inputs to the hidden states at the cut, [n, tokens, W]."""
        hidden = self.embed(inputs)
        for block in self.blocks[: self.skip]:
            hidden = self.run_block(block, hidden)
        return hidden

    @property
    def upper_blocks(self) -> list[Any]:
        """Blocks above the cut."""
        return list(self.blocks[self.skip :])

    def lower_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters below the cut; none at skip = 0, where the embedding trains too."""
        if self.skip > 0:
            yield from self.embedding_parameters()
            yield from self.blocks[: self.skip].parameters()

    def upper_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters above the cut."""
        if self.skip == 0:
            yield from self.embedding_parameters()
        yield from self.blocks[self.skip :].parameters()
        yield from self.head_parameters()

    @torch.compiler.disable  # it asks the system
    def keeps_little(self, hidden: Tensor, widths: int) -> bool:
        """Whether the upper blocks keep their input alone.

        With `memory="auto"` they do where `widths` numbers for each of those in `hidden` and each block would take more
        than half of the memory that is free.
        """
        if self.memory != "auto" or not torch.is_grad_enabled():
            return self.memory == "min"
        wanted = hidden.numel() * hidden.element_size() * widths * (len(self.blocks) - self.skip)
        return wanted > _free_bytes(hidden.device) / 2


class ImageTower(Tower):
    """A tower over images [n, 3, height, width]."""

    image_size: tuple[int, int]

    @abstractmethod
    def upper(self, hidden: Tensor) -> Tensor:
        """Hidden states at the cut [n, tokens, W] to image embeddings [n, D], not normalised."""


class TextTower(Tower):
    """A tower over the prompts of the task's classes.

    Above the cut tokens are rows: the prefix that all prompts share, once, then what follows it in each class.

    Attributes:
        tokens: [C, L] int64, cropped where that is exact.
        pooled: [C] int64, the position in each prompt that becomes the embedding.
    """

    tokens: Tensor
    pooled: Tensor

    @abstractmethod
    def rows(self, hidden: Tensor, class_ids: Tensor | None = None) -> Tensor:
        """Hidden states [n, L, W] of the prompts of `class_ids` (None: of all classes) to rows [R, W]."""

    @abstractmethod
    def upper(self, rows: Tensor, class_ids: Tensor | None = None, *, of_all: bool = True) -> Tensor:
        """Rows at the cut to the text embeddings [K, D] of `class_ids` (None: of all classes), not normalised.

        Args:
            rows: [R, W] of all classes, or, unless `of_all`, of `class_ids` alone.
            class_ids: [K] int64.
            of_all: Whose rows they are.
        """


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    with meminfo.open() as lines:  # at each step: no further than to the third line
        available = next((line for line in lines if line.startswith("MemAvailable")), "MemAvailable: 0 kB")
    return int(available.split()[1]) * 1024
