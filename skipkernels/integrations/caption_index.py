"""Class ids of captions: a search by a hash of their tokens, on the device and without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor


class CaptionIndex:
    """The prompts of classes in ascending order of their hashes.

    A hash is a sum over the tokens with random weights, which wraps around. Of a million prompts two have equal hashes
    with a chance of 1 in 10^7; `find` compares the tokens too.

    Args:
        tokens: Prompts, integers [C, L], or [C, T, L] of T templates.
        device: Device of the captions.

    Raises:
        ValueError: If two classes have the same prompt.
    """

    def __init__(self, tokens: Tensor, device: torch.device):
        self.tokens, self.device = tokens, device
        prompts, generator = tokens.to(device).long().flatten(0, -2), torch.Generator().manual_seed(0)  # [C·T, L]
        self._weights = torch.randint(-(2**63), 2**63 - 1, prompts.shape[1:], generator=generator).to(device)  # [L]
        self._hashes, order = self._hash(prompts).sort()  # [C·T]
        self._prompts, self._class_ids = prompts[order], order // (len(prompts) // len(tokens))  # [C·T, L], [C·T]
        self._refuse_equal_prompts()

    def find(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Class ids [B] of captions [B, L], and whether each is the prompt of a class, bool [B]."""
        found = torch.searchsorted(self._hashes, self._hash(text)).clamp(max=len(self._hashes) - 1)  # [B]
        return self._class_ids[found], (self._prompts[found] == text).all(dim=1)

    def _hash(self, tokens: Tensor) -> Tensor:
        return (tokens.long() * self._weights).sum(dim=1)  # [n, L] -> [n]

    def _refuse_equal_prompts(self) -> None:
        hashes, class_ids = self._hashes, self._class_ids
        same = ((hashes[1:] == hashes[:-1]) & (class_ids[1:] != class_ids[:-1])).nonzero()
        if len(same):
            first, second = sorted(class_ids[same[0, 0] : same[0, 0] + 2].tolist())
            raise ValueError(
                f"ClassModel: classes {first} and {second} have the same prompt, so a caption does not tell which is "
                "meant. Rename one of them, or pass class ids [B] in place of tokens."
            )
