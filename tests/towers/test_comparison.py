"""`fuse` compares a block of each kind with its own forward: it refuses one that differs, and changes nothing else."""

from __future__ import annotations

import pytest
import torch

import skipkernels as sk
from skipkernels.towers import comparison
from skipkernels.towers.block import FusedBlock
from skipkernels.towers.fused import node
from skipkernels.towers.rows import Hidden
from tests.models import tiny_clip
from tests.towers.blocks import FAMILIES, make_block

WRONG = {"output": lambda x: 1.001 * x, "gradient": lambda x: x + 0.01 * (x - x.detach())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrong", WRONG)
def test_fuse_refuses_what_differs(wrong, family, dtype, monkeypatch):
    model, fused_block = make_block(family).to(dtype), node.fused_block
    monkeypatch.setattr(node, "fused_block", lambda *arguments: Hidden(WRONG[wrong](fused_block(*arguments).sum())))
    with pytest.raises(
        RuntimeError, match=rf"fuse: a fused .* differs from its own forward: .* {wrong} .*, allowed [15]e-0"
    ):
        sk.fuse(model)
    assert not isinstance(model[0], FusedBlock)


def test_fuse_compares_each_kind_and_changes_nothing(monkeypatch):
    """Under `no_grad`, inference mode or autocast, with hooks that would see the comparison."""
    model, seen, compared = tiny_clip(torch.bfloat16), [], []
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    blocks[1].ln_2.eps = 1e-4
    for block in blocks:
        block.register_forward_hook(lambda *arguments: seen.append("block"))
        block.mlp.c_fc.weight.register_hook(seen.append)
        block.mlp.c_fc.weight.grad = torch.ones_like(block.mlp.c_fc.weight)
        block.mlp.c_proj.weight.requires_grad_(False)
    before = {name: (id(x), x._version, x.requires_grad, x.grad) for name, x in model.named_parameters()}
    buffers, modes, state = dict(model.named_buffers()), [m.training for m in model.modules()], torch.get_rng_state()
    own = comparison._compare
    monkeypatch.setattr(comparison, "_compare", lambda block: compared.append(block) or own(block))
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            sk.fuse(model)
    assert compared == 3 * [blocks[0], blocks[1], blocks[3]]  # two towers, and another epsilon
    assert not seen and torch.get_rng_state().equal(state) and [m.training for m in model.modules()] == modes
    after = {name: (id(x), x._version, x.requires_grad, x.grad) for name, x in model.named_parameters()}
    assert after == before and all(x is buffers[name] for name, x in model.named_buffers())


def test_fuse_on_the_meta_device():
    """Such as to count operations."""
    (block,) = sk.fuse(make_block("open_clip").to("meta", torch.float32))  # fp64 asks for no autocast
    assert isinstance(block, FusedBlock)
    hidden = torch.zeros(2, 3, block.ln_1.weight.shape[0], device="meta", requires_grad=True)
    block(hidden).sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_flash_attention_is_not_compared():
    """The own forward takes half precision on a GPU alone."""
    model = make_block("hf")
    model[0].self_attn.config._attn_implementation = "flash_attention_2"
    assert isinstance(sk.fuse(model)[0], FusedBlock)
