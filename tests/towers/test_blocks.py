"""Blocks of every kind when they are fused: output and every gradient are those of their own forward, also of rows."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import skipkernels as sk
from skipkernels.memory import most_saved_bytes
from skipkernels.ops import row_sums
from skipkernels.testing import relative_error, saved_bytes
from skipkernels.towers.block import FusedBlock
from skipkernels.towers.families.timm_blocks import rotary_of_tokens
from skipkernels.towers.fused import gradients as gradients_module
from skipkernels.towers.fused import node
from skipkernels.towers.rows import SDPA, Hidden, RowsOptions, Sequences, SingleQuery
from tests.ops.backends import INTERPRETED
from tests.towers.blocks import (
    BLOCKS,
    TOKENS,
    N,
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
    [
        ("no_biases", "balanced", 6),
        *(("no_biases", "fast", 10), ("no_biases", "min", 1), ("qk_norm", "fast", 13), ("swiglu", "fast", 14)),
        *(("hf", "min", 1), ("eva02", "min", 1)),  # their weights in parts are joined again in backward
    ],
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
        counted = most_saved_bytes(hidden, fused=True)
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


def test_fused_block_with_saved_tensor_hooks():
    """Saved tensors may be returned as copies, such as after an offload to the host."""
    block = fused("open_clip")
    expected = gradients(block)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        found = gradients(block)
    assert all(value.equal(expected[name]) for name, value in found.items())


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
    block = fused("perception")
    options = RowsOptions(SingleQuery(query_rows), rotary=rotary_of_tokens(rotary(block), block.attn))
    found = gradients(block, call=lambda block, hidden: block(Hidden(hidden.flatten(0, 1)), options).sum())
    assert_equal(found, gradients(block, call=partial(own_rows, query_rows=query_rows)))


def test_learned_positions_run_own_forward():
    block, hidden = fused("eva"), hidden_states()
    rope = rotary(block).double().requires_grad_()
    expected = torch.autograd.grad(make_block("eva")[0](hidden, rope=rope).sum(), rope)[0]
    assert torch.autograd.grad(block(hidden, rope=rope).sum(), rope)[0].equal(expected)


# ---- rows of a tower -------------------------------------------------------------------------------------------------

FIRST = slice(None, None, TOKENS)
each_query_rows = pytest.mark.parametrize("query_rows", [None, FIRST], ids=["all", "pooled"])


def run_rows(block, hidden, *, query_rows=None, memory="fast", backend=SDPA):
    attention = Sequences(N, backend=backend) if query_rows is None else SingleQuery(query_rows)
    return block(Hidden(hidden.flatten(0, 1)), RowsOptions(attention, memory)).sum()


def own_rows(block, hidden, *, query_rows=None):
    return run(block, hidden).flatten(0, 1)[slice(None) if query_rows is None else query_rows]


# Dtypes of weights and residual stream, and of the products, by autocast if another one, which leaves fp64 as it is;
# rounding.
DTYPES = [
    (torch.float64, torch.float64, 1e-12),
    (torch.float64, torch.bfloat16, 1e-12),
    (torch.float32, torch.float32, 1e-5),
    (torch.float32, torch.bfloat16, 2**-8),
    (torch.bfloat16, torch.bfloat16, 2**-8),
    (torch.bfloat16, torch.float16, 2**-8),
]


@pytest.mark.parametrize("memory", ["fast", "min"])
@pytest.mark.parametrize("constant", [False, True], ids=["inner", "first"])
@each_query_rows
@pytest.mark.parametrize(("dtype", "product_dtype", "rounding"), DTYPES, ids=lambda x: str(x).removeprefix("torch."))
def test_rows_no_worse_than_own_forward(dtype, product_dtype, rounding, query_rows, constant, memory):
    """Against fp64, each result is at most three times as wrong as the block's own, or a rounding."""
    own, hidden = make_block("open_clip", dtype)[0], hidden_states(dtype, constant=constant)
    block, wide = sk.fuse(nn.Sequential(copy.deepcopy(own)))[0], copy.deepcopy(own).double()
    own_forward = partial(own_rows, query_rows=query_rows)
    exact = gradients(wide, hidden.detach().double().requires_grad_(not constant), own_forward)
    with torch.autocast("cpu", product_dtype, enabled=product_dtype != dtype):
        found = gradients(block, hidden, partial(run_rows, query_rows=query_rows, memory=memory))
    # PyTorch's norm on a CPU takes no fp16 hidden states with bf16 weights: the block's own runs in bf16
    with torch.autocast("cpu", product_dtype, enabled=product_dtype != dtype != torch.bfloat16):
        expected = gradients(own, hidden, own_forward)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == dtype
        error, own_error = (relative_error(x[name], exact[name]) for x in (found, expected))
        assert error <= max(3 * own_error, rounding), name


def test_backward_repeats_no_product_that_it_does_not_read():
    """With memory="min" it repeats every product of the forward pass but the last, of W_p."""
    block, flops = fused("open_clip"), {}
    for memory in ("fast", "min", "forward"):
        with FlopCounterMode(display=False) as counter:
            out = run_rows(block, hidden_states(), memory=memory.replace("forward", "fast"))
            if memory != "forward":
                out.sum().backward()
        flops[memory] = counter.get_total_flops()
    assert flops["min"] - flops["fast"] == flops["forward"] - 2 * N * TOKENS * block.mlp.c_proj.weight.numel()


@each_query_rows
def test_rows_of_a_constant_train_one_weight(query_rows):
    block, hidden, call = fused("open_clip"), hidden_states(constant=True), partial(run_rows, query_rows=query_rows)
    everything = gradients(block, hidden, call)
    for name, parameter in block.requires_grad_(False).named_parameters():
        parameter.requires_grad_(True)
        assert_equal(gradients(block, hidden, call), {key: everything[key] for key in ("out", name)})
        parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("memory", "frozen", "expected"),
    [
        ("fast", (), ["forward", "backward"]),
        ("min", (), ["forward", "forward", "backward"]),
        ("fast", ("ln_1", "attn.in_proj"), ["forward"]),  # of a constant: nothing below attention needs a gradient
    ],
)
def test_rows_run_attention_no_more_than_needed(memory, frozen, expected):
    calls = []

    def full(*projections):
        calls.append("forward")
        out = SDPA.full(*projections)
        if out.requires_grad:
            out.register_hook(lambda d_out: calls.append("backward"))
        return out

    block, hidden = fused("open_clip"), hidden_states(constant=bool(frozen))
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen or "none"))
    run_rows(block, hidden, memory=memory, backend=SDPA._replace(full=full)).square().mean().backward()
    assert calls == expected


@pytest.mark.parametrize("backend", [INTERPRETED], indirect=True)
@pytest.mark.parametrize(("name", "query_rows"), [("swiglu", None), ("open_clip", FIRST)], ids=["all", "pooled"])
def test_block_completes_its_sums_by_one_call(backend, name, query_rows, monkeypatch):
    """One launch on a GPU: sums over rows of several operators, which their kernels leave partial."""
    block, calls = fused(name, dtype=torch.float32), []

    def column_sums(*arguments):
        calls.append(arguments)
        return row_sums.column_sums(*arguments)

    monkeypatch.setattr(gradients_module, "column_sums", column_sums)
    call = partial(run_rows, query_rows=query_rows)
    expected = gradients(block, call=call)
    assert not calls
    monkeypatch.setattr(node, "launches_on", lambda device: True)
    assert_equal(gradients(block, call=call), expected)
    assert len(calls) == 1
