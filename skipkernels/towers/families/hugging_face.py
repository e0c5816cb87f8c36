"""Hugging Face's `CLIPModel` and `SiglipModel`.

CLIP: as OpenAI's model, but with separate projections of query, key and value. SigLIP: no class token, no norm in front
of the blocks; images are pooled by attention of a learned probe, texts at their last token, without a mask, through a
linear layer. Fused blocks ignore the model's `attn_implementation`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import CLIPModel, SiglipModel
from transformers.activations import GELUActivation, QuickGELUActivation
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip

from ..base import UnsupportedModel
from ..eligibility import why_not_fusable
from ..fused_block import BlockWeights, FusableBlock
from ..image import ImageTower
from ..text import TextTower

_TANH = type(modeling_clip.ACT2FN["gelu_pytorch_tanh"])  # its name differs between major versions
_ACTIVATIONS = {GELUActivation: "gelu", QuickGELUActivation: "quick_gelu", _TANH: "gelu_tanh"}

_LINEAR_WEIGHTS = (
    *(f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")), "mlp.fc1.weight", "mlp.fc2.weight"
)  # fmt: skip


def _submodule_types(attention: type, mlp: type) -> dict[str, tuple[type, ...]]:
    return {
        "self_attn": (attention,),
        "layer_norm1": (nn.LayerNorm,),
        "mlp": (mlp,),
        "mlp.activation_fn": tuple(_ACTIVATIONS),
        "layer_norm2": (nn.LayerNorm,),
        **{name.removesuffix(".weight"): (nn.Linear,) for name in _LINEAR_WEIGHTS},
    }


_BLOCKS: dict[type, tuple[type, dict[str, tuple[type, ...]]]] = {
    CLIPModel: (modeling_clip.CLIPEncoderLayer, _submodule_types(modeling_clip.CLIPAttention, modeling_clip.CLIPMLP)),
    SiglipModel: (
        modeling_siglip.SiglipEncoderLayer,
        _submodule_types(modeling_siglip.SiglipAttention, modeling_siglip.SiglipMLP),
    ),
}


def _why_not_fusable(block: Any) -> str | None:
    kind = SiglipModel if isinstance(block, modeling_siglip.SiglipEncoderLayer) else CLIPModel
    reason = why_not_fusable(block, *_BLOCKS[kind])
    if reason is not None:
        return reason
    attention = block.self_attn
    if attention.dropout > 0:
        return "a block's attention has dropout"
    if attention.is_causal or attention.scale != (attention.embed_dim // attention.num_heads) ** -0.5:
        return "a block's attention is causal or has an unusual scale"
    return None


def _read_block(block: Any) -> FusableBlock:
    attention, mlp = block.self_attn, block.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weights = BlockWeights(
        block.layer_norm1.weight, block.layer_norm1.bias,
        tuple(layer.weight for layer in projections), tuple(layer.bias for layer in projections),
        attention.out_proj.weight, attention.out_proj.bias, block.layer_norm2.weight, block.layer_norm2.bias,
        mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
    )  # fmt: skip
    eps = block.layer_norm1.eps, block.layer_norm2.eps
    return FusableBlock(weights, _ACTIVATIONS[type(mlp.activation_fn)], eps, attention.num_heads)


def _tensor(output: Any) -> Tensor:
    """Tensor of an output of transformers: itself, the first element of a tuple, or the pooled embedding."""
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output.pooler_output


class _ImageEncoder(nn.Module):
    """Image encoder of a CLIPModel or SiglipModel as a module."""

    def __init__(self, model: Any):
        super().__init__()
        self.vision_model, self.projection = model.vision_model, getattr(model, "visual_projection", nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.vision_model(pixel_values=images).pooler_output)


class HuggingFaceImageTower(ImageTower):
    """Image tower of a `CLIPModel` or `SiglipModel`: `vision_model` and, for CLIP, the projection."""

    read_block, why_not_fusable = staticmethod(_read_block), staticmethod(_why_not_fusable)
    linear_weights = _LINEAR_WEIGHTS

    def __init__(self, model: Any):
        self.model: Any = model
        self.vision = self.model.vision_model
        config = self.vision.config
        self.blocks = self.vision.encoder.layers
        self.image_size = (config.image_size, config.image_size)
        not_fused, not_pooled = self.read_blocks()
        if isinstance(model, CLIPModel):
            self.embedding = (self.vision.embeddings, self.vision.pre_layrnorm)
            self.head = (self.vision.post_layernorm, self.model.visual_projection)
        else:
            if not self.vision.use_head:
                raise UnsupportedModel("SkipCLIP: this SiglipModel has no pooling head, and so no image embedding.")
            self.embedding = (self.vision.embeddings,)
            self.head = (self.vision.post_layernorm, self.vision.head)
            not_pooled = not_pooled or "the tower pools over all tokens"
        self._set_reductions(not_fused, not_pooled)

    def reference_forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return _tensor(self.model.get_image_features(pixel_values=inputs))

    def encoder(self) -> nn.Module:  # noqa: D102
        return _ImageEncoder(self.model)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        hidden = self.vision.embeddings(inputs)
        return self.vision.pre_layrnorm(hidden) if isinstance(self.model, CLIPModel) else hidden

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        return _tensor(block(hidden, attention_mask=None))

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        if isinstance(self.model, CLIPModel):
            return self.model.visual_projection(self.vision.post_layernorm(hidden[:, 0]))
        return self.vision.head(self.vision.post_layernorm(hidden))


class HuggingFaceTextTower(TextTower):
    """Text tower of a `CLIPModel` or `SiglipModel`: `text_model` and, for CLIP, the projection."""

    read_block, why_not_fusable = staticmethod(_read_block), staticmethod(_why_not_fusable)
    linear_weights = _LINEAR_WEIGHTS

    def __init__(self, model: Any, tokens: Tensor):
        self.model: Any = model
        self.text = self.model.text_model
        self.blocks = self.text.encoder.layers
        self.embedding = (self.text.embeddings,)
        self.head = (
            self.text.final_layer_norm,
            self.model.text_projection if isinstance(model, CLIPModel) else self.text.head,
        )
        self._not_fused = self.read_blocks()
        self.read_prompts(tokens)

    def read_prompts(self, tokens: Tensor) -> None:  # noqa: D102
        if isinstance(self.model, CLIPModel):
            self._set_prompts(tokens, self._end_positions(tokens), *self._not_fused)
        else:
            last = tokens.new_full((len(tokens),), tokens.shape[1] - 1)
            not_cropped = "every token sees every other"
            self._set_prompts(tokens, last, *self._not_fused, not_causal="there is no mask", not_cropped=not_cropped)

    def _end_positions(self, tokens: Tensor) -> Tensor:
        end = self.text.eos_token_id  # read by its forward; the config may have changed
        # Configs from before transformers 4.31 always have eos_token_id = 2; the end of text is the largest id.
        return tokens.argmax(dim=-1) if end == 2 else (tokens == end).int().argmax(dim=-1)

    def reference_forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return _tensor(self.model.get_text_features(input_ids=inputs))

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.text.embeddings(input_ids=inputs)

    def mask(self, inputs: Tensor) -> Tensor | None:  # noqa: D102
        return super().mask(inputs) if isinstance(self.model, CLIPModel) else None

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        return _tensor(block(hidden, attention_mask=None if mask is None else mask.to(hidden)))

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        hidden = self.text.final_layer_norm(hidden)
        return self.model.text_projection(hidden) if isinstance(self.model, CLIPModel) else self.text.head(hidden)
