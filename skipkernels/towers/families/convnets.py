"""Image towers whose blocks come in stages: ConvNeXt, FastViT and Swin of timm, CLIP's ResNets of open_clip and OpenAI.

They are chains of the caller's modules. What stands in front of a stage (downsampling, positions) belongs to its first
block, and a tower may be cut between any two blocks. What they pass on are maps, [n, C, height, width], or with the
channels last.

Batch norms below the cut are frozen: evaluation mode, statistics as they are. Above it they do what they do in the
caller's own model: in training mode they normalise by the batch and count it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..base import ImageTower

AS_MODULES = "blocks in stages run as your modules"


def in_order(stages: Iterable[tuple[Sequence[nn.Module], Iterable[nn.Module]]]) -> list[nn.Module]:
    """The blocks of stages (what stands in front, its blocks), as one list."""
    blocks: list[nn.Module] = []
    waiting: list[nn.Module] = []
    for front, stage in stages:
        waiting += front
        for block in stage:
            blocks.append(nn.Sequential(*waiting, block) if waiting else block)
            waiting = []
    return blocks


class StagedTower(ImageTower):
    """A chain of modules.

    Args:
        model: The caller's.
        image_size: Height and width.
        embedding: What is in front of the first stage, in the order in which it is called.
        stages: What stands in front of each, and its blocks.
        head: What is behind the last, in order.
    """

    def __init__(
        self,
        model: Any,
        image_size: Iterable[int],
        embedding: Sequence[nn.Module],
        stages: Iterable[tuple[Sequence[nn.Module], Iterable[nn.Module]]],
        head: Sequence[nn.Module],
    ):
        self.model, self.embedding, self.blocks, self.head = model, embedding, in_order(stages), head
        height, width = image_size
        self.image_size = height, width
        self._enter, self._leave = nn.Sequential(*embedding), nn.Sequential(*head)
        self._set_reductions(AS_MODULES, AS_MODULES)

    def own(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.model.encode_image(inputs)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self._enter(inputs)

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        return block(hidden)

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self._leave(hidden)


class ResNetTower(StagedTower):
    """`model.visual` where it is a `ModifiedResNet`, of open_clip or of OpenAI's clip."""

    def __init__(self, model: Any):
        visual = model.visual
        size = getattr(visual, "image_size", None) or visual.input_resolution
        act = "act" if hasattr(visual, "act1") else "relu"
        stem = [getattr(visual, f"{name}{i}") for i in (1, 2, 3) for name in ("conv", "bn", act)]
        stages = [((), getattr(visual, f"layer{i}")) for i in (1, 2, 3, 4)]
        super().__init__(model, (size, size), [*stem, visual.avgpool], stages, [visual.attnpool])

    def embed(self, inputs: Tensor) -> Tensor:
        """Images to maps; OpenAI's model takes images of any dtype."""
        return super().embed(inputs.to(self.dtype))


def convnext_tower(model: Any) -> StagedTower:
    """`model.visual` where its trunk is timm's `ConvNeXt`."""
    visual, trunk = model.visual, model.visual.trunk
    stages = [([stage.downsample], stage.blocks) for stage in trunk.stages]
    return StagedTower(model, visual.image_size, [trunk.stem], stages, [trunk.norm_pre, trunk.head, visual.head])


def fastvit_tower(model: Any) -> StagedTower:
    """`model.visual` where its trunk is timm's `FastVit`."""
    visual, trunk = model.visual, model.visual.trunk
    stages = [([stage.downsample, stage.pos_emb], stage.blocks) for stage in trunk.stages]
    return StagedTower(model, visual.image_size, [trunk.stem], stages, [trunk.final_conv, trunk.head, visual.head])


def swin_tower(model: Any) -> StagedTower:
    """`model.visual` where its trunk is timm's `SwinTransformer`."""
    visual, trunk = model.visual, model.visual.trunk
    stages = [([stage.downsample], stage.blocks) for stage in trunk.layers]
    size = trunk.patch_embed.img_size
    return StagedTower(model, size, [trunk.patch_embed], stages, [trunk.norm, trunk.head, visual.head])
