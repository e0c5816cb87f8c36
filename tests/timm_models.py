"""Small open_clip models whose image tower is one of timm's, for tests: real classes, few blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import open_clip
import torch
from models import tiny_clip
from open_clip.timm_model import TimmModel
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from skipkernels.towers import ImageTower

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


def timm_clip(trunk: nn.Module, image_size: int = 16, head: nn.Module | None = None) -> nn.Module:
    """An open_clip model in fp64 around a trunk, which ends in 12 numbers or in as many as `head` takes."""
    visual = TimmModel.__new__(TimmModel)  # its constructor knows timm's models by name alone
    nn.Module.__init__(visual)
    visual.trunk, visual.head = trunk, nn.Sequential() if head is None else head
    visual.image_size = (image_size, image_size)
    model = tiny_clip(family=open_clip.CustomTextCLIP)
    model.visual = randomise(visual)
    return model.double().eval()


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter moved a little, so that none is zero or one, and no batch norm the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for norm in batch_norms(module):
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    return module


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def modules_below(tower: ImageTower) -> Iterator[nn.Module]:
    """What is below the cut, if there is one."""
    if tower.skip:
        yield from (part for part in (*tower.embedding, *tower.blocks[: tower.skip]) if isinstance(part, nn.Module))


def vitamin(**rest) -> nn.Module:
    """Two stages of convolutions, of one and two blocks, and a transformer of two."""
    backbone = MbConvStages(VitCfg(embed_dim=(8, 16, 24), depths=(1, 2, 1), stem_width=8))
    shape = {"img_size": 32, "patch_size": 1, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 12}
    mlp = {"mlp_layer": GeGluMlp, "mlp_ratio": 2.0}
    pooled = {"class_token": False, "global_pool": "avg"}
    embed = partial(HybridEmbed, backbone=backbone, proj=False)
    return VisionTransformer(embed_layer=embed, **{**shape, **mlp, **pooled, **rest})
