"""The fused block on rows: pooled queries, a constant input, dtypes of weights and products, runs of attention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from skipkernels.testing import relative_error
from skipkernels.towers.attention import SDPA, Pooled, Sequences
from skipkernels.towers.families.open_clip import OpenClipBlock
from skipkernels.towers.fused import Hidden, RowsOptions
from skipkernels.towers.fused.node import fused_block
from tests.models import tiny_clip

N, TOKENS, W = 3, 5, 24

# fp64: two orders of summation. fp32: the same, 2^29 times larger. bf16: the error of the caller's module against fp64
# is 1e-2 for the smallest gradients, from a few roundings to 8 bits; that of the fused block may be as large.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 4e-2}


def make_block(dtype=torch.float64, **vision):
    return tiny_clip(dtype, vision=vision).visual.transformer.resblocks[0].requires_grad_(True)


def gradients(out, block, hidden):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    named = dict(block.named_parameters()) | ({"hidden": hidden} if hidden.requires_grad else {})
    found = torch.autograd.grad(out, list(named.values()), upstream)
    return dict(zip(named, found, strict=True))


ATTENTION = Sequences(N)


def run_fused(block, hidden, memory="fast", query_rows=None, product_dtype=None):
    options = RowsOptions(ATTENTION if query_rows is None else Pooled(query_rows), memory)
    weights, settings = OpenClipBlock.read_weights(block)
    with torch.autocast("cpu", product_dtype, enabled=product_dtype not in (None, hidden.dtype)):
        return fused_block(weights, settings, Hidden(hidden.flatten(0, 1)), options).sum()


def hidden_states(dtype=torch.float64, *, requires_grad=True):
    hidden = torch.randn(N, TOKENS, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(requires_grad)


# Dtypes of weights and residual stream, and of autocast: the same, or another one. Autocast leaves fp64 as it is.
DTYPES = [
    (torch.float64, torch.bfloat16),
    *((dtype, dtype) for dtype in TOLERANCE),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]


@pytest.mark.parametrize("memory", ["fast", "min"])
@pytest.mark.parametrize("constant", [False, True], ids=["inner", "first"])
@pytest.mark.parametrize("pool", [False, True], ids=["all", "pooled"])
@pytest.mark.parametrize("layer_scale", [None, 0.3], ids=["plain", "layer_scale"])
@pytest.mark.parametrize(("dtype", "product_dtype"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_fused_block_equals_callers_module(dtype, product_dtype, layer_scale, pool, constant, memory):
    block, hidden = make_block(dtype, ls_init_value=layer_scale), hidden_states(dtype, requires_grad=not constant)
    exact, exact_hidden = copy.deepcopy(block).double(), hidden.detach().double().requires_grad_(not constant)
    rows = torch.arange(N) * TOKENS if pool else None
    expected = exact(exact_hidden).flatten(0, 1)
    expected = expected if rows is None else expected[rows]
    out = run_fused(block, hidden, memory, rows, product_dtype)
    tolerance = TOLERANCE[dtype if dtype in (product_dtype, torch.float64) else torch.bfloat16]
    assert out.dtype == dtype and relative_error(out, expected) < tolerance
    truth = gradients(expected, exact, exact_hidden)
    for name, gradient in gradients(out, block, hidden).items():
        assert gradient.dtype == dtype
        assert relative_error(gradient, truth[name]) < tolerance, name


def test_backward_repeats_no_product_that_it_does_not_read():
    """With memory="min" it repeats every product of the forward pass but the last, of W_p."""
    block, flops = make_block(), {}
    for memory in ("fast", "min", "forward"):
        with FlopCounterMode(display=False) as counter:
            out = run_fused(block, hidden_states(), memory.replace("forward", "fast"))
            if memory != "forward":
                out.sum().backward()
        flops[memory] = counter.get_total_flops()
    assert flops["min"] - flops["fast"] == flops["forward"] - 2 * N * TOKENS * block.mlp.c_proj.weight.numel()


@pytest.mark.parametrize("pool", [False, True], ids=["all", "pooled"])
def test_fused_block_of_a_constant_trains_one_weight(pool):
    block, hidden, rows = make_block(), hidden_states(requires_grad=False), torch.arange(N) * TOKENS if pool else None
    everything = gradients(run_fused(block, hidden, query_rows=rows), block, hidden)
    for name, parameter in block.requires_grad_(False).named_parameters():
        parameter.requires_grad_(True)
        out = run_fused(block, hidden, query_rows=rows)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        torch.testing.assert_close(torch.autograd.grad(out, parameter, upstream)[0], everything[name])
        parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("memory", "frozen", "expected"),
    [
        ("fast", (), ["forward", "backward"]),
        ("min", (), ["forward", "forward", "backward"]),
        ("fast", ("ln_1", "attn.in_proj"), ["forward"]),  # of a constant: nothing below attention needs a gradient
    ],
)
def test_fused_block_runs_attention_no_more_than_needed(memory, frozen, expected):
    calls = []

    def full(*projections):
        calls.append("forward")
        out = SDPA.full(*projections)
        if out.requires_grad:
            out.register_hook(lambda d_out: calls.append("backward"))
        return out

    block, hidden = make_block(), hidden_states(requires_grad=not frozen)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen or "none"))
    options = RowsOptions(Sequences(N, backend=SDPA._replace(full=full)), memory)
    weights, settings = OpenClipBlock.read_weights(block)
    fused_block(weights, settings, Hidden(hidden.flatten(0, 1)), options).sum().square().mean().backward()
    assert calls == expected


def test_fused_block_with_saved_tensor_hooks():
    """Saved tensors may be returned as copies, such as after an offload to the host."""
    block, hidden = make_block(), hidden_states()
    expected = gradients(run_fused(block, hidden), block, hidden)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        out = run_fused(block, hidden)
    for name, gradient in gradients(out, block, hidden).items():
        assert gradient.equal(expected[name]), name
