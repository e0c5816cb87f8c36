"""What SkipCLIP needs of a tower: embed, a list of blocks, a last block that may be pooled, a head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn


class UnsupportedModel(ValueError):
    """A model that no adapter handles exactly; the message says which part and why."""


class Tower(ABC):
    """A stack of blocks between an embedding and a head, cut below block `skip`.

    A tower holds no parameters of its own: it calls the caller's modules. Hidden states are [n, tokens, W].

    Attributes:
        blocks: The caller's blocks, in order.
        skip: Blocks below the cut. Set by SkipCLIP.
        reductions: Name → None where an exact reduction is on, else the reason why it is off.
    """

    blocks: nn.ModuleList
    skip: int = 0
    reductions: dict[str, str | None]

    @abstractmethod
    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs to the hidden states in front of the first block, [n, tokens, W]."""

    @abstractmethod
    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block over every token."""

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


class ImageTower(Tower):
    """A tower over images [n, 3, height, width]."""

    image_size: tuple[int, int]

    @abstractmethod
    def upper(self, hidden: Tensor) -> Tensor:
        """Hidden states at the cut to image embeddings [n, D], not normalised."""


class TextTower(Tower):
    """A tower over the prompts of the task's classes.

    Attributes:
        tokens: [C, L] int64, cropped where that is exact.
        pooled: [C] int64, the position in each prompt that becomes the embedding.
    """

    tokens: Tensor
    pooled: Tensor

    @abstractmethod
    def upper(self, hidden: Tensor, class_ids: Tensor | None) -> Tensor:
        """Hidden states at the cut of `class_ids` (None: of all classes) to text embeddings [n, D], not normalised."""
