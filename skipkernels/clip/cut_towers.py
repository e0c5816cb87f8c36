"""The cut of both towers: their options, and their fused blocks, of which the first are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

from torch import nn

from ..options import AttentionName, Memory, Trainable
from ..towers.attention import SDPA, AttentionBackend
from ..towers.base import Cut, ImageTower, Tower
from ..towers.block import FusedBlock, fuse_blocks
from ..towers.text import TextTower


@dataclass(frozen=True)
class TowerOptions:
    """Arguments of SkipCLIP that concern the towers."""

    skip_layers: int | float | tuple[int | float, int | float]  # Of both towers, or (image, text); see `skip_of`
    memory: Memory
    attention: AttentionName
    trainable: Trainable
    train_text: bool
    train_logit_scale: bool
    chunk: int  # Images or prompts that run below the cut at a time

    def __post_init__(self) -> None:
        for name, allowed in (("memory", Memory), ("attention", AttentionName), ("trainable", Trainable)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ValueError(f"SkipCLIP: {name} must be one of {', '.join(get_args(allowed))}; got {value!r}.")
        if isinstance(self.skip_layers, tuple) and len(self.skip_layers) != 2:
            raise ValueError(
                f"SkipCLIP: skip_layers must be one number or a pair (image, text); got {self.skip_layers!r}."
            )

    def skip_of(self, tower: Tower) -> int:
        """Number of blocks that a tower skips; all of a text tower that does not train."""
        image, text = self.skip_layers if isinstance(self.skip_layers, tuple) else (self.skip_layers, self.skip_layers)
        if isinstance(tower, ImageTower):
            return blocks_to_skip(image, len(tower.blocks), "image")
        return blocks_to_skip(text, len(tower.blocks), "text") if self.train_text else len(tower.blocks)


def cut_towers(image: ImageTower, text: TextTower, options: TowerOptions) -> None:
    """Fuse the blocks of both towers in place, and cut the towers."""
    fuse_blocks([*image.blocks, *text.blocks])
    backend = SDPA if options.attention == "sdpa" else _xformers(image, text)
    for tower in (image, text):
        tower.cut = Cut(options.skip_of(tower), options.memory, backend, options.chunk)


def blocks_to_skip(skip: int | float, depth: int, tower: str) -> int:
    """Number of skipped blocks among the `depth` blocks of a tower: a float up to 1.0 is a share, so 1 is one block.

    >>> blocks_to_skip(0.5, 12, "image"), blocks_to_skip(5, 12, "text")
    (6, 5)
    """
    number = not isinstance(skip, bool) and isinstance(skip, (int, float))
    blocks = round(skip * depth) if isinstance(skip, float) and 0.0 <= skip <= 1.0 else skip
    if not (number and 0 <= blocks <= depth and blocks == int(blocks)):
        raise ValueError(
            f"SkipCLIP: skip_layers must be a whole number from 0 to {depth} for the {tower} tower, or a fraction of "
            f"its blocks such as 0.5, or a tuple (image, text) of either; got {skip!r}."
        )
    return int(blocks)


def _xformers(image: ImageTower, text: TextTower) -> AttentionBackend:
    from ..towers import xformers

    device = image.model.logit_scale.device
    for tower in (image, text):
        block = tower.blocks[0]
        if isinstance(block, FusedBlock) and block.why_not_fused() is None:
            weights, settings = block._read()
            out_proj = weights["out_proj"]
            reason = xformers.why_unavailable(device, out_proj.dtype, len(out_proj) // settings.heads)
            if reason is not None:
                raise ValueError(
                    f'SkipCLIP: attention="xformers" cannot be used here: {reason} Leave it at "sdpa", or use a GPU '
                    "and an xformers that was built for this PyTorch."
                )
    return xformers.backend()


@contextmanager
def restored_after_error(model: nn.Module) -> Iterator[None]:
    """Restore the classes of the blocks of a model, and `requires_grad` of its parameters, after an error."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []  # else `build_towers` raises
    kinds = [(module, type(module)) for module in modules]
    required_grad = [(p, p.requires_grad) for module in modules for p in module.parameters(recurse=False)]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in required_grad:
            parameter.requires_grad_(requires_grad)
        for module, kind in kinds:
            module.__class__ = kind  # of a block that was fused
        raise
