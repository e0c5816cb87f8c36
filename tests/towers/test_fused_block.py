"""The fused block against the caller's module: output, gradients, launches and saved bytes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch

from bench import counts
from skipkernels.ops import launching
from skipkernels.testing import relative_error, saved_bytes
from skipkernels.towers.attention import SDPA, Pooled, Sequences
from skipkernels.towers.families.open_clip import OpenClipBlock
from skipkernels.towers.fused.node import fused_block
from skipkernels.towers.fused.records import Hidden, RowsOptions
from skipkernels.towers.fused.stages import SAVED_WIDTHS
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
    weights, settings = OpenClipBlock._read(block)
    with torch.autocast("cpu", product_dtype, enabled=product_dtype not in (None, hidden.dtype)):
        return fused_block(weights, settings, Hidden(hidden.flatten(0, 1)), options).sum()


def hidden_states(dtype=torch.float64, requires_grad=True):
    hidden = torch.randn(N, TOKENS, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(requires_grad)


# Dtypes of weights and residual stream, and of products: the same, or another one as under autocast.
DTYPES = [
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
    block, hidden = make_block(dtype, ls_init_value=layer_scale), hidden_states(dtype, not constant)
    exact, exact_hidden = copy.deepcopy(block).double(), hidden.detach().double().requires_grad_(not constant)
    rows = torch.arange(N) * TOKENS if pool else None
    expected = exact(exact_hidden).flatten(0, 1)
    expected = expected if rows is None else expected[rows]
    out = run_fused(block, hidden, memory, rows, product_dtype)
    tolerance = TOLERANCE[dtype if product_dtype == dtype else torch.bfloat16]
    assert out.dtype == dtype and relative_error(out, expected) < tolerance
    truth = gradients(expected, exact, exact_hidden)
    for name, gradient in gradients(out, block, hidden).items():
        assert gradient.dtype == dtype
        assert relative_error(gradient, truth[name]) < tolerance, name


@pytest.mark.parametrize("product_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_block_separate_projections(product_dtype):
    """Separate projections of query, key and value, as in Hugging Face's models, give the bits of a joined one."""
    block, hidden = make_block(torch.float32), hidden_states(torch.float32)
    joint, settings = OpenClipBlock._read(block)
    parts = [x.detach().chunk(3) for x in (joint.in_proj, joint.in_proj_bias)]
    parts = [tuple(part.requires_grad_() for part in x) for x in parts]
    separate = replace(joint, in_proj=parts[0], in_proj_bias=parts[1])
    for memory in ("fast", "min"):
        found = []
        for each in (joint, separate):
            options = RowsOptions(ATTENTION, memory)
            rows = Hidden(hidden.flatten(0, 1))
            with torch.autocast("cpu", enabled=product_dtype is not None):
                out = fused_block(each, settings, rows, options).sum()
            found.append(torch.autograd.grad(out.square().sum(), [hidden, *each.named_tensors().values()]))
        joined = [*found[1][:3], torch.cat(found[1][3:6]), torch.cat(found[1][6:9]), *found[1][9:]]
        assert all(a.equal(b) for a, b in zip(found[0], joined, strict=True))


@dataclass
class NoLaunch:
    """Attention that launches nothing, and returns the query rows."""

    query_rows: torch.Tensor | None
    separate_queries = False

    def __call__(self, packed, heads):
        return _NoLaunch.apply(packed, N if self.query_rows is not None else len(packed))


class _NoLaunch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, rows):
        ctx.shape = packed.shape
        return packed.new_empty(rows, W)

    @staticmethod
    def backward(ctx, upstream):
        return upstream.new_empty(ctx.shape), None


# Kernels of the forward and backward pass of a block on a GPU, without those of attention. Autocast adds one that casts
# all weights, and one that narrows a gradient for the last.
LAUNCHES = {
    ("inner", torch.float32): (7, 12),
    ("inner", torch.bfloat16): (8, 12),
    ("first", torch.float32): (7, 12),
    ("first", torch.bfloat16): (8, 12),
    ("last", torch.float32): (8, 13),
    ("last", torch.bfloat16): (9, 14),
}


@pytest.mark.skipif(not launching.installed, reason="Triton is not installed")
@pytest.mark.parametrize(("kind", "product_dtype"), LAUNCHES, ids=lambda x: str(x).removeprefix("torch."))
def test_fused_block_launches(kind, product_dtype, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)  # "meta" has no autocast
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: product_dtype)
    block = make_block(torch.float32).to("meta")
    weights, settings = OpenClipBlock._read(block)
    stream = torch.empty(N * TOKENS, W, device="meta", requires_grad=kind != "first")
    branch = None if kind == "first" else stream.detach().to(product_dtype).requires_grad_()
    hidden, inputs = (
        Hidden(stream, branch),
        [x for x in (stream, branch, *weights.named_tensors().values()) if x is not None and x.requires_grad],
    )
    rows = torch.empty(N, dtype=torch.int64, device="meta") if kind == "last" else None
    options = RowsOptions(NoLaunch(rows))
    found = []
    for _ in range(2):  # the first call also tests what the device can do
        results = []
        found = [counts.counts_of(lambda out=results: out.extend(fused_block(weights, settings, hidden, options)))]
        upstream = [torch.empty_like(x) for x in results]
        found.append(counts.counts_of(lambda out=results, up=upstream: torch.autograd.grad(out, inputs, up)))
    assert tuple(count["launches"] for count in found) == LAUNCHES[kind, product_dtype]


@pytest.mark.parametrize("pool", [False, True], ids=["all", "pooled"])
@pytest.mark.parametrize("frozen", ["ln_1", "attn.in_proj_weight", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"])
@pytest.mark.parametrize("constant", [False, True], ids=["inner", "first"])
def test_fused_block_computes_needed_gradients_only(frozen, pool, constant):
    block, hidden = make_block(), hidden_states(requires_grad=not constant)
    rows = torch.arange(N) * TOKENS if pool else None
    everything = gradients(run_fused(block, hidden, query_rows=rows), block, hidden)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    out = run_fused(block, hidden, query_rows=rows)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out.backward(upstream)
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, everything[name], rtol=1e-12, atol=1e-12)


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
    weights, settings = OpenClipBlock._read(block)
    fused_block(weights, settings, Hidden(hidden.flatten(0, 1)), options).sum().square().mean().backward()
    assert calls == expected


def test_fused_block_saved_bytes():
    block, hidden = make_block(), hidden_states()
    width = hidden.numel() * hidden.element_size()
    small = 2 * N * TOKENS * 8 * (2 + block.attn.num_heads)  # statistics of the norms, log-sum-exp
    assert saved_bytes(lambda: run_fused(block, hidden)) <= SAVED_WIDTHS * width + small
    assert saved_bytes(lambda: run_fused(block, hidden, "min")) == width


def test_fused_block_with_saved_tensor_hooks():
    """Saved tensors may be returned as copies, such as after an offload to the host."""
    block, hidden = make_block(), hidden_states()
    expected = gradients(run_fused(block, hidden), block, hidden)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        out = run_fused(block, hidden)
    for name, gradient in gradients(out, block, hidden).items():
        assert gradient.equal(expected[name]), name
