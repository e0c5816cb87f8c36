"""bench.gpu_model, "Estimated" in docs/gpu.md: the launches of a step, and times that follow the assumptions."""

from __future__ import annotations

import pytest
import torch

from bench import counts, gpu_model, recording, tables


def test_two_committed_tables_have_the_same_launches():
    counted = {
        row.precision: row.launches
        for row in tables.read(counts.TABLE, counts.Row)
        if (row.model, row.B, row.C, row.memory) == (gpu_model.MODEL, 4, 1000, "fast")
    }
    rows = [row for row in tables.read(gpu_model.TABLE, gpu_model.Row) if (row.B, row.C) == (4, 1000)]
    assert counted and counted == {row.precision: row.launches for row in rows}


def test_steps_are_recorded(monkeypatch):
    monkeypatch.setattr(gpu_model, "MODEL", "vit-tiny")
    monkeypatch.setattr(gpu_model, "SKIP_LAYERS", 3)
    ours, without_casts = (gpu_model.launches_of_ours(4, 20, precision) for precision in ("bf16", "fp32"))
    published = gpu_model.launches_of_published(4, 20, "bf16")
    update, update_fp32 = (next(x for x in step if x.name == "_sgd_momentum_kernel") for step in (ours, without_casts))
    weights, rest = divmod(update_fp32.nbytes, 5 * 4)
    assert update.triton and rest == 0, "weight and buffer read and written, gradient read; fp32"
    assert 0 < update.nbytes - update_fp32.nbytes < 2 * weights, "casts of the matrices"
    assert "_foreach_copy_" not in {launch.name for launch in ours}
    products = [launch for launch in ours if launch.name in ("mm", "addmm", "bmm")]  # also those into a given tensor
    assert products and all(launch.shape for launch in products)
    assert all(launch.dtype == torch.bfloat16 for launch in products if launch.flops > 1e6)
    assert len(published) > len(ours) and not any(launch.triton for launch in published)
    assert gpu_model.floor(ours) < gpu_model.graph(ours) <= gpu_model.eager(ours)


def test_times_follow_the_assumptions():
    launch = recording.Launch("one", True, int(gpu_model.BANDWIDTH), 0, torch.float32, None)
    few = launch._replace(warps=gpu_model.PROCESSORS * gpu_model.WARPS // 2)
    assert gpu_model.graph([launch, few]) == pytest.approx(1 + 2 + 2 * (gpu_model.START + gpu_model.GAP))
    assert gpu_model.floor([launch, few]) == pytest.approx(2)


def test_bytes_of_views():
    """Parts of a tensor add up; views of the same elements count once, as do views that overlap in all."""
    x = torch.empty(4, 8, device="meta")
    assert recording.bytes_of((x[:1], x[1:])) == recording.bytes_of(x) == 4 * 8 * 4
    assert recording.bytes_of((x[:1], x[:1])) == 8 * 4
    assert recording.bytes_of((x, x.T)) == recording.bytes_of(x)
