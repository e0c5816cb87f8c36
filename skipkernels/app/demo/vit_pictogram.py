"""Image tower of `pictogram-tiny`: a vision transformer on the maps of a small convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Layers = Callable[[int, int, int], list[nn.Module]]
"""Function from the inputs, outputs and stride of a convolution to its layers."""


def convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """Make the layers of a convolution."""
    return [nn.Conv2d(inputs, outputs, 3, stride, 1)]


class Residual(nn.Sequential):
    """Two convolutions and a skip connection, the identity at initialization."""

    def __init__(self, width: int, layers: Layers):
        super().__init__(*layers(width, width, 1), nn.ReLU(), *layers(width, width, 1))
        last: Any = self[-1]
        nn.init.zeros_(last.weight)

    def forward(self, maps: Tensor) -> Tensor:
        """Transform maps, [B, W, H, H]."""
        return (maps + super().forward(maps)).relu()


class Stem(nn.Sequential):
    """Convolutions from images, [B, 3, S, S], to maps, [B, 128, S/8, S/8]; pre-training has other `layers` of each."""

    num_features = 128  # read by HybridEmbed

    def __init__(self, layers: Layers = convolution):
        parts = [*layers(3, 32, 2), nn.ReLU()]
        for inputs, outputs in ((32, 64), (64, self.num_features)):
            parts += [*layers(inputs, outputs, 2), nn.ReLU(), Residual(outputs, layers), Residual(outputs, layers)]
        super().__init__(*parts)


default_cfgs = generate_default_cfgs({"vit_pictogram.untrained": {"input_size": (3, 32, 32)}})  # read by timm


@register_model
def vit_pictogram(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Build the tower, which timm and open_clip find by its name."""
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 1, "embed_dim": 128, "depth": 4, "num_heads": 4}
    embed = partial(HybridEmbed, backbone=Stem())
    return build_model_with_cfg(VisionTransformer, "vit_pictogram", pretrained, **sizes, embed_layer=embed, **options)
