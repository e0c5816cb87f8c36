"""Blocks that were altered in a way that a fused block could miss: output and gradients are those of their own forward.

All in fp64, but for OpenAI's block, with norms that compute in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers.models.clip import modeling_clip

import skipkernels as sk
from skipkernels.towers.alterations import original_method
from skipkernels.towers.base import UnsupportedModel
from tests.towers.blocks import FAMILIES, TOKENS, W, assert_equals_own_forward, hidden_states, make_block, run

# ---- tensors that are no entry of `_parameters` ------------------------------------------------------------------


def as_buffer(module: nn.Module, name: str) -> None:
    x = module._parameters.pop(name)
    module.register_buffer(name, x.detach().clone())


def as_plain_tensor(module: nn.Module, name: str) -> None:
    """Replace a parameter by a plain tensor, as FSDP1 with `use_orig_params=False` does."""
    x = module._parameters.pop(name)
    setattr(module, name, x.detach().clone().requires_grad_())


BIASES = [
    *(("open_clip", path) for path in ("ln_1.bias", "attn.in_proj_bias", "attn.out_proj.bias", "mlp.c_fc.bias")),
    *(("openai", path) for path in ("ln_2.bias", "attn.in_proj_bias", "mlp.c_proj.bias")),
    *(("hf", path) for path in ("layer_norm1.bias", "self_attn.q_proj.bias", "mlp.fc2.bias")),
    *(("timm", path) for path in ("attn.qkv.bias", "attn.q_norm.bias", "mlp.fc1.bias", "ls1.gamma")),
    *(("eva", path) for path in ("attn.q_bias", "attn.v_bias", "gamma_1", "norm2.weight")),
]


@pytest.mark.parametrize("change", [as_buffer, as_plain_tensor])
@pytest.mark.parametrize(("family", "path"), BIASES)
def test_tensor_that_is_no_parameter_counts(family, path, change):
    (block,) = sk.fuse(make_block(family))
    parent, _, name = path.rpartition(".")
    change(block.get_submodule(parent), name)
    assert block.why_not_fused() is None
    assert_equals_own_forward(block)


@pytest.mark.parametrize("name", ["q", "v"])
def test_projection_without_bias_among_others(name):
    (block,) = sk.fuse(make_block("hf"))
    block.self_attn.get_submodule(f"{name}_proj").bias = None
    assert_equals_own_forward(block)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_no_view(family):
    """FSDP2 warns of a view: its hook of backward is lost if the caller writes to it."""
    (block,) = sk.fuse(make_block(family))
    assert not run(block, hidden_states(next(block.parameters()).dtype))._is_view()


@pytest.mark.parametrize("family", ["open_clip", "timm"])  # other blocks refuse one themselves
def test_empty_batch(family):
    (block,) = sk.fuse(make_block(family))
    assert_equals_own_forward(block, hidden=hidden_states()[:0].detach().requires_grad_())


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "argument", "shape"),
    [("open_clip", "attn_mask", (TOKENS, TOKENS)), ("hf", "attention_mask", (1, 1, TOKENS, TOKENS))],
)
def test_learned_mask_gets_its_gradient(family, argument, shape):
    (block,) = sk.fuse(make_block(family))
    assert_equals_own_forward(block, **{argument: torch.randn(shape, dtype=torch.float64, requires_grad=True)})


def test_learned_mask_of_a_block_gets_its_gradient():
    (block,) = sk.fuse(make_block("openai"))
    block.attn_mask = nn.Parameter(torch.randn(TOKENS, TOKENS))
    assert_equals_own_forward(block)


# ---- other code ------------------------------------------------------------------------------------------------------


def halved(own: Callable) -> Callable:
    """A function in the place of another."""

    def function(*arguments, **options):
        out = own(*arguments, **options)
        return (0.5 * out[0], *out[1:]) if isinstance(out, tuple) else 0.5 * out

    return function


class Patch(NamedTuple):
    family: str
    kind: str  # path of the class, within the block; "" is the block's own
    method: str = "forward"


PATCHES = [
    *(Patch("open_clip", path) for path in ("", "attn", "ln_1", "mlp", "mlp.c_fc", "mlp.gelu", "ls_2")),
    Patch("open_clip", "", "attention"),
    Patch("openai", "", "attention"),
    Patch("hf", "self_attn"),
    Patch("timm", "attn.q_norm"),
    Patch("eva", "norm1"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: "-".join(filter(None, p)))
def test_method_patched_on_a_class(patch, when, monkeypatch, recwarn):
    model = make_block(patch.family)
    block, kind = model[0], type(model[0].get_submodule(patch.kind))
    if when == "after":
        sk.fuse(model)
    monkeypatch.setattr(kind, patch.method, halved(getattr(kind, patch.method)))
    if when == "before":
        with pytest.raises(UnsupportedModel, match=rf"{patch.method}\(\) of the class {kind.__name__} was replaced"):
            sk.fuse(model)
        return
    assert_equals_own_forward(block)
    assert f"{patch.method}() of the class {kind.__name__} was replaced" in block.why_not_fused()
    monkeypatch.undo()
    assert block.why_not_fused() is None


def test_method_patched_before_the_family_is_imported(monkeypatch):
    assert original_method(nn.GELU, "forward") is nn.GELU.forward
    monkeypatch.setattr(nn.GELU, "forward", functools.wraps(nn.GELU.forward)(halved(nn.GELU.forward)))
    assert original_method(nn.GELU, "forward") is None


def halved_attention(module, query, key, value, attention_mask, **options):
    out = 0.5 * nn.functional.scaled_dot_product_attention(query, key, value, attention_mask)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("name", ["halved", "sdpa", "eager"])
def test_registered_attention_function(name, monkeypatch):
    """A function of another name, in the place of that of the package, and in the place of the module's own."""
    (block,) = sk.fuse(make_block("hf"))
    block.self_attn.config._attn_implementation = "eager"
    assert block.why_not_fused() is None
    if name == "eager":
        monkeypatch.setattr(modeling_clip, "eager_attention_forward", halved_attention)
    else:
        monkeypatch.setitem(modeling_clip.ALL_ATTENTION_FUNCTIONS._global_mapping, name, halved_attention)
        block.self_attn.config._attn_implementation = name
    assert_equals_own_forward(block)
    assert f"attention function {name!r} of transformers" in block.why_not_fused()


@pytest.mark.parametrize("kept", ["q_norm", "k_norm"])
def test_norm_of_query_or_key_alone(kept):
    (block,) = sk.fuse(make_block("timm"))
    setattr(block.attn, "k_norm" if kept == "q_norm" else "q_norm", nn.Identity())
    assert_equals_own_forward(block)
    assert "one of query and key" in block.why_not_fused()


def test_mlp_in_another_order():
    (block,) = sk.fuse(make_block("open_clip"))
    layers = dict(block.mlp.named_children())
    layers["c_fc"] = nn.Linear(W, W).double()
    layers["c_proj"] = nn.Linear(W, W).double()
    block.mlp = nn.Sequential()
    for name in ("gelu", "c_fc", "c_proj"):
        block.mlp.add_module(name, layers[name])
    assert_equals_own_forward(block)
    assert "order" in block.why_not_fused()
