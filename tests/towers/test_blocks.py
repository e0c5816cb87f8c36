"""Blocks of every kind when they are fused: output and every gradient are those of their own forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipkernels as sk
from skipkernels.testing import relative_error, saved_bytes
from skipkernels.towers import fused as fused_package
from skipkernels.towers.attention import Pooled
from skipkernels.towers.block import FusedBlock
from skipkernels.towers.families.timm_blocks import rotary_of_tokens
from skipkernels.towers.fused import Hidden, RowsOptions
from tests.towers.blocks import (
    BLOCKS,
    TOKENS,
    assert_equal,
    assert_equals_own_forward,
    gradients,
    hidden_states,
    make_block,
    rotary,
    run,
)


def fused(name: str, memory: str = "fast", dtype: torch.dtype | None = None) -> nn.Module:
    return sk.fuse(make_block(name, dtype), memory=memory)[0]


@pytest.mark.parametrize("memory", ["fast", "balanced", "min"])
@pytest.mark.parametrize("name", BLOCKS)
def test_fused_block_equals_own_forward(name, memory):
    block = fused(name, memory)
    assert isinstance(block, FusedBlock) and block.why_not_fused() is None
    assert_equals_own_forward(block)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "openai"])  # its norms compute in fp32
def test_fused_block_no_worse_than_own_forward_in_bf16(name):
    """Against fp64, each result is at most three times as wrong as the block's own under autocast, or a rounding."""
    exact = gradients(make_block(name)[0])
    errors = []
    for block in (make_block(name, torch.float32)[0], fused(name, dtype=torch.float32)):
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(block)
        errors.append({key: relative_error(value, exact[key]) for key, value in found.items()})
    for key, error in errors[1].items():
        assert error <= max(3 * errors[0][key], 2**-8), key


@pytest.mark.parametrize(
    ("name", "memory", "widths"),
    [("no_biases", "fast", 10), ("no_biases", "min", 1), ("qk_norm", "fast", 13), ("swiglu", "fast", 14)],
)
def test_fused_block_saved_widths(name, memory, widths):
    """Multiples of W per token, as in the table of `stages.py`; statistics of norms and attention are less than one."""
    block, hidden = fused(name, memory), hidden_states()
    assert saved_bytes(lambda: block(hidden)) // hidden.nbytes == widths


@pytest.mark.parametrize("autocast", [False, True])
def test_saved_bytes_that_auto_counts(autocast):
    """With norms of heads, up to statistics of rows, which are about a tenth at this width."""
    block, hidden = fused("qk_norm", dtype=torch.float32), hidden_states(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        counted = fused_package.most_saved_bytes(hidden, fused=True)
        assert counted <= saved_bytes(lambda: block(hidden)) < 1.15 * counted


@pytest.mark.parametrize("name", ["half_and_norm", "eva02", "no_biases"])
def test_fused_block_computes_needed_gradients_only(name):
    everything = gradients(fused(name))
    for frozen, _ in make_block(name)[0].named_parameters():
        block = fused(name)
        block.get_parameter(frozen).requires_grad_(False)
        assert_equal(gradients(block), {key: value for key, value in everything.items() if key != frozen})


@pytest.mark.parametrize("name", ["open_clip", "half_and_norm", "eva02"])
@pytest.mark.parametrize("memory", ["fast", "min"])
def test_fused_block_backward_twice(name, memory):
    block, hidden = fused(name, memory), hidden_states()
    out = run(block, hidden).sum()
    inputs = [hidden, *block.parameters()]
    first, second = torch.autograd.grad(out, inputs, retain_graph=True), torch.autograd.grad(out, inputs)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_rotation_saves_nothing():
    block, hidden = fused("perception"), hidden_states()
    saved = [saved_bytes(lambda rope=rope: block(hidden, rope=rope)) for rope in (None, rotary(block))]
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    "query_rows",
    [slice(None, None, TOKENS), slice(2, None, TOKENS), torch.tensor([4, TOKENS, 2 * TOKENS + 2])],
    ids=["first", "third", "any"],
)
def test_pooled_queries_are_rotated_by_their_positions(query_rows):
    block, hidden = fused("perception"), hidden_states()
    options = RowsOptions(Pooled(query_rows), rotary=rotary_of_tokens(rotary(block), block.attn))
    pooled = block(Hidden(hidden.flatten(0, 1)), options).sum()
    expected = run(block, hidden).flatten(0, 1)[query_rows]
    found, truth = (
        {"out": out, "d_hidden": torch.autograd.grad(out.square().sum(), hidden)[0]} for out in (pooled, expected)
    )
    assert_equal(found, truth)


def test_learned_positions_run_own_forward():
    block, hidden = fused("eva"), hidden_states()
    rope = rotary(block).double().requires_grad_()
    expected = torch.autograd.grad(make_block("eva")[0](hidden, rope=rope).sum(), rope)[0]
    assert torch.autograd.grad(block(hidden, rope=rope).sum(), rope)[0].equal(expected)
