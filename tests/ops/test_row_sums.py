"""column_sums, and the backward operators that leave their sums over rows to it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from skipkernels.ops.add_layer_norm import NormResults, add_layer_norm, add_layer_norm_backward
from skipkernels.ops.mlp_activation import KINDS, mlp_activation_backward
from skipkernels.ops.row_sums import MATRICES, column_sums
from skipkernels.testing import SLACK
from skipkernels.towers.attention import Sequences
from skipkernels.towers.fused import node
from skipkernels.towers.fused.records import BlockReading, BlockSettings, BlockWeights, Hidden, RowsOptions
from tests.ops.conftest import Backend

SHAPES = [(1, 1), (129, 33), (3, 64), (130, 7), (788, 70)]


def rows(
    seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, MATRICES, MATRICES + 2])
def test_column_sums_equal_fp64(backend: Backend, count, dtype):
    """Matrices of two dtypes, one of them with strided rows."""
    backend.skip_unless_supported(dtype)
    matrices = [rows(i, *SHAPES[i % len(SHAPES)], device=backend.device, dtype=dtype) for i in range(count)]
    matrices[0] = rows(9, 5, 40, device=backend.device)[:, 3:20] if dtype != torch.float64 else matrices[0]
    found = column_sums(matrices, torch.float32)
    exact = torch.cat([x.double().sum(dim=0) for x in matrices])
    size = torch.cat([x.double().abs().sum(dim=0) for x in matrices])
    assert found.dtype == torch.float32 and ((found.double() - exact).abs() <= SLACK[torch.float32] * size).all()


def test_column_sums_are_rounded_once(backend: Backend):
    x = rows(0, 300, 50, device=backend.device)
    assert torch.equal(column_sums([x], torch.float16), column_sums([x], torch.float32).half())


def test_column_sums_opcheck(backend: Backend):
    matrices = [rows(i, 5, 8, device=backend.device) for i in range(3)]
    backend.opcheck(column_sums, (matrices, torch.float16))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("need_sums", [False, True])
def test_partial_sums_of_a_norm(backend: Backend, need_sums, rms):
    hidden, d_hidden, d_normed = (rows(i, 70, 100, device=backend.device) for i in range(3))
    weight, bias = (rows(i, 100, device=backend.device) for i in (3, 4))
    _, _, mean, rstd = add_layer_norm(hidden, None, weight, bias, 1e-5, None, rms)
    arguments = d_normed, d_hidden, hidden, mean, rstd, weight, bias, True, True, True, need_sums
    whole, part = (NormResults(*add_layer_norm_backward(*arguments, each, None)) for each in (False, True))
    names = ["d_weight", "d_bias", *(["d_hidden_sum", "d_x_sum"] if need_sums else [])]
    totals = [getattr(part, name) for name in names]
    if backend.name in ("cpp", "reference"):  # complete them
        assert part.partial_sums.numel() == 0
    else:
        assert not any(x.numel() for x in totals) and len(part.partial_sums) > 1
        totals = column_sums([part.partial_sums], torch.float32).split(100)
    for name, total in zip(names, totals, strict=True):
        torch.testing.assert_close(total, getattr(whole, name), rtol=0, atol=2e-5)  # fp32 sums of 70 numbers
    assert torch.equal(part.d_x, whole.d_x) and torch.equal(part.normed, whole.normed)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_partial_sums_of_an_activation(backend: Backend, kind):
    x, bias, W = rows(0, 70, 300), rows(2, 300), 150 if kind == "swiglu" else 300
    tensors = (each.to(backend.device) for each in (rows(1, 70, W), x, bias))
    arguments = *tensors, KINDS.index(kind), True, True, True
    whole, part = (mlp_activation_backward(*arguments, each) for each in (False, True))
    if backend.name in ("cpp", "reference"):
        assert part[3].numel() == 0 and torch.equal(part[1], whole[1])
    else:
        assert part[1].numel() == 0 and len(part[3]) > 1
        torch.testing.assert_close(column_sums([part[3]], torch.float32), whole[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["inner", "first", "pooled"])
def test_fused_block_completes_its_sums_by_one_launch(backend: Backend, kind, monkeypatch):
    """Gradients equal those with sums that each operator completes."""
    W, n, tokens, heads = 32, 3, 5, 4
    sizes = ((W,), (W,), (3 * W, W), (3 * W,), (W, W), (W,), (W,), (W,), (4 * W, W), (4 * W,), (W, 4 * W), (W,))
    weights = BlockWeights(*(rows(i, *size, device=backend.device).requires_grad_() for i, size in enumerate(sizes)))
    stream = rows(20, n * tokens, W, device=backend.device).requires_grad_(kind != "first")
    queries = torch.arange(0, n * tokens, tokens, device=backend.device) if kind == "pooled" else None
    attention = Sequences(n) if queries is None else Selected(Sequences(n), queries)
    block, options = BlockReading(weights, BlockSettings("gelu", (1e-5, 1e-5), heads)), RowsOptions(attention)
    inputs, found = [x for x in (stream, *weights.named_tensors().values()) if x.requires_grad], []
    for together in (False, True):
        monkeypatch.setattr(node, "sums_together", lambda device, together=together: together)
        out = node.fused_block(block, Hidden(stream), options, torch.float32).sum()
        found.append(torch.autograd.grad(out.square().mean(), inputs))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


@dataclass
class Selected:
    """Attention of which only the query rows are returned, as of suffixes."""

    attention: Sequences
    query_rows: torch.Tensor
    separate_queries = False

    def __call__(self, packed, heads):
        return self.attention(packed, heads=heads).index_select(0, self.query_rows)
