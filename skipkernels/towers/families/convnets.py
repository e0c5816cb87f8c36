"""Image towers with blocks in stages: ConvNeXt, FastViT and Swin of timm, ResNets of open_clip and OpenAI.

A tower is a chain of the caller's modules. The layers in front of a stage (downsampling, positions) belong to its first
block, and a tower may be cut between any two blocks. Hidden states are maps, [n, C, height, width] or channels last.

Batch norms below the cut are frozen: evaluation mode, constant statistics. Above the cut they run as in the caller's
model: in training mode they normalise by the batch and update their statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..image import ImageTower

NOT_FUSED = "blocks in stages run their own forward"


def chain_stages(stages: Iterable[tuple[Sequence[nn.Module], Iterable[nn.Module]]]) -> list[nn.Module]:
    """List the blocks of all stages (layers in front, blocks); a first block includes the layers in front of it."""
    blocks: list[nn.Module] = []
    pending: list[nn.Module] = []
    for front, stage in stages:
        pending += front
        for block in stage:
            blocks.append(nn.Sequential(*pending, block) if pending else block)
            pending = []
    return blocks


class StagedTower(ImageTower):
    """Image tower that is a chain of modules; `stages` are the modules in front of each stage, and its blocks."""

    def __init__(
        self,
        model: Any,
        image_size: Iterable[int],
        embedding: Sequence[nn.Module],
        stages: Iterable[tuple[Sequence[nn.Module], Iterable[nn.Module]]],
        head: Sequence[nn.Module],
    ):
        self.model, self.embedding, self.blocks, self.head = model, embedding, chain_stages(stages), head
        height, width = image_size
        self.image_size = height, width
        self._embedding_chain, self._head_chain = nn.Sequential(*embedding), nn.Sequential(*head)

    def why_never_rows(self) -> str | None:
        return NOT_FUSED

    def embed(self, inputs: Tensor) -> Tensor:
        return self._embedding_chain(inputs)

    def finish(self, hidden: Tensor) -> Tensor:
        return self._head_chain(hidden)


class ResNetTower(StagedTower):
    """Image tower with a `ModifiedResNet` of open_clip or OpenAI's clip as `visual`."""

    def __init__(self, model: Any):
        visual = model.visual
        size = getattr(visual, "image_size", None) or visual.input_resolution
        act = "act" if hasattr(visual, "act1") else "relu"
        stem = [getattr(visual, f"{name}{i}") for i in (1, 2, 3) for name in ("conv", "bn", act)]
        stages = [((), getattr(visual, f"layer{i}")) for i in (1, 2, 3, 4)]
        super().__init__(model, (size, size), [*stem, visual.avgpool], stages, [visual.attnpool])

    def embed(self, inputs: Tensor) -> Tensor:
        """Map images of any dtype, as in OpenAI's model, to feature maps."""
        return super().embed(inputs.to(self.dtype))


def convnext_tower(model: Any) -> StagedTower:
    """Build the image tower with timm's `ConvNeXt` as its trunk."""
    visual, trunk = model.visual, model.visual.trunk
    stages = [([stage.downsample], stage.blocks) for stage in trunk.stages]
    return StagedTower(model, visual.image_size, [trunk.stem], stages, [trunk.norm_pre, trunk.head, visual.head])


def fastvit_tower(model: Any) -> StagedTower:
    """Build the image tower with timm's `FastVit` as its trunk."""
    visual, trunk = model.visual, model.visual.trunk
    stages = [([stage.downsample, stage.pos_emb], stage.blocks) for stage in trunk.stages]
    return StagedTower(model, visual.image_size, [trunk.stem], stages, [trunk.final_conv, trunk.head, visual.head])


def swin_tower(model: Any) -> StagedTower:
    """Build the image tower with timm's `SwinTransformer` as its trunk."""
    visual, trunk = model.visual, model.visual.trunk
    stages = [([stage.downsample], stage.blocks) for stage in trunk.layers]
    size = trunk.patch_embed.img_size
    return StagedTower(model, size, [trunk.patch_embed], stages, [trunk.norm, trunk.head, visual.head])
