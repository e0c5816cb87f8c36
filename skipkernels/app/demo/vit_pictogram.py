"""Image tower of `pictogram-tiny`: a vision transformer on the maps of a small convolutional network."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def _convolution(inputs: int, outputs: int, stride: int, norm: bool) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)
    return [convolution, nn.BatchNorm2d(outputs)] if norm else [convolution]


class Residual(nn.Sequential):
    """Two convolutions and a skip connection, the identity at initialization."""

    def __init__(self, width: int, norm: bool):
        super().__init__(*_convolution(width, width, 1, norm), nn.ReLU(), *_convolution(width, width, 1, norm))
        last: Any = self[-1]
        nn.init.zeros_(last.weight)

    def forward(self, maps: Tensor) -> Tensor:
        """Transform maps, [B, W, H, H]."""
        return (maps + super().forward(maps)).relu()


class Stem(nn.Sequential):
    """Convolutions from images, [B, 3, S, S], to maps, [B, 128, S/8, S/8]; in pre-training with batch norms."""

    num_features = 128  # read by HybridEmbed

    def __init__(self, norm: bool = False):
        layers = [*_convolution(3, 32, 2, norm), nn.ReLU()]
        for inputs, outputs in ((32, 64), (64, self.num_features)):
            layers += [*_convolution(inputs, outputs, 2, norm), nn.ReLU()]
            layers += [Residual(outputs, norm), Residual(outputs, norm)]
        super().__init__(*layers)

    def without_norms(self) -> Stem:
        """Copy with the batch norms in the convolutions. Sets them to evaluation mode."""
        stem = Stem()
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        copies = [module for module in stem.modules() if isinstance(module, nn.Conv2d)]
        for copy, convolution, norm in zip(copies, convolutions, norms, strict=True):
            copy.load_state_dict(fuse_conv_bn_eval(convolution.eval(), norm.eval()).state_dict())
        return stem


default_cfgs = generate_default_cfgs({"vit_pictogram.untrained": {"input_size": (3, 32, 32)}})  # read by timm


@register_model
def vit_pictogram(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Build the tower, which timm and open_clip find by its name."""
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 1, "embed_dim": 128, "depth": 4, "num_heads": 4}
    embed = partial(HybridEmbed, backbone=Stem())
    return build_model_with_cfg(VisionTransformer, "vit_pictogram", pretrained, **sizes, embed_layer=embed, **options)
