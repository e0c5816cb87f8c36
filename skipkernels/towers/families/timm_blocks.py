"""Blocks of timm: `Block` of `VisionTransformer`, `EvaBlock` of EVA, EVA-02 and Perception Encoder.

Both have the same options: norms of query, key, the result of attention and the activation; SwiGLU, packed or in two
layers; RMSNorm; no biases. An `EvaBlock` also has rotary positions, separate projections, and layer scales that are its
own parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, DropPath, GluMlp, LayerNorm, LayerScale, Mlp, RmsNorm, SwiGLU
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from ..alterations import Submodules, submodules
from ..block import BlockInput, FusedBlock
from ..fused.weights import BlockSettings, GivenWeights
from ..rows import Rotary
from .reading import activation, layer_scale, weights_of, weights_of_parts

_ACTIVATIONS = {nn.GELU: "gelu", GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}


class TimmBlock(FusedBlock):
    """`Block` of timm's `VisionTransformer`."""

    _attentions: tuple[type, ...] = (Attention,)

    @property
    def linear_weights(self) -> Sequence[Any]:  # type: ignore[override]
        layers, mlp = self._modules["attn"]._modules, self._modules["mlp"]._modules
        qkv = ("qkv",) * 3 if "qkv" in layers else ("q_proj", "k_proj", "v_proj")
        fc = "mlp.fc1.weight" if "fc1" in mlp else ("mlp.fc1_g.weight", "mlp.fc1_x.weight")
        return (*(f"attn.{name}.weight" for name in qkv), "attn.proj.weight", fc, "mlp.fc2.weight")

    def read_weights(self) -> tuple[GivenWeights, BlockSettings]:
        attention, mlp = self._modules["attn"], self._modules["mlp"]._modules
        norms, scales = self._norms(), self._scales()
        weights = _projections(attention)
        for name, norm in norms.items():
            weights |= weights_of(name, norm)
        if "fc1_g" in mlp:  # SwiGLU
            weights |= weights_of_parts("mlp_in", [mlp["fc1_g"], mlp["fc1_x"]])
        else:
            weights |= weights_of("mlp_in", mlp["fc1"])
        weights |= weights_of("out_proj", attention._modules["proj"], scales[0])
        weights |= weights_of("mlp_out", mlp["fc2"], scales[1])
        kind = "swiglu" if type(mlp["act"]) is nn.SiLU else activation(mlp["act"], _ACTIVATIONS)
        eps = {name: norm.eps for name, norm in norms.items()}
        return weights, BlockSettings(kind, eps, attention.num_heads, isinstance(norms["norm_1"], RmsNorm))

    def _norms(self) -> dict[str, Any]:
        """Norms of the block by their fields of `BlockWeights`."""
        parts = self._modules
        attention, mlp = parts["attn"]._modules, parts["mlp"]._modules
        norms = {"norm_1": parts["norm1"], "query_norm": attention["q_norm"], "key_norm": attention["k_norm"]}
        norms |= {"attention_norm": attention["norm"], "norm_2": parts["norm2"], "mlp_norm": mlp["norm"]}
        return {name: norm for name, norm in norms.items() if not isinstance(norm, nn.Identity)}

    def _scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Layer scales of both branches."""
        return layer_scale(self._modules["ls1"]), layer_scale(self._modules["ls2"])

    def _parse_input(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> BlockInput | None:
        if x.ndim != 3 or attn_mask is not None:  # towers of CLIP have no mask
            return None
        return BlockInput(x, None, is_causal)

    def _submodules(self) -> Submodules:
        attention, mlp = self._modules.get("attn"), type(self._modules.get("mlp"))
        kind: Any = type(attention) if type(attention) in self._attentions else self._attentions[0]
        packed = attention is not None and "qkv" in attention._modules
        return _SUBMODULES[kind, mlp if mlp in (GluMlp, SwiGLU) else Mlp, packed]

    def _why_settings(self) -> str | None:
        parts = self._modules
        attention, mlp = parts["attn"], parts["mlp"]
        layers, steps = attention._modules, mlp._modules
        rates = [x.p for x in (layers["attn_drop"], layers["proj_drop"], steps["drop1"], steps["drop2"])]
        if any(rates) or any(getattr(parts[name], "drop_prob", 0.0) for name in ("drop_path1", "drop_path2")):
            return "a block drops values or branches at random in training (dropout, drop path); set their rates to 0"
        width, total = parts["norm1"].weight.shape[0], attention.num_heads * attention.head_dim
        if total != width or layers["proj"].out_features != width or getattr(attention, "num_kv_groups", 1) != 1:
            return "the total width of the heads of a block differs from the width of the block"
        if attention.scale != attention.head_dim**-0.5 or getattr(attention, "is_causal", False):
            return "a block's attention is causal or has an unusual scale"
        if getattr(mlp, "gate_last", False):
            return "the gate of a block's MLP is behind its value"
        norms = self._norms()
        if ("query_norm" in norms) != ("key_norm" in norms):
            return "a block has a norm for one of query and key"
        if len({isinstance(x, RmsNorm) for x in norms.values()}) > 1:
            return "a block has LayerNorm and RMSNorm"
        return None


class TimmEvaBlock(TimmBlock):
    """`EvaBlock` of timm's `Eva`."""

    _attentions = (EvaAttention, AttentionRope)

    def _scales(self) -> tuple[Tensor | None, Tensor | None]:
        block: Any = self
        return block.gamma_1, block.gamma_2

    def _parse_input(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> BlockInput | None:
        given = super()._parse_input(x, attn_mask, is_causal)
        if given is None or rope is None:
            return given
        rotary = rotary_of_tokens(rope, self._modules["attn"])
        return None if rotary is None else given._replace(rotary=rotary)

    def example_input(self, draw: Callable[..., Tensor], width: int) -> tuple[Any, ...]:
        attention: Any = self._modules["attn"]
        angles, half = draw(3, attention.head_dim // 2), getattr(attention, "rotate_half", False)
        angles = torch.cat([angles] * 2, dim=1) if half else angles.repeat_interleave(2, dim=1)
        positions = torch.cat([angles.sin(), angles.cos()], dim=1)
        return draw(2, attention.num_prefix_tokens + 3, width), positions


def rotary_of_tokens(rope: Tensor, attention: Any) -> Rotary | None:
    """Rotary positions of all tokens from timm's, [tokens with a position, 2E]: the sine of each pair, twice, and the
    cosine. None if they are learned, or differ between heads or images.
    """
    if rope.ndim != 2 or rope.requires_grad:
        return None
    interleaved = not getattr(attention, "rotate_half", False)
    head_dim = rope.shape[1] // 2
    once = slice(None, None, 2) if interleaved else slice(head_dim // 2)
    sin, cos = (x[:, once] for x in rope.split(head_dim, dim=1))
    prefix = (0, 0, attention.num_prefix_tokens, 0)  # class token and registers are not rotated
    return Rotary(F.pad(cos, prefix, value=1.0), F.pad(sin, prefix), interleaved)


def _projections(attention: Any) -> GivenWeights:
    """Weights and biases of query, key and value."""
    layers = attention._modules
    if "qkv" not in layers:
        return weights_of_parts("in_proj", [layers[name] for name in ("q_proj", "k_proj", "v_proj")])
    found = weights_of("in_proj", layers["qkv"])
    if getattr(attention, "q_bias", None) is not None:  # of EvaAttention, where the layer has no bias
        found |= {"query_bias": attention.q_bias, "key_bias": attention.k_bias, "value_bias": attention.v_bias}
    return found


_NORM = (nn.LayerNorm, LayerNorm, RmsNorm)
_OPTIONAL_NORM = (nn.Identity, *_NORM)


def _submodules_of(attention: Any, mlp: Any, packed: bool) -> Submodules:
    """Submodules of a block with these types, and a packed projection of query, key and value or three."""
    types: dict[str, tuple[type, ...]] = {
        "norm1": _NORM,
        "attn": (attention,),
        **{f"attn.{name}": (nn.Linear,) for name in (("qkv",) if packed else ("q_proj", "k_proj", "v_proj"))},
        **{f"attn.{name}": _OPTIONAL_NORM for name in ("q_norm", "k_norm", "norm")},
        "attn.proj": (nn.Linear,),
        "norm2": _NORM,
        "mlp": (mlp,),
        **{f"mlp.{name}": (nn.Linear,) for name in (("fc1_g", "fc1_x") if mlp is SwiGLU else ("fc1",))},
        "mlp.act": tuple(_ACTIVATIONS) if mlp is Mlp else (nn.SiLU,),
        "mlp.norm": _OPTIONAL_NORM,
        "mlp.fc2": (nn.Linear,),
        **{name: (nn.Dropout,) for name in ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2")},
        **{name: (nn.Identity, DropPath) for name in ("drop_path1", "drop_path2")},
    }
    if attention is Attention:
        types |= {name: (nn.Identity, LayerScale) for name in ("ls1", "ls2")}
    return submodules(types)


_SUBMODULES = {
    key: _submodules_of(*key)
    for key in itertools.product((Attention, EvaAttention, AttentionRope), (Mlp, GluMlp, SwiGLU), (True, False))
}
