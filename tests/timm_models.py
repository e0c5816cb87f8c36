"""Small CLIP models around timm's image towers and ResNets, random in every parameter and statistic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import open_clip
import torch
from open_clip.timm_model import TimmModel
from timm.layers import HybridEmbed, LayerNorm
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.models import openai_clip, tiny_clip

SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 12}
CLIP = {"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5)}
SIGLIP = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}
ROTARY = {"use_rot_pos_emb": True, "global_pool": "token"}
EVA02 = {**ROTARY, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
PE = {**ROTARY, "attn_type": "rope", "global_pool": "map", "attn_pool_num_heads": 4, "use_pre_transformer_norm": True}
GRID = {"ref_feat_shape": (4, 4), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy"}
FASTVIT = {
    "layers": (1, 1, 2, 1),
    "embed_dims": (8, 8, 16, 32),
    "token_mixers": ("repmixer", "repmixer", "repmixer", "attention"),
    "pos_embs": (None, None, None, partial(RepConditionalPosEnc, spatial_shape=(7, 7))),
    "se_downsamples": (False, False, True, True),
}


def timm_clip(trunk: nn.Module, size: int = 16, projection: bool = False) -> nn.Module:
    """Open_clip model around a trunk with 12 outputs, or 24 and a projection (timm_proj="linear" of its configs)."""
    head = nn.Sequential(nn.Dropout(0.0), nn.Linear(24, 12, bias=False)) if projection else nn.Sequential()
    visual = TimmModel.__new__(TimmModel)  # its constructor takes a name, not sizes
    nn.Module.__init__(visual)
    visual.trunk, visual.head, visual.image_size = trunk, head, (size, size)
    model = tiny_clip(family=open_clip.CustomTextCLIP)
    model.visual = randomise(visual)
    return model.double().eval()


def randomise(module: nn.Module) -> nn.Module:
    """Perturb every parameter, so that none is zero or one and no batch norm the identity."""
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


def seeded(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make the same model in each call."""

    @functools.wraps(make)
    def function(*arguments, **options) -> nn.Module:
        torch.manual_seed(0)
        return make(*arguments, **options)

    return function


# ---- transformers ----------------------------------------------------------------------------------------------------


@seeded
def vit(**rest) -> nn.Module:
    return timm_clip(VisionTransformer(**{**SHAPE, **rest}))


@seeded
def vit_siglip() -> nn.Module:
    return timm_clip(VisionTransformer(**{**SHAPE, **SIGLIP, "num_classes": 0}), projection=True)


def mobile_clip() -> nn.Module:
    stem = ConvStem(depth=2, channels=(8, 24), stride=(4, 2), kernel_size=(4, 2), padding=0, act_layer=nn.GELU)
    return vit(patch_size=1, no_embed_class=True, embed_layer=partial(HybridEmbed, backbone=stem, proj=False))


@seeded
def eva(**rest) -> nn.Module:
    return timm_clip(Eva(**{**SHAPE, "global_pool": "token", **rest}))


@seeded
def relative(**rest) -> nn.Module:
    return timm_clip(VisionTransformerRelPos(**{**SHAPE, **rest}))


@seeded
def naflex(**options) -> nn.Module:
    size = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 12}
    return timm_clip(NaFlexVit(**{**size, "pos_embed_grid_size": (2, 2), "global_pool": "avg", **options}))


# ---- towers in stages, on images of 32 × 32 pixels -------------------------------------------------------------------


@seeded
def convnext(projection: bool = False, **rest) -> nn.Module:
    shape = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 24), "num_classes": 0 if projection else 12}
    return timm_clip(ConvNeXt(**{**shape, **rest}), 32, projection)


@seeded
def fastvit(**rest) -> nn.Module:
    return timm_clip(FastVit(**FASTVIT, num_classes=12, **rest), 32)


def fused_fastvit() -> nn.Module:
    """Deployed form: every branch and batch norm merged into one convolution."""
    model = fastvit(stem_use_scale_branch=False, lkc_use_act=True)
    for module in model.visual.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    return model


@seeded
def swin(**rest) -> nn.Module:
    shape = {"img_size": 32, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    return timm_clip(SwinTransformer(**{**shape, "num_classes": 12, **rest}), 32)


@seeded
def vitamin(**rest) -> nn.Module:
    """Two convolutional stages of one and two blocks, and a transformer of two blocks."""
    backbone = MbConvStages(VitCfg(embed_dim=(8, 16, 24), depths=(1, 2, 1), stem_width=8))
    stem = {"patch_size": 1, "depth": 2, "embed_layer": partial(HybridEmbed, backbone=backbone, proj=False)}
    blocks = {"mlp_layer": GeGluMlp, "mlp_ratio": 2.0, "class_token": False, "global_pool": "avg"}
    return timm_clip(VisionTransformer(**{**SHAPE, "img_size": 32, **stem, **blocks, **rest}), 32)


def resnet() -> nn.Module:
    """Open_clip's own ResNet."""
    vision = {"layers": [1, 2, 1, 1], "width": 8, "image_size": 32, "patch_size": None}
    return randomise(tiny_clip(vision=vision)).double().eval()


def openai_resnet() -> nn.Module:
    """OpenAI's model with its own ResNet, in fp32."""
    return randomise(openai_clip(32, (1, 2, 1, 1), 8)).eval()
