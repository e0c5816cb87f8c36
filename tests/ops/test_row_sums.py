"""column_sums, and a fused block, which completes the partial sums of its operators by it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from skipkernels.ops.row_sums import MATRICES, column_sums
from skipkernels.testing import SLACK
from skipkernels.towers.attention import Sequences
from skipkernels.towers.fused import Hidden, RowsOptions, node
from skipkernels.towers.fused.weights import BlockSettings
from tests.ops.backends import Backend

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


@pytest.mark.parametrize("kind", ["inner", "first", "pooled"])
def test_fused_block_completes_its_sums_by_one_launch(backend: Backend, kind, monkeypatch):
    """Gradients equal those with sums that each operator completes."""
    W, n, tokens, heads = 32, 3, 5, 4
    layers = {"in_proj": (3 * W, W), "out_proj": (W, W), "mlp_in": (4 * W, W), "mlp_out": (W, 4 * W)}
    sizes = {"norm_1": (W,), "norm_2": (W,), **layers}
    sizes |= {f"{name}_bias": size[:1] for name, size in sizes.items()}
    weights = {
        name: rows(i, *size, device=backend.device).requires_grad_() for i, (name, size) in enumerate(sizes.items())
    }
    stream = rows(20, n * tokens, W, device=backend.device).requires_grad_(kind != "first")
    queries = torch.arange(0, n * tokens, tokens, device=backend.device) if kind == "pooled" else None
    attention = Sequences(n) if queries is None else Selected(Sequences(n), queries)
    settings, options = BlockSettings("gelu", {"norm_1": 1e-5, "norm_2": 1e-5}, heads), RowsOptions(attention)
    inputs, found = [x for x in (stream, *weights.values()) if x.requires_grad], []
    for together in (False, True):
        monkeypatch.setattr(node, "launches_on", lambda device, together=together: together)
        out = node.fused_block(weights, settings, Hidden(stream), options).sum()
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
