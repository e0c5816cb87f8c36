"""One block of each kind, with parameters of ordinary size, and its output and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import open_clip.transformer
import torch
import transformers
from timm.layers import GluMlp, Mlp, RmsNorm, SwiGLU
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers.models.clip import modeling_clip

from skipkernels.towers.fused_classes import unfused
from tests.models import openai_models
from tests.reference_step import assert_close_by_name

N, GRID, W, HEADS = 3, 4, 24, 3
TOKENS = GRID + 1  # with a class token

LAYER_NORM = partial(nn.LayerNorm, eps=1e-5)
BIAS_FREE = {"qkv_bias": False, "proj_bias": False, "norm_layer": partial(nn.LayerNorm, bias=False)}
EVA02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}


def hugging_face_block() -> nn.Module:
    config = transformers.CLIPVisionConfig(hidden_size=W, intermediate_size=2 * W, num_attention_heads=HEADS)
    config._attn_implementation = "sdpa"
    return modeling_clip.CLIPEncoderLayer(config)


def causal_mask() -> Tensor:
    return torch.full((TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)


def mlp_without_bias(**arguments) -> nn.Module:
    return Mlp(**{**arguments, "bias": False})


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "open_clip": lambda: open_clip.transformer.ResidualAttentionBlock(W, HEADS, ls_init_value=0.3),
    "openai": lambda: openai_models().ResidualAttentionBlock(W, HEADS, causal_mask()),
    "hf": hugging_face_block,
    "timm": lambda: Block(W, HEADS, qkv_bias=True, qk_norm=True, init_values=0.3),
    "eva": lambda: EvaBlock(W, HEADS, init_values=0.3, norm_layer=LAYER_NORM),
}
BLOCKS = FAMILIES | {
    "no_biases": lambda: Block(W, HEADS, mlp_layer=mlp_without_bias, **BIAS_FREE),
    "qk_norm": lambda: Block(W, HEADS, qkv_bias=True, qk_norm=True),
    "scale_norms": lambda: Block(W, HEADS, qkv_bias=True, scale_attn_norm=True, scale_mlp_norm=True),
    "rms_norm": lambda: Block(W, HEADS, qk_norm=True, scale_mlp_norm=True, norm_layer=RmsNorm, init_values=0.3),
    "swiglu": lambda: Block(W, HEADS, qkv_bias=True, mlp_layer=SwiGLU, act_layer=nn.SiLU),
    "swiglu_packed": lambda: Block(W, HEADS, mlp_layer=partial(GluMlp, gate_last=False), act_layer=nn.SiLU),
    "eva_swiglu": lambda: EvaBlock(W, HEADS, swiglu_mlp=True, norm_layer=LAYER_NORM),
    "eva02": lambda: EvaBlock(W, HEADS, mlp_ratio=8 / 3, norm_layer=LAYER_NORM, **EVA02),
    "perception": lambda: EvaBlock(W, HEADS, attn_type="rope", norm_layer=LAYER_NORM),
    "half_and_norm": lambda: EvaBlock(W, HEADS, attn_type="rope", rotate_half=True, qk_norm=True, norm_layer=RmsNorm),
}


def make_block(name: str, dtype: torch.dtype | None = None) -> nn.Sequential:
    """A block in a model, in fp64, or in fp32 if its norms are. A library may start weights at 0 or 1e-6."""
    torch.manual_seed(0)
    block = BLOCKS[name]().to(dtype or (torch.float32 if name == "openai" else torch.float64))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3 + (parameter.ndim == 1))
    return nn.Sequential(block)


def rotary(block: nn.Module) -> Tensor:
    """Rotary positions as timm's, [tokens, 2E] with the same angle for both columns of a pair or for both halves."""
    angles = torch.rand(GRID, W // HEADS // 2, generator=torch.Generator().manual_seed(7)) * 6
    half = getattr(block.attn, "rotate_half", False)
    angles = torch.cat([angles] * 2, dim=1) if half else angles.repeat_interleave(2, dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def hidden_states(dtype: torch.dtype = torch.float64, *, constant: bool = False) -> Tensor:
    hidden = torch.randn(N, TOKENS, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(not constant)


def run(block: nn.Module, hidden: Tensor, **arguments: Tensor) -> Tensor:
    """Output of a block, which may take [tokens, n, W], a mask or positions."""
    if isinstance(block, EvaBlock):
        arguments = {"rope": rotary(block), **arguments}
    elif hasattr(block, "self_attn"):
        arguments = {"attention_mask": None, **arguments}
    return block(hidden.transpose(0, 1) if hasattr(block, "attn_mask") else hidden, **arguments)


def gradients(block: nn.Module, hidden: Tensor | None = None, call: Callable = run, **arguments) -> dict[str, Tensor]:
    """Output of `call`, and gradients of the input and of every tensor that trains, by name."""
    if hidden is None:
        hidden = hidden_states(next(x for x in block.parameters() if x.ndim == 2).dtype)
    out = call(block, hidden, **arguments)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    plain = {f"{id(m)}.{name}": x for m in block.modules() for name, x in vars(m).items() if isinstance(x, Tensor)}
    named = {"hidden": hidden, **arguments, **dict(block.named_parameters()), **plain}
    trained = {name: x for name, x in named.items() if x.requires_grad}
    return {"out": out} | dict(zip(trained, torch.autograd.grad(out, list(trained.values()), upstream), strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to the order of sums."""
    assert_close_by_name(found, expected, tolerance=1e-5 if expected["out"].dtype == torch.float32 else 1e-12)


def assert_equals_own_forward(block: nn.Module, **arguments: Tensor) -> None:
    with unfused(block.modules()):
        expected = gradients(block, **arguments)
    assert_equal(gradients(block, **arguments), expected)
