"""Options of timm's blocks in the fused block: each against the block's own forward, with every gradient."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from timm.layers import GluMlp, Mlp, RmsNorm, SwiGLU
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn

import skipkernels as sk
from skipkernels.testing import relative_error, saved_bytes
from skipkernels.towers.block import FusedBlock

N, GRID, W, HEADS = 3, 4, 24, 3
TOKENS = GRID + 1  # with a class token

LAYER_NORM = partial(nn.LayerNorm, eps=1e-5)
BIAS_FREE = {"qkv_bias": False, "proj_bias": False, "norm_layer": partial(nn.LayerNorm, bias=False)}
EVA02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}

BLOCKS = {
    "no_biases": lambda: Block(W, HEADS, mlp_layer=_mlp_without_bias, **BIAS_FREE),
    "qk_norm": lambda: Block(W, HEADS, qkv_bias=True, qk_norm=True),
    "scale_norms": lambda: Block(W, HEADS, qkv_bias=True, scale_attn_norm=True, scale_mlp_norm=True),
    "rms_norm": lambda: Block(W, HEADS, qk_norm=True, scale_mlp_norm=True, norm_layer=RmsNorm, init_values=0.3),
    "swiglu": lambda: Block(W, HEADS, qkv_bias=True, mlp_layer=SwiGLU, act_layer=nn.SiLU),
    "swiglu_packed": lambda: Block(W, HEADS, mlp_layer=partial(GluMlp, gate_last=False), act_layer=nn.SiLU),
    "eva": lambda: EvaBlock(W, HEADS, init_values=0.3, norm_layer=LAYER_NORM),
    "eva_swiglu": lambda: EvaBlock(W, HEADS, swiglu_mlp=True, norm_layer=LAYER_NORM),
    "eva02": lambda: EvaBlock(W, HEADS, mlp_ratio=8 / 3, norm_layer=LAYER_NORM, **EVA02),
    "perception": lambda: EvaBlock(W, HEADS, attn_type="rope", norm_layer=LAYER_NORM),
    "half_and_norm": lambda: EvaBlock(W, HEADS, attn_type="rope", rotate_half=True, qk_norm=True, norm_layer=RmsNorm),
}


def _mlp_without_bias(**arguments):
    return Mlp(**{**arguments, "bias": False})


def make_block(name, dtype=torch.float64):
    """A block with weights and biases of ordinary size: timm starts some at 0 or 1e-6."""
    torch.manual_seed(0)
    block = BLOCKS[name]().to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3 + (parameter.ndim == 1))
    return block


def positions():
    """Rotary positions as timm's, [tokens, 2E] with the same angle for both columns of a pair or for both halves."""
    angles = torch.rand(GRID, W // HEADS // 2, generator=torch.Generator().manual_seed(7)) * 6
    return angles


def arguments(block):
    if not isinstance(block, EvaBlock):
        return {}
    half = getattr(block.attn, "rotate_half", False)
    angles = torch.cat([positions()] * 2, 1) if half else positions().repeat_interleave(2, dim=1)
    return {"rope": torch.cat([angles.sin(), angles.cos()], dim=1)}


def hidden_states(dtype=torch.float64):
    hidden = torch.randn(N, TOKENS, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return hidden.to(dtype).requires_grad_()


def gradients(block, hidden, **rest):
    out = block(hidden, **arguments(block), **rest)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    named = {"hidden": hidden} | {name: x for name, x in block.named_parameters() if x.requires_grad}
    return {"out": out} | dict(zip(named, torch.autograd.grad(out, list(named.values()), upstream), strict=True))


def assert_equal(found, expected):
    """Equal up to the order of sums. The bias of a key shifts all logits of a query: its gradient is 0 up to that."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() < 1e-12 * max(value.norm(), 1.0), key


def fused(block, memory="fast"):
    return sk.fuse(nn.Sequential(block), memory=memory)[0]


@pytest.mark.parametrize("memory", ["fast", "balanced", "min"])
@pytest.mark.parametrize("name", BLOCKS)
def test_fused_block_equals_own_forward(name, memory):
    block = make_block(name)
    expected = gradients(copy.deepcopy(block), hidden_states())
    assert isinstance(fused(block, memory), FusedBlock) and block.why_not_fused() is None
    assert_equal(gradients(block, hidden_states()), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_block_no_worse_than_own_forward_in_bf16(name):
    """Against fp64, each result is at most three times as wrong as the block's own under autocast, or a rounding."""
    exact = gradients(make_block(name), hidden_states())
    errors = []
    for prepare in (lambda block: block, fused):
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(prepare(make_block(name, torch.float32)), hidden_states(torch.float32))
        errors.append({key: relative_error(value, exact[key]) for key, value in found.items()})
    for key, error in errors[1].items():
        assert error <= max(3 * errors[0][key], 2**-8), key


@pytest.mark.parametrize(("name", "widths"), {"no_biases": 10, "qk_norm": 13, "swiglu": 14}.items())
def test_fused_block_saved_widths(name, widths):
    """Multiples of W per token, as `SAVED_WIDTHS` says; the statistics of norms and attention are less than one."""
    block, hidden = fused(make_block(name)), hidden_states()
    assert saved_bytes(lambda: block(hidden)) // hidden.nbytes == widths


@pytest.mark.parametrize("name", ["half_and_norm", "eva02", "no_biases"])
def test_fused_block_computes_needed_gradients_only(name):
    everything = gradients(fused(make_block(name)), hidden_states())
    for frozen, _ in make_block(name).named_parameters():
        block = fused(make_block(name))
        block.get_parameter(frozen).requires_grad_(False)
        found = gradients(block, hidden_states())
        assert_equal(found, {key: value for key, value in everything.items() if key != frozen})


@pytest.mark.parametrize("name", ["half_and_norm", "eva02"])
@pytest.mark.parametrize("memory", ["fast", "min"])
def test_fused_block_backward_twice(name, memory):
    block, hidden = fused(make_block(name), memory), hidden_states()
    out = block(hidden, **arguments(block)).sum()
    inputs = [hidden, *block.parameters()]
    first, second = torch.autograd.grad(out, inputs, retain_graph=True), torch.autograd.grad(out, inputs)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_rotation_saves_nothing():
    block, hidden = make_block("perception"), hidden_states()
    rope = arguments(block)["rope"]
    saved = {}
    for given in (None, rope):
        block = fused(make_block("perception"))
        saved[given is None] = saved_bytes(lambda block=block, given=given: block(hidden, rope=given))
    assert saved[False] == saved[True]


def test_learned_positions_run_own_forward():
    block, hidden = make_block("eva"), hidden_states()
    rope = arguments(block)["rope"].double().requires_grad_()
    expected = torch.autograd.grad(block(hidden, rope=rope).sum(), rope)[0]
    assert torch.autograd.grad(fused(block)(hidden, rope=rope).sum(), rope)[0].equal(expected)
