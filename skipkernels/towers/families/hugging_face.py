"""Hugging Face's `CLIPModel`, `MetaClip2Model`, `SiglipModel` and `Siglip2Model`.

CLIP and MetaCLIP 2: as OpenAI's model, but with separate projections of query, key and value. SigLIP: no class token,
no norm in front of the blocks; images are pooled by attention of a learned probe, texts at their last token, without a
mask, through a linear layer. SigLIP 2 (NaFlex) takes patches, which are made here of images of one size, as its
processor does, without padding. Fused blocks compute what "sdpa", "eager" and "flash_attention_…" of transformers do;
with a registered attention function they run their own forward.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, QuickGELUActivation
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.clip import modeling_clip
from transformers.models.metaclip_2 import modeling_metaclip_2
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2

from ..alterations import Submodules, submodules
from ..base import UnsupportedModel
from ..block import BlockInput, FusedBlock
from ..fused.weights import BlockSettings, GivenWeights
from ..image import ImageTower
from ..prompts import Pooling, Prompts
from ..text import TextTower
from .reading import weights_of, weights_of_parts

_TANH = type(modeling_clip.ACT2FN["gelu_pytorch_tanh"])  # its name differs between major versions
_ACTIVATIONS = {GELUActivation: "gelu", QuickGELUActivation: "quick_gelu", _TANH: "gelu_tanh"}


class HuggingFaceBlock(FusedBlock):
    """`CLIPEncoderLayer`, `MetaClip2EncoderLayer`, `SiglipEncoderLayer` and `Siglip2EncoderLayer` of transformers."""

    linear_weights = (
        *(f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")), "mlp.fc1.weight", "mlp.fc2.weight"
    )  # fmt: skip

    def read_weights(self) -> tuple[GivenWeights, BlockSettings]:
        parts = self._modules
        norm_1, norm_2, attention = parts["layer_norm1"], parts["layer_norm2"], parts["self_attn"]
        layers, mlp = attention._modules, parts["mlp"]._modules
        weights = {
            **weights_of("norm_1", norm_1),
            **weights_of_parts("in_proj", [layers[name] for name in ("q_proj", "k_proj", "v_proj")]),
            **weights_of("out_proj", layers["out_proj"]),
            **weights_of("norm_2", norm_2),
            **weights_of("mlp_in", mlp["fc1"]),
            **weights_of("mlp_out", mlp["fc2"]),
        }
        heads = attention.embed_dim // attention.head_dim  # its forward ignores `num_heads`
        kind, eps = _ACTIVATIONS[type(mlp["activation_fn"])], {"norm_1": norm_1.eps, "norm_2": norm_2.eps}
        return weights, BlockSettings(kind, eps, heads)

    def _parse_input(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> BlockInput | None:
        if any(value is not None and value is not False for value in kwargs.values()):
            return None  # such as output_attentions
        if attention_mask is None:
            ignores = self._modules["self_attn"].config._attn_implementation == "eager"  # which knows the mask alone
            return BlockInput(hidden_states, None, bool(is_causal) and not ignores)
        if attention_mask.ndim != 4:  # of flash attention and flex attention
            return None
        if attention_mask.dtype == torch.bool:  # True where a token is seen
            attention_mask = hidden_states.new_zeros(attention_mask.shape).masked_fill(~attention_mask, -torch.inf)
        return BlockInput(hidden_states, attention_mask)

    def example_input(self, draw: Callable[..., Tensor], width: int) -> tuple[Any, ...] | None:
        takes_fp32 = self._attention_function() is not flash_attention_forward
        return (draw(2, 3, width), None) if takes_fp32 else None  # without a mask

    def _submodules(self) -> Submodules:
        return _BLOCKS[self.caller_class]

    def _why_settings(self) -> str | None:
        attention = self._modules["self_attn"]
        if self._attention_function() not in _ATTENTION_FUNCTIONS:
            name = attention.config._attn_implementation
            return f"the attention function {name!r} of transformers was registered or replaced"
        if attention.dropout > 0:
            return "a block's attention has dropout"
        if attention.is_causal or attention.scale != attention.head_dim**-0.5:
            return "a block's attention is causal or has an unusual scale"
        return None

    def _attention_function(self) -> Any:
        """The function of transformers that the attention module calls."""
        attention = self._modules["self_attn"]
        module = sys.modules[type(attention).__module__]
        functions, eager = module.ALL_ATTENTION_FUNCTIONS, module.eager_attention_forward
        return functions.get(attention.config._attn_implementation, eager)


def _submodules_of(attention: type, mlp: type) -> Submodules:
    types = {
        "self_attn": (attention,),
        "layer_norm1": (nn.LayerNorm,),
        "mlp": (mlp,),
        "mlp.activation_fn": tuple(_ACTIVATIONS),
        "layer_norm2": (nn.LayerNorm,),
        **{name.removesuffix(".weight"): (nn.Linear,) for name in HuggingFaceBlock.linear_weights},
    }
    return submodules(types)


_MODULES: dict[str, Any] = {
    "CLIP": modeling_clip,
    "MetaClip2": modeling_metaclip_2,
    "Siglip": modeling_siglip,
    "Siglip2": modeling_siglip2,
}
_BLOCKS: dict[type, Submodules] = {
    getattr(module, f"{name}EncoderLayer"): _submodules_of(
        getattr(module, f"{name}Attention"), getattr(module, f"{name}MLP")
    )
    for name, module in _MODULES.items()
}
_ATTENTION_FUNCTIONS = {
    sdpa_attention_forward,
    flash_attention_forward,
    *(module.eager_attention_forward for module in _MODULES.values()),
}


def _is_clip(model: Any) -> bool:
    """Return True for models in the structure of CLIP, False for those of SigLIP."""
    return isinstance(model, (modeling_clip.CLIPModel, modeling_metaclip_2.MetaClip2Model))


def _image_size(vision: Any) -> tuple[int, int]:
    """Height and width of images; for SigLIP 2 those of a square with as many patches as there are positions."""
    config = vision.config
    if not isinstance(vision, modeling_siglip2.Siglip2VisionModel):
        return config.image_size, config.image_size
    side = math.isqrt(config.num_patches) * config.patch_size
    return side, side


def _patches(vision: Any, images: Tensor) -> dict[str, Tensor]:
    """Arguments of the embeddings of a vision model for images [n, 3, height, width]."""
    if not isinstance(vision, modeling_siglip2.Siglip2VisionModel):
        return {"pixel_values": images}
    size = vision.config.patch_size
    patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [n, 3, rows, size, columns, size]
    shape = torch.tensor([[patches.shape[2], patches.shape[4]]], device=images.device)
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [n, rows · columns, size² · 3]
    return {"pixel_values": patches, "spatial_shapes": shape.expand(len(images), 2)}


def _vision_inputs(vision: Any, images: Tensor) -> dict[str, Tensor]:
    """Arguments of a vision model for images [n, 3, height, width]; no patch is padding."""
    inputs = _patches(vision, images)
    if "spatial_shapes" in inputs:
        patches = inputs["pixel_values"]
        inputs["pixel_attention_mask"] = torch.ones(patches.shape[:2], dtype=torch.int32, device=images.device)
    return inputs


def _tensor(output: Any) -> Tensor:
    """Tensor of an output of transformers: itself, the first element of a tuple, or the pooled embedding."""
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output.pooler_output


class _ImageEncoder(nn.Module):
    """Image encoder of a model as a module."""

    def __init__(self, model: Any):
        super().__init__()
        self.vision_model, self.projection = model.vision_model, getattr(model, "visual_projection", nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.vision_model(**_vision_inputs(self.vision_model, images)).pooler_output)


class HuggingFaceImageTower(ImageTower):
    """Image tower: `vision_model` and, for CLIP, the projection."""

    def __init__(self, model: Any):
        self.model: Any = model
        self.vision = self.model.vision_model
        self.blocks = self.vision.encoder.layers
        self.image_size = _image_size(self.vision)
        self._of_clip = _is_clip(model)
        if not self._of_clip and not self.vision.use_head:
            raise UnsupportedModel(
                f"SkipCLIP: this {type(model).__name__} has no pooling head, and so no image embedding."
            )
        vision = self.vision
        self.embedding = (vision.embeddings, vision.pre_layrnorm) if self._of_clip else (vision.embeddings,)
        self.head = (vision.post_layernorm, self.model.visual_projection if self._of_clip else vision.head)

    def why_not_pooled(self) -> str | None:
        return None if self._of_clip else "the tower pools over all tokens"

    def reference_forward(self, inputs: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(**_vision_inputs(self.vision, inputs)))

    def encoder(self) -> nn.Module:
        return _ImageEncoder(self.model)

    def embed(self, images: Tensor) -> Tensor:
        hidden = self.vision.embeddings(**_patches(self.vision, images))
        return self.vision.pre_layrnorm(hidden) if self._of_clip else hidden

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return _tensor(block(hidden, attention_mask=None))

    def finish(self, hidden: Tensor) -> Tensor:
        if self._of_clip:
            return self.model.visual_projection(self.vision.post_layernorm(hidden[:, 0]))
        return self.vision.head(self.vision.post_layernorm(hidden))


class HuggingFaceTextTower(TextTower):
    """Text tower: `text_model` and, for CLIP, the projection."""

    def __init__(self, model: Any):
        self.model: Any = model
        self.text = self.model.text_model
        self.blocks = self.text.encoder.layers
        self._of_clip = _is_clip(model)
        self.embedding = (self.text.embeddings,)
        self.head = (self.text.final_layer_norm, model.text_projection if self._of_clip else self.text.head)

    def pooling(self, tokens: Tensor) -> Pooling:
        if self._of_clip:
            return Pooling(self._end_positions(tokens))
        last = tokens.new_full((len(tokens),), tokens.shape[1] - 1)
        not_cropped = "every token sees every other"
        return Pooling(last, why_not_shared="there is no mask", why_not_cropped=not_cropped)

    def _end_positions(self, tokens: Tensor) -> Tensor:
        end = self.text.eos_token_id  # read by its forward; the config may have changed
        # Configs of CLIP from before transformers 4.31 always have eos_token_id = 2; the end of text is the largest id.
        largest = end == 2 and isinstance(self.model, modeling_clip.CLIPModel)
        return tokens.argmax(dim=-1) if largest else (tokens == end).int().argmax(dim=-1)

    def reference_forward(self, inputs: Tensor) -> Tensor:
        return _tensor(self.model.get_text_features(input_ids=inputs))

    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        return self.text.embeddings(input_ids=tokens)

    def mask(self, tokens: Tensor, prompts: Prompts) -> Tensor | None:
        return super().mask(tokens, prompts) if self._of_clip else None

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return _tensor(block(hidden, attention_mask=None if mask is None else mask.to(hidden)))

    def finish(self, hidden: Tensor) -> Tensor:
        hidden = self.text.final_layer_norm(hidden)
        return self.model.text_projection(hidden) if self._of_clip else self.text.head(hidden)
